"""The credit microscope: one fixed policy, the same rollouts, every credit rule; whose gradient is
the best?

    python -m experiments.credit --out runs/credit     trains the bases, measures; resumable
    python -m experiments.credit --plot                figures and tables of what is measured

The policy is a base of the synthetic "qa" task with fresh LoRA, so the gradient is that of LoRA's
B: the first step of training. Its true policy gradient G* of the expected reward comes from very
many rollouts. A rule turns a batch of 64 responses into a gradient, g; what counts is cos(g, G*),
how much of a step of given length goes where the reward grows. A rule may fall short by noise,
SNR = |E g|^2 / E|g - E g|^2, or by bias, cos(E g, G*) < 1. Two settings:

    exact      rollouts at top-p 1, log-probabilities summed over a response's tokens: policy
               gradient theory
    training   rollouts at top-p 0.9, their mean over a response's tokens, as leaf.policy_loss has
               it

G* is always of the exact setting; G_train is what the training setting would have instead. Norms
are estimated without the noise that would inflate them, from products of independent halves or
batches, which is why a cosine may exceed 1. Intervals are of the batches alone, G* taken as known.
Its length moves all rules alike; of the noise in its direction, "truth" in the tables says how much
there is: the cosine of two halves.
"""

import argparse
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
import leaf
import train
from experiments.compare import student
from experiments.common import RESULTS
from experiments.methods import (
    BASELINE,
    METHODS,
    OURS,
    PLAIN,
    Method,
    even_boundaries,
    leave_one_out,
    random_boundaries,
)
from lora import lora_parameters
from model import PrefixTree, Prompts, Rollout, SpeechLM

FOLDER = RESULTS / "credit"
SEED = 11  # of everything random here
BASES = {200: "early", 400: "default", 1200: "late"}  # by sft_steps
MAIN_BASE = 400
# Rows by length of the answer, as corpora.synthetic deals them out.
QUESTIONS = {"long": 0, "middle": 1, "short": 2}
MAP_QUESTIONS = ("long", "short")
KS = (4, 8, 16)
BUDGETS = (1, 2, 4, 8)
BATCH = 64  # responses
ROWS = 999  # of the training rows, from which prompts are drawn
BLOCKS = 20  # of batches, for the jackknife


@dataclass
class Setting:
    top_p: float
    token_mean: bool  # weigh a response's tokens by 1 / length


SETTINGS = {"exact": Setting(1.0, False), "training": Setting(0.9, True)}
REWARDS = {
    "BLEU": data.reward,
    "exact match": lambda text, row: float(text.split() == row["reference"].split()),
    "slots": lambda text, row: data.slot_accuracy([text], [row]),
}


# --------------------------------------------------------------------------------------------------
# Rules: (tokens (K, T), lengths (K,), surprisal (K, T), rewards [K]) -> the tokens' credit (K, T)


def rule_of(method: Method):
    cfg = train.Config(**method.flags)
    return lambda *group: method.credit(cfg, *group)[0]


def raw(*group, **switches):
    """LEAF without the z-score."""
    return leaf.leaf_advantages(*group, normalize=False, **switches)


def divided(tokens, lengths, surprisal, rewards):
    """LEAF with the z-score's division, without its shift of the mean."""
    boundaries = leaf.select_boundaries(surprisal, lengths)
    nodes = leaf.build_tree(tokens, lengths, rewards, boundaries)
    std = stdev(span.credit for span in leaf.span_credits(lengths, rewards, nodes))
    return raw(tokens, lengths, surprisal, rewards) / max(std, 1e-6)


def every_token(tokens, lengths, surprisal, rewards):
    """Our variant with a boundary at every token, so that neither surprisal nor B matters."""
    return leave_one_out(tokens, lengths, rewards, list(range(1, int(lengths.max()))))


NO_Z_SCORE = "LEAF, no z-score"
DIAGNOSES = {
    "LEAF, divided only": divided,
    NO_Z_SCORE: raw,
    "... and no 1/sqrt n": partial(raw, multiplicity=False),
    "... and LA only": partial(raw, multiplicity=False, terms="local"),
    "leave-one-out, every token": every_token,
}
RULES = {name: rule_of(method) for name, method in METHODS.items()} | DIAGNOSES
LEAF_BY_BUDGET = {1: "B=1", 2: "LEAF", 4: "B=4", 8: "B=8"}
MAP_RULES = [
    BASELINE,
    PLAIN,
    *LEAF_BY_BUDGET.values(),
    NO_Z_SCORE,
    OURS,
    "leave-one-out, every token",
]


# --------------------------------------------------------------------------------------------------
# The policy, its rollouts and its gradient


@dataclass
class Policy:
    model: SpeechLM
    split: data.Split
    cfg: train.Config
    questions: dict[str, list[int]]  # rows by length, and "all"

    @classmethod
    def load(cls, sft_steps: int, out: Path) -> "Policy":
        """A base, trained unless it is there, with fresh LoRA; its greedy BLEU goes to a file
        beside it."""
        cfg = train.Config(sft_steps=sft_steps, base=str(out / f"base-sft{sft_steps}"))
        device = torch.device("cpu")
        rows = train.load_rows(cfg)
        if not cfg.base_folder.exists():
            whole = data.Split("train", rows["train"], cfg.cache_gb)
            train.make_base(cfg, whole, cfg.base_folder, device)
        split = data.Split("train", rows["train"][:ROWS], cfg.cache_gb)
        model, tokenizer = train.load(cfg, device, torch.float32)
        train.adapt(cfg, model)
        split.hear(model, tokenizer)
        file = out / f"base-{sft_steps}.json"
        if not file.exists():
            validation = data.Split("validation", rows["validation"], cfg.cache_gb)
            validation.hear(model, tokenizer)
            reached = round(train.greedy_bleu(model, tokenizer, validation, cfg), 2)
            keep(file, {"sft_steps": sft_steps, "validation BLEU greedy": reached})
        every = list(range(len(split.rows)))
        questions = {name: every[q :: len(QUESTIONS)] for name, q in QUESTIONS.items()}
        questions["all"] = every
        return cls(model, split, cfg, questions)

    @property
    def parameters(self):
        return [p for name, p in lora_parameters(self.model).items() if name.endswith("lora_B")]


@dataclass
class Batch:
    indices: list[int]  # of the rows, P
    rows: list[dict]
    prompts: Prompts
    rollout: Rollout  # cut to the longest response
    texts: list[list[str]]  # P, K

    def rewards(self, name: str) -> list[list[float]]:
        reward = REWARDS[name]
        pairs = zip(self.texts, self.rows)
        return [[reward(" ".join(text.split()), row) for text in group] for group, row in pairs]

    def groups(self, rewards):
        """The arguments of a rule, prompt by prompt."""
        return zip(self.rollout.tokens, self.rollout.lengths, -self.rollout.logq, rewards)

    def weight(self, setting: Setting):
        """Of a token's log-probability (P, K, T), for a mean over responses."""
        length = self.rollout.lengths[..., None] if setting.token_mean else 1
        return self.rollout.mask / length / self.rollout.lengths.numel()

    def logp(self, policy: Policy):
        groups = zip(self.rollout.tokens, self.rollout.lengths)
        trees = [PrefixTree(tokens, lengths) for tokens, lengths in groups]
        return policy.model.response_logp(self.prompts, trees)


def gradient(policy: Policy, logp, weights):
    """Of the sum of weights (P, K, T) times log-probabilities: (D,)"""
    gradients = torch.autograd.grad(logp, policy.parameters, weights, retain_graph=True)
    return torch.cat([g.flatten() for g in gradients])


def roll(policy: Policy, stream: int, n: int, question: str, P: int, K: int, top_p: float) -> Batch:
    """Batch n of an endless stream: P of a question's rows, K responses to each.

    Rows are drawn with replacement: batches that take turns in one pass would not be independent of
    each other.
    """
    model, cfg = policy.model, policy.cfg
    rows = policy.questions[question]
    tokenizer = policy.split.tokenizer
    drawn = np.random.default_rng([SEED, stream, n]).integers(len(rows), size=P)
    indices = [rows[i] for i in drawn]
    places = list(range(n * P, n * P + P))
    u = data.noise([SEED, stream, 1], places, K, cfg.max_new_tokens, "cpu")
    with torch.no_grad():
        prompts = policy.split.prompts(model, indices)
    rollout = model.sample(prompts, u, tokenizer.eos_id, cfg.temperature, top_p).trimmed()
    groups = zip(rollout.tokens, rollout.lengths)
    texts = [train.decode(tokenizer, tokens, lengths) for tokens, lengths in groups]
    return Batch(indices, [policy.split.rows[i] for i in indices], prompts, rollout, texts)


# --------------------------------------------------------------------------------------------------
# The truth


TRUTH_P, TRUTH_K = 16, 16
TRUTH_RESPONSES = {200: 49_152, 400: 98_304, 1200: 49_152}  # the training setting: half of it
TRUTH_STREAM = {"exact": 1, "training": 2}


def truth(policy: Policy, setting: str, out: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The expected gradient by reward and question, of two halves of the rollouts: (2, D)."""
    steps = policy.cfg.sft_steps
    names = list(REWARDS) if setting == "exact" and steps == MAIN_BASE else ["BLEU"]
    file = out / f"truth-{steps}-{setting}.pt"
    if not file.exists():
        responses = TRUTH_RESPONSES[steps] if setting == "exact" else TRUTH_RESPONSES[steps] // 2
        questions = QUESTIONS if steps == MAIN_BASE else MAP_QUESTIONS
        batches = responses // len(questions) // (TRUTH_P * TRUTH_K) // 2 * 2
        D = sum(p.numel() for p in policy.parameters)
        total = {name: {question: torch.zeros(2, D) for question in questions} for name in names}
        work = [(question, n) for n in range(batches) for question in questions]
        for question, n in tqdm(work, desc=f"truth of base {steps}, {setting}", disable=None):
            stream = TRUTH_STREAM[setting] * 10 + QUESTIONS[question]
            batch = roll(policy, stream, n, question, TRUTH_P, TRUTH_K, SETTINGS[setting].top_p)
            logp = batch.logp(policy)
            for name in names:
                rewards = torch.tensor(batch.rewards(name))
                centred = rewards - rewards.mean(1, keepdim=True)
                left_out = centred * TRUTH_K / (TRUTH_K - 1)  # minus the mean of the others
                weights = batch.weight(SETTINGS[setting]) * left_out[..., None]
                total[name][question][n % 2] += gradient(policy, logp, weights) * 2 / batches
        temporary = file.with_suffix(".tmp")
        torch.save(total, temporary)
        temporary.rename(file)
    total = torch.load(file)
    # There are as many rows of each question.
    return {name: by | {"all": sum(by.values()) / len(by)} for name, by in total.items()}


TARGETS = ("G*", "G_train")


@dataclass
class Target:
    """A true gradient, known up to noise: mean is unbiased, and norm is without what the noise
    adds."""

    mean: torch.Tensor  # (D,)
    norm: float
    half_cosine: float  # of the two halves

    @classmethod
    def of(cls, halves) -> "Target":
        square = float(halves[0] @ halves[1])
        norm = math.sqrt(max(square, 1e-30))
        return cls(halves.mean(0), norm, square / float(halves[0].norm() * halves[1].norm()))


# --------------------------------------------------------------------------------------------------
# A condition: batches, every rule's gradient on them, and what their sums say


@dataclass(frozen=True)
class Condition:
    setting: str = "training"
    base: int = MAIN_BASE
    question: str = "all"
    K: int = 8
    reward: str = "BLEU"
    batches: int = 600
    rules: tuple = tuple(RULES)

    @property
    def file(self) -> str:
        reward = self.reward.replace(" ", "-")
        return f"{self.setting}-{self.base}-{self.question}-K{self.K}-{reward}.json"


MAIN = [Condition("training"), Condition("exact", batches=400)]
REWARD = [Condition(reward=name, batches=160) for name in ("exact match", "slots")]
MAP = [
    Condition(base=base, question=question, K=K, batches=100, rules=tuple(MAP_RULES))
    for base in (400, 200, 1200)
    for question in MAP_QUESTIONS
    for K in KS
]


class Sums:
    """What is kept of one rule's gradients: |g|^2, dot products with the targets, and sums over
    blocks of batches."""

    def __init__(self, batches: int, targets: list[Target]):
        self.targets = targets
        self.norms = np.array([t.norm for t in targets])
        self.member = np.arange(batches) * BLOCKS // batches  # the block of each batch
        self.squares = np.zeros(batches)
        self.dots = np.zeros((batches, len(targets)))
        self.blocks = torch.zeros(BLOCKS, len(targets[0].mean))

    def add(self, n: int, g):
        self.blocks[self.member[n]] += g
        self.squares[n] = g.square().sum()
        self.dots[n] = [g @ t.mean for t in self.targets]

    def cosines(self):
        """Of every batch with each target (batches, targets); 0 for a batch without a gradient."""
        return self.dots / np.maximum(np.sqrt(self.squares), 1e-12)[:, None] / self.norms

    def whole(self):
        """SNR, and the mean gradient's cosine with each target, of all and without each block:
        (1 + BLOCKS, ...)."""
        products = (self.blocks @ self.blocks.T).double().numpy()
        total = []
        for left_out in (None, *range(BLOCKS)):
            use = np.arange(BLOCKS) != left_out
            kept = self.member != left_out
            n = kept.sum()
            squares = self.squares[kept].sum()
            pairs = products[np.ix_(use, use)].sum() - squares
            square = max(pairs / n / (n - 1), 1e-30)  # |E g|^2
            cosines = self.dots[kept].mean(0) / self.norms / math.sqrt(square)
            total.append([square / (squares / n - square), *cosines])
        return np.array(total)


def interval(total) -> dict:
    """Value and half width of the 95% interval, by the jackknife, from a value and those without
    each block."""
    value, left_out = total[0], total[1:]
    n = len(left_out)
    half = student(n - 1) * math.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum())
    return {"value": round(float(value), 4), "ci": round(half, 4)}


def mean_interval(values) -> dict:
    half = student(len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return {"value": round(float(values.mean()), 4), "ci": round(float(half), 4)}


def measure(policy: Policy, condition: Condition, targets: list[Target]) -> dict:
    """Every rule on the same rollouts; targets are G* and, where it is known, G_train."""
    began = time.time()
    c = condition
    setting = SETTINGS[c.setting]
    sums = {rule: Sums(c.batches, targets) for rule in c.rules}
    all_rewards = []
    forks = {B: [] for B in BUDGETS}
    shared = {B: [] for B in BUDGETS}
    for n in tqdm(range(c.batches), desc=c.file, disable=None):
        batch = roll(policy, 3, n, c.question, BATCH // c.K, c.K, setting.top_p)
        rewards = batch.rewards(c.reward)
        weight = batch.weight(setting)
        logp = batch.logp(policy)
        torch.manual_seed(n)  # random boundaries
        for rule in c.rules:
            weights = torch.stack([RULES[rule](*group) for group in batch.groups(rewards)]) * weight
            sums[rule].add(n, gradient(policy, logp, weights))
        all_rewards += rewards
        for B in BUDGETS:
            for tokens, lengths, surprisal, group in batch.groups(rewards):
                boundaries = leaf.select_boundaries(surprisal, lengths, B)
                forks[B] += leaf.fork_stats(tokens, lengths, group, boundaries)
                shared[B].append(shared_tokens(tokens, lengths, group, boundaries))
    return {
        "condition": {k: v for k, v in vars(c).items() if k != "rules"},
        "truth": {name: round(t.half_cosine, 4) for name, t in zip(TARGETS, targets)},
        "rules": compare(sums),
        "forks": {B: fork_summary(all_rewards, forks[B], shared[B]) for B in BUDGETS},
        "seconds": round(time.time() - began),
    }


OTHERS = {"": BASELINE, " to plain": PLAIN, " to LEAF": "LEAF"}


def compare(sums: dict[str, Sums]) -> dict[str, dict]:
    """What each rule reaches, and its differences on the same batches to GRPO, with floor or plain
    std, and to LEAF."""
    cosines = {rule: s.cosines() for rule, s in sums.items()}
    wholes = {rule: s.whole() for rule, s in sums.items()}
    table = {}
    for rule in sums:
        row = table[rule] = {"norm": round(float(np.sqrt(sums[rule].squares).mean()), 5)}
        row["SNR"] = interval(wholes[rule][:, 0])
        row["SNR difference"] = interval(wholes[rule][:, 0] - wholes[BASELINE][:, 0])
        for n, target in zip(range(cosines[rule].shape[1]), TARGETS):
            row[f"cosine {target}"] = mean_interval(cosines[rule][:, n])
            for name, other in OTHERS.items():
                difference = (cosines[rule] - cosines[other])[:, n]
                row[f"cosine {target} difference{name}"] = mean_interval(difference)
            row[f"bias {target}"] = interval(wholes[rule][:, 1 + n])
            row[f"bias {target} difference"] = interval((wholes[rule] - wholes[BASELINE])[:, 1 + n])
    return table


def shared_tokens(tokens, lengths, rewards, boundaries) -> float:
    """Share of tokens that stand in a span which ends at a node: the rest, the tails, are nobody
    else's."""
    nodes = leaf.build_tree(tokens, lengths, rewards, boundaries)
    paths = [leaf.path_of(i, nodes) for i in range(len(rewards))]
    ends = [path[-1].boundary if path else 0 for path in paths]
    return sum(map(min, ends, lengths.tolist())) / int(lengths.sum())


def fork_summary(rewards, reports: list[dict], shared: list[float]) -> dict[str, float]:
    summary = leaf.group_stats(rewards, reports) | {"shared_tokens": fmean(shared)}
    for name in ("group_size", "reward_spread"):  # of retained groups, 0 for a boundary without one
        summary[name] = fmean(report[name] for report in reports)
    return {name: round(value, 4) for name, value in summary.items()}


# --------------------------------------------------------------------------------------------------
# Where credit goes: the true advantage of every token


DECISION_BATCHES = 20
COMPLETIONS = 32  # of each prefix
DECISIVE = 0.1  # |A*| of a token that matters
BINS = 10  # of the relative position in a response
BOOTSTRAP = 1000


def completions(
    policy: Policy, prompts: Prompts, prefixes: list[tuple], row: dict, key: list[int], chunk=24
):
    """Rewards (n, COMPLETIONS) and first tokens (n, COMPLETIONS) of completions of a prompt's
    prefixes, top-p 1."""
    model = policy.model
    tokenizer = policy.split.tokenizer
    limit = policy.cfg.max_new_tokens
    embed = model.language_model.model.embed_tokens
    heard = prompts.x[0, prompts.valid[0]]
    rewards, firsts = [], []
    for start in range(0, len(prefixes), chunk):
        part = prefixes[start : start + chunk]
        with torch.no_grad():
            embedded = [embed(torch.tensor(prefix, dtype=torch.int64)) for prefix in part]
        longer = [torch.cat((heard, e)) for e in embedded]
        x = pad_sequence(longer, batch_first=True, padding_side="left")
        lengths = torch.tensor([len(row) for row in longer])
        valid = torch.arange(x.shape[1]) >= x.shape[1] - lengths[:, None]
        places = list(range(start, start + len(part)))
        room = limit - min(len(prefix) for prefix in part)
        u = data.noise(key, places, COMPLETIONS, room, "cpu")
        rollout = model.sample(Prompts(x, valid), u, tokenizer.eos_id)
        for prefix, tokens, counts in zip(part, rollout.tokens.tolist(), rollout.lengths.tolist()):
            texts = [tokenizer.decode([*prefix, *t[:n]][:limit]) for t, n in zip(tokens, counts)]
            rewards.append(data.reward_all(texts, [row] * len(texts)))
            firsts.append([t[0] for t in tokens])
    return np.array(rewards), np.array(firsts)


def true_advantages(policy: Policy, batch: Batch, p: int):
    """A*(t) = Q(t + 1 tokens) - Q(t tokens) of prompt p's responses (K, T), its noise variance, and
    Q(no tokens).

    Q(t) = pi Q(t + 1) + (1 - pi) Q_other, where pi is the probability of the token and Q_other the
    value of the other tokens there, from the completions that took one. So A* = (1 - pi) (Q(t + 1)
    - Q_other): a token that had to come has hardly any noise. Where no completion took another, A*
    is 0.
    """
    index = batch.indices[p]
    row = batch.rows[p]
    tokens = batch.rollout.tokens[p].tolist()
    lengths = batch.rollout.lengths[p].tolist()
    whole = [tuple(t[:n]) for t, n in zip(tokens, lengths)]
    prefixes = sorted({t[:n] for t in whole for n in range(len(t))}, key=lambda x: (len(x), x))
    prompts = policy.split.prompts(policy.model, [index])
    rewards, firsts = completions(policy, prompts, prefixes, row, [SEED, 4, index])
    place = {prefix: i for i, prefix in enumerate(prefixes)}
    value = rewards.mean(1)
    noise = rewards.var(1, ddof=1) / COMPLETIONS
    advantage, variance = torch.zeros(2, *batch.rollout.tokens.shape[1:])
    for k, response in enumerate(whole):
        for t in range(len(response)):
            here = place[response[:t]]
            after = place.get(response[: t + 1])
            if after is None:  # the response ends here
                q, v = data.reward(batch.texts[p][k], row), 0
            else:
                q, v = value[after], noise[after]
            others = rewards[here][firsts[here] != response[t]]
            if len(others):
                rest = 1 - math.exp(batch.rollout.logp[p, k, t])
                advantage[k, t] = rest * (q - others.mean())
                variance[k, t] = rest**2 * (v + noise[here] * COMPLETIONS / len(others))
    return advantage, variance, float(value[0])


def decisions(policy: Policy, target: Target) -> dict:
    """Rules' credit against the true advantage, token by token; boundaries against decisions; the
    oracle's gradient."""
    began = time.time()
    setting = SETTINGS["training"]
    tokenizer = policy.split.tokenizer
    prompts, oracle = [], []
    landed = {how: [] for how in BOUNDARIES}
    batches = [roll(policy, 5, n, "all", 8, 8, setting.top_p) for n in range(DECISION_BATCHES)]
    bar = tqdm(total=8 * DECISION_BATCHES, desc="true advantages", disable=None)
    for batch in batches:
        rewards = batch.rewards("BLEU")
        mask = batch.rollout.mask
        truths = []
        for p, group in enumerate(batch.groups(rewards)):
            advantage, variance, start = true_advantages(policy, batch, p)
            truths.append(advantage)
            torch.manual_seed(len(prompts))
            credits = {rule: f(*group) for rule, f in RULES.items()}
            tokens, lengths, _, _ = group
            prompts.append(
                {
                    "mask": mask[p].numpy(),
                    "truth": advantage.numpy(),
                    "noise": variance.numpy(),
                    "rewards": rewards[p],
                    "start": start,
                    "credits": {rule: credit.numpy() for rule, credit in credits.items()},
                    "row": batch.rows[p],
                    "pieces": [tokenizer.pieces(t[:n].tolist()) for t, n in zip(tokens, lengths)],
                }
            )
            for how in BOUNDARIES:
                landed[how].append(landings(how, group, advantage.numpy()))
            bar.update()
        compared = {rule: [f(*g) for g in batch.groups(rewards)] for rule, f in RULES.items()}
        compared["true advantage"] = truths
        logp = batch.logp(policy)
        weight = batch.weight(setting)
        reached = {}
        for rule, credit in compared.items():
            g = gradient(policy, logp, torch.stack(credit) * weight)
            reached[rule] = float(target.mean @ g / g.norm() / target.norm)
        oracle.append(reached)
    cosines = {rule: np.array([x[rule] for x in oracle]) for rule in oracle[0]}
    gains = {rule: x - cosines[BASELINE] for rule, x in cosines.items()}
    places = {"true advantage": profile(prompts, None)}
    return {
        "prompts": len(prompts),
        "completions": COMPLETIONS,
        "tokens": int(sum(p["mask"].sum() for p in prompts)),
        "decisive": DECISIVE,
        "Q of nothing": round(fmean(p["start"] for p in prompts), 4),
        "mean reward": round(fmean(fmean(p["rewards"]) for p in prompts), 4),
        "A* sum against r - Q": telescoping(prompts),
        "reliability of A*": round(reliability(prompts), 4),
        "share of tokens": round(share_decisive(prompts), 4),
        "rules": {rule: token_agreement(prompts, rule) for rule in RULES},
        "position": places | {rule: profile(prompts, rule) for rule in RULES},
        "boundaries": {how: summarise_landings(x) for how, x in landed.items()},
        "cosine G*": {rule: mean_interval(x) for rule, x in cosines.items()},
        "cosine G* difference": {rule: mean_interval(x) for rule, x in gains.items()},
        "example": example(prompts),
        "seconds": round(time.time() - began),
    }


def telescoping(prompts) -> dict:
    """The advantages of a response's tokens should add up to what it got beyond what was to be
    expected."""
    pairs = []
    for p in prompts:
        for truth, mask, reward in zip(p["truth"], p["mask"], p["rewards"]):
            pairs.append((truth[mask].sum(), reward - p["start"]))
    a, b = np.array(pairs).T
    correlation = float(np.corrcoef(a, b)[0, 1])
    return {"correlation": round(correlation, 4), "mean gap": round(float((a - b).mean()), 4)}


def reliability(prompts) -> float:
    """Share of A*'s variance over tokens that is not noise."""
    truth = np.concatenate([p["truth"][p["mask"]] for p in prompts])
    noise = np.concatenate([p["noise"][p["mask"]] for p in prompts])
    return float(1 - noise.mean() / truth.var())


def share_decisive(prompts) -> float:
    truth = np.concatenate([p["truth"][p["mask"]] for p in prompts])
    return float(np.mean(abs(truth) > DECISIVE))


def token_agreement(prompts, rule: str) -> dict:
    """Correlation of credit and A* over tokens, without what A*'s noise takes, and what decisive
    tokens get."""
    rows = []
    for p in prompts:
        values = (p["truth"], p["credits"][rule], p["noise"])
        a, c, noise = (x[p["mask"]].astype(float) for x in values)
        sums = [len(a), a.sum(), c.sum(), a @ a, c @ c, a @ c, noise.sum()]
        decisive = abs(c)[abs(a) > DECISIVE]
        rows.append([*sums, decisive.sum(), abs(c).sum()])

    def statistics(rows):  # (..., prompts, 9) -> correlation, share (..., 2)
        n, a, c, aa, cc, ac, noise, decisive, size = np.moveaxis(rows.sum(-2), -1, 0)
        covariance = ac / n - a * c / n**2
        spread_a = (aa - noise) / n - (a / n) ** 2
        spread_c = cc / n - (c / n) ** 2
        return np.stack((covariance / np.sqrt(spread_a * spread_c), decisive / size), -1)

    return bootstrap(rows, statistics, ("correlation", "share on decisive"))


def bootstrap(rows: list[list[float]], statistics, names: tuple[str, ...]) -> dict[str, dict]:
    """statistics((..., prompts, sums)) -> (..., names), with 95% intervals over prompts."""
    rows = np.array(rows, dtype=float)
    drawn = np.random.default_rng(SEED).integers(len(rows), size=(BOOTSTRAP, len(rows)))
    low, high = np.percentile(statistics(rows[drawn]), (2.5, 97.5), axis=0)
    return {
        name: {"value": round(float(v), 4), "ci": [round(float(lo), 4), round(float(hi), 4)]}
        for name, v, lo, hi in zip(names, statistics(rows), low, high)
    }


def profile(prompts, rule: str | None) -> list[float]:
    """Mean |credit|, or |A*|, by relative position in the response."""
    total, count = np.zeros(BINS), np.zeros(BINS)
    for p in prompts:
        for mask, values in zip(p["mask"], p["truth"] if rule is None else p["credits"][rule]):
            n = mask.sum()
            bins = (np.arange(n) * BINS + BINS // 2) // n
            np.add.at(total, bins, abs(values[:n]))
            np.add.at(count, bins, 1)
    return [round(float(x), 4) for x in total / count]


BOUNDARIES = {  # of surprisal and lengths, with LEAF's budget
    "surprisal": leaf.select_boundaries,
    "random": lambda surprisal, lengths: random_boundaries(lengths, fork_budget=2),
    "even": lambda surprisal, lengths: even_boundaries(lengths, fork_budget=2),
}


def landings(how: str, group, truth) -> list:
    """For each boundary and each response that goes on past it: the distance to its nearest
    decisive token, or None."""
    _, lengths, surprisal, _ = group
    found = []
    for b in BOUNDARIES[how](surprisal, lengths):
        for values, length in zip(truth, lengths.tolist()):
            if length > b:
                at = np.flatnonzero(abs(values[:length]) > DECISIVE) - b
                found.append(int(at[abs(at).argmin()]) if len(at) else None)
    return found


def summarise_landings(found: list[list]) -> dict:
    """found: for each prompt, the distances of `landings`."""

    def statistics(rows):
        """(..., prompts, 4) -> the two shares, and the mean distance of those that have one."""
        count, at, near, distance = np.moveaxis(rows.sum(-2), -1, 0)
        return np.stack((at / count, 1 - near / count, distance / near), -1)

    rows = []
    for group in found:
        near = [abs(x) for x in group if x is not None]
        rows.append([len(group), near.count(0), len(near), sum(near)])
    return bootstrap(rows, statistics, ("on a decision", "no decision", "mean distance"))


def example(prompts) -> dict:
    """Of a long answer, the response with the most decisive token: what the figure shows."""
    long = [p for p in prompts if len(p["row"]["slots"]) == 7]
    responses = [(p, k) for p in long for k in range(len(p["rewards"]))]
    p, k = max(responses, key=lambda x: abs(x[0]["truth"][x[1]]).max())
    n = p["mask"][k].sum()
    shown = {"true advantage": p["truth"][k]}
    shown |= {rule: p["credits"][rule][k] for rule in ("LEAF", BASELINE, OURS)}
    credits = {name: [round(float(x), 4) for x in values[:n]] for name, values in shown.items()}
    return {
        "reference": p["row"]["reference"],
        "pieces": p["pieces"][k],
        "reward": round(p["rewards"][k], 4),
        "rewards": [round(r, 4) for r in p["rewards"]],
        "credits": credits,
    }


# --------------------------------------------------------------------------------------------------
# Tables and figures


SHOWN = {"LEAF": "tab:blue", BASELINE: "tab:orange", OURS: "tab:green"}
BASE_COLOURS = {200: "tab:red", 400: "tab:purple", 1200: "tab:cyan"}
K_MARKERS = {4: "o", 8: "s", 16: "^"}


def cell(x: dict) -> str:
    """A value and its 95% interval."""
    if isinstance(x["ci"], list):
        return f"{x['value']:.3f} ({x['ci'][0]:.3f} to {x['ci'][1]:.3f})"
    return f"{x['value']:+.4f} ± {x['ci']:.4f}"


def show(title: str, columns: list[str], rows: dict[str, list[str]]):
    print(f"\n{title}\n\n| | " + " | ".join(columns) + " |\n|---" + "|---" * len(columns) + "|")
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells) + " |")


def show_condition(result: dict):
    c = result["condition"]
    truth = result["truth"]
    title = (
        f"{c['setting']} setting, base of {c['base']} steps, {c['question']} rows, K = {c['K']}, "
        f"{c['reward']}; {c['batches']} batches; halves of the truth agree to {truth}"
    )
    columns = ["cosine G*", *(f"cosine G* difference{name}" for name in OTHERS)]
    columns += ["SNR", "SNR difference", "bias G*", "bias G* difference"]
    columns += ["cosine G_train", "cosine G_train difference"] if "G_train" in truth else []
    rows = {rule: [cell(row[x]) for x in columns] for rule, row in result["rules"].items()}
    show(title, columns, rows)


def show_map(cells: list[dict]):
    rows = {}
    for result in cells:
        c = result["condition"]
        rules = result["rules"]
        for B, rule in LEAF_BY_BUDGET.items():
            fork = result["forks"][str(B)]
            row = rules[rule]
            rows[f"{BASES[c['base']]}, {c['question']}, K={c['K']}, B={B}"] = [
                f"{fork['usable_fork_fire']:.2f}",
                f"{fork['fork_fire']:.2f}",
                f"{fork['group_size']:.1f}",
                f"{fork['reward_spread']:.3f}",
                f"{fork['reward_std']:.3f}",
                f"{rules[BASELINE]['cosine G*']['value']:.3f}",
                cell(row["cosine G* difference"]),
                cell(row["cosine G* difference to plain"]),
                cell(row["SNR difference"]),
                cell(rules[NO_Z_SCORE]["cosine G* difference"]),
                cell(rules[OURS]["cosine G* difference"]),
            ]
    columns = [
        "usable forks",
        "forks that fire",
        "group size",
        "spread in groups",
        "reward std",
        "GRPO's cosine",
        "LEAF's difference",
        "to plain",
        "SNR difference",
        f"{NO_Z_SCORE}, B=2",
        f"{OURS}, B=2",
    ]
    show("map, training setting", columns, rows)
    usable = [result["forks"][str(B)]["usable_fork_fire"] for result in cells for B in BUDGETS]
    for name, other in (("", BASELINE), (" to plain", PLAIN)):
        measure = f"cosine G* difference{name}"
        leafs = LEAF_BY_BUDGET.values()
        gains = [result["rules"][rule][measure] for result in cells for rule in leafs]
        above = sum(gain["value"] > gain["ci"] for gain in gains)
        below = sum(-gain["value"] > gain["ci"] for gain in gains)
        r = np.corrcoef(usable, [gain["value"] for gain in gains])[0, 1]
        print(
            f"{len(gains)} cells against {other}: {above} above and {below} below by more than the "
            f"interval; correlation with usable forks {r:.2f}"
        )


def show_decisions(d: dict):
    decisive = f"{d['share of tokens']:.1%} with |A*| > {d['decisive']}"
    print(f"\n{d['prompts']} prompts, {d['tokens']} tokens, {decisive}")
    for check in ("Q of nothing", "mean reward", "A* sum against r - Q", "reliability of A*"):
        print(f"{check}: {d[check]}")
    columns = ["correlation", "share on decisive"]
    rows = {rule: [cell(row[c]) for c in columns] for rule, row in d["rules"].items()}
    show("credit against A*", columns, rows)
    columns = list(d["boundaries"]["even"])
    rows = {how: [cell(x[c]) for c in columns] for how, x in d["boundaries"].items()}
    show("nearest decisive token, from each boundary in each response", columns, rows)
    columns = ["cosine G*", "cosine G* difference"]
    rows = {rule: [cell(d[c][rule]) for c in columns] for rule in (*SHOWN, "true advantage")}
    show("batches' gradients, with the true advantage as credit beside them", columns, rows)


def plot_credit(main: dict, d: dict):
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(13, 8.5), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(1, 2.2))
    strip = figure.add_subplot(grid[0, :])
    line = figure.add_subplot(grid[1, 0])
    to_grpo = figure.add_subplot(grid[1, 1])
    to_leaf = figure.add_subplot(grid[1, 2], sharey=to_grpo)

    e = d["example"]
    names = list(e["credits"])
    values = np.array([e["credits"][name] for name in names])
    scaled = values / abs(values).max(1, keepdims=True)
    strip.imshow(scaled, cmap="PiYG", vmin=-1, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if abs(value) > 0.7 * abs(values[row]).max() else "black"
        strip.text(column, row, f"{value:+.2f}", ha="center", va="center", fontsize=8, color=colour)
    strip.set_yticks(range(len(names)), names)
    strip.set_xticks(range(len(e["pieces"])), [piece.strip() or "␣" for piece in e["pieces"]])
    rewards = f"a response of reward {e['reward']:.2f}, mean {fmean(e['rewards']):.2f}"
    strip.set_title(f"(a) {rewards}; wanted: {e['reference']}", fontsize=10)

    x = (np.arange(BINS) + 0.5) / BINS
    for name, colour in {"true advantage": "black", **SHOWN}.items():
        y = np.array(d["position"][name])
        style = "o--" if name == "true advantage" else "o-"
        line.plot(x, y / y.mean(), style, color=colour, label=name)
    line.set_xlabel("position in the response")
    line.set_ylabel("mean |credit|, over its mean")
    line.set_title("(b) where credit goes", fontsize=10)
    line.legend(fontsize=8)

    rules = list(main["rules"])[::-1]
    panels = ((to_grpo, "c", "", BASELINE), (to_leaf, "d", " to LEAF", "LEAF"))
    for axes, letter, name, other in panels:
        for y, rule in enumerate(rules):
            gain = main["rules"][rule][f"cosine G* difference{name}"]
            colour = SHOWN.get(rule, "tab:gray")
            axes.errorbar(gain["value"], y, xerr=gain["ci"], fmt="o", color=colour, capsize=2)
        axes.axvline(0, color=SHOWN[other])
        axes.locator_params(axis="x", nbins=6)
        cosine = main["rules"][other]["cosine G*"]["value"]
        axes.set_xlabel(f"minus that of {other} ({cosine:.3f})")
        axes.set_title(f"({letter}) cosine of one batch with G*", fontsize=10)
    to_grpo.set_yticks(range(len(rules)), rules, fontsize=8)
    to_leaf.tick_params(labelleft=False)
    for axes in (line, to_grpo, to_leaf):
        axes.grid(alpha=0.3)
    save(figure, "credit")


def plot_map(cells: list[dict]):
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(13, 4.6), sharey=True, layout="constrained")
    views = (
        (f"(a) LEAF, minus {BASELINE}", LEAF_BY_BUDGET, "cosine G* difference"),
        (f"(b) LEAF, minus {PLAIN}", LEAF_BY_BUDGET, "cosine G* difference to plain"),
        (f"(c) {OURS}, minus {BASELINE}", {2: OURS}, "cosine G* difference"),
    )
    for axes, (title, rules, measure) in zip(panels, views):
        for result in cells:
            c = result["condition"]
            colour, marker = BASE_COLOURS[c["base"]], K_MARKERS[c["K"]]
            for B, rule in rules.items():
                gain = result["rules"][rule][measure]
                axes.errorbar(
                    result["forks"][str(B)]["usable_fork_fire"],
                    gain["value"],
                    gain["ci"],
                    fmt=marker,
                    color=colour,
                    markersize=3 + 1.2 * math.log2(2 * B),
                    markerfacecolor=colour if c["question"] == "long" else "white",
                    elinewidth=0.5,
                    alpha=0.8,
                )
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("usable fork-fire rate")
        axes.set_ylabel("difference in cosine with G*")
        axes.grid(alpha=0.3)
    marks = [(f"{BASES[b]} base", dict(marker="o", color=c)) for b, c in BASE_COLOURS.items()]
    marks += [(f"K = {K}", dict(marker=m, color="gray")) for K, m in K_MARKERS.items()]
    marks += [
        (f"{q} answer", dict(marker="o", color="gray", markerfacecolor=f))
        for q, f in (("long", "gray"), ("short", "white"))
    ]
    marks += [
        (f"B = {B}", dict(marker="o", color="gray", markersize=3 + 1.2 * math.log2(2 * B)))
        for B in BUDGETS
    ]
    handles = [plt.Line2D([], [], linestyle="", label=label, **style) for label, style in marks]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, columnspacing=1
    )
    save(figure, "map")


def save(figure, name: str):
    for kind in ("png", "svg"):
        figure.savefig(FOLDER / f"{name}.{kind}", dpi=120)


def report():
    measured = [c for c in [*MAIN, *REWARD, *MAP] if (FOLDER / c.file).exists()]
    found = {c: train.read_json(FOLDER / c.file) for c in measured}
    for c in [*MAIN, *REWARD]:
        if c in found:
            show_condition(found[c])
    cells = [found[c] for c in MAP if c in found]
    if cells:
        show_map(cells)
        plot_map(cells)
    if (FOLDER / "decisions.json").exists():
        d = train.read_json(FOLDER / "decisions.json")
        show_decisions(d)
        plot_credit(found[MAIN[0]], d)


# --------------------------------------------------------------------------------------------------
# Everything in order


def keep(file: Path, result: dict):
    """Beside the bases, from where a stopped run goes on, and in the repository's results."""
    train.write_json(file, result)
    train.write_json(FOLDER / file.name, result)


def run(out: Path):
    began = time.time()
    policies, truths = {}, {}

    def policy(base):
        if base not in policies:
            policies[base] = Policy.load(base, out)
        return policies[base]

    def targets(c: Condition):
        known = SETTINGS if c in MAIN else ["exact"]
        for setting in known:
            if (c.base, setting) not in truths:
                truths[c.base, setting] = truth(policy(c.base), setting, out)
        return [Target.of(truths[c.base, setting][c.reward][c.question]) for setting in known]

    def finish(file: str, work):
        if not (out / file).exists():
            keep(out / file, work())
            print(f"{file} after {time.time() - began:.0f} s")

    def finish_all(conditions):
        for c in conditions:
            finish(c.file, lambda c=c: measure(policy(c.base), c, targets(c)))

    finish_all(MAIN[:1])
    finish("decisions.json", lambda: decisions(policy(MAIN_BASE), targets(MAIN[0])[0]))
    finish_all([*MAP[:6], *MAIN, *MAP[:12], *REWARD, *MAP])


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/credit"), help="folder of bases and true gradients"
    )
    parser.add_argument(
        "--plot",
        action="store_true",
        help="figures and tables of what is measured, and nothing else",
    )
    args = parser.parse_args()
    if args.plot:
        return report()
    with train.lock(args.out, wait=False):
        measured = {"rules": list(RULES), "conditions": [c.file for c in (*MAIN, *REWARD, *MAP)]}
        train.check_same(args.out, measured, "config.json")
        run(args.out)


if __name__ == "__main__":
    main()
