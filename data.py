"""What goes in and what is rewarded: rows, audio, text and BLEU.

A row is a dict {"audio", "prompt", "reference"} and optionally

    "transcript"  the words spoken: trains the encoder's CTC head (characters)
    "target"      what supervised training of the base teaches; default: the reference
    "slots"       words that only the audio tells, e.g. ["seven", "bought|purchased"]; reported as slot accuracy
    "group"       a name under which evaluation reports these rows separately

A corpus is a folder with train.jsonl, validation.jsonl and test.jsonl, one row a line, audio paths relative to it.
`reward` at the end of the first section is the one function to replace for another objective.
"""

import collections
import contextlib
import datetime
import fcntl
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import jinja2.sandbox
import numpy as np
import sentencepiece
import soundfile
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

SAMPLE_RATE = 16_000  # Hz
N_FFT, WINDOW, HOP, N_MELS = 512, 400, 160, 80  # samples: 25 ms windows every 10 ms, 100 mel frames per second
TEMPLATE_DATE = datetime.date(2025, 4, 9)  # in prompts that tell the date: the one in Granite Speech 3.3's model card
AUDIO = "<|audio|>"  # its place in the prompt is where the audio embeddings go


class UserError(ValueError):
    """Something the user can mend: train.py prints it as one line and exits with code 2."""


class DataError(UserError):
    """Bad input; the message names the file, the line and the reason."""


# ---------------------------------------------------------------------------------------------------------------------
# Never lose work: files whole or not at all, one process at a time, stops that save, checkpoints


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


def check_same(folder: Path, settings: dict, file: str):
    """A folder belongs to one configuration: another is refused with the difference shown, a new folder takes it."""
    path = folder / file
    if {p.name for p in folder.iterdir()} <= {file, "lock", "tokenizer.model"}:  # nothing was done here yet
        return write_json(path, settings)
    there = read_json(path)
    different = [f"  {k}: {there.get(k)!r} there, {v!r} now" for k, v in settings.items() if there.get(k) != v]
    if different:
        raise UserError(
            f"{folder} belongs to another configuration:\n" + "\n".join(different) + "\nChange the flags back, "
            f"choose another folder with {'--base' if file == 'base.json' else '--out'}, or remove this one"
        )


@contextlib.contextmanager
def stop_requests():
    """Inside, Ctrl-C and SIGTERM are noted for the loop to save and leave; a second one stops at once."""
    received = []

    def note(number, frame):
        if received:
            raise SystemExit(128 + number)
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def save_checkpoint(folder: Path, step: int, named: dict[str, torch.Tensor], optimizer):
    """One folder, step-NNNNNN: everything is written and synced under another name, then renamed once."""
    tensors = {f"value.{name}": tensor for name, tensor in named.items()}
    for name, tensor in named.items():
        for key, moment in optimizer.state.get(tensor, {}).items():
            tensors[f"{key}.{name}"] = moment
    final, temporary = folder / f"step-{step:06d}", folder / f"saving-{os.getpid()}"
    temporary.mkdir(parents=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary / "tensors.safetensors")
    write_json(temporary / "state.json", {"step": step})
    sync(temporary / "tensors.safetensors")
    sync(temporary)
    os.rename(temporary, final)
    for old in sorted(folder.glob("step-*"))[:-2]:  # the newest two
        shutil.rmtree(old)


def load_checkpoint(folder: Path, named: dict[str, torch.Tensor], optimizer) -> int:
    """Restore the newest complete checkpoint; returns its step, 0 where there is none."""
    for leftover in folder.glob("saving-*"):  # a save that was killed
        shutil.rmtree(leftover)
    found = sorted(folder.glob("step-*"))
    if not found:
        return 0
    tensors = load_file(found[-1] / "tensors.safetensors")
    with torch.no_grad():
        for name, tensor in named.items():
            tensor.copy_(tensors.pop(f"value.{name}"))
    for key, moment in tensors.items():
        kind, _, name = key.partition(".")
        optimizer.state[named[name]][kind] = moment if kind == "step" else moment.to(named[name].device)  # as AdamW
    return read_json(found[-1] / "state.json")["step"]


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


def rouge_l(answer: str, reference: str) -> float:
    """0..1: F1 of the longest common subsequence of words (Lin 2004), lower case, without punctuation or stemming."""
    a, b = (re.findall(r"[^\W_]+", text.lower()) for text in (answer, reference))
    longest = [0] * (len(b) + 1)  # of the words of the answer so far and the first j of the reference
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            diagonal, longest[j] = longest[j], diagonal + 1 if word == other else max(longest[j], longest[j - 1])
    return 2 * longest[-1] / (len(a) + len(b)) if longest[-1] else 0.0


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


def scores(rows: list[dict], greedy: list[str], passes: list[list[str]], swapped: list[str] | None) -> dict[str, float]:
    """What evaluation reports, of one greedy answer and some sampled ones to each row.

    swapped: greedy answers to the audio of the rows at swap(rows), where rows have slots.
    """
    references = [row["reference"] for row in rows]
    bleu = [corpus_bleu(texts, references, lowercase=True) for texts in passes]
    exact = [np.mean([a.split() == r.split() for a, r in zip(texts, references)]) for texts in [greedy, *passes]]
    result = {
        "BLEU greedy": corpus_bleu(greedy, references, lowercase=True),
        "BLEU sampled": np.mean(bleu),
        "BLEU sampled, std": np.std(bleu, ddof=1) if len(bleu) > 1 else 0.0,
        "ROUGE-L sampled": 100 * np.mean([rouge_l(a, r) for texts in passes for a, r in zip(texts, references)]),
        "exact match %": 100 * exact[0],
        "exact match sampled %": 100 * np.mean(exact[1:]),
        "mean reward x100": 100 * np.mean([rewards(texts, rows) for texts in passes]),
    }
    if swapped:
        result["slots heard %"] = 100 * slot_accuracy(greedy, rows)
        result["slots, audio swapped %"] = 100 * slot_accuracy(swapped, rows)
        # What the swapped audio's own right answers would score: the level of not listening.
        result["slots, chance %"] = 100 * slot_accuracy([references[j] for j in swap(rows)], rows)
    for group in sorted({row["group"] for row in rows if "group" in row}):
        chosen = [i for i, row in enumerate(rows) if row.get("group") == group]
        pairs = [greedy[i] for i in chosen], [references[i] for i in chosen]
        result[f"BLEU greedy, {group}"] = corpus_bleu(*pairs, lowercase=True)
    return {name: float(value) for name, value in result.items()}


def write_predictions(path: Path, rows: list[dict], greedy: list[str], passes: list[list[str]]):
    with open(path, "w", encoding="utf-8") as file:
        for row, one, *sampled in zip(rows, greedy, *passes):
            line = {k: row[k] for k in ("audio", "prompt", "reference")} | {"greedy": one, "sampled": sampled}
            file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")


def show_table(title: str, columns: dict[str, dict]):
    """Results side by side, and the difference of two."""
    width = max(map(len, [title, *next(iter(columns.values()))]))
    print(f"\n{title:{width}}" + "".join(f" {name:>9}" for name in columns) + "  difference" * (len(columns) == 2))
    for row in zip(*(column.items() for column in columns.values())):
        values = [value for _, value in row]
        difference = f" {values[1] - values[0]:+11.2f}" if len(values) == 2 else ""
        print(f"{row[0][0]:{width}}" + "".join(f" {value:9.2f}" for value in values) + difference)


# ---------------------------------------------------------------------------------------------------------------------
# Audio


def load_audio(row: dict) -> torch.Tensor:
    """The row's audio as (samples,) float32, 16 kHz mono."""
    if not isinstance(row["audio"], str):  # synthetic speech
        return row["audio"].samples()
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
        self.compute, self.kept = torch.no_grad()(compute), []
        room = gigabytes * 1e9
        for start in tqdm(range(0, n, batch), desc=title, leave=False, disable=None):
            fresh = self.compute(list(range(start, min(n, start + batch))))
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


class ChatTokenizer:
    """The tokenizer.json of a released checkpoint, and its chat template around every prompt."""

    def __init__(self, folder: Path, system_prompt: str):
        settings = {}
        if (folder / "tokenizer_config.json").exists():
            settings = read_json(folder / "tokenizer_config.json")
        read_json(folder / "tokenizer.json")  # there, and JSON
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation(), self.tokenizer.no_padding()  # the file may hold both, from somebody's training
        self.audio_id = self.tokenizer.token_to_id(AUDIO)
        self.special = {}  # what templates may ask for, as transformers hands it to them
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            if token := settings.get(name):
                self.special[name] = token["content"] if isinstance(token, dict) else token
        self.eos_id = self.tokenizer.token_to_id(self.special.get("eos_token", ""))
        if self.eos_id is None or self.audio_id is None:
            raise DataError(f"{folder}: no eos_token in tokenizer_config.json, or no {AUDIO} in tokenizer.json")
        self.system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        self.source = chat_template(folder, settings)

    def encode_prompt(self, prompt: str) -> list[int]:
        messages = self.system + [{"role": "user", "content": prompt}]
        try:
            text = compiled(self.source).render(messages=messages, add_generation_prompt=True, **self.special)
        except jinja2.TemplateError as error:
            raise DataError(f"the checkpoint's chat template fails: {error}") from None
        if self.system and self.system[0]["content"] not in text:
            raise DataError("the checkpoint's chat template has no place for a system prompt: go on without it")
        ids = self.tokenizer.encode(text).ids
        if ids.count(self.audio_id) != 1:
            raise DataError(f"the chat template turns {prompt!r} into a prompt without one {AUDIO}: {text!r}")
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def pieces(self, ids: list[int]) -> list[str]:
        return [self.tokenizer.decode([i], skip_special_tokens=False) for i in ids]


def chat_template(folder: Path, settings: dict) -> str:
    """The conversation's format, wherever a checkpoint keeps it."""
    source = settings.get("chat_template")
    if (folder / "chat_template.json").exists():
        source = read_json(folder / "chat_template.json")["chat_template"]
    if (folder / "chat_template.jinja").exists():
        source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if not source:
        raise DataError(f"{folder}: no chat template, neither chat_template.jinja nor in tokenizer_config.json")
    return source


@lru_cache
def compiled(template: str) -> jinja2.Template:
    """Chat templates are code that comes with a download: they run in jinja's sandbox, with what they may expect."""

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def strftime_now(form):  # one date for ever: a run means the same tomorrow
        return TEMPLATE_DATE.strftime(form)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment.from_string(template)


def load_tokenizer(folder: Path, system_prompt: str = ""):
    """Of a base trained here, or of a released checkpoint."""
    if (folder / "tokenizer.model").exists():
        return Tokenizer(folder / "tokenizer.model")
    return ChatTokenizer(folder, system_prompt)


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


def load_corpus(
    folder, max_seconds: float, skip_bad_rows: bool = False, splits=("train", "validation", "test")
) -> dict[str, list[dict]]:
    """Read and check the splits. Every row is looked at before anything else happens; DataError lists the bad."""
    folder = Path(folder)
    corpus, bad = {}, []
    for split in splits:
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
        corpus[split] = rows
    if bad:
        summary = "\n  ".join([f"{len(bad)} bad rows"] + bad[:5] + (["..."] if len(bad) > 5 else []))
        if not skip_bad_rows:
            raise DataError(f"{summary}\nFix them, or go on without them: --skip-bad-rows")
        print(f"skipping {summary}")
        for split, rows in corpus.items():
            if not rows:
                raise DataError(f"{folder / split}.jsonl has no good row left")
    return corpus


def fingerprint(rows: list[dict]) -> str:
    """Of the rows' content, wherever their folder lies: neither a run nor a base is taken up again on other data."""

    def portable(audio):  # a file by its name and size; synthetic speech by what it is made from
        return [Path(audio).name, Path(audio).stat().st_size] if isinstance(audio, str) else asdict(audio)

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

    def project(self, model, tokenizer, frozen: bool = True):
        """And through the projector: if that is frozen too, what is left for RL is embeddings in, text out."""
        self.tokenizer, self.frozen = tokenizer, frozen
        if not frozen:  # heard anew each time, by the model as it is then, with gradients where they are enabled
            self.sounds = lambda indices: model.project(model.encode(self.mels(indices)))
            return
        self.encode(model)
        self.sounds = self.cache("projecting", lambda indices: model.project(self.frames(indices)))
        self.frames.forget()

    def batch(self, model, indices: list[int], sounds_of: list[int] | None = None):
        """Prompts of the rows at indices, optionally with other rows' audio."""
        prompts = [self.tokenizer.encode_prompt(self.rows[i]["prompt"]) for i in indices]
        return model.embed_prompts(prompts, self.sounds(sounds_of or indices))


def order(n: int, seed: list[int], start: int, count: int) -> list[int]:
    """Items start .. start + count - 1 of an endless sequence of shuffled passes over n rows."""
    epochs = range(start // n, (start + count - 1) // n + 1)
    passes = {e: np.random.default_rng([*seed, e]).permutation(n) for e in epochs}
    return [int(passes[i // n][i % n]) for i in range(start, start + count)]


def noise(seed: list[int], indices: list[int], K: int, T: int, device) -> torch.Tensor:
    """(P, K, T) uniform numbers keyed by (seed, prompt, response): the same for whoever else is in the batch."""
    rows = [[np.random.default_rng([*seed, i, k]).random(T, dtype=np.float32) for k in range(K)] for i in indices]
    return torch.from_numpy(np.array(rows)).to(device)
