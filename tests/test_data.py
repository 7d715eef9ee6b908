"""data.py: features, BLEU and other scores, text, a split heard once, order and noise."""

import io
import itertools
import math
import random
import re
import sys
from functools import partial
from statistics import fmean, stdev

import numpy as np
import pytest
import sentencepiece
import torch

import data
import train
from corpora import synthetic
from data import AUDIO
from model import SpeechLM
from tests.helpers import first_run, near, randn, same, seeded, tiny
from upkeep.errors import DataError, UserError

__all__ = ["first_run", "seeded"]  # fixtures


@pytest.mark.parametrize("samples", [400, 559, 560, 719, 720, 1601, 16000, 33333])
def test_log_mel_is_granite_speechs(samples):
    """Of a single recording: transformers' feature extractor, which is torchaudio's
    MelSpectrogram inside."""
    pytest.importorskip("torchaudio")
    extractor = pytest.importorskip("transformers").GraniteSpeechFeatureExtractor()
    time = torch.arange(samples) / 16000
    chirp = 0.3 * torch.sin(4000 * time * (1 + time)) * (time > 0.01)
    audio = chirp + 1e-4 * randn(samples) * (time < 0.9)
    near(data.log_mel(audio), extractor(audio)["input_features"][0], atol=2e-5)
    assert data.log_mel(0 * audio).isfinite().all()
    assert len(data.log_mel(audio)) == (samples // 160 + 1) // 2


PIECES = (
    "the cat sat on a mat The CAT Mat don't it's 'quoted' \"said\" “curly” e.g. U.S. Mr. 3.14 "
    "1,000 1,000.5 1-2\n-7 7- 50% $5 #1 a/b a_b (x) [y] {z} <b> a&b &quot; &amp; &lt; &gt; "
    "&amp;quot; <skipped> - -- — … ... . , ; : ! ? .5 5.\nnaïve café Ünïcödé 日本 日本語。 你好， ١٢٣ ½ "
    "№ ß ﬁ 🎉 e\u0301 \u200b x\xa0y 3.a a.3 3,a well-known co-\nop \n- -\n \n\n\t \r \u2028 "
    "\x1c \\ * + = @ | ~ ^ ` a.b"
).split(" ")


def nasty_pairs(n, seed):
    """Hypotheses and references that share words, from none to all of them; some empty, many
    short."""
    rng = random.Random(seed)
    for _ in range(n):
        reference = rng.choices(PIECES, k=rng.choice([0, 1, 2, 3, 4, 5, 8, 13, 30]))
        hypothesis = [w for w in reference if rng.random() < 0.9] if rng.random() < 0.8 else []
        for _ in range(rng.choice([0, 0, 1, 3, 6])):
            hypothesis.insert(rng.randint(0, len(hypothesis)), rng.choice(PIECES))
        gaps = [" ", " ", " ", "", "  "]
        yield rng.choice(gaps).join(hypothesis), rng.choice(gaps).join(reference)


def test_bleu_is_sacrebleus():
    sacrebleu = pytest.importorskip("sacrebleu")
    rewards = []
    metric = sacrebleu.BLEU(effective_order=True)
    exactly = partial(pytest.approx, abs=1e-9)
    for hypothesis, reference in nasty_pairs(1500, seed=0):
        want = metric.sentence_score(hypothesis, [reference]).score
        assert data.sentence_bleu(hypothesis, reference) == exactly(want), (hypothesis, reference)
        plain, plain_reference = (" ".join(x.split()) for x in (hypothesis, reference))
        want = metric.sentence_score(plain, [plain_reference]).score
        rewards.append(data.reward(hypothesis, {"reference": reference}))
        assert 100 * rewards[-1] == exactly(want) and 0 <= rewards[-1] <= 1
    assert 0.1 < np.mean(np.array(rewards) > 0.5) < 0.9
    for seed, lowercase in itertools.product(range(100), (False, True)):
        answers, references = map(list, zip(*nasty_pairs([1, 2, 5, 20][seed % 4], seed + 1)))
        want = sacrebleu.corpus_bleu(answers, [references], lowercase=lowercase).score
        assert data.corpus_bleu(answers, references, lowercase) == exactly(want)


def test_reward_and_slots_by_hand():
    row = {"reference": "Anna  bought\tthe \n seven apples ."}
    assert data.reward(" Anna\nbought the  seven apples.", row) == 1
    assert data.reward(row["reference"], row) == 1
    assert data.reward("", row) == data.reward(" \n", row) == data.reward("zebra", row) == 0
    assert 0 < data.reward("anna bought the seven apples.", row) < 1  # case counts
    rows = [{"slots": ["Seven", "bought|purchased"]}, {}, {"slots": ["red"]}]
    assert data.slot_accuracy(["She PURCHASED seven.", "red", "reddish"], rows) == 2 / 3
    assert data.slot_accuracy(["seventy boughts", "", "a red, hat"], rows) == 1 / 3
    assert math.isnan(data.slot_accuracy(["a"], [{}]))
    rows[0] = {"slots": {"number": "Seven", "verb": "bought|purchased"}}  # by field, which counts
    rows[1] = {"slots": {"verb": "sold"}}
    answers = ["She PURCHASED eleven.", "red", "red"]
    assert data.slot_accuracy(answers, rows) == 2 / 4
    assert data.slot_accuracy(answers, rows, "verb") == 1 / 2
    assert data.slot_accuracy(answers, rows, "number") == 0
    assert math.isnan(data.slot_accuracy(answers, rows, "colour"))  # those of a list have no field


def test_a_deaf_field_is_seen(capsys):
    """Six fields are always right and the verb is at chance: the mean is high, and whoever reads the
    table finds the verb, in its row and in the last one; where training makes another field worse,
    each column names its own."""
    verbs = ("bought", "sold", "found", "lost")
    right = {"name": "Anna", "number": "six", "colour": "red", "thing": "hats", "place": "school"}
    right["day"] = "Sunday"
    said = "Anna {} six red hats at the school on {}."
    rows = [
        {
            "prompt": AUDIO + "?",
            "reference": said.format(verb, "Sunday"),
            "slots": {"verb": verb, **right},
        }
        for verb in verbs
    ]
    base = [said.format("found", "Sunday")] * 4
    trained = [said.format(verb, "Monday") for verb in ("lost", *verbs[1:])]
    columns = {}
    for name, answers in (("base", base), ("trained", trained)):
        columns[name] = data.evaluation_scores(rows, answers, [answers], answers)
    heard = {name: value for name, value in columns["base"].items() if name.startswith("heard %")}
    others = {f"heard %, {field}": 100 for field in right}
    assert heard == {"heard %": pytest.approx(100 * 25 / 28), "heard %, verb": 25, **others}
    assert heard["heard %"] > 89
    train.show_table("test split", columns)
    title, *table = capsys.readouterr().out.strip().splitlines()
    assert title.split() == ["test", "split", "base", "trained", "difference"]
    assert "heard %, verb 25.00 75.00 +50.00" in [" ".join(line.split()) for line in table]
    assert table[-1].split() == ["worst", "heard", "%", "verb", "25.0", "day", "0.0"]
    train.show_table("test split", {"": columns["base"]})  # as --eval-only does
    assert capsys.readouterr().out.split()[-5:] == ["worst", "heard", "%", "verb", "25.0"]
    # What an older version wrote has other names, and slots in a list have no fields.
    older = {"BLEU greedy": 50.0, "slots heard %": 89.0}
    greedy = columns["trained"]["BLEU greedy"]
    train.show_table("test split", {"base": older, "trained": columns["trained"]})
    _, *table = capsys.readouterr().out.strip().splitlines()
    told = ["BLEU", "greedy", "50.00", f"{greedy:.2f}", f"{greedy - 50:+.2f}"]
    assert [line.split() for line in table] == [told]
    rows = [row | {"slots": [*row["slots"].values()]} for row in rows]
    scores = data.evaluation_scores(rows, base, [base], base)
    assert scores["heard %"] == heard["heard %"] and "heard %, verb" not in scores
    train.show_table("test split", {"": scores})
    _, *table = capsys.readouterr().out.strip().splitlines()
    assert [line.rsplit(maxsplit=1)[0].strip() for line in table] == list(scores)


@pytest.mark.parametrize(
    "slot, found, missed",
    [
        ("New York", "in new  york, since May", "a New Yorker; York, New"),
        ("o'clock", "at five o\N{RIGHT SINGLE QUOTATION MARK}clock.", "oclock"),
        ("café", "the Cafe\N{COMBINING ACUTE ACCENT}!", "cafe"),
        ("cafe\N{COMBINING ACUTE ACCENT}", "CAFÉ", "cafés"),
        ("Größe|size", "die größe 7", "Größen, sized"),
        ("нью йорк", "(Нью-Йорк)", "Нью-Йорка"),
        ("कि", "उसने कहा कि हाँ", "क की किताब"),
        ("東京", "私は東京に行く", "京東、都"),
        ("3.5", "it costs 3.5 euros", "35 or 13.5"),
    ],
)
def test_a_slot_is_a_phrase_in_any_script(slot, found, missed):
    assert data.slot_accuracy([found, missed, ""], 3 * [{"slots": [slot]}]) == 1 / 3


@pytest.mark.parametrize(
    "slots, answer, reference, as_heard",
    [
        # All is heard, in whatever words: the reference as it is.
        (["Anna", "lost|dropped"], "she dropped anna's", "Anna  lost it . ", "Anna  lost it . "),
        ({"name": "Anna"}, "Bob lost it.", "Anna lost it.", "unheard lost it."),
        ({"name": "Anna"}, "", "ANNA, anna: Anna's Annas", "unheard, unheard: unheard's Annas"),
        ({"verb": "misplaced|lost"}, "Anna sold it", "Anna lost it.", "Anna unheard it."),
        (["red", "hats"], "green hats", "Reddish (red) hats!", "Reddish (unheard) hats!"),
        # Half a phrase was not heard either; each of its words goes, and they nowhere else.
        (["New York"], "in old York", "New in New York?", "New in unheard unheard?"),
        (["York"], "in old York", "in New York", "in New York"),
        (["a a|"], "a", "a a a", "unheard unheard unheard"),
        (["two", "twenty"], "two", "Two of two twenty.", "Two of two unheard."),
        # The reference need not have the slot.
        (["seven", "lost"], "", "Anna lost some.", "Anna unheard some."),
        # Any script, as slots are found.
        (["東京"], "京東", "私は東京に行く。", "私はunheardunheardに行く。"),
        (["café"], "cafe", "the Cafe\N{COMBINING ACUTE ACCENT}!", "the unheard!"),
        (["क"], "", "कि क", "कि unheard"),
        ([], "", "Anna lost it.", "Anna lost it."),
    ],
)
def test_a_reference_as_it_was_heard(slots, answer, reference, as_heard):
    row = {"reference": reference, "slots": slots}
    assert data.references_as_heard([answer], [row]) == [as_heard]


def test_no_reference_has_the_word_for_what_was_not_heard():
    rows = [{"reference": "Anna lost it", "slots": ["Anna"]}, {"reference": "Unheard of"}]
    assert data.references_as_heard(["", ""], rows) == ["unheardx lost it", "Unheard of"]


def longest_common(a, b):
    """Length of the longest common subsequence, by its definition."""
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + longest_common(a[1:], b[1:])
    return max(longest_common(a[1:], b), longest_common(a, b[1:]))


def test_scores():
    """What evaluation reports, against sacrebleu and brute force."""
    sacrebleu = pytest.importorskip("sacrebleu")
    rng = random.Random(0)
    words = "Anna anna, bought BOUGHT the über red-hot apples. apples".split()
    texts = [
        [" ".join(rng.choices(words, k=rng.randint(0, 7))) for _ in range(12)] for _ in range(5)
    ]
    references, greedy, *passes = texts
    greedy[0] = references[0] + " "
    references = [r or "the" for r in references]
    passes[0][1] = references[1]
    rows = [{"prompt": AUDIO + "?", "reference": r} for r in references]
    for i, row in enumerate(rows):
        row["slots"] = {"name": "Anna", "colour": "red"}
        if i % 2:
            row |= {"slots": ["Anna", "red"], "group": "odd"}
    swapped = rng.sample(greedy, 12)
    got = data.evaluation_scores(rows, greedy, passes, swapped)
    exactly = partial(pytest.approx, rel=1e-9, abs=1e-9)
    bleu = [sacrebleu.corpus_bleu(p, [references], lowercase=True).score for p in passes]
    greedy_bleu = sacrebleu.corpus_bleu(greedy, [references], lowercase=True).score
    assert got["BLEU greedy"] == exactly(greedy_bleu)
    assert (got["BLEU sampled"], got["BLEU sampled, std"]) == exactly((fmean(bleu), stdev(bleu)))
    assert data.evaluation_scores(rows, greedy, passes[:1], None)["BLEU sampled, std"] == 0
    odd = sacrebleu.corpus_bleu(greedy[1::2], [references[1::2]], lowercase=True).score
    assert got["BLEU greedy, odd"] == exactly(odd)
    of_slots = [name for name in got if "heard" in name or "ceiling" in name]
    unheard = data.evaluation_scores(rows, greedy, passes, None)
    assert unheard == {name: value for name, value in got.items() if name not in of_slots}
    assert got["exact match %"] == exactly(100 / 12)
    assert got["exact match sampled %"] == exactly(100 / 36)
    f1 = []
    for answer, reference in zip(sum(passes, []), references * 3):
        a, b = (re.sub(r"[.,-]", " ", text.lower()).split() for text in (answer, reference))
        f1.append(2 * longest_common(a, b) / (len(a) + len(b)))
    assert got["ROUGE-L sampled"] == exactly(100 * fmean(f1))
    assert 0 < min(filter(None, f1)) < max(f1) == 1
    pairs = list(zip(sum(passes, []), references * 3))
    rewards = [sacrebleu.sentence_bleu(answer, [reference]).score for answer, reference in pairs]
    assert got["mean reward x100"] == exactly(fmean(rewards))
    both = ("anna", "red")
    others = [references[j] for j in data.swapped_audio(rows)]
    for name, answers, slots in (
        ("heard %", greedy, both),
        ("heard %, name", greedy[::2], ("anna",)),  # the others' slots are lists
        ("heard %, colour", greedy[::2], ("red",)),
        ("heard, audio swapped %", swapped, both),
        ("heard, chance %", others, both),
    ):
        hits = [slot in re.findall(r"\w+", a.lower()) for a in answers for slot in slots]
        assert got[name] == exactly(100 * fmean(hits))
    best = []  # what hearing like this can earn
    for answer, reference in zip(greedy, references):
        as_heard = reference
        for slot in both:
            if not re.search(rf"\b{slot}\b", answer.lower()):
                as_heard = re.sub(rf"\b{slot}\b", "zebra", as_heard, flags=re.IGNORECASE)
        best.append(sacrebleu.sentence_bleu(as_heard, [reference]).score)
    assert got["mean reward x100, ceiling"] == exactly(fmean(best))
    assert fmean(best) < 99 and of_slots[0] == "mean reward x100, ceiling" and len(of_slots) == 6


def test_tokenizer_and_alphabet(tmp_path):
    rows = []
    for task in ("qa", "translation"):
        rows += synthetic.rows(task, {"train": 150}, 0)["train"]
    (tmp_path / "tokenizer.model").write_bytes(data.Tokenizer.train(rows))
    assert data.Tokenizer.train(rows) == (tmp_path / "tokenizer.model").read_bytes()
    tokenizer = data.Tokenizer(tmp_path / "tokenizer.model")
    eos = tokenizer.eos_id
    audio = tokenizer.audio_id
    answer = tokenizer.answer_id
    size = tokenizer.vocab_size
    assert len({eos, audio, answer}) == 3 and all(0 < i < size for i in (eos, audio, answer))
    for text in (
        *(row["reference"] for row in rows),
        "日本語 🎉 ñ",
        "Zürich, 3.14% <b>",
        "q\u0301 </s> \u200b|",
        "",
    ):
        ids = tokenizer.encode_answer(text)
        assert tokenizer.decode(ids) == tokenizer.decode(ids[:-1]) == text
        assert ids[-1] == eos and ids.count(eos) == 1 and len(ids) < 35
    for ids in (tokenizer.encode_prompt(row["prompt"]) for row in rows):
        assert ids.count(audio) == ids.count(answer) == 1 and ids[-1] == answer
    random_ids = np.random.default_rng(0).integers(size, size=(200, 12)).tolist()
    for ids in random_ids:  # whatever a model says can be shown
        assert isinstance(tokenizer.decode(ids), str) and len(tokenizer.pieces(ids)) == 12
    other_kind = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c"] * 9), model_writer=other_kind, vocab_size=7, minloglevel=2
    )
    for content in (other_kind.getvalue(), b"", b"Entry not found"):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(DataError, match=r"tokenizer.model cannot be read as a SentencePiece"):
            data.Tokenizer(tmp_path / "tokenizer.model")


def test_the_first_process_alone_shows_a_bar(monkeypatch):
    for rank in (0, 1):
        terminal = io.StringIO()
        terminal.isatty = lambda: True
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(data, "rank", lambda rank=rank: rank)
        data.Cache(lambda at: [torch.zeros(1) for _ in at], 3, 1.0, "hearing")
        assert ("hearing" in terminal.getvalue()) == (rank == 0)


@pytest.mark.parametrize("budget, batches, kept", [(0, 1, 0), (40, 2, 3), (10000, 3, 9)])
def test_cache_does_not_depend_on_the_order_of_questions(budget, batches, kept):
    """Items are computed in fixed company, or alone, whoever asks for what; and the budget in
    bytes is kept."""
    calls = []

    def compute(indices):  # 4 (i + 1) bytes each, and a trace of the company
        calls.append(indices)
        return [torch.full((i + 1,), i + len(indices) / 100) for i in indices]

    cache = data.Cache(compute, 9, budget * 1e-9, "testing", batch=3)
    first = [cache([i])[0] for i in range(9)]
    assert [(len(t), int(t[0])) for t in first] == [(i + 1, i) for i in range(9)]
    for asked in np.random.default_rng(0).integers(9, size=(20, 5)).tolist():
        same(cache(asked), [first[i] for i in asked])
    together = [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert calls[:batches] == together[:batches]
    assert {len(call) for call in calls[batches:]} <= {1}
    assert len(cache.kept) == kept and sum(tensor.nbytes for tensor in cache.kept) <= budget


def test_a_path_is_no_recording():
    with pytest.raises(UserError, match=r"^'clip.wav' has no samples\(\).*Recording") as error:
        data.Split("one", [{"audio": "clip.wav"}], 1.0)
    assert "\n" not in str(error.value)


def test_audio_is_encoded_once(tmp_path, monkeypatch):
    """Frames of next-token training are RL's: to the bit those of the base as it is loaded, which
    encodes the other splits alone. In another dtype nothing of them is used."""
    encoded = []
    encode = SpeechLM.encode

    def watched(model, mels):
        encoded.append(len(mels))
        return encode(model, mels)

    heard = {}
    hear = data.Split.hear

    def remembered(split, model, tokenizer, frozen=True):
        hear(split, model, tokenizer, frozen)
        heard[split.name] = (model, split.audio.kept)

    monkeypatch.setattr(SpeechLM, "encode", watched)
    monkeypatch.setattr(data.Split, "hear", remembered)
    short = "--ctc-steps 1 --sft-steps 1 --steps 1 --eval-every 0"
    train.main(tiny(f"{short} --train-rows 40", out=tmp_path / "run"))
    sizes = {name: len(kept) for name, (_, kept) in heard.items()}
    assert sizes["train"] == 40 and encoded[:2] == [32, 8]  # in next-token training
    assert sum(encoded) == sum(sizes.values())
    model, kept = heard["train"]
    rows = train.load_rows(train.Config(train_rows=40, validation_rows=1, test_rows=1))["train"]
    again = data.Split("again", rows, 1.0)
    hear(again, model, None)
    same(again.audio.kept, kept)

    class Other:
        """Hears nothing, in bfloat16."""

        device, dtype = model.device, torch.bfloat16
        encode = staticmethod(lambda mels: [torch.full((2, 3), 7.0) for _ in mels])
        project = staticmethod(lambda frames: frames)

    split = data.Split("another dtype", rows[:3], 1.0)
    split.encode(model)
    hear(split, Other, None)
    assert torch.equal(split.audio([0, 1, 2])[2], torch.full((2, 3), 7.0))


def test_order_and_swap():
    assert sorted(data.order(10, [0], 0, 10)) == list(range(10))
    assert sorted(data.order(10, [0], 10, 10)) == list(range(10))
    assert data.order(10, [0], 0, 25)[7:25] == data.order(10, [0], 7, 18)
    assert data.order(10, [0], 0, 10) != data.order(10, [1], 0, 10)
    rows = [{"prompt": p} for p in "abaabcb"]
    other = data.swapped_audio(rows)
    assert sorted(other) == list(range(7))
    assert all(rows[i]["prompt"] == rows[j]["prompt"] for i, j in enumerate(other))
    assert [i for i, j in enumerate(other) if i == j] == [5]  # the only row of its prompt


def test_noise_is_keyed_by_prompt_and_response():
    u = data.noise([3, 1], [5, 9], 4, 6, "cpu")
    assert torch.equal(u[1:, :2], data.noise([3, 1], [9], 2, 6, "cpu")) and u.unique().numel() == 48
    assert not torch.equal(u, data.noise([3, 2], [5, 9], 4, 6, "cpu"))
