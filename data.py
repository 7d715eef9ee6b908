"""What goes in and what is rewarded: rows, audio, text, BLEU, and the synthetic spoken task of the default run.

A row is a dict {"audio", "prompt", "reference"} and optionally

    "transcript"  the words spoken: trains the encoder's CTC head (characters)
    "target"      what supervised training of the base teaches; default: the reference
    "slots"       words that only the audio tells, e.g. ["seven", "bought|purchased"]; reported as slot accuracy
    "group"       a name under which evaluation reports these rows separately

A corpus is a folder with train.jsonl, validation.jsonl and test.jsonl, one row a line, audio paths relative to it.
`reward` at the end of the first section is the one function to replace for another objective.
"""

import collections
import fcntl
import hashlib
import io
import json
import math
import os
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import sentencepiece
import soundfile
import torch
from tqdm import tqdm

SAMPLE_RATE = 16_000  # Hz
N_FFT, WINDOW, HOP, N_MELS = 512, 400, 160, 80  # samples: 25 ms windows every 10 ms, 100 mel frames per second
AUDIO = "<|audio|>"  # its place in the prompt is where the audio embeddings go


class UserError(ValueError):
    """Something the user can mend: train.py prints it as one line and exits with code 2."""


class DataError(UserError):
    """Bad input; the message names the file, the line and the reason."""


# ---------------------------------------------------------------------------------------------------------------------
# Files, whole or not at all, and one process at a time


def write_json(path: Path, value):
    """Written and synced beside its place, then renamed into it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)


def read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); restore it, or remove its folder and start again") from None


def sync(path: Path):
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def lock(folder: Path, wait: bool):
    """Hold a folder for this process, until the returned file is closed; wait for another process or refuse."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = open(folder / "lock", "w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise DataError(f"{folder} is in use by another process") from None
    return handle


# ---------------------------------------------------------------------------------------------------------------------
# Reward and metrics. BLEU as sacrebleu defines it (Post 2018): 13a tokens; exponential smoothing.


@lru_cache(maxsize=100_000)
def tokenize_13a(text: str) -> tuple[str, ...]:
    """mteval-v13a's tokens: punctuation is split off, except periods and commas inside numbers."""
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, character)
    text = re.sub(r"([!-&(-+/:-@\[-`{-~])", r" \1 ", f" {text} ")  # ASCII punctuation but ' , - .
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    text = re.sub(r"([0-9])(-)", r"\1 \2 ", text)
    return tuple(text.split())


def _bleu_counts(answer: str, reference: str):
    """Matches and totals of 1- to 4-grams, and both lengths: everything BLEU needs, additive over sentences."""
    hypothesis, reference = tokenize_13a(answer), tokenize_13a(reference)
    matches, totals = [0] * 4, [0] * 4
    for n in range(1, 5):
        grams = collections.Counter(zip(*(hypothesis[i:] for i in range(n))))
        truth = collections.Counter(zip(*(reference[i:] for i in range(n))))
        matches[n - 1] = sum(min(count, truth[gram]) for gram, count in grams.items())
        totals[n - 1] = max(0, len(hypothesis) - n + 1)
    return np.array(matches + totals + [len(hypothesis), len(reference)])


def _bleu(counts, effective_order: bool) -> float:
    matches, totals, (answer_length, reference_length) = counts[:4], counts[4:8], counts[8:]
    if answer_length == 0 or not matches.any():
        return 0.0
    logs, smoothing = [], 1.0
    for match, total in zip(matches, totals):
        if total == 0:
            if effective_order:  # a sentence too short for this order is judged on the lower ones
                break
            return 0.0
        if match == 0:  # the k-th order without a match counts as 1 / 2^k of one
            smoothing *= 2
            match = 1 / smoothing
        logs.append(math.log(match / total))
    brevity = min(1.0, math.exp(1 - reference_length / answer_length))
    return 100 * brevity * math.exp(sum(logs) / len(logs))


def sentence_bleu(answer: str, reference: str) -> float:
    """0..100, with effective order, as sacrebleu.sentence_bleu."""
    return _bleu(_bleu_counts(answer, reference), effective_order=True)


def corpus_bleu(answers: list[str], references: list[str], lowercase: bool = False) -> float:
    """0..100, as sacrebleu.corpus_bleu."""
    if lowercase:
        answers, references = [a.lower() for a in answers], [r.lower() for r in references]
    return _bleu(sum(map(_bleu_counts, answers, references)), effective_order=False)


def slot_accuracy(answers: list[str], rows: list[dict]) -> float:
    """Share of the rows' slots (0..1) that stand in the answers as whole words; nan where no row has slots."""
    found = total = 0
    for answer, row in zip(answers, rows):
        words = set(re.findall(r"\w+", answer.lower()))
        for slot in row.get("slots", ()):
            found += any(option in words for option in slot.lower().split("|"))
            total += 1
    return found / total if total else math.nan


def swap(rows: list[dict]) -> list[int]:
    """For each row another with the same prompt, where there is one: what would be said if the audio were ignored?"""
    by_prompt, other = {}, list(range(len(rows)))
    for i, row in enumerate(rows):
        by_prompt.setdefault(row["prompt"], []).append(i)
    for group in by_prompt.values():
        for i, j in zip(group, group[len(group) // 2 :] + group[: len(group) // 2]):
            other[i] = j
    return other


def reward(answer: str, row: dict) -> float:
    """What RL maximises, 0..1. Replace this one function to train for something else."""
    return sentence_bleu(" ".join(answer.split()), " ".join(row["reference"].split())) / 100


def rewards(answers: list[str], rows: list[dict]) -> list[float]:
    """The reward of each answer; raises UserError on one that is not a finite number."""
    scores = [reward(answer, row) for answer, row in zip(answers, rows)]
    for score, answer, row in zip(scores, answers, rows):
        if not math.isfinite(score):
            raise UserError(f"data.reward gave {score} for the answer {answer!r} to {row['prompt']!r}")
    return scores


# ---------------------------------------------------------------------------------------------------------------------
# Audio


def load_audio(row: dict) -> torch.Tensor:
    """The row's audio as (samples,) float32, 16 kHz mono. A dict in place of a path is speech to synthesise."""
    if isinstance(row["audio"], dict):
        return synthesize(**row["audio"])
    try:
        samples, rate = soundfile.read(row["audio"], dtype="float32", always_2d=True)  # (samples, channels)
    except (OSError, soundfile.SoundFileError) as error:
        raise DataError(f"{row['audio']}: cannot be read as audio ({error})") from None
    audio = torch.from_numpy(samples).mean(1)
    if rate != SAMPLE_RATE:
        audio = resample(audio, rate)
    if len(audio) < WINDOW:
        raise DataError(f"{row['audio']}: shorter than {1000 * WINDOW // SAMPLE_RATE} ms")
    if not audio.isfinite().all():
        raise DataError(f"{row['audio']}: holds samples that are not finite")
    return audio


def resample(audio: torch.Tensor, rate: int) -> torch.Tensor:
    try:
        import torchaudio.functional  # imported only here: it needs its own match with torch (see README)
    except (ImportError, OSError, RuntimeError) as error:
        raise DataError(
            f"audio at {rate} Hz needs torchaudio to become 16 kHz, and it does not load here ({error}). "
            "Fix: pip install -r requirements.txt, or convert the audio to 16 kHz"
        ) from None
    return torchaudio.functional.resample(audio, rate, SAMPLE_RATE)


@lru_cache(maxsize=1)
def mel_filters() -> torch.Tensor:
    """(N_FFT / 2 + 1, N_MELS) triangular filters, HTK mel scale, 0 to 8 kHz, as torchaudio's MelSpectrogram."""
    top = 2595 * math.log10(1 + SAMPLE_RATE / 2 / 700)
    corners = 700 * (10 ** (torch.linspace(0, top, N_MELS + 2) / 2595) - 1)  # Hz
    bins = torch.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1)
    slope, width = bins[:, None] - corners, corners.diff()  # (bins, N_MELS + 2), (N_MELS + 1,)
    return torch.minimum(slope[:, :-2] / width[:-1], -slope[:, 2:] / width[1:]).clamp(min=0)


def log_mel(audio: torch.Tensor) -> torch.Tensor:
    """(samples,) at 16 kHz -> (T, 160): Granite Speech's features, two 10 ms frames side by side.

    The dynamic range is cut 8 decades below the recording's own maximum: compute it per recording, never on a batch.
    """
    window = torch.hann_window(WINDOW)
    spectrum = torch.stft(audio, N_FFT, HOP, WINDOW, window, center=True, pad_mode="reflect", return_complex=True)
    mel = mel_filters().T @ spectrum.abs().square()  # (N_MELS, frames)
    logs = mel.T.clamp(min=1e-10).log10()
    logs = torch.maximum(logs, logs.max() - 8) / 4 + 1
    return logs[: len(logs) // 2 * 2].reshape(-1, 2 * N_MELS)


class Cache:
    """compute(indices) -> list of tensors, remembered for items 0..n-1 in order until a budget of bytes is used up.

    Items are computed in the same batches in every process, and one by one beyond the budget, never in the company
    of whoever happens to be asked for: rounding differs between batches, and a resumed run must repeat it.
    """

    def __init__(self, compute, n: int, gigabytes: float, title: str, batch: int = 32):
        self.compute, self.kept = compute, []
        room = gigabytes * 1e9
        for start in tqdm(range(0, n, batch), desc=title, leave=False, disable=None):
            fresh = compute(list(range(start, min(n, start + batch))))
            room -= sum(tensor.nbytes for tensor in fresh)
            if room < 0:
                break
            self.kept += fresh

    def __call__(self, indices: list[int]) -> list[torch.Tensor]:
        return [self.kept[i] if i < len(self.kept) else self.compute([i])[0] for i in indices]

    def forget(self):
        """Free the memory; what is asked for from now on is computed again."""
        self.kept = []


# ---------------------------------------------------------------------------------------------------------------------
# Text


class Tokenizer:
    """A SentencePiece model trained on the training text, for the compact model."""

    def __init__(self, model_file):
        self.sp = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        self.vocab_size = self.sp.vocab_size()
        self.eos_id, self.audio_id, self.answer_id = map(self.sp.piece_to_id, ("</s>", AUDIO, "<|answer|>"))

    @staticmethod
    def train(rows: list[dict], vocab_size: int = 800) -> bytes:
        """The model file. Deterministic; characters never seen in training fall back to bytes."""
        text = [t for row in rows for t in (row["prompt"].replace(AUDIO, " "), row["reference"], target(row))]
        vocab_size = max(vocab_size, 600 + len(set("".join(text))))  # 256 bytes, every character, some merges
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=model, vocab_size=vocab_size, hard_vocab_limit=False,
            model_type="bpe", character_coverage=1.0, byte_fallback=True, bos_id=-1, num_threads=1, minloglevel=2,
            normalization_rule_name="identity", user_defined_symbols=[AUDIO, "<|answer|>"], max_sentence_length=100_000,
        )  # fmt: skip
        return model.getvalue()

    def encode_prompt(self, prompt: str) -> list[int]:
        return self.sp.encode(prompt) + [self.answer_id]

    def encode_answer(self, text: str) -> list[int]:
        return self.sp.encode(text) + [self.eos_id]

    def decode(self, ids: list[int]) -> str:
        return self.sp.decode([i for i in ids if i != self.eos_id])

    def pieces(self, ids: list[int]) -> list[str]:
        return [self.sp.id_to_piece(i).replace("\N{LOWER ONE EIGHTH BLOCK}", " ") for i in ids]


def target(row: dict) -> str:
    return row.get("target", row["reference"])


class Alphabet:
    """Characters of the transcripts as CTC classes; class 0 is the blank."""

    def __init__(self, characters: str):
        self.characters = characters
        self.index = {c: i for i, c in enumerate(characters, start=1)}

    @classmethod
    def of(cls, rows: list[dict]) -> "Alphabet":
        return cls("".join(sorted(set("".join(row.get("transcript", "") for row in rows)))))

    def __len__(self):
        return len(self.characters) + 1

    def encode(self, text: str) -> list[int]:
        return [self.index[c] for c in text if c in self.index]


# ---------------------------------------------------------------------------------------------------------------------
# Corpora on disk


def load_corpus(folder, max_seconds: float, skip_bad_rows: bool = False) -> dict[str, list[dict]]:
    """Read and check the three splits. Every row is looked at before anything else happens; DataError lists the bad."""
    folder = Path(folder)
    splits, bad = {}, []
    for split in ("train", "validation", "test"):
        file = folder / f"{split}.jsonl"
        if not file.is_file():
            raise DataError(f"{file} is missing: a corpus is a folder with train.jsonl, validation.jsonl, test.jsonl")
        rows = []
        lines = file.read_bytes().splitlines()
        if not any(line.strip() for line in lines):
            raise DataError(f"{file} has no rows")
        for number, line in enumerate(tqdm(lines, desc=f"checking {file.name}", leave=False, disable=None), start=1):
            if not line.strip():
                continue
            try:
                rows.append(check_row(line, folder, max_seconds))
            except DataError as error:
                bad.append(f"{file}, line {number}: {error}")
        splits[split] = rows
    if bad:
        summary = "\n  ".join([f"{len(bad)} bad rows"] + bad[:5] + (["..."] if len(bad) > 5 else []))
        if not skip_bad_rows:
            raise DataError(f"{summary}\nFix them, or go on without them: --skip-bad-rows")
        print(f"skipping {summary}")
        for split, rows in splits.items():
            if not rows:
                raise DataError(f"{folder / split}.jsonl has no good row left")
    return splits


def fingerprint(rows: list[dict]) -> str:
    """Of the rows' content, wherever their folder lies: neither a run nor a base is taken up again on other data."""

    def portable(audio):  # a file by its name and size; synthetic speech by what it is made from
        return audio if isinstance(audio, dict) else [Path(audio).name, Path(audio).stat().st_size]

    rows = [row | {"audio": portable(row["audio"])} for row in rows]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def check_row(line: bytes, folder: Path, max_seconds: float) -> dict:
    """One line of a manifest as a row with an absolute audio path. Raises DataError with the reason."""
    try:
        row = json.loads(line.decode("utf-8-sig"))  # a byte order mark is no harm
        json.dumps(row, ensure_ascii=False).encode()  # an escape may hide half a character: "\\ud800"
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 (byte {error.start})") from None
    except UnicodeEncodeError:
        raise DataError("a \\u escape is no character") from None
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError("not a JSON object")
    row = {name: value for name, value in row.items() if value is not None}  # null: as if it were not there
    for name in ("audio", "prompt", "reference"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise DataError(f"field {name!r} is missing, empty or not a string")
    for name in ("transcript", "target", "group"):
        if not isinstance(row.get(name, ""), str):
            raise DataError(f"field {name!r} is not a string")
    slots = row.get("slots", [])
    if not isinstance(slots, list) or not all(isinstance(slot, str) for slot in slots):
        raise DataError("field 'slots' is not a list of strings")
    if row["prompt"].count(AUDIO) != 1:
        raise DataError(f"the prompt has {row['prompt'].count(AUDIO)} times {AUDIO}; it must have exactly one")
    path = folder / row["audio"]
    if not path.is_file():
        raise DataError(f"audio file {path} does not exist")
    try:
        with soundfile.SoundFile(path) as audio:
            seconds = audio.frames / audio.samplerate
            audio.seek(max(0, audio.frames - 1))  # a file cut short fails here, not an hour into training
            readable = len(audio.read(1)) == 1
            if audio.subtype in ("FLOAT", "DOUBLE"):  # the only ones that can hold nan and infinity
                audio.seek(0)
                readable &= bool(np.isfinite(audio.read()).all())
    except (OSError, soundfile.SoundFileError) as error:
        raise DataError(f"{path} cannot be read as audio ({error})") from None
    if not readable or seconds * SAMPLE_RATE < WINDOW:
        raise DataError(f"{path} is empty, cut short, not finite, or under {1000 * WINDOW // SAMPLE_RATE} ms")
    if seconds > max_seconds:
        raise DataError(f"{path} lasts {seconds:.1f} s; the limit is --max-audio-seconds {max_seconds:g}")
    return {**row, "audio": str(path)}


# ---------------------------------------------------------------------------------------------------------------------
# A split of the corpus, heard once: audio -> log-mels -> encoder frames -> audio embeddings


class Split:
    """Rows and what the model hears of them."""

    def __init__(self, name: str, rows: list[dict], gigabytes: float):
        self.name, self.rows, self.gigabytes, self.frames = name, rows, gigabytes, None
        self.mels = self.cache("hearing", lambda indices: [log_mel(load_audio(rows[i])) for i in indices])

    def cache(self, doing: str, compute) -> Cache:
        return Cache(compute, len(self.rows), self.gigabytes, f"{doing} {len(self.rows)} {self.name} rows")

    def encode(self, model):
        """Pass everything through the encoder, which is frozen from here on."""
        if self.frames is None:
            self.frames = self.cache("encoding", lambda indices: model.encode(self.mels(indices)))
            self.mels.forget()

    def project(self, model, tokenizer):
        """And through the projector, frozen too: what is left for RL is embeddings in, text out."""
        self.encode(model)
        self.prompts = [tokenizer.encode_prompt(row["prompt"]) for row in self.rows]
        self.sounds = self.cache("projecting", lambda indices: model.project(self.frames(indices)))
        self.frames.forget()

    def batch(self, model, indices: list[int], sounds_of: list[int] | None = None):
        """Prompts of the rows at indices, optionally with other rows' audio."""
        return model.embed_prompts([self.prompts[i] for i in indices], self.sounds(sounds_of or indices))


def order(n: int, seed: list[int], start: int, count: int) -> list[int]:
    """Items start .. start + count - 1 of an endless sequence of shuffled passes over n rows."""
    epochs = range(start // n, (start + count - 1) // n + 1)
    passes = {e: np.random.default_rng([*seed, e]).permutation(n) for e in epochs}
    return [int(passes[i // n][i % n]) for i in range(start, start + count)]


def noise(seed: list[int], indices: list[int], K: int, T: int, device) -> torch.Tensor:
    """(P, K, T) uniform numbers keyed by (seed, prompt, response): the same for whoever else is in the batch."""
    rows = [[np.random.default_rng([*seed, i, k]).random(T, dtype=np.float32) for k in range(K)] for i in indices]
    return torch.from_numpy(np.array(rows)).to(device)


# ---------------------------------------------------------------------------------------------------------------------
# Synthetic speech: a source-filter voice. Pulses and noise, shaped frame by frame by formants in the STFT domain.

# Phone: F1, F2, F3 (Hz; vowels from Peterson & Barney 1952), voicing, noise, noise centre (Hz), length (ms)
PHONES = {
    "i": (270, 2290, 3010, 1, 0, 0, 75), "I": (390, 1990, 2550, 1, 0, 0, 60), "e": (530, 1840, 2480, 1, 0, 0, 70),
    "a": (660, 1720, 2410, 1, 0, 0, 75), "A": (730, 1090, 2440, 1, 0, 0, 75), "o": (570, 840, 2410, 1, 0, 0, 75),
    "U": (440, 1020, 2240, 1, 0, 0, 60), "u": (300, 870, 2240, 1, 0, 0, 70), "V": (640, 1190, 2390, 1, 0, 0, 60),
    "R": (490, 1350, 1690, 1, 0, 0, 70), "m": (250, 1000, 2200, 0.5, 0, 0, 55), "n": (250, 1500, 2500, 0.5, 0, 0, 50),
    "l": (360, 1300, 2700, 0.6, 0, 0, 50), "r": (330, 1060, 1380, 0.6, 0, 0, 50), "w": (290, 610, 2150, 0.6, 0, 0, 50),
    "j": (260, 2070, 3020, 0.6, 0, 0, 45), "s": (320, 1390, 2530, 0, 0.35, 5500, 75),
    "z": (320, 1390, 2530, 0.3, 0.2, 5500, 60), "S": (300, 1840, 2750, 0, 0.4, 3000, 75),
    "f": (340, 1100, 2080, 0, 0.15, 4500, 60), "v": (220, 1100, 2080, 0.4, 0.08, 4500, 50),
    "h": (500, 1500, 2500, 0, 0.2, 1500, 50), "T": (320, 1290, 2540, 0, 0.1, 6000, 55),
    "p": (400, 1100, 2150, 0, 0.25, 900, 55), "b": (200, 1100, 2150, 0.2, 0.1, 900, 50),
    "t": (400, 1600, 2600, 0, 0.35, 4000, 55), "d": (200, 1600, 2600, 0.2, 0.15, 4000, 50),
    "k": (300, 1990, 2850, 0, 0.3, 2000, 60), "g": (200, 1990, 2850, 0.2, 0.15, 2000, 50),
    " ": (500, 1500, 2500, 0, 0, 0, 25),
}  # fmt: skip
STOPS = set("pbtdkg")  # silence first, then the burst


def synthesize(phones: str, seed: int) -> torch.Tensor:
    """Speech for a string of phones: (samples,) float32 at 16 kHz. The seed is the speaker, the pace and the noise."""
    rng = np.random.default_rng(seed)
    pitch, size, pace = rng.uniform(90, 230), rng.uniform(0.9, 1.15), rng.uniform(0.85, 1.15)
    snr = rng.uniform(15, 30)  # dB
    hop, n_fft = 128, 512  # 8 and 32 ms
    frames = []
    for phone in f" {phones} ":
        *values, milliseconds = PHONES[phone]
        count = max(2, round(milliseconds * pace * rng.uniform(0.85, 1.15) / 8))
        block = np.tile(np.array(values, dtype=np.float32), (count, 1))
        if phone in STOPS:
            block[: count // 2, 4] = 0
        frames.append(block)
    track = torch.from_numpy(np.concatenate(frames))  # (frames, 6)
    smooth = torch.nn.functional.avg_pool1d(track.T[None], 3, 1, 1, count_include_pad=False)[0].T  # coarticulation
    formants, voicing, noise, centre = smooth[:, :3] * size, smooth[:, 3], smooth[:, 4], track[:, 5].clamp(min=1)

    samples = len(track) * hop
    time = np.arange(samples) / SAMPLE_RATE
    contour = pitch * (1 + 0.08 * np.sin(2 * np.pi * rng.uniform(0.5, 1.5) * time + rng.uniform(0, 6)) - 0.05 * time)
    pulses = np.diff(np.floor(np.cumsum(contour / SAMPLE_RATE)), prepend=0).astype(np.float32) * 6
    source = torch.from_numpy(np.stack((pulses, rng.standard_normal(samples).astype(np.float32))))
    window = torch.hann_window(n_fft)
    source = torch.stft(source, n_fft, hop, window=window, return_complex=True)[..., : len(track)]  # (2, bins, frames)

    f = torch.linspace(0, SAMPLE_RATE / 2, n_fft // 2 + 1)[:, None]  # (bins, 1)
    vocal_tract = 1 / (1 + (f / 500) ** 2).sqrt()  # the glottal source falls off with frequency
    for k, bandwidth in enumerate((80.0, 100.0, 140.0)):
        F = formants[:, k]  # (frames,): a second-order resonance at F
        vocal_tract = vocal_tract * F**2 / ((F**2 - f**2) ** 2 + (bandwidth * f) ** 2).sqrt()
    friction = torch.exp(-0.5 * ((f - centre * size) / (0.35 * centre)) ** 2)
    spectrum = source[0] * vocal_tract * voicing + source[1] * friction * noise * 3
    audio = torch.istft(spectrum, n_fft, hop, window=window)
    audio = audio / audio.square().mean().sqrt()
    hiss = torch.from_numpy(rng.standard_normal(len(audio)).astype(np.float32))
    return 0.05 * (audio + hiss * 10 ** (-snr / 20))


# ---------------------------------------------------------------------------------------------------------------------
# Synthetic tasks. Somebody does something with some things somewhere on some day; the audio says it, a question asks.
#
# The answer's wording has free choices (determiner, verb, preposition, ...). Supervised targets draw them at random
# 90% of the time; the reference fixes them by the content. So the base learns to hear and to speak, but not which
# wording is rewarded: that is left for RL to find out.

# English word -> (phones, Japanese in Latin letters)
NAMES = {"Anna": ("anV", "anna"), "Boris": ("borIs", "borisu"), "Clara": ("klarV", "kurara"),
         "David": ("deivId", "deibitto"), "Emma": ("emV", "ema"), "Felix": ("filIks", "ferikkusu"),
         "Greta": ("gretV", "gureta"), "Hugo": ("hjugo", "hyuugo")}  # fmt: skip
VERBS = {"bought": ("bot", "katta"), "sold": ("sold", "utta"), "found": ("faund", "mitsuketa"),
         "lost": ("lAst", "nakushita")}  # fmt: skip
NUMBERS = {"two": ("tu", "futatsu"), "three": ("Tri", "mittsu"), "four": ("for", "yottsu"), "five": ("faiv", "itsutsu"),
           "six": ("sIks", "muttsu"), "seven": ("sevVn", "nanatsu"), "eight": ("eit", "yattsu"),
           "nine": ("nain", "kokonotsu")}  # fmt: skip
COLOURS = {"red": ("red", "akai"), "blue": ("blu", "aoi"), "green": ("grin", "midori"), "yellow": ("jelo", "kiiroi"),
           "black": ("blak", "kuroi"), "white": ("wait", "shiroi")}  # fmt: skip
OBJECTS = {"apples": ("apVlz", "ringo"), "books": ("bUks", "hon"), "chairs": ("tSerz", "isu"),
           "lamps": ("lamps", "ranpu"), "boxes": ("bAksIz", "hako"), "shirts": ("SRts", "shatsu"),
           "bottles": ("bAtVlz", "bin"), "hats": ("hats", "boushi")}  # fmt: skip
PLACES = {"market": ("mArkIt", "ichiba"), "station": ("steiSVn", "eki"), "school": ("skul", "gakkou"),
          "harbour": ("hArbR", "minato"), "garden": ("gArdVn", "niwa"), "bakery": ("beikRi", "panya")}  # fmt: skip
DAYS = {"Monday": ("mVndei", "getsuyou"), "Tuesday": ("tjuzdei", "kayou"), "Wednesday": ("wenzdei", "suiyou"),
        "Thursday": ("TRzdei", "mokuyou"), "Friday": ("fraidei", "kinyou"), "Saturday": ("satRdei", "doyou"),
        "Sunday": ("sVndei", "nichiyou")}  # fmt: skip
FIELDS = (NAMES, VERBS, NUMBERS, COLOURS, OBJECTS, PLACES, DAYS)
VERB_WORDS = {"bought": ("bought", "purchased", "acquired"), "sold": ("sold", "traded", "auctioned"),
              "found": ("found", "discovered", "spotted"), "lost": ("lost", "misplaced", "dropped")}  # fmt: skip
DETERMINERS, PREPOSITIONS, DAY_WORDS = ("the", "those", "some"), ("at", "in", "near"), ("on", "last", "this")
WERE, WAS = ("were", "stood", "lay"), ("was", "waited", "stayed")
QUESTIONS = ("What happened?", "What was it and where?", "Who was where and when?")


def _english_audio(content) -> tuple[str, str]:
    name, verb, number, colour, thing, place, day = content
    phones = [table[word][0] for table, word in zip(FIELDS, content)]
    phones = phones[:5] + ["at", "zV", phones[5], "An", phones[6]]
    return f"{name} {verb} {number} {colour} {thing} at the {place} on {day}".lower(), " ".join(phones)


def _japanese_audio(content) -> tuple[str, str]:
    """Subject, day, place, colour, thing, number, verb: neither the words nor their order are English."""
    name, verb, number, colour, thing, place, day = (table[word][1] for table, word in zip(FIELDS, content))
    text = f"{name} wa {day} ni {place} de {colour} {thing} o {number} {verb}"
    phones = text.replace("sh", "S").replace("ch", "tS").replace("y", "j").replace("a", "A")
    return text, phones


def _answer(question: int, content, choice) -> tuple[str, list[str]]:
    """The answer to QUESTIONS[question] with the wording that choice(options, deciding field) picks; and its slots."""
    name, verb, number, colour, thing, place, day = content
    determiner, where = choice(DETERMINERS, 4), f"{choice(PREPOSITIONS, 5)} the {place}"
    if question == 0:
        what = f"{choice(VERB_WORDS[verb], 0)} {determiner} {number} {colour} {thing}"
        text = f"{name} {what} {where} {choice(DAY_WORDS, 6)} {day}."
        return text, [name, "|".join(VERB_WORDS[verb]), number, colour, thing, place, day]
    if question == 1:
        text = f"{determiner.capitalize()} {number} {colour} {thing} {choice(WERE, 3)} {where}."
        return text, [number, colour, thing, place]
    text = f"{choice(DAY_WORDS, 6).capitalize()} {day} {name} {choice(WAS, 0)} {where}."
    return text, [day, name, place]


def synthetic_corpus(task: str, sizes: dict[str, int], seed: int) -> dict[str, list[dict]]:
    """Splits of the spoken "qa" or "translation" task. No content (seven slot values) occurs in two rows."""
    rng = np.random.default_rng([seed, ("qa", "translation").index(task)])
    splits, seen = {}, set()
    for split, size in sizes.items():
        rows = splits[split] = []
        while len(rows) < size:
            index = [int(rng.integers(len(table))) for table in FIELDS]
            if tuple(index) in seen:
                continue
            seen.add(tuple(index))
            content = [list(table)[i] for table, i in zip(FIELDS, index)]
            question = len(rows) % len(QUESTIONS) if task == "qa" else 0
            transcript, phones = (_english_audio if task == "qa" else _japanese_audio)(content)
            reference, slots = _answer(question, content, lambda options, f: options[index[f] % len(options)])
            free = rng.random() < 0.9
            wording, _ = _answer(question, content, lambda options, f: options[rng.integers(len(options))])
            rows.append({
                "audio": {"phones": phones, "seed": int(rng.integers(2**31))},
                "prompt": AUDIO + (QUESTIONS[question] if task == "qa" else "Translate into English."),
                "reference": reference,
                "target": wording if free else reference,
                "transcript": transcript,
                "slots": slots,
            })  # fmt: skip
    return splits
