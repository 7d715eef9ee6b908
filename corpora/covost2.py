r"""Speech translation from CoVoST 2: Common Voice recordings and their translations, English to
German and 35 more.

    python -m corpora.covost2 --common-voice data/cv-corpus-4/en \
        --translations data/covost_v2.en_de.tsv --out data/ast

Get the translations from CoVoST's page, facebookresearch/covost on GitHub (Wang et al. 2020;
licence CC0 by its README, CC BY-NC 4.0 by the dataset's card on Hugging Face), and the recordings
from Mozilla Common Voice (CC0), source language English, in the release that CoVoST 2 was made
from: Corpus 4, 2019-12-10.

    covost_v2.en_de.tsv         columns path, translation, split; the file's name tells the two
                                languages
    en/                         --common-voice names this folder or the one it is in
        validated.tsv           columns path, sentence and others
        clips/*.mp3

Splits are CoVoST's (its get_covost_splits.py, version 2), and LEAF's official code takes the same:
rows that are in both files; `train` and `train_covost` are train, `dev` is validation. For en_de
they have 289,430, 15,531 and 15,531 rows (the card). As there, a quotation mark in a TSV file is a
character like any other, and a backslash escapes the next one. Rows are shuffled, for train.py may
evaluate on the first ones only, and those might be of few speakers.

Some MP3 files of Corpus 4 are empty, and another release may lack some of the recordings. Both are
left out and counted; only a split with nothing left is refused. Compare the counts before you
compare scores. Rows point to the MP3 files by absolute path: nothing is copied. `sentence` becomes
the transcript, as it was written.

The prompts' wording is ours. LEAF's (Grimoid/LEAF, commit c7623e3,
scripts/data_prep/prepare_covost2_en_de*.py) is one of three for training, chosen by a hash of the
sentence, and always the same for evaluation; here a hash chooses in train and validation, and the
test split has one wording.
"""

import argparse
import csv
import re
from pathlib import Path

from tqdm import tqdm

from corpora import AUDIO, SPLITS, locate, new_corpus, refuse, shuffled, wording

SPLIT_OF = {"train": "train", "train_covost": "train", "dev": "validation", "test": "test"}
LANGUAGES = {
    "ar": "Arabic", "ca": "Catalan", "cy": "Welsh", "de": "German", "en": "English",
    "et": "Estonian", "fa": "Persian", "id": "Indonesian", "ja": "Japanese", "lv": "Latvian",
    "mn": "Mongolian", "sl": "Slovenian", "sv-SE": "Swedish", "ta": "Tamil", "tr": "Turkish",
    "zh-CN": "Chinese",
}  # fmt: skip
WORDINGS = (
    AUDIO + "Say this in {}.",
    AUDIO + "Write in {} what the speaker says.",
    "How is this put in {}? " + AUDIO,
)


def read_tsv(file, columns):
    """Yield the named columns of each line."""
    with open(file, encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE, escapechar="\\")
        try:
            header = next(reader, [])
            if not set(columns) <= set(header):
                found = ", ".join(header)[:200]
                refuse(f"{file}: expected the columns {', '.join(columns)}, found {found}")
            places = [header.index(column) for column in columns]
            for fields in reader:
                if fields and not max(places) < len(fields) <= len(header):
                    place = f"{file}, line {reader.line_num}"
                    refuse(f"{place}: expected {len(header)} fields, found {len(fields)}")
                if fields:
                    yield [fields[i].strip() for i in places]
        except (csv.Error, UnicodeDecodeError) as error:
            refuse(f"{file}, after line {reader.line_num}: {error}")


def build(voice, translations, language):
    """{split: rows}. Prints what is left out."""
    wanted = {
        path: (translation, SPLIT_OF[split])
        for path, translation, split in read_tsv(translations, ("path", "translation", "split"))
        if split in SPLIT_OF
    }
    rows = {split: [] for split in SPLITS}
    silent = []
    empty = []
    spoken = read_tsv(voice / "validated.tsv", ("path", "sentence"))
    for path, sentence in tqdm(spoken, unit="clip", leave=False, disable=None):
        if path not in wanted:
            continue
        translation, split = wanted.pop(path)
        audio = voice / "clips" / path
        if not audio.is_file() or not audio.stat().st_size:
            silent.append(path)
        elif not translation:
            empty.append(path)
        else:
            prompt = wording(split, WORDINGS, sentence).format(language)
            row = {"audio": str(audio), "prompt": prompt, "reference": translation}
            if sentence:
                row["transcript"] = sentence
            rows[split].append(row)
    reasons = {
        "not in validated.tsv": list(wanted),
        "missing or empty in clips": silent,
        "without translation": empty,
    }
    for reason, paths in reasons.items():
        if paths:
            print(f"left out: {len(paths)} recordings {reason}, e.g. {', '.join(paths[:3])}")
    return {split: shuffled(rows[split]) for split in SPLITS}


def main(arguments=None):
    summary = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m corpora.covost2", description=summary)
    add = parser.add_argument
    recordings = "folder with validated.tsv and clips"
    add("--out", type=Path, required=True, help="folder to make")
    add("--common-voice", type=Path, required=True, help=recordings)
    add("--translations", type=Path, required=True, help="covost_v2.SOURCE_TARGET.tsv")
    args = parser.parse_args(arguments)
    name = re.fullmatch(r"covost_v2\.([A-Za-z-]+)_([A-Za-z-]+)\.tsv", args.translations.name)
    if not name or name[2] not in LANGUAGES or not args.translations.is_file():
        wanted = "a file covost_v2.SOURCE_TARGET.tsv, unpacked, e.g. covost_v2.en_de.tsv"
        refuse(f"{args.translations}: expected {wanted}")
    with new_corpus(args.out) as rows:
        voice = locate(args.common_voice, name[1], ("validated.tsv", "clips"))
        rows.update(build(voice, args.translations, LANGUAGES[name[2]]))


if __name__ == "__main__":
    main()
