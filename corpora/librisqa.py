r"""Spoken question answering from LibriSQA part I: free-form questions about LibriSpeech
recordings.

    python -m corpora.librisqa --librispeech data/LibriSpeech --librisqa data/LibriSQA \
        --out data/sqa

Get the questions from the authors' dataset page ZihanZhao/LibriSQA on Hugging Face (Zhao et al.
2023), and of LibriSpeech (OpenSLR, resource SLR12, CC BY 4.0) train-clean-360 (23 GB) and
test-clean (346 MB):

    LibriSQA/LibriSQA-PartI/                LibriSpeech/
        LibriSQA-PartI-train.json               train-clean-360/SPEAKER/CHAPTER/*.flac
        LibriSQA-PartI-test.json                test-clean/SPEAKER/CHAPTER/*.flac

Either option names the folder shown or the one it is in. A JSON file is a list of objects with
speech_path, question, answer, text and duration (the dataset's card). As in LEAF's official code
(Grimoid/LEAF, commit c7623e3, scripts/data_prep/prepare_librisqa.py) a leading LibriSpeech/ of
speech_path is dropped, and .wav and .flac stand for each other. `text` becomes the transcript, in
lower case. Rows point to the FLAC files by absolute path: nothing is copied.

Splits are the official code's, row for row: the test questions are the test split; of the others
train_test_split of the library `datasets` with test_size=0.2, seed=0 makes the validation split
(the first fifth, rounded up, of numpy's default_rng(0).permutation) and the train split (the rest),
in that order. Readers and books are in both. The test split is shuffled too, for train.py may
evaluate on its first rows only, and those might be of few readers.

The prompts' wording is ours. Theirs is one of three in every split, chosen by a hash of the
question; here a hash chooses in train and validation, and the test split has one wording, the
question alone.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
from tqdm import tqdm

from corpora import AUDIO, locate, new_corpus, refuse, shuffled, wording

FILES = ("LibriSQA-PartI-train.json", "LibriSQA-PartI-test.json")
FIELDS = ("speech_path", "question", "answer")
WORDINGS = (
    AUDIO + "{}",
    AUDIO + "Judging by what is read aloud: {}",
    "{} The recording will tell: " + AUDIO,
)


def read_questions(file):
    """The items of a LibriSQA file, each with at least the texts FIELDS."""
    try:
        items = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        # Not JSON, or perhaps not even UTF-8.
        refuse(f"{file} is not JSON ({error}); download it again")
    if not isinstance(items, list):
        refuse(f"{file}: expected a list of questions, found {str(items)[:80]}")
    for number, item in enumerate(items, start=1):
        texts = [item.get(field) for field in FIELDS] if isinstance(item, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            wanted = f"the texts {', '.join(FIELDS)}"
            refuse(f"{file}, item {number}: expected {wanted}, found {str(item)[:200]}")
    return items


def train_validation(items, seed):
    """Four fifths and one fifth, as train_test_split of the library `datasets` parts and orders
    them."""
    order = np.random.default_rng(seed).permutation(len(items))
    count = math.ceil(0.2 * len(items))
    return [items[i] for i in order[count:]], [items[i] for i in order[:count]]


def to_rows(items, split, speech, skip_missing):
    """Rows of a split. Recordings that are not below `speech` are counted, and refused unless they
    may be skipped."""
    rows = []
    missing = []
    empty = 0
    for item in tqdm(items, split, unit="row", leave=False, disable=None):
        path, question, answer = (item[field].strip() for field in FIELDS)
        named = speech / path.removeprefix("LibriSpeech/")
        places = (named, named.with_suffix(".flac"), named.with_suffix(".wav"))
        audio = next((place for place in places if place.is_file()), None)
        if audio is None:
            missing.append(path)
        elif not question or not answer:
            empty += 1
        else:
            prompt = wording(split, WORDINGS, question).format(question)
            rows.append({"audio": str(audio), "prompt": prompt, "reference": answer})
            if isinstance(item.get("text"), str) and item["text"].strip():
                rows[-1]["transcript"] = item["text"].strip().lower()
    if missing:
        gaps = f"{len(missing)} of {len(items)} recordings are not in {speech}, e.g. {missing[0]}"
        message = f"{split}: {gaps}"
        if not skip_missing:
            refuse(f"{message}; unpack LibriSpeech again, or go on without them: --skip-missing")
        print(f"{message}; left out")
    if empty:
        print(f"{split}: {empty} of {len(items)} rows have no question or no answer; left out")
    return rows


def main(arguments=None):
    summary = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m corpora.librisqa", description=summary)
    add = parser.add_argument
    recordings = "folder LibriSpeech, or the one it is in"
    questions = f"folder with {' and '.join(FILES)}"
    seed = "of train and validation (default 0, as the official code)"
    skip = "go on without recordings that are not there"
    add("--out", type=Path, required=True, help="folder to make")
    add("--librispeech", type=Path, required=True, help=recordings)
    add("--librisqa", type=Path, required=True, help=questions)
    add("--seed", type=int, default=0, help=seed)
    add("--skip-missing", action="store_true", help=skip)
    args = parser.parse_args(arguments)
    with new_corpus(args.out) as rows:
        questions = locate(args.librisqa, "LibriSQA-PartI", FILES)
        speech = locate(args.librispeech, "LibriSpeech", ("train-clean-360", "test-clean"))
        # Split first, skip afterwards: what is missing moves no row from one split to another.
        train, validation = train_validation(read_questions(questions / FILES[0]), args.seed)
        test = read_questions(questions / FILES[1])
        for split, items in zip(("train", "validation", "test"), (train, validation, test)):
            rows[split] = to_rows(items, split, speech, args.skip_missing)
        rows["test"] = shuffled(rows["test"])


if __name__ == "__main__":
    main()
