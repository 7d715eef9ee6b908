"""One short script per real corpus; each writes a folder of JSON Lines manifests. Here is what they
share."""

import hashlib
import json
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np

AUDIO = "<|audio|>"  # as data.AUDIO; importing data would wait for torch
SPLITS = ("train", "validation", "test")


def refuse(message):
    """Something the user can mend: one line on stderr, exit code 2."""
    print(message, file=sys.stderr)
    sys.exit(2)


def locate(folder, inner, names):
    """The folder that holds `names`: `folder`, or the folder `inner` in it, whichever of the two
    the user named."""
    place = folder / inner if (folder / inner).is_dir() else folder
    if not all((place / name).exists() for name in names):
        there = ["no such folder"]
        if place.is_dir():
            there = sorted(path.name for path in place.iterdir())
        found = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "") or "nothing"
        refuse(f"{place}: expected {' and '.join(names)} in it, found {found}")
    return place.resolve()


def wording(split, wordings, text):
    """A row's prompt: the first wording in the test split, elsewhere the one that a hash of the
    row's text picks."""
    if split == "test":
        return wordings[0]
    return wordings[hashlib.sha256(text.encode()).digest()[0] % len(wordings)]


def shuffled(rows):
    """The rows in an order that mixes the speakers, always the same."""
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]


@contextmanager
def new_corpus(out):
    """A dict to fill with {split: rows}, written as the folder `out` in the end: whole, or not at
    all."""
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        refuse(f"{out} is there already and not empty: remove it or choose another --out")
    rows = {}
    yield rows
    for split in SPLITS:
        if not rows[split]:
            refuse(f"{out} is not made: no row is left for the {split} split")
    out.parent.mkdir(parents=True, exist_ok=True)
    # Built beside its place and renamed once: an interrupted build leaves nothing half-written.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        folder = Path(temporary) / "corpus"
        folder.mkdir()
        for split in SPLITS:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows[split]]
            (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
            print(f"{split}: {len(lines)} rows, the first {lines[0]}", end="")
        folder.rename(out)
    print(f"wrote {out}")
