"""Speech recognition from LibriSpeech: read English, to be written down.

    python -m corpora.librispeech --librispeech data/LibriSpeech --out data/asr [--download]

LibriSpeech (Panayotov et al. 2015, CC BY 4.0) is resource SLR12 of OpenSLR. By default this takes
train-clean-100 (6.3 GB to download, 28,539 recordings), dev-clean (337 MB, 2,703) and test-clean
(346 MB, 2,620); unpacked, they are

    LibriSpeech/
        train-clean-100/                    subset
            103/1240/                       speaker/chapter
                103-1240.trans.txt          lines "103-1240-0000 WORDS IN CAPITALS"
                103-1240-0000.flac          16 kHz mono

--librispeech names this folder or the one it is in. --download fetches what is not there, with
torchaudio, which takes a subset's folder for the whole subset: remove one that was only half
unpacked. Rows point to the FLAC files by absolute path: nothing is copied, and moving them means
building again.

Transcripts are published in capitals, A-Z and the apostrophe. Here they are in lower case, as
reference and as transcript: that is how the other corpora's text and a pretrained decoder's tokens
mostly look, and the reward tells capitals from small letters. A split of several subsets gets their
names as `group`, so that they are reported apart. Rows are shuffled, for train.py may evaluate on
the first ones only, and those would be one reader's.

Recordings that are missing are left out and counted. No subset has gaps: it was not unpacked to the
end. A few recordings last more than 30 s; train.py takes them with --max-audio-seconds 36.
"""

import argparse
import tarfile
from pathlib import Path

from tqdm import tqdm

from corpora import AUDIO, SPLITS, Odd, locate, new_corpus, refuse, shuffled, text_of

PROMPT = AUDIO + "Write down what is said."
SUBSETS = (
    "train-clean-100",
    "train-clean-360",
    "train-other-500",
    "dev-clean",
    "dev-other",
    "test-clean",
    "test-other",
)
DEFAULTS = {"train": "train-clean-100", "validation": "dev-clean", "test": "test-clean"}


def download(folder, subsets):
    """Fetch and unpack the subsets that are not there yet, so that `locate` finds them."""
    # Imported only here: torchaudio needs its own match with torch.
    try:
        from torchaudio.datasets import LIBRISPEECH
    except (ImportError, OSError, RuntimeError) as error:
        trouble = f"--download needs torchaudio, which does not load here ({error})"
        refuse(f"{trouble}; fix: pip install -r requirements.txt")
    root = folder.parent if folder.name == "LibriSpeech" else folder
    root.mkdir(parents=True, exist_ok=True)
    for subset in subsets:
        print(f"{subset}: looking in {root}, else downloading")
        try:
            LIBRISPEECH(str(root), url=subset, download=True)
        except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
            trouble = f"{subset} could not be downloaded to {root} ({error})"
            refuse(f"{trouble}; remove what there is of it and try again")


def read_subset(folder, corpus):
    """[(audio file, words)] of a subset, in the order of the file names."""
    spoken = []
    files = sorted(folder.glob("*/*/*.trans.txt"))
    for file in tqdm(files, folder.name, unit="chapter", leave=False, disable=None):
        chapter = file.name.removesuffix(".trans.txt")
        lines = file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        for number, line in enumerate(lines, start=1):
            with corpus.row(f"{file.name}, line {number}"):
                name, _, words = line.strip().partition(" ")
                if "-".join(name.split("-")[:2]) != chapter:
                    raise Odd("no recording's name", line[:80])
                audio = file.with_name(f"{name}.flac")
                words = text_of(words, "words").lower()
                if not audio.is_file():
                    raise Odd("recording missing", audio)
                spoken.append((audio, words))
    if not files:
        refuse(f"{folder}: expected SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt in it, found none")
    return spoken


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m corpora.librispeech",
        description=__doc__.splitlines()[0],
        epilog=f"Subsets: {', '.join(SUBSETS)}.",
    )
    add = parser.add_argument
    recordings = "folder LibriSpeech, or the one it is in"
    add("--out", type=Path, required=True, help="folder to make")
    add("--librispeech", type=Path, required=True, help=recordings)
    add("--download", action="store_true", help="fetch the subsets that are not there")
    for split in SPLITS:
        add(
            f"--{split}",
            nargs="+",
            choices=SUBSETS,
            metavar="SUBSET",
            default=[DEFAULTS[split]],
            help=f"one or more (default {DEFAULTS[split]})",
        )
    args = parser.parse_args(arguments)
    chosen = [subset for split in SPLITS for subset in getattr(args, split)]
    if len(set(chosen)) < len(chosen):
        refuse(f"a subset is named twice: {', '.join(chosen)}")
    with new_corpus(args.out) as corpus:
        if args.download:
            download(args.librispeech, chosen)
        folder = locate(args.librispeech, "LibriSpeech", chosen)
        for split in SPLITS:
            subsets = getattr(args, split)
            part = []
            for subset in subsets:
                group = {"group": subset} if len(subsets) > 1 else {}
                for audio, words in read_subset(folder / subset, corpus):
                    row = {"audio": str(audio), "prompt": PROMPT, "reference": words}
                    part.append({**row, "transcript": words, **group})
            corpus.rows[split] = shuffled(part)


if __name__ == "__main__":
    main()
