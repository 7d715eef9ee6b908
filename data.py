"""What goes in and what is rewarded: `reward`, the first function here, is the one to replace.

A row is a dict {"audio", "prompt", "reference"}, whose audio.samples() are (samples,) float32 at 16
kHz (corpora.load.Recording, corpora.synthetic.Speech), and optionally

    "transcript"  the words spoken: trains the encoder's CTC head (characters)
    "target"      what supervised training of the base teaches; default: the reference
    "slots"       words or phrases that only the audio tells, e.g. ["seven", "bought|purchased"];
                  or, named, {"number": "seven", "verb": "bought|purchased"}: each is reported
    "group"       a name under which evaluation reports these rows separately
"""

import collections
import io
import math
import re
import unicodedata
from functools import lru_cache

import numpy as np
import sentencepiece
import torch
from tqdm import tqdm

from upkeep.errors import UserError, errors_of_reading
from upkeep.forks import checked_reward
from upkeep.processes import rank

SAMPLE_RATE = 16_000  # Hz
N_FFT = 512  # samples
WINDOW = 400  # samples: 25 ms
HOP = 160  # samples: 10 ms, so 100 mel frames per second
N_MELS = 80
AUDIO = "<|audio|>"  # its place in the prompt is where the audio embeddings go
ANSWER = "<|answer|>"  # ends the prompt of the compact model


# --------------------------------------------------------------------------------------------------
# Reward


def reward(answer: str, row: dict) -> float:
    """What RL maximises, 0..1. Replace this one function to train for something else."""
    return sentence_bleu(" ".join(answer.split()), " ".join(row["reference"].split())) / 100


def rewards_of(answers: list[str], rows: list[dict], reward=reward) -> list[float]:
    """The reward of each answer to its row; raises UserError where one is not a finite number."""
    pairs = zip(answers, rows, strict=True)
    return [checked_reward(reward(answer, row), reward, answer, row) for answer, row in pairs]


# --------------------------------------------------------------------------------------------------
# BLEU as sacrebleu defines it (Post 2018): 13a tokens, exponential smoothing


def sentence_bleu(answer: str, reference: str) -> float:
    """0..100, with effective order, as sacrebleu.sentence_bleu."""
    return _bleu(_bleu_counts(answer, reference), effective_order=True)


def corpus_bleu(answers: list[str], references: list[str], lowercase: bool = False) -> float:
    """0..100, as sacrebleu.corpus_bleu."""
    if lowercase:
        answers = [answer.lower() for answer in answers]
        references = [reference.lower() for reference in references]
    return _bleu(sum(map(_bleu_counts, answers, references)), effective_order=False)


@lru_cache(maxsize=100_000)
def tokenize_13a(text: str) -> tuple[str, ...]:
    """mteval-v13a's tokens: punctuation is split off, but for periods and commas inside numbers."""
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, character)
    text = re.sub(r"([!-&(-+/:-@\[-`{-~])", r" \1 ", f" {text} ")  # ASCII punctuation but ' , - .
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    text = re.sub(r"([0-9])(-)", r"\1 \2 ", text)
    return tuple(text.split())


def _bleu_counts(answer: str, reference: str) -> np.ndarray:
    """Everything BLEU needs, additive over sentences: (10,), matches and totals of 1- to 4-grams,
    then the lengths of answer and reference in tokens."""
    hypothesis = tokenize_13a(answer)
    truth = tokenize_13a(reference)
    matches, totals = [], []
    for n in range(1, 5):
        grams = collections.Counter(zip(*(hypothesis[i:] for i in range(n))))
        allowed = collections.Counter(zip(*(truth[i:] for i in range(n))))
        matches.append(sum(min(count, allowed[gram]) for gram, count in grams.items()))
        totals.append(max(0, len(hypothesis) - n + 1))
    return np.array([*matches, *totals, len(hypothesis), len(truth)])


def _bleu(counts: np.ndarray, effective_order: bool) -> float:
    """0..100, of what _bleu_counts returns, for one sentence or summed over many."""
    matches, totals = counts[:4], counts[4:8]
    answer_length, reference_length = counts[8:]
    if answer_length == 0 or not matches.any():
        return 0.0
    logs = []
    smoothing = 1.0
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


# --------------------------------------------------------------------------------------------------
# Further scores of evaluation

# Thai, Lao, Burmese, Khmer, Kana, Han: scripts that put no blanks between words.
WITHOUT_BLANKS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"


def words_and_gaps(text: str) -> list[str]:
    """The text in pieces, gap, word, gap, ..., word, gap: words are those at odd places. A word is
    letters, their marks and digits; a character of a script without blanks is one."""
    in_word = [c == "_" or unicodedata.category(c)[0] in "LMN" for c in text]
    spaced = "".join(c if kept else " " for c, kept in zip(text, in_word))
    words = re.finditer(f"[{WITHOUT_BLANKS}]|[^ {WITHOUT_BLANKS}]+", spaced)
    cuts = [0, *(cut for word in words for cut in word.span()), len(text)]
    return [text[start:end] for start, end in zip(cuts, cuts[1:])]


def spoken_words(text: str) -> list[str]:
    """The text's words in lower case."""
    return words_and_gaps(unicodedata.normalize("NFC", text.lower()))[1::2]


def named_slots(row: dict) -> list[tuple[str, str]]:
    """(field, slot) for each slot of a row; in a list they have no field: ""."""
    slots = row.get("slots", [])
    return list(slots.items()) if isinstance(slots, dict) else [("", slot) for slot in slots]


def occurrences(slot: str, words: list[str]) -> list[slice]:
    """Where a slot stands among the words: any of its phrases "a|b|c", as a whole."""
    phrases = [phrase for phrase in map(spoken_words, slot.split("|")) if phrase]
    spans = [slice(i, i + len(phrase)) for phrase in phrases for i in range(len(words))]
    return [span for span in spans if words[span] in phrases]


def slot_accuracy(answers: list[str], rows: list[dict], field: str = "") -> float:
    """Share (0..1) of the rows' slots, or of a field's, found in the answers; nan without any."""
    found = []
    for answer, row in zip(answers, rows):
        words = spoken_words(answer)
        slots = [slot for name, slot in named_slots(row) if not field or name == field]
        found += [bool(occurrences(slot, words)) for slot in slots]
    return sum(found) / len(found) if found else math.nan


def references_as_heard(answers: list[str], rows: list[dict]) -> list[str]:
    """For the ceiling: each reference, with a word that no reference has for every word of the slots
    that the row's answer lacks. These texts earn what perfect wording of what was heard earns."""
    unheard = "unheard"
    while any(unheard in row["reference"].lower() for row in rows):
        unheard += "x"
    texts = []
    for answer, row in zip(answers, rows, strict=True):
        heard = spoken_words(answer)
        pieces = words_and_gaps(row["reference"])
        said = pieces[1::2]
        words = [spoken_words(word)[0] for word in said]
        missed = [slot for _, slot in named_slots(row) if not occurrences(slot, heard)]
        for span in [span for slot in missed for span in occurrences(slot, words)]:
            said[span] = [unheard] * len(words[span])
        pieces[1::2] = said
        texts.append("".join(pieces))
    return texts


def rouge_l(answer: str, reference: str) -> float:
    """0..1: F1 of the longest common subsequence of words (Lin 2004), lower case, no stemming."""
    a = re.findall(r"[^\W_]+", answer.lower())
    b = re.findall(r"[^\W_]+", reference.lower())
    longest = [0] * (len(b) + 1)  # of the answer's words so far and the first j of the reference
    for word in a:
        diagonal = 0  # longest[j - 1] before this word
        for j, other in enumerate(b, start=1):
            above = longest[j]
            if word == other:
                longest[j] = diagonal + 1
            else:
                longest[j] = max(above, longest[j - 1])
            diagonal = above
    return 2 * longest[-1] / (len(a) + len(b)) if longest[-1] else 0.0


def swapped_audio(rows: list[dict]) -> list[int]:
    """For each row another with the same prompt, or itself. Its audio is played instead: an answer
    that stays right did not come from the audio."""
    by_prompt = collections.defaultdict(list)
    for i, row in enumerate(rows):
        by_prompt[row["prompt"]].append(i)
    other = list(range(len(rows)))
    for group in by_prompt.values():
        half = len(group) // 2
        for i, j in zip(group, group[half:] + group[:half]):
            other[i] = j
    return other


HEARD = "heard %, "  # begins the name of a field's score


def evaluation_scores(rows, greedy, passes, swapped, reward=reward) -> dict[str, float]:
    """The figures of a report, from a greedy answer to each row and passes of sampled ones.

    swapped: greedy answers to the audio of the rows at swapped_audio(rows); None where no row has
    slots. reward None: without the mean reward and its ceiling.
    """
    references = [row["reference"] for row in rows]

    def exact_match(answers):
        return np.mean([a.split() == r.split() for a, r in zip(answers, references)])

    bleu = [corpus_bleu(answers, references, lowercase=True) for answers in passes]
    rouge = [rouge_l(a, r) for answers in passes for a, r in zip(answers, references)]
    scores = {
        "BLEU greedy": corpus_bleu(greedy, references, lowercase=True),
        "BLEU sampled": np.mean(bleu),
        "BLEU sampled, std": np.std(bleu, ddof=1) if len(bleu) > 1 else 0.0,
        "ROUGE-L sampled": 100 * np.mean(rouge),
        "exact match %": 100 * exact_match(greedy),
        "exact match sampled %": 100 * np.mean([exact_match(answers) for answers in passes]),
    }
    if reward:
        rewards = [rewards_of(answers, rows, reward) for answers in passes]
        scores["mean reward x100"] = 100 * np.mean(rewards)
    if reward and swapped:  # then rows have slots
        as_heard = references_as_heard(greedy, rows)
        scores["mean reward x100, ceiling"] = 100 * np.mean(rewards_of(as_heard, rows, reward))
    if swapped:
        scores["heard %"] = 100 * slot_accuracy(greedy, rows)
        for field in dict.fromkeys(name for row in rows for name, _ in named_slots(row) if name):
            scores[HEARD + field] = 100 * slot_accuracy(greedy, rows, field)
        scores["heard, audio swapped %"] = 100 * slot_accuracy(swapped, rows)
        # Chance: how many of a row's slots the right answer to the swapped audio has.
        others = [references[j] for j in swapped_audio(rows)]
        scores["heard, chance %"] = 100 * slot_accuracy(others, rows)
    for group in sorted({row["group"] for row in rows if "group" in row}):
        chosen = [i for i, row in enumerate(rows) if row.get("group") == group]
        answers = [greedy[i] for i in chosen]
        wanted = [references[i] for i in chosen]
        scores[f"BLEU greedy, {group}"] = corpus_bleu(answers, wanted, lowercase=True)
    return {name: float(value) for name, value in scores.items()}


# --------------------------------------------------------------------------------------------------
# Audio


@lru_cache(maxsize=1)
def mel_filters() -> torch.Tensor:
    """(N_FFT / 2 + 1, N_MELS) triangular filters, HTK mel scale, 0 to 8 kHz, as torchaudio's."""
    top = 2595 * math.log10(1 + SAMPLE_RATE / 2 / 700)  # mel
    corners = 700 * (10 ** (torch.linspace(0, top, N_MELS + 2) / 2595) - 1)  # Hz, (N_MELS + 2,)
    bins = torch.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1)  # Hz
    width = corners.diff()  # (N_MELS + 1,)
    slope = bins[:, None] - corners  # (bins, N_MELS + 2)
    rising = slope[:, :-2] / width[:-1]
    falling = -slope[:, 2:] / width[1:]
    return torch.minimum(rising, falling).clamp(min=0)


def log_mel(audio: torch.Tensor) -> torch.Tensor:
    """(samples,) at 16 kHz -> (T, 160): Granite Speech's features, two 10 ms frames side by side.

    The dynamic range is cut 8 decades below the recording's own maximum: compute it per recording,
    never on a batch.
    """
    window = torch.hann_window(WINDOW)
    spectrum = torch.stft(
        audio, N_FFT, HOP, WINDOW, window, center=True, pad_mode="reflect", return_complex=True
    )
    mel = mel_filters().T @ spectrum.abs().square()  # (N_MELS, frames)
    logs = mel.T.clamp(min=1e-10).log10()
    logs = torch.maximum(logs, logs.max() - 8) / 4 + 1
    logs = logs[: len(logs) // 2 * 2]  # an odd last frame has no partner
    return logs.reshape(-1, 2 * N_MELS)


# --------------------------------------------------------------------------------------------------
# Text


def target(row: dict) -> str:
    """What supervised training teaches."""
    return row.get("target", row["reference"])


class Tokenizer:
    """A SentencePiece model trained on the training text, for the compact model."""

    def __init__(self, model_file):
        with errors_of_reading(
            model_file, f"a SentencePiece model with </s>, {AUDIO} and {ANSWER}"
        ):
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
            self.vocab_size = self.sp.vocab_size()
            ids = [self.sp.piece_to_id(piece) for piece in ("</s>", AUDIO, ANSWER)]
            if self.sp.unk_id() in ids:
                raise ValueError("one of them is missing")
        self.eos_id, self.audio_id, self.answer_id = ids

    @staticmethod
    def train(rows: list[dict], vocab_size: int = 800) -> bytes:
        """The model file. Deterministic; characters never seen in training fall back to bytes."""
        texts = []
        for row in rows:
            texts += [row["prompt"].replace(AUDIO, " "), row["reference"], target(row)]
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            # 256 bytes, every character, and some merges.
            vocab_size=max(vocab_size, 600 + len(set("".join(texts)))),
            hard_vocab_limit=False,
            character_coverage=1.0,
            byte_fallback=True,
            bos_id=-1,
            user_defined_symbols=[AUDIO, ANSWER],
            normalization_rule_name="identity",
            max_sentence_length=100_000,
            num_threads=1,
            minloglevel=2,
        )
        return model.getvalue()

    def encode_prompt(self, prompt: str) -> list[int]:
        return self.sp.encode(prompt) + [self.answer_id]

    def encode_answer(self, text: str) -> list[int]:
        return self.sp.encode(text) + [self.eos_id]

    def decode(self, ids: list[int]) -> str:
        return self.sp.decode([i for i in ids if i != self.eos_id])

    def pieces(self, ids: list[int]) -> list[str]:
        """Each token as text; SentencePiece writes a space as a low block."""
        return [self.sp.id_to_piece(i).replace("\N{LOWER ONE EIGHTH BLOCK}", " ") for i in ids]


# --------------------------------------------------------------------------------------------------
# A split of the corpus, heard once: audio -> log-mels -> encoder frames -> audio embeddings


class Cache:
    """compute(indices) -> a tensor for each, kept for as many of n items as there is room for.

    The first items are computed here, in batches of a fixed size, until `gigabytes` are used up;
    the others one by one whenever they are asked for. Rounding differs with the batch; here an
    item's index alone decides its batch, so a resumed run sees the same numbers.
    """

    def __init__(self, compute, n: int, gigabytes: float, title: str, batch: int = 32):
        self.compute = torch.no_grad()(compute)
        self.kept = []
        room = gigabytes * 1e9
        for start in tqdm(range(0, n, batch), title, leave=False, disable=rank() > 0 or None):
            fresh = self.compute(list(range(start, min(n, start + batch))))
            room -= sum(tensor.nbytes for tensor in fresh)
            if room < 0:
                break
            self.kept += fresh

    def __call__(self, indices: list[int]) -> list[torch.Tensor]:
        return [self.kept[i] if i < len(self.kept) else self.compute([i])[0] for i in indices]

    def serves(self, model) -> bool:
        """Whether what is kept has this model's dtype and device."""
        return {(x.dtype, x.device) for x in self.kept} == {(model.dtype, model.device)}

    def forget(self):
        """Free the memory; what is asked for from now on is computed again."""
        self.kept = []


class Split:
    """Rows, and what the model hears of them. Pretraining calls `encode` once its encoder is frozen;
    RL and evaluation call `hear`, which encodes where that was not done, and then `prompts`.

    Each stage maps indices of rows to one tensor per row: mels (frames, 160) -> encoder frames
    (T, C) -> audio embeddings (N, C_text).
    """

    def __init__(self, name: str, rows: list[dict], gigabytes: float):
        recordings = [row["audio"] for row in rows]
        silent = [x for x in recordings if not hasattr(x, "samples")]
        if silent:
            raise UserError(
                f"{silent[0]!r} has no samples(): is it a corpora.load.Recording(path)?"
            )
        self.name = name
        self.rows = rows
        self.gigabytes = gigabytes
        self.mels = self.cache(
            "log-mels of", lambda at: [log_mel(recordings[i].samples()) for i in at]
        )
        self.frames = None

    def cache(self, doing: str, compute) -> Cache:
        title = f"{doing} {len(self.rows)} {self.name} rows"
        return Cache(compute, len(self.rows), self.gigabytes, title)

    def encode(self, model) -> Cache:
        """Frames of a frozen encoder; they are kept, and `hear` goes on from them."""
        self.frames = self.cache("encoding", lambda indices: model.encode(self.mels(indices)))
        return self.frames

    def hear(self, model, tokenizer, frozen: bool = True):
        """Pass everything through encoder and projector; what is left for RL is embeddings in,
        text out. After `encode` the encoder must be the same; its dtype may differ.

        Not frozen (LoRA is on the encoder or projector): nothing is kept, and the audio is heard
        anew each time, by the model as it is then, with gradients where they are enabled.
        """
        self.tokenizer = tokenizer
        if frozen:
            if self.frames is None or not self.frames.serves(model):
                self.encode(model)
            self.audio = self.cache("projecting", lambda at: model.project(self.frames(at)))
            self.mels.forget()
            self.frames.forget()
        else:
            self.audio = lambda indices: model.project(model.encode(self.mels(indices)))

    def prompts(self, model, indices: list[int], audio_of: list[int] | None = None):
        """model.Prompts of the rows at indices, optionally with other rows' audio."""
        ids = [self.tokenizer.encode_prompt(self.rows[i]["prompt"]) for i in indices]
        return model.embed_prompts(ids, self.audio(audio_of or indices))


# --------------------------------------------------------------------------------------------------
# Order and noise, keyed by what they are for, so that neither depends on what ran before


def order(n: int, seed: list[int], start: int, count: int) -> list[int]:
    """Items start .. start + count - 1 of an endless sequence of shuffled passes over n rows."""
    passes = range(start // n, (start + count - 1) // n + 1)
    shuffled = {p: np.random.default_rng([*seed, p]).permutation(n) for p in passes}
    return [int(shuffled[i // n][i % n]) for i in range(start, start + count)]


def noise(seed: list[int], prompts: list[int], K: int, T: int, device) -> torch.Tensor:
    """(P, K, T) uniform numbers in [0, 1), a row keyed by (seed, prompt, response): the same
    whoever else is in the batch."""
    rows = [
        [np.random.default_rng([*seed, p, k]).random(T, dtype=np.float32) for k in range(K)]
        for p in prompts
    ]
    return torch.from_numpy(np.array(rows)).to(device)
