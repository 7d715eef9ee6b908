"""The scripts of corpora/, on made-up files in the publishers' layouts, and synthetic speech."""

import collections
import errno
import gzip
import hashlib
import itertools
import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import data
from corpora import (
    SPLITS,
    asterisk,
    covost2,
    librispeech,
    librisqa,
    load,
    longaudio,
    new_corpus,
    synthetic,
)
from data import AUDIO
from tests.helpers import read_json_lines, same, seeded, write_tone

__all__ = ["seeded"]  # a fixture that every test here uses


# --------------------------------------------------------------------------------------------------
# asterisk


def make_packages(root):
    """A made-up tree in the packages' layout: each recording a short sine burst of its own
    pitch, 30 sentences each."""
    rng = np.random.default_rng(0)

    def burst(path, seconds):
        path.parent.mkdir(parents=True, exist_ok=True)
        time = np.arange(int(8000 * seconds)) / 8000
        tone = 0.3 * np.sin(2 * np.pi * rng.uniform(200, 3000) * time).astype(np.float32)
        soundfile.write(path, np.pad(tone, 400), 8000, subtype="PCM_16")

    for language, voice in asterisk.VOICES.items():
        for name in asterisk.LEXICON[language]:
            burst(root / "sounds" / voice / f"{name}.wav", rng.uniform(0.1, 0.3))
        if language not in asterisk.TRANSCRIBED:
            continue
        lines = [
            "; a comment",
            "digits/1: one",
            "beep: [a tone]",
            "vm-none:",
            "unrecorded: Nobody said this.",
            "vm-broken: Nobody can hear this.",
            "vm-0: Not \udcff in UTF-8.",
        ]
        (root / "sounds" / voice / "vm-broken.wav").write_bytes(b"RIFF")
        for i in range(30):
            burst(root / "sounds" / voice / f"vm-{i}.wav", 0.6)
            first, last = divmod(i, 6)
            lines.append(f"vm-{i}: Sentence{'abcdef'[first]} number{'uvwxyz'[last]}, café 7...")
        path = root / "doc" / asterisk.TRANSCRIPT.format(language)
        path.parent.mkdir(parents=True)
        path.write_bytes(gzip.compress("\n".join(lines).encode(errors="surrogateescape")))


def folders_of(root):
    return ["--sounds", root / "sounds", "--transcripts", root / "doc"]


def build_asterisk(root, name, *extra):
    sizes = "--train 64 --validation 24 --test 24".split()
    run_script(asterisk, "--out", root / name, *folders_of(root), *sizes, *extra)
    return {split: read_json_lines(root / name / f"{split}.jsonl") for split in SPLITS}


def words(text):
    return re.sub(r"[^\w\s']", " ", text.lower()).split()


def spoken_slots(row):
    """What is said in an English row of the asterisk corpus, by field, from the transcript or, where
    code words spell, the letters of the reference."""
    said = row["transcript"].replace("hundred ", "").split()
    if row["group"] == "en-spelling":
        said = [word for word in words(row["reference"]) if len(word) == 1]
    names = {
        "en-date": ("day", "month", "ordinal"),
        "en-time": ("day", "hour", "minute"),
        "en-number": ("day", "hundreds", "tens", "unit"),
        "en-spelling": [f"letter {n}" for n in (1, 2, 3, 4)],
        "en-sequence-question": [f"number {n}" for n in (1, 2, 3, 4)],
    }[row["group"]]
    by_field = dict(zip(names, said, strict=True))
    if "first" in row["prompt"]:  # only the first and the last number are asked for
        return {name: by_field[name] for name in ("number 1", "number 4")}
    return by_field


def test_asterisk_corpus(tmp_path, capsys):
    pytest.importorskip("torchaudio")
    make_packages(tmp_path)
    rows = build_asterisk(tmp_path, "made")
    sizes = {split: len(part) for split, part in rows.items()}
    assert sizes == {"train": 64, "validation": 24, "test": 24}
    assert {row["group"] for row in rows["train"]} == set(asterisk.MIX)
    differ = 0
    for row in (row for part in rows.values() for row in part):
        assert row["prompt"].startswith("<|audio|>") and row["prompt"].count("<|audio|>") == 1
        assert re.fullmatch(r"[a-z' ]+", row["transcript"])
        info = soundfile.info(tmp_path / "made" / row["audio"])
        assert info.samplerate == 16000 and info.channels == 1 and 0.3 < info.duration < 7
        if row["group"].startswith("prompts-"):
            assert "slots" not in row and row["reference"] == row["target"]
            sentence = r"Sentence[a-f] number[u-z], café (seven|sept|siete)"
            assert re.fullmatch(sentence, row["reference"])
            continue
        differ += row["reference"] != row["target"]
        for text in (row["reference"], row["target"]):
            assert 7 <= len(words(text)) <= 16
            # There, and not in the carrier.
            assert all(words(text).count(slot) == 1 for slot in row["slots"].values()), row
        assert not set(row["slots"].values()) & set(words(row["prompt"]))
        if row["group"].startswith("en-"):
            assert row["slots"] == spoken_slots(row)
    assert differ > 60  # taste is at random in targets, a function of the content in references

    # Splits are disjoint: contents across languages and questions (told by slots), sentences by
    # their words.
    def contents(split):
        found = set()
        for row in rows[split]:
            if "slots" not in row:
                found.add((row["group"], row["transcript"]))
            elif row["group"] == "en-sequence-question":  # whose slots may be a part
                found.add(row["transcript"])
            else:
                language = row["group"].split("-")[1]
                found.add((language, tuple(row["slots"].values())))
        return found

    train, validation, test = map(contents, SPLITS)
    assert not (train & validation or train & test or validation & test)

    # The same seed gives the same bytes, another one does not; a folder in use is left alone, and
    # nothing half-made.
    capsys.readouterr()
    build_asterisk(tmp_path, "again")
    printed = capsys.readouterr().out
    assert all(group in printed for group in asterisk.MIX) and "hours" in printed
    # One that cannot be read in each language.
    assert re.search(r"left out: 3 rows, .*LibsndfileError.*, e\.g\. \S+vm-broken\.wav", printed)
    for path in (tmp_path / "made").rglob("*.*"):
        same_file = tmp_path / "again" / path.relative_to(tmp_path / "made")
        assert path.read_bytes() == same_file.read_bytes(), path
    other = build_asterisk(tmp_path, "other", "--seed", "1")
    references, others = ([row["reference"] for row in x["train"]] for x in (rows, other))
    assert others != references
    refused(capsys, asterisk, "not empty", "--out", tmp_path / "made", *folders_of(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"sounds", "doc", "made", "again", "other"}


def test_asterisk_without_torchaudio(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio.functional", None)  # makes its import fail
    with pytest.raises(SystemExit, match="torchaudio does not import .*; fix: pip install"):
        asterisk.resample(np.zeros(8000, np.float32), 8000)


def test_asterisk_missing_packages(tmp_path, capsys):
    make_packages(tmp_path)
    (tmp_path / "sounds" / asterisk.VOICES["ru"] / "digits" / "3.wav").unlink()
    (tmp_path / "doc" / asterisk.TRANSCRIPT.format("fr")).unlink()
    with pytest.raises(SystemExit) as stop:
        build_asterisk(tmp_path, "made")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and not (tmp_path / "made").exists()
    packages = "asterisk-core-sounds-fr asterisk-core-sounds-ru-wav"
    assert re.search(rf"apt-get install .*{packages}\n", message)
    assert "asterisk-core-sounds-en" not in message


# --------------------------------------------------------------------------------------------------
# librispeech, librisqa, covost2, longaudio: made-up trees in the publishers' layouts


def run_script(script, *arguments):
    script.main([str(argument) for argument in arguments])


def refused(capsys, script, why, *arguments):
    """The script says why in one line, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_script(script, *arguments)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(why, message) and message.count("\n") == 1, message


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def make_librispeech(root, sizes):
    """Subset/speaker/chapter folders, three recordings a chapter and its .trans.txt. Returns
    {subset: files}."""
    files = {subset: [] for subset in sizes}
    for speaker, (subset, size) in enumerate(sizes.items(), start=61):
        for i in range(size):
            name = f"{speaker}-{i // 3}"
            folder = root / "LibriSpeech" / subset / str(speaker) / str(i // 3)
            folder.mkdir(parents=True, exist_ok=True)
            files[subset].append(str(folder / f"{name}-{i % 3:04d}.flac"))
            write_tone(files[subset][-1], 0.1, 16000)
            with open(folder / f"{name}.trans.txt", "a") as file:
                file.write(f"{name}-{i % 3:04d} IT'S {'OH ' * i}ONE OF {speaker}\n")
    return files


def test_librispeech_corpus(tmp_path, capsys, monkeypatch):
    sizes = {"train-clean-100": 9, "dev-clean": 2, "test-clean": 4, "test-other": 3}
    files = make_librispeech(tmp_path, sizes)
    speech = tmp_path / "LibriSpeech"
    test = ["--test", "test-clean", "test-other", "--out"]
    run_script(librispeech, "--librispeech", speech, *test, tmp_path / "made")
    rows = load.load_corpus(tmp_path / "made", 1)
    for split, *subsets in (
        ("train", "train-clean-100"),
        ("validation", "dev-clean"),
        ("test", "test-clean", "test-other"),
    ):
        want = []
        for subset in subsets:
            speaker = 61 + list(sizes).index(subset)
            for i, file in enumerate(files[subset]):
                said = f"it's {'oh ' * i}one of {speaker}"
                prompt = AUDIO + "Write down what is said."
                row = {"audio": file, "prompt": prompt, "reference": said, "transcript": said}
                if split == "test":
                    row["group"] = subset
                want.append(row)
        assert sorted(map(str, rows[split])) == sorted(map(str, want))
    # The first rows come from everywhere.
    assert len({row["group"] for row in rows["test"][:4]}) == 2
    monkeypatch.chdir(tmp_path)
    # The folder around it will do, and a relative path.
    run_script(librispeech, "--librispeech", ".", *test, "again")
    assert contents(tmp_path / "made") == contents(tmp_path / "again")

    test.append(tmp_path / "new")
    for why, folder, extra in (
        ("made is there already and not empty", speech, ["--out", tmp_path / "made"]),
        ("named twice", speech, ["--validation", "test-other"]),
        (
            "LibriSpeech: expected .* and dev-other and .*, found dev-clean, t",
            speech,
            ["--validation", "dev-other"],
        ),
        (
            "dev-clean: expected train-clean-100 and .*test-other in it, found 62$",
            speech / "dev-clean",
            [],
        ),
        ("/no: expected train-clean-100 and .*, found no such folder$", tmp_path / "no", []),
    ):
        refused(capsys, librispeech, why, "--librispeech", folder, *test, *extra)
    test = ["--librispeech", speech, *test]
    # One row never ends the build.
    Path(files["test-clean"][1]).unlink()
    spoken = speech / "test-clean/63/1/63-1.trans.txt"
    spoken.write_bytes(b"63-1-0000 ONE\n\n63-1-0000\n62-1-0001 TWO\n63-1-0002 \xff\n" + b"x" * 9999)
    run_script(librispeech, *test, "--out", tmp_path / "odd")
    printed = capsys.readouterr().out
    for count, reason in (
        (1, r"recording missing, e\.g\. 63-0\.trans\.txt, line 2: \S+63-0-0001\.flac"),
        (3, r"no recording's name, e\.g\. 63-1\.trans\.txt, line 2: ; .*line 4: 62-.*line 6: x+"),
        (1, r"no words, e\.g\. 63-1\.trans\.txt, line 3"),
        (1, r"words is not Unicode, e\.g\. 63-1\.trans\.txt, line 5"),
    ):
        assert re.search(rf"^left out: {count} rows, {reason}$", printed, re.M), printed
    left = load.load_corpus(tmp_path / "odd", 1)
    assert left["train"] == rows["train"] and left["validation"] == rows["validation"]
    assert sum(row["group"] == "test-clean" for row in left["test"]) == 3
    spoken = speech / "dev-clean/62/0/62-0.trans.txt"
    spoken.write_text("")
    refused(capsys, librispeech, "no row is left for the validation split", *test)

    def torn(*_):
        raise BrokenPipeError

    with monkeypatch.context() as patched, pytest.raises(BrokenPipeError):
        patched.setattr("builtins.print", torn)  # `| head`: the corpus is there all the same
        run_script(
            librispeech, "--librispeech", speech, "--validation", "test-other", "--out", "head"
        )
    assert [len(part) for part in load.load_corpus(tmp_path / "head", 1).values()] == [9, 3, 3]
    spoken.unlink()
    refused(capsys, librispeech, "dev-clean: expected SPEAKER/CHAPTER/", *test)
    with pytest.raises(TypeError):
        with new_corpus(tmp_path / "new") as corpus:  # stopped while it writes the second file
            corpus.rows = {"train": [1], "validation": [{2}], "test": [3]}
    for error in (OSError(28, "No space left", "audio/1.flac"), soundfile.LibsndfileError(1)):
        with pytest.raises(SystemExit), new_corpus(tmp_path / "new"):
            raise error
        assert re.search("new is not made: .*(No space .*1.flac|Format)", capsys.readouterr().err)
    # Whole, or not at all.
    assert {path.name for path in tmp_path.iterdir()} == {
        "LibriSpeech",
        "made",
        "again",
        "odd",
        "head",
    }


def test_librispeech_download(tmp_path, monkeypatch, capsys):
    asked = []

    def fetch(root, url, download):  # as torchaudio's: what is there already is left alone
        asked.append((root, url, download))
        if len(asked) == 3:
            raise RuntimeError("invalid hash value")
        if not (Path(root) / "LibriSpeech" / url).is_dir():
            make_librispeech(Path(root), {url: 1})

    datasets = types.SimpleNamespace(LIBRISPEECH=fetch)
    monkeypatch.setitem(sys.modules, "torchaudio.datasets", datasets)
    options = ["--download", "--out", tmp_path / "made", "--librispeech"]
    why = r"test-clean could not be downloaded to \S+data \(invalid hash value\)"
    refused(capsys, librispeech, why, *options, tmp_path / "data")
    run_script(
        librispeech, *options, tmp_path / "data" / "LibriSpeech"
    )  # either folder means the same
    subsets = ("train-clean-100", "dev-clean", "test-clean")
    assert asked == 2 * [(str(tmp_path / "data"), subset, True) for subset in subsets]
    assert [len(part) for part in load.load_corpus(tmp_path / "made", 1).values()] == [1, 1, 1]
    monkeypatch.setitem(sys.modules, "torchaudio.datasets", None)  # makes its import fail
    options += [tmp_path / "data", "--out", tmp_path / "new"]
    refused(capsys, librispeech, "fix: pip install", *options)


def test_librisqa_corpus(tmp_path, capsys):
    files = make_librispeech(tmp_path, {"train-clean-360": 11, "test-clean": 5})
    questions = tmp_path / "LibriSQA" / "LibriSQA-PartI"
    items = {}
    questions.mkdir(parents=True)

    def write(name, items):
        (questions / f"LibriSQA-PartI-{name}.json").write_text(json.dumps(items), encoding="utf-8")

    for name, subset in (("train", "train-clean-360"), ("test", "test-clean")):
        names = [str(Path(file).relative_to(tmp_path)) for file in files[subset]]
        paths = [name.replace(".flac", ".wav") for name in names]
        paths[0] = paths[0].removeprefix("LibriSpeech/").replace(".wav", ".flac")
        items[name] = [
            {
                "speech_path": path,
                "question": f"Why {i} {{}}? ",
                "answer": f" Since {i} é.",
                "text": f"OH {i}",
                "duration": 0.1,
            }
            for i, path in enumerate(paths)
        ]
        write(name, items[name])
    options = ["--librispeech", tmp_path, "--librisqa", tmp_path / "LibriSQA", "--out"]
    run_script(librisqa, *options, tmp_path / "made")
    rows = load.load_corpus(tmp_path / "made", 1)
    numbers = {
        split: [int(row["reference"].split()[1]) for row in part] for split, part in rows.items()
    }
    # What datasets 5.2.0 makes of 0..10 with train_test_split(test_size=0.2, seed=0): validation is
    # its test split.
    assert numbers["train"] == [2, 0, 3, 5, 10, 9, 8, 1] and numbers["validation"] == [4, 6, 7]
    assert sorted(numbers["test"]) == [0, 1, 2, 3, 4] != numbers["test"]
    for split, part in rows.items():
        subset = files["test-clean" if split == "test" else "train-clean-360"]
        for i, row in zip(numbers[split], part):
            assert row["audio"] == subset[i]
            assert (row["reference"], row["transcript"]) == (f"Since {i} é.", f"oh {i}")
            question = f"Why {i} {{}}?"
            assert row["prompt"] in [wording.format(question) for wording in librisqa.WORDINGS]
            assert split != "test" or row["prompt"] == f"{AUDIO}Why {i} {{}}?"
    # Chosen by a hash, the same on every machine: `printf 'Why 2 {}?' | sha256sum` starts with a
    # byte that is 0 mod 3.
    wordings = [re.sub(r"Why \d {}\?", "{}", row["prompt"]) for row in rows["train"][:3]]
    assert [librisqa.WORDINGS.index(wording) for wording in wordings] == [0, 2, 1]

    inner = ["--librisqa", questions, "--librispeech", tmp_path / "LibriSpeech"]
    run_script(librisqa, *options, tmp_path / "again", *inner)
    assert contents(tmp_path / "made") == contents(tmp_path / "again")
    run_script(librisqa, *options, tmp_path / "seed1", "--seed", "1")
    assert contents(tmp_path / "made")["train.jsonl"] != contents(tmp_path / "seed1")["train.jsonl"]

    # Recording 5 is gone, and these are odd. The rest stays in its split.
    Path(files["train-clean-360"][5]).unlink()
    items["train"][10]["answer"] = " "
    items["train"][9] = {"question": "Why?"}
    items["train"][8]["question"] = None
    items["train"][1] = "Why?"
    items["test"] += [[], None, {**items["test"][0], "answer": "\ud800"}]
    items["test"] += [{**items["test"][0], "speech_path": "x" * 9999}]
    for name in items:
        write(name, items[name])
    capsys.readouterr()
    run_script(librisqa, *options, tmp_path / "new")
    printed = capsys.readouterr().out
    for count, reason, names in (
        (1, "recording missing", r"LibriSQA-PartI-train.json, item 6: \S+1-0002.wav"),
        (1, "no answer", "LibriSQA-PartI-train.json, item 11"),
        (1, "no question", "LibriSQA-PartI-train.json, item 9"),
        (1, "no speech_path", "LibriSQA-PartI-train.json, item 10"),
        (
            3,
            r"not as expected \(AttributeError\)",
            "LibriSQA-PartI-train.json, item 2: 'str' obj.*",
        ),
        (1, "answer is not Unicode", "LibriSQA-PartI-test.json, item 8"),
        (1, r"not as expected \(OSError\)", "LibriSQA-PartI-test.json, item 9: .*too long.*"),
    ):
        assert re.search(rf"^left out: {count} rows, {reason}, e\.g\. {names}$", printed, re.M), (
            printed
        )
    left = [row for row in rows["train"] if row["reference"].split()[1] in ("2", "0", "3")]
    assert load.load_corpus(tmp_path / "new", 1) == {**rows, "train": left}
    for why, changed in (
        (r"test\.json: expected a list, found \{'speech_path'", items["test"][0]),
        ("no row is left for the test split", []),
    ):
        write("test", changed)
        refused(capsys, librisqa, why, *options, tmp_path / "bad")
    (questions / "LibriSQA-PartI-test.json").write_text('[{"speech_path"')
    refused(capsys, librisqa, r"test\.json is not JSON \(", *options, tmp_path / "bad")
    found = "found test-clean, train-clean-360$"
    why = f"/LibriSpeech: expected LibriSQA-PartI-train.json and .* in it, {found}"
    options += [tmp_path / "bad", "--librisqa", tmp_path / "LibriSpeech"]
    refused(capsys, librisqa, why, *options)


def test_covost2_corpus(tmp_path, capsys):
    clips = tmp_path / "cv" / "en" / "clips"
    tsv = tmp_path / "covost_v2.en_de.tsv"
    clips.mkdir(parents=True)
    spoken = ["client_id\tpath\tsentence\tup_votes"]
    translated = ["path\ttranslation\tsplit"]
    want = {}
    ours = {
        "train": "train",
        "dev": "validation",
        "test": "test",
        "train_covost": "train",
        "dev_covost": "none",
    }
    for i, (theirs, split) in enumerate(ours.items()):
        for k in range(4):
            write_tone(clips / f"en_{i}{k}.mp3", 0.1, 48000)
            clip = clips / f"en_{i}{k}.mp3"
            # A quotation that never ends, and characters escaped.
            spoken.append(f'c\t{clip.name}\t"{k}, he said\t2')
            translated.append(f'{clip.name}\t {i}\\"{k}\\\\ "ä\t{theirs}')
            row = (str(clip), f'"{k}, he said', f'{i}"{k}\\ "ä')
            want.setdefault(split, set()).add(row)
    for name in ("old", "gone", "empty", "mute"):
        spoken += [f"c\t{name}.mp3\tSo.\t2"] if name != "old" else []
        translated.append(f"{name}.mp3\t{'So.' if name != 'mute' else ''}\ttest")
        if name != "gone":
            (clips / f"{name}.mp3").write_bytes(b"x" if name != "empty" else b"")

    def write(spoken, translated):
        for file, lines in ((clips.parent / "validated.tsv", spoken), (tsv, translated)):
            file.write_bytes("".join(f"{x}\n" for x in lines).encode(errors="surrogateescape"))

    write(spoken, translated)
    options = ["--common-voice", clips.parent, "--translations", tsv, "--out"]
    run_script(covost2, *options, tmp_path / "made")
    printed = capsys.readouterr().out
    assert "1 rows, not in validated.tsv, e.g. old.mp3\n" in printed
    assert "2 rows, recording missing or empty in clips, e.g. gone.mp3; empty.mp3\n" in printed
    assert "1 rows, no translation, e.g. mute.mp3\n" in printed
    assert printed.isascii()  # whatever the terminal can show
    rows = load.load_corpus(tmp_path / "made", 1)
    for split, part in rows.items():
        assert {(row["audio"], row["transcript"], row["reference"]) for row in part} == want[split]
        assert len(part) == len(want[split])
        clips_in_order = [row["audio"] for row in part]
        assert clips_in_order != sorted(clips_in_order)  # speakers mixed
    assert {row["prompt"] for row in rows["test"]} == {AUDIO + "Say this in German."}
    prompts = {row["transcript"]: row["prompt"] for row in rows["train"]}
    assert len(prompts) == 4
    assert len(set(prompts.values())) > 1
    assert all("German" in p for p in prompts.values())
    for row in rows["train"] + rows["validation"]:
        assert row["prompt"] == prompts[row["transcript"]]
    # The folder around it will do.
    run_script(covost2, *options, tmp_path / "again", "--common-voice", tmp_path / "cv")
    assert contents(tmp_path / "made") == contents(tmp_path / "again")

    options.append(tmp_path / "new")
    for why, *changed in (
        (
            "validated.tsv: expected the columns path, sentence, found path, text$",
            ["path\ttext"],
            translated,
        ),
        (
            "en_de.tsv: expected the columns .*split, found <!DOCTYPE html>$",
            spoken,
            ["<!DOCTYPE html>"],
        ),
        ("no row is left for the train split", spoken[:1], translated),
    ):
        write(*changed)
        refused(capsys, covost2, why, *options)
    # As Common Voice has it today, other columns and all; and lines that are odd.
    old, *said = spoken
    new = "client_id\tpath\tsentence_id\tsentence\tsentence_domain\tup_votes".split("\t")
    said = ["c\t{}\tf00d\t{}\t\t2".format(*line.split("\t")[1:3]) for line in said]
    said[1:1] = ["c\ten_01.mp3", "", "c\t" + "x" * 200_000 + "\t\t\t\t", "c" + "\t" * 6]
    said += ["c\tbyte.mp3\tf00d\t\udcff\t\t2"]
    (clips / "byte.mp3").write_bytes(b"x")
    more = ["a\tb\ttest\tc", "byte.mp3\tSo.\ttrain", "en_00.mp3\t\udcff\ttrain"]
    write(["\t".join(new), *said], [*translated, *more])
    run_script(covost2, *options)
    printed = capsys.readouterr().out
    names = r"validated\.tsv, line 3; validated\.tsv, line 6"
    assert re.search(
        rf"left out: 2 rows, other fields than the header's 6, e\.g\. {names}\n", printed
    )
    names = r"covost_v2\.en_de\.tsv, line 26"
    assert re.search(
        rf"left out: 1 rows, other fields than the header's 3, e\.g\. {names}\n", printed
    )
    assert (
        "left out: 1 rows, not as expected (Error), e.g. validated.tsv, line 5: field " in printed
    )
    assert "left out: 1 rows, sentence is not Unicode, e.g. byte.mp3" in printed
    assert "left out: 1 rows, translation is not Unicode, e.g. en_00.mp3" in printed
    left = load.load_corpus(tmp_path / "new", 1)
    assert left["test"] == rows["test"] and left["validation"] == rows["validation"]
    assert left["train"] != rows["train"]
    assert len(left["train"]) == len(rows["train"]) - 1
    options[-1] = tmp_path / "bad"
    for name in ("covost_v2.en_de.tsv.tar.gz", "covost_v2.en_xx.tsv", "covost_v2.de_en.tsv"):
        if "de_en" not in name:  # which is not there
            (clips / name).write_text("path\ttranslation\tsplit\n")
        why = f"{name}: expected a file covost_v2.SOURCE_TARGET.tsv"
        refused(capsys, covost2, why, *options, "--translations", clips / name)
    found = r"found byte.mp3, covost_v2.en_de.*, empty.mp3, .*, \.\.\.$"
    why = f"clips: expected validated.tsv and clips in it, {found}"
    refused(capsys, covost2, why, *options, "--common-voice", clips)
    assert {path.name for path in tmp_path.iterdir()} == {"cv", tsv.name, "made", "again", "new"}


def make_longaudio(root):
    """The questions, {split: rows wanted}, and {sound: samples}: noise in the publishers' trees."""
    rng = np.random.default_rng(0)
    heard = {}

    def noise(file, seconds, rate):
        file.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(file, rng.uniform(-0.3, 0.3, int(seconds * rate)), rate)
        return soundfile.read(file, dtype="float32")[0]

    for dialogue, turns in ((0, 1), (1, 12), (2540, 2)):
        folder = root / "dailytalk" / "data" / str(dialogue)
        parts = [noise(folder / f"{i}_{i % 2}_d{dialogue}.wav", 0.1, 44100) for i in range(turns)]
        heard[f"{dialogue}.wav"] = np.concatenate(parts)
    for speech, kind in (("en.20080925.16.4-121", "flac"), ("en.20081023.4.4-026", "wav")):
        audio = noise(root / "v1.1" / "en" / "audios" / f"{speech}.{kind}", 2, 16000)
        heard[f"{speech}_0.0_0.74.wav"] = audio[: int(0.74 * 16000)]
        heard[f"{speech}_1.11_1.58.wav"] = audio[int(1.11 * 16000) : int(1.58 * 16000)]
    session = "20171116-0900-PLENARY-5"
    audio = noise(root / "voxpopuli/raw_audios/en/2017" / f"{session}_en.ogg", 15, 16000)
    lines = ["session_id|id_|original_text|split|vad"]
    for number, vad in enumerate(([(0.5, 1.25)], [(2, 2.5), (8.25, 8.75)])):
        paragraph = f"en_20171116-10:38:16_{number}"
        lines.append(f'{session}|{paragraph}|"He said ""so | so""."||{[list(x) for x in vad]}')
        pieces = [audio[int(start * 16000) : int(end * 16000)] for start, end in vad]
        heard[f"en/2017/{session}-{paragraph}.wav"] = np.concatenate(pieces)
    lines += [f"{session}|short", f"{session}|odd||train|[[1, 2]"]
    (root / "voxpopuli/transcribed_data/en").mkdir(parents=True)
    table = "\n".join(lines).encode() + b"\n\xff\n"
    (root / "voxpopuli/transcribed_data/en/asr_en.tsv.gz").write_bytes(gzip.compress(table))

    wanted = {split: [] for split in SPLITS}
    (root / "LongAudio" / "longaudio_xl").mkdir(parents=True)
    for name, pattern in (
        ("DailyTalk", r"\d+\.wav"),
        ("Europarl", r"en\..*"),
        ("VoxPopuli", "en/.*"),
    ):
        sounds = [sound for sound in heard if re.fullmatch(pattern, sound)]
        items = []
        for i in range(40):
            one = sounds[i % len(sounds)]
            both = [one, sounds[(i + 1) % len(sounds)]]
            question = {"from": "human", "value": f"<sound>\nWhy {i}, ä?"}
            answer = {"from": "gpt", "value": f" Since {i}. "}
            again = [{"from": "human", "value": "And then?"}, {"from": "gpt", "value": "No."}]
            items.append({"id": i, "sound": both if i % 3 else one, "duration": 30.0})
            items[-1]["conversations"] = [question, answer] + (again if i % 2 else [])
            tenth = int.from_bytes(hashlib.md5(b"%d" % i).digest()[:4], "big") * 10 >> 32
            split = ("test", "validation", *["train"] * 8)[tenth]
            audio = np.concatenate([heard[sound] for sound in (both if i % 3 else [one])])
            prompt = f"{AUDIO}\nWhy {i}, ä?"
            wanted[split].append((name, prompt, f"Since {i}.", audio))
        file = root / "LongAudio" / "longaudio_xl" / f"{name}_LongAudio.json"
        file.write_text(json.dumps(items))
    return wanted


def test_longaudio_corpus(tmp_path, capsys):
    wanted = make_longaudio(tmp_path)
    questions = tmp_path / "LongAudio" / "longaudio_xl"
    trees = {
        "DailyTalk": ["--dailytalk", tmp_path],
        "Europarl": ["--europarl-st", tmp_path / "v1.1"],
        "VoxPopuli": ["--voxpopuli", tmp_path / "voxpopuli"],
    }
    options = ["--longaudio", questions, *sum(trees.values(), []), "--out"]
    run_script(longaudio, *options, tmp_path / "made")
    printed = capsys.readouterr().out
    assert (
        "left out: 2 rows, other fields than the header's 5, e.g. asr_en.tsv.gz, line 4" in printed
    )
    assert printed.count("left out") == 1
    rows = load.load_corpus(tmp_path / "made", 40)
    groups = {"DailyTalk": "dailytalk", "Europarl": "europarl-st", "VoxPopuli": "voxpopuli"}
    for split, part in rows.items():
        found = {(row["group"], row["prompt"]): row for row in part}
        assert len(found) == len(part) == len(wanted[split])
        for name, prompt, reference, audio in wanted[split]:
            row = found[groups[name], prompt]
            assert row["reference"] == reference
            samples, rate = soundfile.read(row["audio"], dtype="float32")
            assert rate == (44100 if name == "DailyTalk" else 16000)
            assert samples.shape == audio.shape and np.abs(samples - audio).max() < 1e-4
        assert [row["group"] for row in part] != sorted(row["group"] for row in part)
    audio = {row["audio"] for part in rows.values() for row in part}
    assert len(audio) == len(list((tmp_path / "made" / "audio").iterdir())) < 20
    # One publisher alone: no groups. The same again, whole.
    for name in ("one", "again"):
        run_script(
            longaudio,
            "--longaudio",
            tmp_path / "LongAudio",
            *trees["DailyTalk"],
            "--out",
            tmp_path / name,
        )
    assert contents(tmp_path / "one" / "audio") == contents(tmp_path / "again" / "audio")
    one = load.load_corpus(tmp_path / "one", 40)
    assert not any("group" in row for row in one["train"])


def test_longaudio_odd_rows(tmp_path, capsys):
    """Each left out with the reason and counted; none ends the build."""
    make_longaudio(tmp_path)
    audios = tmp_path / "v1.1" / "en" / "audios"
    (audios / "m4a.m4a").write_bytes(b"ftyp")
    (audios / "torn.flac").write_bytes(b"fLaC")
    write_tone(audios / "long.flac", 41, 8000)
    write_tone(audios / "slow.flac", 1, 8000)
    (tmp_path / "dailytalk" / "data" / "7").mkdir()
    speech = "en.20080925.16.4-121"
    session = "en/2017/20171116-0900-PLENARY-5-en"
    question = {"from": "human", "value": "<sound>Why?"}
    answer = {"from": "gpt", "value": "So."}
    choice = {"from": "human", "value": "<sound>Who? Choose the correct option from A or B."}
    odd = [
        ("Europarl", "longer than 40 s", {"duration": 40.01}),
        ("Europarl", "longer than 40 s", {"sound": "long_0_40.5.wav", "duration": "40"}),
        ("Europarl", "multiple choice", {"conversations": [choice, answer]}),
        (
            "Europarl",
            "multiple choice",
            {"conversations": [question, {**answer, "value": "(A) So."}]},
        ),
        (
            "Europarl",
            "question without exactly one <sound>",
            {"conversations": [{**question, "value": "Why?"}, answer]},
        ),
        ("Europarl", "no answer", {"conversations": [question]}),
        ("Europarl", "no question", {"conversations": [{**question, "value": None}, answer]}),
        (
            "Europarl",
            "answer is not Unicode",
            {"conversations": [question, {**answer, "value": "\ud800"}]},
        ),
        ("Europarl", "not as expected (TypeError)", {"conversations": None}),
        ("Europarl", "not as expected (TypeError)", {"conversations": "[]"}),
        ("Europarl", "not as expected (TypeError)", {"duration": None}),
        ("Europarl", "not as expected (ValueError)", {"duration": "long"}),
        ("Europarl", "not as expected (KeyError)", "id"),
        ("Europarl", "not as expected (TypeError)", None),
        ("Europarl", "not as expected (AttributeError)", {"sound": 5}),
        ("Europarl", "not as expected (TypeError)", {"sound": [[]]}),
        ("Europarl", "recording empty", {"sound": []}),
        ("Europarl", "recording missing", {"sound": "gone_0_1.wav"}),
        ("Europarl", "recording empty", {"sound": f"{speech}_1_1.wav"}),
        (
            "Europarl",
            "M4A, to be converted as corpora/longaudio.py says",
            {"sound": "m4a_0_1.wav"},
        ),
        ("Europarl", "not as expected (LibsndfileError)", {"sound": "torn_0_1.wav"}),
        ("Europarl", "not as expected (LibsndfileError)", {"sound": f"{speech}_5_6.wav"}),
        ("Europarl", "not as expected (OSError)", {"sound": "x" * 9999 + "_0_1.wav"}),
        ("Europarl", "not as expected (ValueError)", {"sound": "speech.wav"}),
        ("Europarl", "parts of different rates", {"sound": [f"{speech}_0_1.wav", "slow_0_1.wav"]}),
        ("DailyTalk", "recording missing", {"sound": "7.wav"}),
        (
            "VoxPopuli",
            "recording not in asr_en.tsv.gz",
            {"sound": f"{session}_20171116-10:38:16_9.wav"},
        ),
        (
            "VoxPopuli",
            "not as expected (SyntaxError)",
            {"sound": "20171116-0900-PLENARY-5-odd.wav"},
        ),
    ]
    counts = collections.Counter({"other fields than the header's 5": 2})
    for name in ("DailyTalk", "Europarl", "VoxPopuli"):
        file = tmp_path / "LongAudio" / "longaudio_xl" / f"{name}_LongAudio.json"
        items = json.loads(file.read_text())
        for _, reason, changed in (case for case in odd if case[0] == name):
            item = {**items[3], "conversations": [question, answer]}
            if isinstance(changed, str):
                del item[changed]
            items.append({**item, **changed} if isinstance(changed, dict) else item)
            if changed is None:
                items[-1] = None
            counts[reason] += 1
        file.write_text(json.dumps(items))
    trees = ["--dailytalk", tmp_path, "--europarl-st", tmp_path, "--voxpopuli", tmp_path]
    options = ["--longaudio", tmp_path / "LongAudio", "--out", tmp_path / "made"]
    run_script(longaudio, *options, *trees)
    printed = capsys.readouterr().out
    found = re.findall(r"^left out: (\d+) rows, (.*?), e\.g\. ", printed, re.M)
    assert {reason: int(count) for count, reason in found} == counts
    assert re.search(r"recording missing, e\.g\. DailyTalk\S+, item 41: \S+/data/7; Euro", printed)
    assert re.search(r"; Europarl\S+, item 58: \S+/en/audios/gone\.flac\n", printed), printed
    assert sum(map(len, load.load_corpus(tmp_path / "made", 40).values())) == 120

    options[-1] = tmp_path / "new"
    refused(capsys, longaudio, "one or more of --dailytalk, --europarl-st, --voxp", *options)
    why = "LongAudio: expected data in it, found longaudio_xl"
    refused(capsys, longaudio, why, *options, "--dailytalk", tmp_path / "LongAudio")
    why = "v1.1: expected Europarl_LongAudio.json in it, found en"
    refused(capsys, longaudio, why, *options, *trees[2:4], "--longaudio", tmp_path / "v1.1")
    table = tmp_path / "voxpopuli" / "transcribed_data" / "en" / "asr_en.tsv.gz"
    table.write_bytes(table.read_bytes()[:-20])
    refused(capsys, longaudio, r"asr_en\.tsv\.gz cannot be read \(.*again", *options, *trees[4:])
    file = tmp_path / "LongAudio" / "longaudio_xl" / "DailyTalk_LongAudio.json"
    for wrong in ("[" * 100_000, "{", '[{"id": 1e'):
        file.write_text(wrong)
        refused(capsys, longaudio, r"DailyTalk_LongAudio\.json is not JSON", *options, *trees[:2])
    assert not (tmp_path / "new").exists()


def test_full_disk(tmp_path, capsys, monkeypatch):
    """Names the path, leaves nothing; it is not taken for an odd row."""
    make_longaudio(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    options = ["--longaudio", tmp_path / "LongAudio", "--dailytalk", tmp_path]
    why = r"audio/dailytalk-00000\.flac: .*No space left"
    refused(capsys, longaudio, why, *options, "--out", tmp_path / "made")
    assert {path.name for path in tmp_path.iterdir()} == {
        "LongAudio",
        "dailytalk",
        "v1.1",
        "voxpopuli",
    }


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied"),
        OSError(errno.EMFILE, "Too many open files"),
        MemoryError("no memory"),
        soundfile.LibsndfileError(2),  # its words for any error of the system
    ],
)
def test_a_recording_that_cannot_be_read_now_is_no_odd_row(error, tmp_path, capsys, monkeypatch):
    """It ends the build: a row that is left out is left out for ever."""
    make_longaudio(tmp_path)
    options = ["--longaudio", tmp_path / "LongAudio", "--dailytalk", tmp_path]

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(longaudio, "read_parts", fail)
        why = f"item 1: {type(error).__name__}: "
        refused(capsys, longaudio, why, *options, "--out", tmp_path / "made")
    run_script(longaudio, *options, "--out", tmp_path / "made")
    assert "left out" not in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# synthetic


@pytest.mark.parametrize("task", ["qa", "translation"])
def test_synthetic_corpus(task):
    """No content twice, in whatever split; every slot is in reference and target and, asked for,
    in the audio, and of its field; the supervised wording is mostly not the rewarded one; who does
    not listen has few slots right."""
    sizes = {"train": 400, "validation": 60, "test": 90}
    splits = synthetic.rows(task, sizes, seed=3)
    rows = sum(splits.values(), [])
    prompts = {row["prompt"] for row in splits["train"]}
    names = "name verb number colour thing place day".split()
    fields = dict(zip(names, synthetic.FIELDS, strict=True))
    assert splits == synthetic.rows(task, sizes, seed=3) != synthetic.rows(task, sizes, seed=4)
    assert {name: len(part) for name, part in splits.items()} == sizes
    assert len({row["transcript"] for row in rows}) == len(rows)
    assert len({row["audio"].phones for row in rows}) == len(rows)
    for row in rows:
        assert row["prompt"].count(AUDIO) == 1
        assert not any(slot in row["prompt"] for slot in row["slots"].values())
        assert all(slot.split("|")[0] in fields[field] for field, slot in row["slots"].items())
        for text in ("reference", "target", *["transcript"] * (task == "qa")):
            assert data.slot_accuracy([row[text]], [row]) == 1
    assert 0.8 < np.mean([row["target"] != row["reference"] for row in rows]) < 0.95
    assert 20 < np.mean([data.sentence_bleu(row["target"], row["reference"]) for row in rows]) < 80
    assert data.slot_accuracy([row["reference"] for row in rows], rows[1:] + rows[:1]) < 0.4
    # One for one content, always.
    keys = [(row["prompt"], *row["slots"].values()) for row in rows]
    wording = dict(zip(keys, [row["reference"] for row in rows]))
    assert all(row["reference"] == wording[key] for row, key in zip(rows, keys))
    assert len(wording) < len(rows) - 10 or task == "translation"
    assert len(prompts) == (3 if task == "qa" else 1)
    assert len({(row["prompt"], len(row["slots"])) for row in rows}) == len(prompts)
    assert set("".join(row["audio"].phones for row in rows)) <= set(synthetic.PHONES)


@pytest.mark.parametrize("phones", ["anV bot sevVn red apVlz", "hjugo wA getsujou ni"])
def test_synthesize(phones):
    """16 kHz, audible, finite; the seed decides everything, nothing outside does; voices and
    phones differ."""
    audio = synthetic.Speech(phones, 7).samples()
    state = torch.random.get_rng_state()
    np.random.seed(1)
    same((audio, state), (synthetic.synthesize(phones, 7), torch.random.get_rng_state()))
    assert audio.dtype == torch.float32 and audio.ndim == 1 and audio.isfinite().all()
    assert 0.02 < audio.square().mean().sqrt() < 0.2 and audio.abs().max() < 1
    assert 0.7 < len(audio) / sum(16 * synthetic.PHONES[p][-1] for p in f" {phones} ") < 1.4
    speakers = [data.log_mel(synthetic.synthesize(phones, seed)) for seed in range(6)]
    for a, b in itertools.combinations(speakers, 2):
        assert (a[: len(b)] - b[: len(a)]).abs().mean() > 0.02
    periods = []  # in samples, of one vowel by several speakers
    for seed in range(8):
        vowel = synthetic.synthesize("u" * 20, seed)[4000:5600]
        autocorrelation = torch.fft.irfft(torch.fft.rfft(vowel, 3200).abs() ** 2)
        periods.append(autocorrelation[62:240].argmax() + 62)
    assert max(periods) > 1.4 * min(periods)
    spectra = []
    for phone in "iAus":
        mel = data.log_mel(synthetic.synthesize(phone * 8, 5))
        spectra.append(mel.unflatten(1, (2, 80)).mean((0, 1)))
    assert torch.pdist(torch.stack(spectra)).min() > 0.5
