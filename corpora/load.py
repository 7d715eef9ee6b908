"""A stranger's corpus: recordings decoded, a folder's rows read and checked whole, fingerprints.

A corpus is a folder with train.jsonl, validation.jsonl and test.jsonl, one row of data.py a line,
audio paths relative to it.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import stat
from dataclasses import asdict
from functools import partial
from pathlib import Path

import soundfile
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from corpora import NO_SUCH_FILE, mp3
from data import AUDIO, SAMPLE_RATE, WINDOW, spoken_words
from upkeep.errors import DataError, UserError, errors_of_reading, errors_of_writing, is_lfs_pointer
from upkeep.files import is_there

# --------------------------------------------------------------------------------------------------
# A recording


class Recording(str):
    """The path of an audio file, as a row has it; the file is read when it is asked for."""

    def samples(self, max_seconds: float = math.inf) -> torch.Tensor:
        """(samples,) float32, 16 kHz mono. Raises DataError with the file's name.

        The check of a corpus and training both read recordings with it, so what passes the one
        loads in the other.
        """
        with errors_of_reading(self, "audio"):
            audio, rate = decode(self, max_seconds)
            if len(audio) * SAMPLE_RATE < WINDOW * rate:
                shortest = 1000 * WINDOW // SAMPLE_RATE
                raise DataError(f"{self} is empty, or shorter than {shortest} ms")
            if not audio.abs().max() < LOUDEST:
                raise DataError(f"{self} holds samples that are not finite, or absurdly large")
            return audio if rate == SAMPLE_RATE else resample(audio, rate)


LOUDEST = 1e15  # full scale is 1; beyond, float32 cannot hold the power spectrum
# What libsndfile's log says of a size in the header that is not the file's, and of Ogg's last page.
SIZES = re.compile(
    r"^ *(?:data|SSND|Data Size|BODY|riff|Riff size) *: (\d+) \(should be (\d+)", re.MULTILINE
)
NO_SIZE = 2**30 - 2**16  # from here on a size stands for none: that is what pipes are given
NO_LAST_PAGE = re.compile(r"Ogg ?: (?:Last page lacks|Junk after the last page)")
UNKNOWN = 2**63 - 1  # libsndfile's number of frames where the header tells none


class Content(io.BytesIO):
    def __repr__(self):
        return "it"  # in soundfile's errors, which would show an address


class Sound(soundfile.SoundFile):
    """A recording that is read once from its beginning to its end."""

    def __init__(self, content: bytes):
        super().__init__(Content(content))

    def seekable(self) -> bool:
        return False  # else soundfile seeks after every block, and some files cannot


def decode(file: str, max_seconds: float) -> tuple[torch.Tensor, int]:
    """(samples,) float32, the mean of a recording's channels, and its rate in Hz. Raises DataError
    where it is cut short or longer than max_seconds, and whatever libsndfile raises."""
    content = with_size(read_file(file))
    if content.startswith(b"OggS") and content.count(b"OggS\0\2") > 1:  # pages that begin one
        raise DataError(f"{file} is a chain of OGG recordings, of which only one would be read")
    is_mp3 = file.lower().endswith(".mp3")  # junk may hide its beginning
    with contextlib.suppress(soundfile.LibsndfileError), Sound(content) as recording:
        is_mp3 = recording.format == "MP3"
    blocks = [torch.empty(0)]
    length = rate = 0
    for part in mp3.recordings(content) if is_mp3 else [content]:
        start = length
        with Sound(part) as recording:
            if rate not in (0, recording.samplerate):
                raise DataError(f"{file} is joined of recordings of different rates")
            rate = recording.samplerate
            while length <= max_seconds * rate:
                block = recording.read(2**16, dtype="float32", always_2d=True)  # (frames, channels)
                if len(block) == 0:
                    break
                blocks.append(torch.from_numpy(block).mean(1))
                length += len(block)
            frames = recording.frames
            log = recording.extra_info
        if length > max_seconds * rate:
            raise DataError(f"{file} lasts longer than --max-audio-seconds {max_seconds:g}")
        missing = [frames - (length - start)] if frames < UNKNOWN else []
        for promised, there in SIZES.findall(log):
            if int(promised) < NO_SIZE and int(there) > 0:
                missing.append(abs(int(promised) / int(there) - 1) * length)
        if max(missing, default=0) > rate / 10 or NO_LAST_PAGE.search(log):
            raise DataError(f"{file} is cut short: it holds less than it says")
    return torch.cat(blocks), rate


def read_file(file: str) -> bytes:
    """A recording's bytes; DataError where there is none. Any other OSError is not the row's."""
    try:
        if stat.S_ISREG(os.stat(file).st_mode):
            return Path(file).read_bytes()
    except OSError as error:
        if error.errno not in NO_SUCH_FILE:
            raise
    except ValueError:  # a NUL in the name
        pass
    raise DataError(f"audio file {str(file)!r:.300} does not exist")


def with_size(content: bytes) -> bytes:
    """A WAV whose samples have no size, since it was written to a pipe, where nobody can go back and
    fill it in: with the size that stands for none."""
    at = 12  # of a chunk: name, size, content
    while content.startswith(b"RIFF") and at + 8 <= len(content):
        size = int.from_bytes(content[at + 4 : at + 8], "little")
        if content[at : at + 4] == b"data":
            return content if size else content[: at + 4] + b"\xff" * 4 + content[at + 8 :]
        at += 8 + size + size % 2
    return content


def resample(audio: torch.Tensor, rate: int) -> torch.Tensor:
    """(samples,) at `rate` Hz -> (samples,) at 16 kHz: the sinc under a Hann window, six zero
    crossings to either side, that torchaudio takes by default.

    Output n lies at n * down / up of the recording's samples. What is left of that after the point
    repeats every `up` outputs, so there are `up` short filters, and each serves every up-th output.
    """
    common = math.gcd(rate, SAMPLE_RATE)
    down = rate // common
    up = SAMPLE_RATE // common
    length = math.ceil(len(audio) * up / down)
    phases = torch.arange(min(up, length))
    cutoff = 0.99 * min(1, SAMPLE_RATE / rate)  # of half the recording's rate
    reach = math.ceil(6 / cutoff)  # samples to either side
    after_the_point = (phases * down % up) / up
    crossings = (torch.arange(-reach, reach + 2) - after_the_point[:, None]) * cutoff
    window = torch.cos(crossings.clamp(-6, 6) * math.pi / 12).square()
    filters = cutoff * torch.sinc(crossings) * window  # (phases, taps)
    taps = filters.shape[1]

    rounds = math.ceil(length / up)
    padded = F.pad(audio, (reach, rounds * down + taps - len(audio)))
    outputs = audio.new_zeros(rounds, up)
    for phase, first in enumerate((phases * down // up).tolist()):
        heard = padded[first:].unfold(0, taps, down)[:rounds]  # (rounds, taps)
        outputs[:, phase] = heard @ filters[phase]
    return outputs.flatten()[:length]


# --------------------------------------------------------------------------------------------------
# A folder of rows


def load_corpus(
    folder,
    max_seconds: float,
    skip_bad_rows: bool = False,
    splits: tuple[str, ...] = ("train", "validation", "test"),
    checked: Path = Path(os.devnull),
) -> dict[str, list[dict]]:
    """Read the splits and check every row before anything else happens; DataError lists the bad.

    checked: a file that remembers good recordings, so that they are not decoded again.
    """
    folder = Path(folder)
    corpus = {}
    bad = []
    for split in splits:
        file = folder / f"{split}.jsonl"
        rows = {}  # by line
        reasons = {}
        with errors_of_reading(file, "a manifest"):
            for number, line in enumerate(manifest_lines(file), start=1):
                if not line.strip():
                    continue
                try:
                    rows[number] = parse_row(line, folder)
                except DataError as error:
                    reasons[number] = error
                except (ValueError, RecursionError) as error:  # 5,000 digits, a thousand brackets
                    reasons[number] = f"{type(error).__name__}: {error}"
        refused = check_recordings(
            file, [row["audio"] for row in rows.values()], max_seconds, checked
        )
        corpus[split] = []
        for number, row in rows.items():
            if row["audio"] in refused:
                reasons[number] = refused[row["audio"]]
            else:
                corpus[split].append(row)
        bad += [f"{file}, line {number}: {reasons[number]}" for number in sorted(reasons)]
    if bad:
        shown = bad[:5] + (["..."] if len(bad) > 5 else [])
        summary = "\n  ".join([f"{len(bad)} bad rows", *shown])
        if not skip_bad_rows:
            raise DataError(f"{summary}\nFix them, or go on without them: --skip-bad-rows")
        print(f"skipping {summary}")
        for split, rows in corpus.items():
            if not rows:
                raise DataError(f"{folder / split}.jsonl has no good row left")
    return corpus


def manifest_lines(file: Path) -> list[bytes]:
    """The lines of a split; DataError where the file as a whole is of another kind."""
    if not is_there(file):
        raise DataError(
            f"{file} is missing: a corpus is a folder with train.jsonl, validation.jsonl, test.jsonl"
        )
    content = file.read_bytes()
    kind = json.detect_encoding(content)
    if content.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\3\4")):
        kind = "compressed (gzip or the like)"
    if is_lfs_pointer(file):
        kind = "a pointer of Git LFS, not the file itself"
    if content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        with contextlib.suppress(ValueError, RecursionError):  # only its first row begins like one
            json.loads(content)
            kind = "a JSON array"
    if not kind.startswith("utf-8"):
        raise DataError(f"{file} is {kind}; it must be UTF-8 text with one JSON object a line")
    lines = content.splitlines()
    if not any(line.strip() for line in lines):
        raise DataError(f"{file} has no rows")
    return lines


def parse_row(line: bytes, folder: Path) -> dict:
    """One line of a manifest as a row with an absolute audio path; DataError with the reason."""
    try:
        row = json.loads(line.decode("utf-8-sig"))  # a byte order mark is no harm
        json.dumps(row, ensure_ascii=False).encode()  # an escape may be half a character: "\\ud800"
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 (byte {error.start})") from None
    except UnicodeEncodeError:
        raise DataError("a \\u escape is no character") from None
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError("not a JSON object")
    row = {name: value for name, value in row.items() if value is not None}  # null: not given
    for name in ("audio", "prompt", "reference"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise DataError(f"field {name!r} is missing, empty or not a string")
    for name in ("transcript", "target", "group"):
        if not isinstance(row.get(name, ""), str):
            raise DataError(f"field {name!r} is not a string")
    slots = row.get("slots", [])
    slots = list(slots.values()) if isinstance(slots, dict) else slots
    if not isinstance(slots, list) or not all(isinstance(slot, str) for slot in slots):
        raise DataError("field 'slots' is neither a list nor an object of strings")
    for slot in slots:
        if not spoken_words(slot):
            raise DataError(f"the slot {slot!r} holds no word, so no answer can match it")
    times = row["prompt"].count(AUDIO)
    if times != 1:
        raise DataError(f"the prompt has {times} times {AUDIO}; it must have exactly one")
    return {**row, "audio": Recording(folder / row["audio"])}


def check_recordings(
    file: Path, paths: list[str], max_seconds: float, checked: Path
) -> dict[str, str]:
    """{path: reason} of a manifest's recordings that are refused. All are decoded whole, by as many
    processes as there are cores, but for those that are in the file `checked`, a line each that was
    good. What is refused is looked at again, and what cannot be read now ends the check."""
    good = remembered(checked)
    keys = {path: key_of(path) for path in sorted(set(paths))}
    unknown = [path for path, key in keys.items() if not good.get(key, math.inf) <= max_seconds]
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):  # those that this process may use
        cores = len(os.sched_getaffinity(0))
    loader = DataLoader(
        unknown,
        batch_size=16,
        num_workers=min(cores, len(unknown) // 64),  # a few are not worth a process
        collate_fn=partial(listen, max_seconds),  # runs in the workers
        generator=torch.Generator(),  # leaves the global one alone
    )
    refused = {}
    title = f"checking {file.name}"
    with (
        errors_of_reading(f"{file}: a recording", "audio"),  # a worker may be killed
        tqdm(total=len(unknown), desc=title, leave=False, disable=None) as bar,
    ):
        for heard in loader:
            lines = []
            for path, seconds, error in heard:
                if error is None:
                    lines.append("\n" + json.dumps([*keys[path], seconds]))
                elif isinstance(error, DataError):
                    refused[path] = str(error)
                else:
                    raise error
            with errors_of_writing(checked):
                checked.parent.mkdir(parents=True, exist_ok=True)
                with open(checked, "a", encoding="utf-8") as memory:
                    memory.write("".join(lines))
            bar.update(len(heard))
    return refused


def listen(max_seconds: float, paths: list[str]) -> list[tuple[str, float, UserError | None]]:
    """How many seconds each recording lasts, and what is wrong."""
    heard = []
    for path in paths:
        try:
            samples = Recording(path).samples(max_seconds)
            heard.append((path, len(samples) * 1000 // SAMPLE_RATE / 1000, None))
        except UserError as error:
            heard.append((path, math.nan, error))
    return heard


def key_of(path: str) -> tuple:
    """What a recording is known by; another libsndfile may find it otherwise."""
    size = time = None
    with contextlib.suppress(OSError, ValueError):
        status = os.stat(path)
        size, time = status.st_size, status.st_mtime_ns
    return soundfile.__libsndfile_version__, path, size, time


def remembered(checked: Path) -> dict[tuple, float]:
    """{key: seconds} of the good recordings in a file that check_recordings wrote."""
    good = {}
    with errors_of_reading(checked, "text"), contextlib.suppress(FileNotFoundError):
        for line in checked.read_bytes().splitlines():
            with contextlib.suppress(ValueError, TypeError):  # empty, or cut short
                *key, seconds = json.loads(line)
                good[tuple(key)] = seconds
    return good


def fingerprint(rows: list[dict], folder) -> str:
    """Of the rows' content, wherever their folder lies: neither a run nor a base goes on with other
    data."""
    digest = hashlib.sha256()
    for row in rows:
        audio = row["audio"]
        if isinstance(audio, str):
            heard = [os.path.relpath(audio, folder), *ends(audio)]
        else:  # synthetic speech is known by what it is made from
            heard = asdict(audio)
        digest.update(json.dumps(row | {"audio": heard}, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def ends(file: str, size: int = 2**13) -> tuple[int, str]:
    """A file's length in bytes, and a digest of its first and last `size`."""
    with errors_of_reading(file, "a file"), open(file, "rb") as content:
        digest = hashlib.sha256(content.read(size))
        length = content.seek(0, os.SEEK_END)
        content.seek(max(size, length - size))
        digest.update(content.read())
    return length, digest.hexdigest()
