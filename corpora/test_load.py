"""corpora/load.py: recordings of any kind, a folder checked whole, fingerprints."""

import errno
import gzip
import io
import json
import math
import os
import random
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader

import data
from corpora import load
from data import AUDIO
from tests.helpers import first_run, near, rand, seeded, write_corpus, write_tone
from upkeep.errors import DataError, UserError

__all__ = ["first_run", "seeded"]  # fixtures


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
def test_any_audio_becomes_16_khz_mono(kind, rate, tmp_path):
    for channels in (1, 2):
        write_tone(tmp_path / f"tone.{kind}", 1.3, rate, channels)
        line = json.dumps({"audio": f"tone.{kind}", "prompt": AUDIO + "?", "reference": "a"})
        audio = load.parse_row(line.encode(), tmp_path)["audio"].samples(30)
        assert audio.dtype == torch.float32 and audio.ndim == 1
        assert len(audio) == pytest.approx(1.3 * 16000, abs=1 if kind in ("wav", "flac") else 1200)
        spectrum = torch.fft.rfft(audio[4000:12000]).abs() / 4000  # 2 Hz a bin
        assert spectrum.argmax() == 220
        assert spectrum[220].item() == pytest.approx(0.5 / channels, abs=0.05)
    for samples in (np.zeros(399), np.full(1000, np.nan), np.zeros(0)):
        soundfile.write(tmp_path / "bad.wav", samples, 16000, subtype="FLOAT")
        with pytest.raises(DataError, match="bad.wav"):
            load.Recording(tmp_path / "bad.wav").samples()


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 24000, 44100, 48000, 96000])
@pytest.mark.parametrize("length", [1, 401, 5003])
def test_resampling_is_torchaudios(rate, length):
    functional = pytest.importorskip("torchaudio.functional")
    audio = rand(length) * 2 - 1
    near(load.resample(audio, rate), functional.resample(audio, rate, 16000), atol=1e-3, rtol=0)


@pytest.mark.parametrize("rate", [15999, 44101, 999983])
def test_a_rate_without_a_common_factor(rate):
    """Nothing repeats within a second: torchaudio would need gigabytes."""
    audio = torch.sin(2 * math.pi * 440 * torch.arange(rate // 2) / rate)
    got = load.resample(audio, rate)
    want = torch.sin(2 * math.pi * 440 * torch.arange(len(got)) / 16000)
    assert len(got) == math.ceil(len(audio) * 16000 / rate)
    near(got[100:-100], want[100:-100], atol=2e-3, rtol=0)


def noisy_tone(seconds=2.0, rate=16000):
    noise = 0.05 * np.random.default_rng(0).standard_normal(round(seconds * rate))
    return 0.3 * np.sin(2 * np.pi * 300 * np.arange(len(noise)) / rate) + noise


def recording(kind, change=bytes, samples=None, rate=16000, **options):
    """A function that writes a file: `samples` as soundfile encodes them, changed as bytes."""

    def write(path):
        audio = noisy_tone(rate=rate) if samples is None else samples
        soundfile.write(path, audio, rate, format=kind, **options)
        path.write_bytes(change(path.read_bytes()))

    return write


def without_header(mp3):
    """As ffmpeg writes to a pipe: no Info frame, so that libsndfile has to guess the length."""
    second = mp3.index(mp3[:2], 4)  # frames begin alike
    assert b"Info" in mp3[:second] or b"Xing" in mp3[:second]
    return mp3[second:]


def with_size(value):
    return lambda wav: wav[:40] + value.to_bytes(4, "little") + wav[44:]


def flipped(content):
    middle = len(content) // 2
    return (
        content[:middle] + bytes(b ^ 0x5A for b in content[middle:][:400]) + content[middle + 400 :]
    )


def part(share):
    return lambda content: content[: int(len(content) * share)]


def with_chunk(wav, name, content):
    """Before the format."""
    return wav[:12] + name + len(content).to_bytes(4, "little") + content + wav[12:]


def of_unknown_length(flac):
    """As an encoder writes to a pipe: no number of samples, no checksum of them."""
    assert flac[:4] == b"fLaC"
    return flac[:21] + bytes([flac[21] & 0xF0]) + bytes(20) + flac[42:]


def id3(text, size):
    """A tag with a text at its beginning."""
    head = bytes(size >> shift & 127 for shift in (21, 14, 7, 0))
    return b"ID3\4\0\0" + head + text.encode().ljust(size, b"\0")


def with_count(mp3, count):
    """Another number of frames in the first frame; None: it has none at all."""
    at = mp3.index(b"Xing") if b"Xing" in mp3 else mp3.index(b"Info")
    flags = mp3[at + 7] & ~1 if count is None else mp3[at + 7]
    return mp3[: at + 7] + bytes([flags]) + (count or 0).to_bytes(4, "big") + mp3[at + 12 :]


def mp3_of(rate):
    with io.BytesIO() as file:
        soundfile.write(file, noisy_tone(rate=rate), rate, format="MP3")
        return file.getvalue()


def holed(mp3):
    """Without its headers' first bytes in the middle, for a second."""
    middle = len(mp3) // 2
    return mp3[:middle] + bytes(len(mp3) // 4) + mp3[middle + len(mp3) // 4 :]


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
VBR = {"kind": "MP3", "bitrate_mode": "VARIABLE"}
MP3 = {"kind": "MP3", "rate": 32000, "bitrate_mode": "CONSTANT", "compression_level": 0.5}
QUIET_FIRST = np.concatenate([np.zeros(16000), noisy_tone(1.5, 32000)])
USABLE = {
    "mp3 without header": recording(**MP3, change=without_header),
    "mp3 of varying bitrate without header": recording(  # its length is guessed twice too long
        **MP3 | {"bitrate_mode": "VARIABLE"}, change=without_header, samples=QUIET_FIRST
    ),
    "gsm": recording("WAV", rate=8000, subtype="GSM610"),
    "g721": recording("AU", subtype="G721_32"),
    "opus": recording("OGG", subtype="OPUS"),
    "wav of a pipe, 0": recording("WAV", with_size(0)),
    "wav of a pipe, -1": recording("WAV", with_size(2**32 - 1)),
    "wav of a pipe, 2 GB": recording("WAV", with_size(2**31 - 37)),
    "aiff": recording("AIFF"),
    "dwvw": recording("AIFF", subtype="DWVW_16"),  # nobody can seek in it
    "loud": recording("WAV", samples=noisy_tone() * 3e4, subtype="FLOAT"),
    "prime rate": recording("WAV", rate=44101),
    "wav of a pipe, 1 GB": recording("WAV", with_size(2**30 - 37)),
    "wav of a pipe behind a chunk that holds a size of 0": recording(
        "WAV", lambda wav: with_chunk(with_size(0)(wav), b"LIST", b"data\0\0\0\0")
    ),
    "wav of a pipe behind a large chunk": recording(
        "WAV", lambda wav: with_chunk(with_size(0)(wav), b"JUNK", bytes(70_000))
    ),
    "wav with 44 bytes less than it says": recording("WAV", with_size(64_044)),
    "flac of a pipe": recording("FLAC", of_unknown_length),
    "joined mp3": recording(**VBR, samples=noisy_tone(1.0), change=lambda mp3: 2 * mp3),
    "joined mp3 with tags": recording(
        **VBR, samples=noisy_tone(1.0), change=lambda mp3: 2 * (id3("Info", 300) + mp3)
    ),
    "joined mp3, the second without a header": recording(
        **VBR, samples=noisy_tone(1.0), change=lambda mp3: mp3 + without_header(mp3)
    ),
    "mp3 of varying bitrate without header, loud first": recording(
        **VBR, samples=noisy_tone()[::-1] * np.linspace(3, 0.1, 32000) ** 2, change=without_header
    ),
    "mp3 whose header counts too few": recording(**VBR, change=lambda mp3: with_count(mp3, 9)),
    "mp3 whose header counts nothing": recording(**VBR, change=lambda mp3: with_count(mp3, None)),
    "mp3 with a word of headers in its tag": recording(
        **MP3, change=lambda mp3: id3("Information", 40_000) + without_header(mp3)
    ),
    "mp3 behind zeros": recording(**MP3, change=lambda mp3: bytes(3000) + mp3),
    "mp3 before tags": recording(**MP3, change=lambda mp3: mp3 + b"TAG" + bytes(125)),
}
REFUSED = {
    "absurd": ("absurd", recording("WAV", samples=noisy_tone() * 1e25, subtype="FLOAT")),
    "1e300": ("not finite", recording("WAV", samples=noisy_tone() * 1e300, subtype="DOUBLE")),
    "infinite": ("not finite", recording("CAF", samples=np.full(999, np.inf), subtype="FLOAT")),
    "damaged flac": ("cannot be read", recording("FLAC", flipped)),
    "cut wav": ("cut short", recording("WAV", part(0.9))),
    "cut gsm": ("cut short", recording("WAV", part(0.9), rate=8000, subtype="GSM610")),
    "cut aiff": ("cut short", recording("AIFF", part(0.9))),
    "cut au": ("cut short", recording("AU", part(0.9))),
    "cut caf": ("cut short", recording("CAF", part(0.95))),
    "cut flac": ("cannot be read", recording("FLAC", part(0.9))),
    "cut vorbis": ("cut short", recording("OGG", part(0.9))),
    "cut opus": ("cut short", recording("OGG", part(0.9), subtype="OPUS")),
    "cut mp3 with header": ("cut short", recording(**MP3, change=part(0.8))),
    "raw": ("cannot be read", recording("RAW", subtype="PCM_16")),
    "cut joined mp3": ("cut short", recording(**VBR, change=lambda mp3: 2 * mp3[:-4000])),
    "mp3 of two rates": (
        "different rates",
        recording(**VBR, change=lambda mp3: mp3 + mp3_of(24000)),
    ),
    "mp3 with a hole": ("no MP3", recording(**MP3, change=lambda mp3: holed(without_header(mp3)))),
    "chained vorbis": ("a chain of OGG", recording("OGG", change=lambda ogg: 2 * ogg)),
    "chained opus": ("a chain of OGG", recording("OGG", lambda ogg: 2 * ogg, subtype="OPUS")),
    "lfs pointer": ("Git LFS.*git lfs pull", lambda path: path.write_text(LFS_POINTER)),
    "a header alone": ("empty", recording("WAV", samples=np.zeros(0))),
    "too long": ("--max-audio-seconds 3", recording("WAV", samples=noisy_tone(3.1))),
}


def corpus_with(folder, name, **fields):
    """One split of three rows; the audio of the second is `name`."""
    write_tone(folder / "good.wav", 0.5, 16000)
    rows = [{"audio": "good.wav", "prompt": AUDIO + "?", "reference": "a"} for _ in range(3)]
    rows[1] |= {"audio": name, **fields}
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("name", USABLE)
def test_what_passes_the_check_loads(name, tmp_path):
    file = "odd." + ("mp3" if "mp3" in name else "sound")
    USABLE[name](tmp_path / file)
    rows = load.load_corpus(corpus_with(tmp_path, file), 3, splits=("test",))["test"]
    audio = rows[1]["audio"].samples()
    assert len(audio) == pytest.approx(32000, abs=2304)  # two frames of an MP3 at 32 kHz
    power = torch.fft.rfft(audio[8000:24000]).abs()  # 1 Hz a bin
    assert power.argmax() == 300 and data.log_mel(audio).isfinite().all()


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_load_is_refused_by_line(name, tmp_path, capsys):
    reason, write = REFUSED[name]
    file = "odd." + ("raw" if name == "raw" else "sound")
    write(tmp_path / file)
    corpus = corpus_with(tmp_path, file)
    with pytest.raises(DataError, match=rf"1 bad rows\n.*test.jsonl, line 2: .*{file}.*{reason}"):
        load.load_corpus(corpus, 3, splits=("test",))
    assert len(load.load_corpus(corpus, 3, True, ("test",))["test"]) == 2
    assert "skipping 1 bad rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    "kind, content",
    [
        ("a JSON array", lambda lines: b"[\n" + b",\n".join(lines) + b"]"),
        ("a JSON array", lambda lines: b"[" + b",".join(lines) + b"]"),
        ("compressed", lambda lines: gzip.compress(b"\n".join(lines))),
        ("utf-16", lambda lines: b"\n".join(lines).decode().encode("utf-16")),
        ("utf-16-le", lambda lines: b"\n".join(lines).decode().encode("utf-16-le")),
        ("a pointer of Git LFS", lambda lines: LFS_POINTER.encode()),
    ],
)
def test_a_manifest_of_another_kind_is_told_once(kind, content, tmp_path):
    lines = (corpus_with(tmp_path, "good.wav") / "test.jsonl").read_bytes().splitlines()
    (tmp_path / "test.jsonl").write_bytes(content(lines))
    with pytest.raises(DataError, match=f"test.jsonl is {kind}.*; it must be") as error:
        load.load_corpus(tmp_path, 3, splits=("test",))
    assert "\n" not in str(error.value)


def corpus_of(folder, count):
    """One split of short good recordings; what is to be called to check it."""
    rows = []
    for i in range(count):
        write_tone(folder / f"{i}.wav", 0.4, 16000)
        rows.append({"audio": f"{i}.wav", "prompt": AUDIO + "?", "reference": "a"})
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return partial(load.load_corpus, folder, splits=("test",), checked=folder / "of" / "file")


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that are decoded, in this process."""
    names = []

    def decode(file, max_seconds, original=load.decode):
        names.append(Path(file).name)
        return original(file, max_seconds)

    monkeypatch.setattr(load, "decode", decode)
    monkeypatch.setattr(load, "DataLoader", lambda *a, num_workers, **k: DataLoader(*a, **k))
    return names


def test_what_was_checked_is_remembered(tmp_path, request, monkeypatch):
    """By several processes, in order. What is unchanged and good is not decoded a second time; what
    was refused, what is new and what changed is, and nothing else."""
    check = corpus_of(tmp_path, 130)  # enough for two processes
    for i in (7, 100):
        content = (tmp_path / f"{i}.wav").read_bytes()
        (tmp_path / f"{i}.wav").write_bytes(part(0.5)(content))
    torch.manual_seed(0)
    words = "(?s)2 bad rows.*line 8: .*cut short.*line 101: .*cut short"
    with pytest.raises(DataError, match=words):
        check(3)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))  # the check draws no random number of the run's
    decoded = request.getfixturevalue("decoded")
    with pytest.raises(DataError, match=words):
        check(3)
    assert decoded == ["100.wav", "7.wav"]  # the refused alone: it may have been mended
    write_tone(tmp_path / "7.wav", 0.4, 16000)
    write_tone(tmp_path / "50.wav", 0.5, 16000)
    decoded.clear()
    assert len(check(3, skip_bad_rows=True)["test"]) == 129
    assert decoded == ["100.wav", "50.wav", "7.wav"]
    decoded.clear()
    assert len(check(0.4, skip_bad_rows=True)["test"]) == 128  # their lengths are known
    assert decoded == ["100.wav", "50.wav"]
    lines = (tmp_path / "of" / "file").read_text()
    (tmp_path / "of" / "file").write_text(lines[:-5])  # killed while the last was written
    decoded.clear()
    assert len(check(3, skip_bad_rows=True)["test"]) == 129
    assert len(decoded) == 2 and "100.wav" in decoded
    decoded.clear()
    assert len(check(3, skip_bad_rows=True)["test"]) == 129 and decoded == ["100.wav"]
    decoded.clear()
    monkeypatch.setattr(soundfile, "__libsndfile_version__", "another")
    assert len(check(3, skip_bad_rows=True)["test"]) == 129 and len(decoded) == 130


def test_a_check_that_is_stopped_keeps_what_it_found(tmp_path, monkeypatch, decoded):
    check = corpus_of(tmp_path, 40)
    heard = []

    def interrupted(self, max_seconds, original=load.Recording.samples):
        heard.append(self)
        if len(heard) == 35:
            raise KeyboardInterrupt
        return original(self, max_seconds)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(load.Recording, "samples", interrupted)
        check(3)
    decoded.clear()
    assert len(check(3)["test"]) == 40 and len(decoded) == 8  # 32 were written, 16 by 16


TROUBLES = {
    "permission": (load.os, "stat", PermissionError(errno.EACCES, "Permission denied")),
    "handles": (load.Path, "read_bytes", OSError(errno.EMFILE, "Too many open files")),
    "share": (load.Path, "read_bytes", OSError(errno.EIO, "Input/output error")),
    "memory": (load, "Sound", MemoryError()),
    "torch's memory": (
        load.torch,
        "cat",
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ),
    "libsndfile's memory": (load, "Sound", soundfile.LibsndfileError(17)),
    "resampling": (load, "resample", RuntimeError("DefaultCPUAllocator: can't allocate memory")),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_trouble_of_the_machine_is_forgotten(trouble, tmp_path, monkeypatch, decoded):
    """It ends the check with a line, is no property of a row, and when it is over the recording is
    looked at again."""
    check = corpus_of(tmp_path, 3)
    write_tone(tmp_path / "1.wav", 0.1, 8000)
    owner, name, error = TROUBLES[trouble]
    original = getattr(owner, name)

    def fail(*args, **kwargs):
        if decoded[-1:] == ["1.wav"]:
            raise error
        return original(*args, **kwargs)

    for skip in (False, True):
        decoded.clear()
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(UserError, match=r"1\.wav cannot be read now \(") as told:
                check(3, skip_bad_rows=skip)
        assert not isinstance(told.value, DataError) and "\n" not in str(told.value)
    assert len(check(3)["test"]) == 3


def test_a_worker_that_is_killed_ends_the_check_with_a_line(tmp_path, monkeypatch):
    """As by a system that is out of memory."""
    check = corpus_of(tmp_path, 130)

    def killed(self, max_seconds, original=load.Recording.samples, parent=os.getpid()):
        assert os.getpid() != parent
        if self.endswith("99.wav"):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, max_seconds)

    with monkeypatch.context() as patch:
        patch.setattr(load.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
        patch.setattr(load.Recording, "samples", killed)
        with pytest.raises(UserError, match=r"test.jsonl: a recording cannot be read now") as told:
            check(3, skip_bad_rows=True)
    assert not isinstance(told.value, DataError) and "\n" not in str(told.value)
    assert len(check(3)["test"]) == 130


def test_rows_are_told_apart_by_place_and_content(tmp_path):
    """A replaced recording of the same length is another corpus; a folder that moved is not."""

    def fingerprint(folder):
        return load.fingerprint(load.load_corpus(folder, 30)["train"], folder)

    corpus = write_corpus(tmp_path / "one", rows=3)
    before = fingerprint(corpus)
    corpus = corpus.rename(tmp_path / "two")
    assert fingerprint(corpus) == before
    os.utime(corpus / "train0.wav", (1, 1))  # a copy has other times
    assert fingerprint(corpus) == before
    recording = corpus / "train0.wav"
    samples, rate = soundfile.read(recording)
    for changed in (samples[::-1], samples * 0.999):
        soundfile.write(recording, changed, rate)
        assert fingerprint(corpus) != before
    soundfile.write(recording, samples, rate)
    assert fingerprint(corpus) == before
    recording.rename(corpus / "elsewhere.wav")
    text = (corpus / "train.jsonl").read_text()
    (corpus / "train.jsonl").write_text(text.replace("train0", "elsewhere"))
    assert fingerprint(corpus) != before


def test_a_file_is_known_by_both_its_ends(tmp_path):
    content = bytearray(random.Random(0).randbytes(1000))
    seen = set()
    for changed in (None, 0, 40, 960, 999):  # of the 100 bytes at either end
        if changed is not None:
            content[changed] ^= 1
        (tmp_path / "file").write_bytes(content)
        seen.add(load.ends(tmp_path / "file", 100))
    assert len(seen) == 5
    (tmp_path / "file").write_bytes(content[:150])  # whole where it is small
    known = load.ends(tmp_path / "file", 100)
    content[120] ^= 1
    (tmp_path / "file").write_bytes(content[:150])
    assert load.ends(tmp_path / "file", 100) != known


def bad_lines(folder, row):
    """What the error must say -> a line that must be refused."""
    for name, seconds in (("long.wav", 2.1), ("empty.wav", 0), ("cut.flac", 1.5)):
        write_tone(folder / name, seconds, 8000, 2)
    (folder / "cut.flac").write_bytes((folder / "cut.flac").read_bytes()[:-3000])
    (folder / "text.wav").write_text("this is no audio " * 99)
    lines = {
        "not JSON": b'{"audio": ',
        "not a JSON object": b'["a"]',
        "not UTF-8": json.dumps(row, ensure_ascii=False).encode("latin-1", "replace"),
        "5000|4300": b'{"n": ' + 5000 * b"1" + b"}",
        "RecursionError": b'{"n": ' + 10**5 * b"[" + 10**5 * b"]" + b"}",
    }
    for reason, field, value in (
        ("gone.wav' does not exist", "audio", "gone.wav"),
        ("'[^,]*/a b.wav ' does not exist", "audio", "a b.wav "),
        ("audio file '[^,]*' does not exist", "audio", "."),
        ("text.wav cannot be read", "audio", "text.wav"),
        ("empty.wav is empty", "audio", "empty.wav"),
        ("cut.flac", "audio", "cut.flac"),
        (r"long.wav lasts longer than --max-audio-seconds 2", "audio", "long.wav"),
        ("audio file '.*aaa does not exist", "audio", "a" * 5000),
        (r"a\\x00b' does not exist", "audio", "a\0b"),
        ("'audio' is missing", "audio", ...),
        ("'prompt' is missing", "prompt", ...),
        ("'slots' is neither a list nor an object", "slots", "ja"),
        ("'slots' is neither .* of strings", "slots", ["ja", 3]),
        ("'slots' is neither", "slots", {"a": "ja", "b": ["ja"]}),
        (r"slot '\?\|' holds no word", "slots", ["ja", "?|"]),
        (r"slot '\?' holds no word", "slots", {"a": "ja", "b": "?"}),
        ("'reference' is missing", "reference", "  "),
        ("'reference' .* not a string", "reference", 3),
        ("'target' is not", "target", ["a"]),
        ("'transcript' is not", "transcript", 1),
        ("has 0 times", "prompt", "what?"),
        ("has 2 times", "prompt", AUDIO + AUDIO),
    ):
        changed = {k: v for k, v in {**row, field: value}.items() if v is not ...}
        lines[reason] = json.dumps(changed).encode()
    return lines


def test_corpora_are_checked(tmp_path, capsys):
    """Bad rows: file, line and reason of each; all counted, the first shown; --skip-bad-rows
    goes on and says so."""
    files = {split: tmp_path / f"{split}.jsonl" for split in ("train", "validation", "test")}
    row = {
        "audio": "a b.wav",
        "prompt": f"Hör:{AUDIO} was?",
        "reference": "日本 \u2028",
        "slots": ["ja"],
        "my": 1,
    }
    good = 2 * (json.dumps(row, ensure_ascii=False).encode() + b"\n")
    lines = bad_lines(tmp_path, row)
    write_tone(tmp_path / "a b.wav", 0.5, 16000)
    for file in files.values():
        file.write_bytes(good)
    want = {**row, "audio": str(tmp_path / "a b.wav")}
    assert load.load_corpus(tmp_path, 2) == {split: [want, want] for split in files}
    by_field = {**row, "slots": {"what": "ja"}}
    assert load.parse_row(json.dumps(by_field).encode(), tmp_path)["slots"] == {"what": "ja"}
    for file in files.values():  # missing, or empty; test never stands in for validation
        for change in (lambda path: path.unlink(), lambda path: path.write_text("")):
            change(file)
            with pytest.raises(DataError, match=file.name):
                load.load_corpus(tmp_path, 2)
        file.write_bytes(good)
    for reason, line in lines.items():
        files["validation"].write_bytes(good + line + b"\n" + good)
        words = rf"(?s)\b1 bad row.*validation\.jsonl, line 3: .*{reason}"
        with pytest.raises(DataError, match=words):
            load.load_corpus(tmp_path, 2)
        kept = load.load_corpus(tmp_path, 2, skip_bad_rows=True)
        assert [len(rows) for rows in kept.values()] == [2, 4, 2]
        assert "1 bad row" in capsys.readouterr().out
    files["train"].write_bytes(b"\n".join(lines.values()))  # and nothing left to go on with
    words = rf"{len(lines) + 1} bad rows(.*\n)+.*--skip-bad-rows"
    with pytest.raises(DataError, match=words) as error:
        load.load_corpus(tmp_path, 2)
    assert all(f"train.jsonl, line {n}:" in str(error.value) for n in (1, 2, 3))
    assert len(str(error.value)) < 2000
    with pytest.raises(DataError, match="train.jsonl"):
        load.load_corpus(tmp_path, 2, skip_bad_rows=True)
