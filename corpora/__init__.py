"""One short script per real corpus; each writes a folder of JSON Lines manifests. Here is what they
share."""

import collections
import csv
import errno
import hashlib
import io
import json
import re
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile

AUDIO = "<|audio|>"  # as data.AUDIO; importing data would wait for torch
NO_SUCH_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}
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


class Odd(ValueError):
    """Odd(reason, *found): a publisher's row that is no use. It is counted under the reason."""


class Corpus:
    """What a script fills: `rows` of each split, and `folder` with audio of its own, if any."""

    def __init__(self, folder):
        self.folder = folder
        self.rows = {split: [] for split in SPLITS}
        self.left_out = collections.defaultdict(list)  # {reason: names of rows}

    @contextmanager
    def row(self, name):
        """`with corpus.row("train.json, item 3"):` a row is made. If that fails it is left out and
        counted, whatever a stranger's file made it raise: one row never ends a build. That a file
        cannot be read now (no rights, no handle, no memory) is not the row's fault, and does."""
        try:
            yield
        except Odd as odd:
            reason, *found = odd.args
            self.left_out[reason].append(": ".join([name, *map(str, found)]))
        except Exception as error:
            not_now = isinstance(error, (OSError, MemoryError))
            not_now |= getattr(error, "code", 0) == 2  # libsndfile's for the system's errors
            if not_now and getattr(error, "errno", None) not in NO_SUCH_FILE:
                refuse(f"{name}: {type(error).__name__}: {error}")
            reason = f"not as expected ({type(error).__name__})"
            self.left_out[reason].append(f"{name}: {error}")

    def print_left_out(self):
        """In ASCII, for a terminal may know no more."""
        for reason, names in self.left_out.items():
            some = "; ".join(names[:3])[:300].encode("ascii", "backslashreplace").decode()
            print(f"left out: {len(names)} rows, {reason}, e.g. {some}")

    def write_flac(self, name, samples, rate):
        """Write (samples,) floats as `folder`/name, 16 bit."""
        encoded = io.BytesIO()
        soundfile.write(encoded, samples, rate, format="FLAC", subtype="PCM_16")
        try:
            (self.folder / name).write_bytes(encoded.getbuffer())
        except OSError as error:  # a full disk is not the row's fault
            refuse(f"{self.folder / name}: {error}")


@contextmanager
def new_corpus(out):
    """A Corpus to fill, written as the folder `out` in the end: whole, or not at all."""
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        refuse(f"{out} is there already and not empty: remove it or choose another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Built beside its place and renamed once: an interrupted build leaves nothing half-written.
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
            corpus = Corpus(Path(temporary) / "corpus")
            corpus.folder.mkdir()
            yield corpus
            for split, rows in corpus.rows.items():
                if not rows:
                    corpus.print_left_out()
                    refuse(f"{out} is not made: no row is left for the {split} split")
                lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
                (corpus.folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
            corpus.folder.rename(out)
    except (OSError, soundfile.SoundFileError) as error:
        refuse(f"{out} is not made: {error}")
    corpus.print_left_out()
    for split, rows in corpus.rows.items():
        print(f"{split}: {len(rows)} rows, the first {json.dumps(rows[0])}")
    print(f"wrote {out}")


# --------------------------------------------------------------------------------------------------
# Publishers' files


def text_of(value, what):
    """A text without the space around it; Odd where there is none, or none that can be written."""
    if not isinstance(value, str) or not value.strip():
        raise Odd(f"no {what}")
    if re.search("[\ud800-\udfff]", value):  # half a character, or a byte that is not UTF-8
        raise Odd(f"{what} is not Unicode")
    return value.strip()


def read_items(file):
    """The items of a file that is one JSON list."""
    try:
        items = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        # Not JSON, or perhaps not even UTF-8.
        refuse(f"{file} is not JSON ({error}); download it again")
    if not isinstance(items, list):
        refuse(f"{file}: expected a list, found {str(items)[:80]}")
    return items


def read_table(file, lines, columns, corpus, **dialect):
    """Yield the named columns of each line, as csv reads lines of this dialect."""
    lines = iter(lines)
    header = next(csv.reader([next(lines, "")], **dialect), [])
    if not set(columns) <= set(header):
        found = ", ".join(header)[:200]
        refuse(f"{file}: expected the columns {', '.join(columns)}, found {found}")
    places = [header.index(column) for column in columns]
    for number, line in enumerate(lines, start=2):
        with corpus.row(f"{file.name}, line {number}"):
            fields = next(csv.reader([line], **dialect), [])
            if fields and not max(places) < len(fields) <= len(header):
                raise Odd(f"other fields than the header's {len(header)}")
            if fields:
                yield [fields[i].strip() for i in places]
