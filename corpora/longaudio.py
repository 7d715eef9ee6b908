r"""Spoken question answering from NVIDIA's LongAudio: free-form questions about dialogues
(DailyTalk) and about speeches in the European Parliament (Europarl-ST, VoxPopuli).

    python -m corpora.longaudio --longaudio data/LongAudio --dailytalk data/dailytalk \
        --out data/dailytalk-qa
    python -m corpora.longaudio --longaudio data/LongAudio --europarl-st data/v1.1 \
        --voxpopuli data/voxpopuli --out data/longaudio-qa

The first is the LEAF paper's DailyTalk benchmark, the second its LongAudio. Where recordings of
several publishers are named, rows get the name as `group`, so that they are reported apart.

Get the questions from the dataset nvidia/LongAudio on Hugging Face (Goel et al. 2025; licence on
its card); only the files of the recordings that are named are needed. Each is one JSON list of
objects with id, duration (seconds), conversations ([{"from": "human" or "gpt", "value": TEXT}])
and sound, a name or a list of names.

    hf download nvidia/LongAudio longaudio_xl/DailyTalk_LongAudio.json --repo-type dataset \
        --local-dir data/LongAudio

    LongAudio/longaudio_xl/
        DailyTalk_LongAudio.json            45,951 questions
        Europarl_LongAudio.json             56,054
        VoxPopuli_LongAudio.json            81,952

The recordings come from their publishers. Any option names the folder shown or the one it is in.

    dailytalk/data/                         DailyTalk (Lee et al. 2022, CC BY-SA 4.0), from
        0/0_0_d0.wav                        https://drive.google.com/drive/folders/
        0/1_1_d0.wav                        1WRt-EprWs-2rmYxoWYT9_13omlhDHcaL, unpacked. The sound
                                            0.wav is dialogue 0, its turns joined.

    v1.1/en/audios/                         Europarl-ST (Iranzo-Sanchez et al. 2020, CC BY-NC 4.0):
        en.20080925.16.4-121.flac           https://www.mllp.upv.es/europarl-st/v1.1.tar.gz, 20 GB.
                                            The sound en.20080925.16.4-121_7.11_11.58.wav is cut
                                            from it, from 7.11 s to 11.58 s.

    voxpopuli/                              VoxPopuli (Wang et al. 2021, CC0), laid out as by the
        raw_audios/en/2017/                 scripts of facebookresearch/voxpopuli. Below
            20171116-0900-PLENARY-5_en.ogg  https://dl.fbaipublicfiles.com/voxpopuli it is
        transcribed_data/en/                audios/en_2009.tar to en_2020.tar, 5 to 10 GB each, and
            asr_en.tsv.gz                   annotations/asr/asr_en.tsv.gz. The sound
                                            en/2017/20171116-0900-PLENARY-5-en_20171116-10:38:16_0
                                            .wav is cut from the session as the line that is called
                                            so (session_id, id_) says (vad: starts and ends, in
                                            seconds).

libsndfile reads WAV and OGG, but not the M4A that Europarl-ST consists of. Convert it once:

    cd data/v1.1/en/audios
    for f in *.m4a; do ffmpeg -i "$f" -ac 1 -ar 16000 "${f%.m4a}.flac"; done

As in LEAF's official code (Grimoid/LEAF, commit c7623e3, scripts/data_prep/prepare_*_longaudio.py)
recordings up to 40 s are taken, the first question and answer of a conversation, and a hash of the
id decides the split, 80, 10 and 10%; other questions about a recording may be in other splits.
Multiple choice is left out, as theirs is for Europarl-ST and VoxPopuli; for DailyTalk their README
says so, their script does not. By their notes about 7,181 rows of Europarl-ST and 9,607 of
VoxPopuli are left, and of DailyTalk 35,881 with multiple choice. All that is left out is counted:
compare before you compare scores.

The prompt is the question as published, with the recording where <sound> stands; there is no
transcript. The recordings are written as FLAC at their own rate; train.py takes them with
--max-audio-seconds 40. Rows are shuffled, for train.py may evaluate on the first ones only.
"""

import argparse
import ast
import functools
import gzip
import hashlib
import re
import zlib
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from corpora import (
    AUDIO,
    SPLITS,
    Odd,
    locate,
    new_corpus,
    read_items,
    read_table,
    refuse,
    shuffled,
    text_of,
)

MAX_SECONDS = 40

# --------------------------------------------------------------------------------------------------
# Where a sound is: [(audio file, start, end)], in seconds; the end None is the file's


def dailytalk_parts(folder, sound, annotations):
    """The utterances of a dialogue, TURN_SPEAKER_dDIALOGUE.wav, in the order of the turns."""
    dialogue = folder / "data" / Path(sound).stem
    turns = sorted(dialogue.glob("*.wav"), key=lambda file: int(file.name.split("_")[0]))
    if not turns:
        raise Odd("recording missing", dialogue)
    return [(file, 0.0, None) for file in turns]


def europarl_parts(folder, sound, annotations):
    """A stretch of a speech: SPEECH_START_END.wav."""
    speech, start, end = sound.removesuffix(".wav").rsplit("_", 2)
    files = [folder / "en" / "audios" / f"{speech}{kind}" for kind in (".flac", ".wav", ".m4a")]
    file = next((file for file in files if file.is_file()), files[0])
    if file.suffix == ".m4a":
        raise Odd("M4A, to be converted as corpora/longaudio.py says", file)
    return [(file, float(start), float(end))]


def voxpopuli_parts(folder, sound, annotations):
    """The stretches of a paragraph, FOLDERS/SESSION-en_WHEN_NUMBER.wav, that hold speech."""
    name = Path(sound).stem
    if name not in annotations:
        raise Odd("recording not in asr_en.tsv.gz", name)
    session = name.split("-en_")[0]
    file = folder / "raw_audios" / "en" / session[:4] / f"{session}_en.ogg"
    return [(file, start, end) for start, end in ast.literal_eval(annotations[name])]


def read_annotations(folder, corpus):
    """{paragraph: its stretches, as text}, from VoxPopuli's table."""
    file = folder / "transcribed_data" / "en" / "asr_en.tsv.gz"
    try:
        with gzip.open(file, "rt", encoding="utf-8", errors="replace", newline="\n") as lines:
            table = read_table(file, lines, ("session_id", "id_", "vad"), corpus, delimiter="|")
            bar = tqdm(table, file.name, unit="line", leave=False, disable=None)
            return {f"{session}-{paragraph}": vad for session, paragraph, vad in bar}
    except (OSError, EOFError, zlib.error) as error:
        refuse(f"{file} cannot be read ({error}); download it again")


# option: questions, usual name of the publisher's folder, what is in it, where a sound is
SOURCES = {
    "dailytalk": ("DailyTalk_LongAudio.json", "dailytalk", ("data",), dailytalk_parts),
    "europarl-st": ("Europarl_LongAudio.json", "v1.1", ("en",), europarl_parts),
    "voxpopuli": (
        "VoxPopuli_LongAudio.json",
        "voxpopuli",
        ("raw_audios", "transcribed_data"),
        voxpopuli_parts,
    ),
}

# --------------------------------------------------------------------------------------------------
# Rows


def read_parts(parts):
    """(samples,) float32 of the parts, one after the other, and their rate in Hz."""
    pieces = []
    rates = set()
    for file, start, end in parts:
        if not file.is_file():
            raise Odd("recording missing", file)
        with soundfile.SoundFile(file) as audio:
            rates.add(audio.samplerate)
            first = int(start * audio.samplerate)
            last = audio.frames if end is None else int(end * audio.samplerate)
            audio.seek(first)  # in an OGG's last page off by some 10 ms (libsndfile issue 885)
            samples = audio.read(max(0, last - first), dtype="float32", always_2d=True)
            pieces.append(samples.mean(1))
    if not any(map(len, pieces)):
        raise Odd("recording empty")
    if len(rates) > 1:
        raise Odd("parts of different rates", rates)
    return np.concatenate(pieces), rates.pop()


def split_of(item):
    """The split that the official code puts a question in."""
    digest = hashlib.md5(str(item["id"]).encode()).hexdigest()
    place = int(digest[:8], 16) / 16**8
    if place < 0.1:
        return "test"
    return "validation" if place < 0.2 else "train"


def to_row(item):
    """Prompt and reference of a question; Odd where it is not wanted."""
    if float(item["duration"]) > MAX_SECONDS:
        raise Odd(f"longer than {MAX_SECONDS} s")
    said = {turn["from"]: turn["value"] for turn in reversed(item["conversations"])}  # the first
    prompt = text_of(said.get("human"), "question").replace("<sound>", AUDIO)
    reference = text_of(said.get("gpt"), "answer")
    if prompt.count(AUDIO) != 1:
        raise Odd("question without exactly one <sound>")
    if re.search("Choose the correct (option|answer)", prompt) or reference.startswith("("):
        raise Odd("multiple choice")
    return {"prompt": prompt, "reference": reference}


def add_rows(corpus, file, parts_of, group):
    """The rows of a LongAudio file. parts_of(sound) says where the recording is."""
    made = {}  # {sounds: audio file}; many questions are about the same recording
    name = file.name.split("_")[0].lower()
    bar = tqdm(read_items(file), name, unit="row", leave=False, disable=None)
    for number, item in enumerate(bar, start=1):
        with corpus.row(f"{file.name}, item {number}"):
            split = split_of(item)
            row = to_row(item)
            sounds = item["sound"] if isinstance(item["sound"], list) else [item["sound"]]
            key = tuple(sounds)
            if key not in made:
                samples, rate = read_parts([part for sound in sounds for part in parts_of(sound)])
                if len(samples) > MAX_SECONDS * rate:
                    raise Odd(f"longer than {MAX_SECONDS} s")
                audio = f"audio/{name}-{len(made):05d}.flac"
                corpus.write_flac(audio, samples, rate)
                made[key] = audio
            corpus.rows[split].append({"audio": made[key], **row, **group})


def main(arguments=None):
    summary = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m corpora.longaudio", description=summary)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to make")
    add("--longaudio", type=Path, required=True, help="folder with the questions, *_LongAudio.json")
    add("--dailytalk", type=Path, help="folder with data/DIALOGUE/*.wav")
    add("--europarl-st", type=Path, help="folder with en/audios/*.flac")
    add("--voxpopuli", type=Path, help="folder with raw_audios and transcribed_data")
    args = parser.parse_args(arguments)
    named = {name: getattr(args, name.replace("-", "_")) for name in SOURCES}
    folders = {
        name: locate(folder, *SOURCES[name][1:3]) for name, folder in named.items() if folder
    }
    if not folders:
        refuse(f"nothing to hear: give one or more of --{', --'.join(SOURCES)}")
    with new_corpus(args.out) as corpus:
        files = [SOURCES[name][0] for name in folders]
        questions = locate(args.longaudio, "longaudio_xl", files)
        (corpus.folder / "audio").mkdir()
        for name, folder in folders.items():
            file, _, _, parts_of = SOURCES[name]
            annotations = read_annotations(folder, corpus) if name == "voxpopuli" else {}
            group = {"group": name} if len(folders) > 1 else {}
            parts = functools.partial(parts_of, folder, annotations=annotations)
            add_rows(corpus, questions / file, parts, group)
        corpus.rows = {split: shuffled(corpus.rows[split]) for split in SPLITS}


if __name__ == "__main__":
    main()
