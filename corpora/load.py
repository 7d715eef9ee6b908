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
from dataclasses import asdict
from functools import partial
from pathlib import Path

import soundfile
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import AUDIO, SAMPLE_RATE, WINDOW, spoken_words
from upkeep.errors import DataError, reading, writing

# --------------------------------------------------------------------------------------------------
# A recording


class Recording(str):
    """The path of an audio file, as a row has it; the file is read when it is asked for."""

    def samples(self, max_seconds: float = math.inf) -> torch.Tensor:
        """(samples,) float32, 16 kHz mono. Raises DataError with the file's name.

        The check of a corpus and training both read recordings with it, so what passes the one
        loads in the other.
        """
        with reading(self, "audio"):
            audio, rate = decode(self, max_seconds)
        if len(audio) * SAMPLE_RATE < WINDOW * rate:
            raise DataError(f"{self} is empty, or shorter than {1000 * WINDOW // SAMPLE_RATE} ms")
        if not audio.abs().max() < LOUDEST:
            raise DataError(f"{self} holds samples that are not finite, or absurdly large")
        return audio if rate == SAMPLE_RATE else resample(audio, rate)


LOUDEST = 1e15  # full scale is 1; beyond, float32 cannot hold the power spectrum
# What libsndfile's log says of a file that ends too early: a size in the header, or Ogg's last page.
PROMISED_BYTES = re.compile(
    r"^ *(?:data|SSND|Data Size|BODY|riff|Riff size) *: (\d+) \(should be", re.MULTILINE
)
NO_LAST_PAGE = re.compile(r"Ogg ?: (?:Last page lacks|Junk after the last page)")


def decode(file: str, max_seconds: float) -> tuple[torch.Tensor, int]:
    """(samples,) float32, the mean of a recording's channels, and its rate in Hz. Raises DataError
    where it is cut short or longer than max_seconds, and whatever libsndfile raises."""
    if not Path(file).is_file():
        raise DataError(f"audio file {file} does not exist")
    source = file
    with open(file, "rb") as raw:
        start = raw.read(2**16)
        at = start.find(b"data")
        if start.startswith(b"RIFF") and start[at : at + 8] == b"data\0\0\0\0":
            # Written to a pipe, where nobody can go back and fill in the size.
            whole = bytearray(start + raw.read())
            whole[at + 4 : at + 8] = b"\xff" * 4
            source = io.BytesIO(whole)
    blocks = [torch.empty(0)]
    length = 0
    with soundfile.SoundFile(source) as recording:
        rate = recording.samplerate
        # How many frames there are is known at the end: of an MP3 libsndfile may only guess it.
        while length <= max_seconds * rate:
            block = recording.read(2**16, dtype="float32", always_2d=True)  # (frames, channels)
            if len(block) == 0:
                break
            blocks.append(torch.from_numpy(block).mean(1))
            length += len(block)
        frames = recording.frames
        is_mp3 = recording.format == "MP3"
        log = recording.extra_info
    if length > max_seconds * rate:
        raise DataError(f"{file} lasts longer than --max-audio-seconds {max_seconds:g}")
    # An MP3 without either header does not say how long it is: libsndfile only guessed.
    frames_known = not is_mp3 or b"Xing" in start or b"Info" in start
    frames_missing = frames_known and frames - length > rate / 10
    # A size from 2 GB on stands for none: that is what a pipe is given.
    sizes = [int(size) for size in PROMISED_BYTES.findall(log)]
    bytes_missing = any(size < 2**31 - 2**16 for size in sizes)
    if frames_missing or bytes_missing or NO_LAST_PAGE.search(log):
        raise DataError(f"{file} is cut short: it holds less than it says")
    return torch.cat(blocks), rate


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
    checked: Path | None = None,
) -> dict[str, list[dict]]:
    """Read the splits and check every row before anything else happens; DataError lists the bad.

    checked: a file that remembers what was found, so that unchanged recordings are not decoded again.
    """
    folder = Path(folder)
    corpus = {}
    bad = []
    for split in splits:
        file = folder / f"{split}.jsonl"
        rows = {}  # by line
        reasons = {}
        for number, line in enumerate(manifest_lines(file), start=1):
            if not line.strip():
                continue
            try:
                rows[number] = parse_row(line, folder)
            except DataError as error:
                reasons[number] = error
            except Exception as error:  # 5,000 digits, a thousand brackets: no row ends the check
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
    with reading(file, "a manifest"):
        if not file.is_file():
            raise DataError(
                f"{file} is missing: a corpus is a folder with train.jsonl, validation.jsonl, "
                "test.jsonl"
            )
        content = file.read_bytes()
    kind = json.detect_encoding(content)
    if content.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\3\4")):
        kind = "compressed (gzip or the like)"
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
    file: Path, paths: list[str], max_seconds: float, checked: Path | None
) -> dict[str, str]:
    """{path: reason} of a manifest's recordings that are refused. All are decoded whole, by
    as many processes as there are cores, unless the file `checked` remembers the same recordings."""
    paths = sorted(set(paths))
    found = [soundfile.__libsndfile_version__, max_seconds]
    for path in paths:
        status = None
        with contextlib.suppress(OSError, ValueError):
            status = os.stat(path)
        found.append([path, status and status.st_size, status and status.st_mtime_ns])
    state = hashlib.sha256(json.dumps(found).encode()).hexdigest()
    remembered = {}
    if checked is not None:
        with contextlib.suppress(OSError, ValueError):  # none yet, or it was cut short
            remembered = json.loads(checked.read_text(encoding="utf-8"))
    name = str(file.resolve())
    if remembered.get(name, {}).get("state") == state:
        return remembered[name]["refused"]

    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):  # those that this process may use
        cores = len(os.sched_getaffinity(0))
    loader = DataLoader(
        paths,
        batch_size=16,
        num_workers=min(cores, len(paths) // 64),  # a few are not worth a process
        collate_fn=partial(refusals, max_seconds),  # runs in the workers
        generator=torch.Generator(),  # leaves the global one alone
    )
    refused = {}
    with tqdm(total=len(paths), desc=f"checking {file.name}", leave=False, disable=None) as bar:
        for count, reasons in loader:
            refused |= reasons
            bar.update(count)
    if checked is not None:
        remembered[name] = {"state": state, "refused": refused}
        with writing(checked):
            checked.parent.mkdir(parents=True, exist_ok=True)
            checked.write_text(json.dumps(remembered), encoding="utf-8")
    return refused


def refusals(max_seconds: float, paths: list[str]) -> tuple[int, dict[str, str]]:
    """How many recordings were decoded, and why some of them are refused."""
    reasons = {}
    for path in paths:
        try:
            Recording(path).samples(max_seconds)
        except DataError as error:
            reasons[path] = str(error)
    return len(paths), reasons


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
    with reading(file, "a file"), open(file, "rb") as content:
        digest = hashlib.sha256(content.read(size))
        length = content.seek(0, os.SEEK_END)
        content.seek(max(size, length - size))
        digest.update(content.read())
    return length, digest.hexdigest()
