"""corpora/load.py: recordings of any kind, a folder checked whole, fingerprints."""

import gzip
import json
import math
import os
import random
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
from upkeep.errors import DataError

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
    "loud": recording("WAV", samples=noisy_tone() * 3e4, subtype="FLOAT"),
    "prime rate": recording("WAV", rate=44101),
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
    "dwvw": ("cannot be read", recording("AIFF", subtype="DWVW_16")),
    "raw": ("cannot be read", recording("RAW", subtype="PCM_16")),
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
    file = "odd." + ("raw" if name == "raw" else "sound")
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
    ],
)
def test_a_manifest_of_another_kind_is_told_once(kind, content, tmp_path):
    lines = (corpus_with(tmp_path, "good.wav") / "test.jsonl").read_bytes().splitlines()
    (tmp_path / "test.jsonl").write_bytes(content(lines))
    with pytest.raises(DataError, match=f"test.jsonl is {kind}.*; it must be") as error:
        load.load_corpus(tmp_path, 3, splits=("test",))
    assert "\n" not in str(error.value)


def test_what_was_checked_is_remembered(tmp_path, monkeypatch):
    """By several processes, in order; unchanged recordings are not decoded a second time, a changed
    one is, and so is everything under another limit."""
    cut = part(0.9)
    rows = []
    for i in range(130):  # enough for two processes
        write_tone(tmp_path / f"{i}.wav", 0.1, 16000)
        rows.append({"audio": f"{i}.wav", "prompt": AUDIO + "?", "reference": "a"})
    for i in (7, 100):
        (tmp_path / f"{i}.wav").write_bytes(cut((tmp_path / f"{i}.wav").read_bytes()))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    check = partial(load.load_corpus, tmp_path, splits=("test",), checked=tmp_path / "of" / "file")
    torch.manual_seed(0)
    words = "(?s)2 bad rows.*line 8: .*cut short.*line 101: .*cut short"
    with pytest.raises(DataError, match=words):
        check(3)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))  # the check draws no random number of the run's
    decoded = []

    def decode(file, max_seconds, original=load.decode):
        decoded.append(Path(file).name)
        return original(file, max_seconds)

    monkeypatch.setattr(load, "decode", decode)
    monkeypatch.setattr(load, "DataLoader", lambda *a, num_workers, **k: DataLoader(*a, **k))
    with pytest.raises(DataError, match=words):
        check(3)
    assert len(check(3, skip_bad_rows=True)["test"]) == 128 and decoded == []
    write_tone(tmp_path / "7.wav", 0.1, 16000)
    assert len(check(3, skip_bad_rows=True)["test"]) == 129 and "7.wav" in decoded
    decoded.clear()
    with pytest.raises(DataError, match="130 bad rows"):
        check(0.01)
    assert len(decoded) == 130
    (tmp_path / "of" / "file").write_text('{"cut sh')
    assert len(check(3, skip_bad_rows=True)["test"]) == 129


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
        ("gone.wav does not exist", "audio", "gone.wav"),
        ("audio file [^,]* does not exist", "audio", "."),
        ("text.wav cannot be read", "audio", "text.wav"),
        ("empty.wav is empty", "audio", "empty.wav"),
        ("cut.flac", "audio", "cut.flac"),
        (r"long.wav lasts longer than --max-audio-seconds 2", "audio", "long.wav"),
        ("audio .*File name too long", "audio", "a" * 5000),
        ("audio .*does not exist|null", "audio", "a\0b"),
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
