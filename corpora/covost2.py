r"""Speech translation from CoVoST 2: Common Voice recordings and their translations, English to
German and 35 more.

    python -m corpora.covost2 --common-voice data/cv-corpus-4/en \
        --translations data/covost_v2.en_de.tsv --out data/ast

Get the translations from CoVoST's page, facebookresearch/covost on GitHub (Wang et al. 2020;
licence CC0 by its README, CC BY-NC 4.0 by the dataset's card on Hugging Face), unpacked from
https://dl.fbaipublicfiles.com/covost/covost_v2.en_de.tsv.tar.gz, and the recordings from Mozilla
Common Voice (CC0), source language English: Corpus 4 (2019-12-10), which CoVoST 2 was made from, or
Scripted Speech 24.0 (2025-12-05), which LEAF's official code fetches (87.7 GB, from
datacollective.mozillafoundation.org, dataset cmj8u3p1w0075nxxbe8bedl00, with an account).

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

Sizes differ between the releases: one may lack a recording that the other has, or no longer count
it as validated, and some MP3 files of Corpus 4 are empty. All that is left out is counted; compare
the counts before you compare scores. Rows point to the MP3 files by absolute path: nothing is
copied. `sentence` becomes the transcript, as it was written.

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

from corpora import (
    AUDIO,
    SPLITS,
    Odd,
    locate,
    new_corpus,
    read_table,
    refuse,
    shuffled,
    text_of,
    wording,
)

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


def read_tsv(file, columns, corpus):
    """Yield the named columns of each line."""
    # A byte that is not UTF-8 spoils its own line only.
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as lines:
        dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "escapechar": "\\"}
        yield from read_table(file, lines, columns, corpus, **dialect)


def build(corpus, voice, translations, language):
    """Fill the corpus."""
    columns = ("path", "translation", "split")
    wanted = {
        path: (translation, SPLIT_OF[split])
        for path, translation, split in read_tsv(translations, columns, corpus)
        if split in SPLIT_OF
    }
    spoken = read_tsv(voice / "validated.tsv", ("path", "sentence"), corpus)
    for path, sentence in tqdm(spoken, unit="clip", leave=False, disable=None):
        if path not in wanted:
            continue
        translation, split = wanted.pop(path)
        with corpus.row(path):
            audio = voice / "clips" / path
            if not audio.is_file() or not audio.stat().st_size:
                raise Odd("recording missing or empty in clips")
            translation = text_of(translation, "translation")
            transcript = {"transcript": text_of(sentence, "sentence")} if sentence else {}
            prompt = wording(split, WORDINGS, sentence).format(language)
            row = {"audio": str(audio), "prompt": prompt, "reference": translation}
            corpus.rows[split].append({**row, **transcript})
    if wanted:
        corpus.left_out["not in validated.tsv"] += wanted
    corpus.rows = {split: shuffled(corpus.rows[split]) for split in SPLITS}


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
    with new_corpus(args.out) as corpus:
        voice = locate(args.common_voice, name[1], ("validated.tsv", "clips"))
        build(corpus, voice, args.translations, LANGUAGES[name[2]])


if __name__ == "__main__":
    main()
