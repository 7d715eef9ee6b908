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
evaluate on its first rows only, and those might be of few readers. What cannot be used, for want of
its recording for instance, is left out and counted.

The prompts' wording is ours. Theirs is one of three in every split, chosen by a hash of the
question; here a hash chooses in train and validation, and the test split has one wording, the
question alone.
"""

import argparse
import math
from pathlib import Path

import numpy as np
from tqdm import tqdm

from corpora import AUDIO, Odd, locate, new_corpus, read_items, shuffled, text_of, wording

FILES = ("LibriSQA-PartI-train.json", "LibriSQA-PartI-test.json")
FIELDS = ("speech_path", "question", "answer")
WORDINGS = (
    AUDIO + "{}",
    AUDIO + "Judging by what is read aloud: {}",
    "{} The recording will tell: " + AUDIO,
)


def train_validation(items, seed):
    """Four fifths and one fifth, as train_test_split of the library `datasets` parts and orders
    them."""
    order = np.random.default_rng(seed).permutation(len(items))
    count = math.ceil(0.2 * len(items))
    return [items[i] for i in order[count:]], [items[i] for i in order[:count]]


def add_rows(corpus, split, file, items, speech):
    """Rows of a split from [(number in the file, item)]."""
    for number, item in tqdm(items, split, unit="row", leave=False, disable=None):
        with corpus.row(f"{file}, item {number}"):
            path, question, answer = (text_of(item.get(field), field) for field in FIELDS)
            named = speech / path.removeprefix("LibriSpeech/")
            places = (named, named.with_suffix(".flac"), named.with_suffix(".wav"))
            audio = next((place for place in places if place.is_file()), None)
            if audio is None:
                raise Odd("recording missing", named)
            prompt = wording(split, WORDINGS, question).format(question)
            row = {"audio": str(audio), "prompt": prompt, "reference": answer}
            if isinstance(item.get("text"), str) and item["text"].strip():
                row["transcript"] = text_of(item["text"], "text").lower()
            corpus.rows[split].append(row)


def main(arguments=None):
    summary = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m corpora.librisqa", description=summary)
    add = parser.add_argument
    recordings = "folder LibriSpeech, or the one it is in"
    questions = f"folder with {' and '.join(FILES)}"
    seed = "of train and validation (default 0, as the official code)"
    add("--out", type=Path, required=True, help="folder to make")
    add("--librispeech", type=Path, required=True, help=recordings)
    add("--librisqa", type=Path, required=True, help=questions)
    add("--seed", type=int, default=0, help=seed)
    args = parser.parse_args(arguments)
    with new_corpus(args.out) as corpus:
        questions = locate(args.librisqa, "LibriSQA-PartI", FILES)
        speech = locate(args.librispeech, "LibriSpeech", ("train-clean-360", "test-clean"))
        train, test = (list(enumerate(read_items(questions / file), start=1)) for file in FILES)
        # Split first, skip afterwards: what is missing moves no row from one split to another.
        train, validation = train_validation(train, args.seed)
        add_rows(corpus, "train", FILES[0], train, speech)
        add_rows(corpus, "validation", FILES[0], validation, speech)
        add_rows(corpus, "test", FILES[1], test, speech)
        corpus.rows["test"] = shuffled(corpus.rows["test"])


if __name__ == "__main__":
    main()
