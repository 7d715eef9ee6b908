"""The credit microscope: one fixed policy, the same rollouts, every credit rule, and a dial from
rewards that a tree can help with to rewards that it cannot.

    python -m experiments.credit --out runs/credit     trains the base, measures; resumable
    python -m experiments.credit --plot                the table and the figure again

The policy is the default base of the task "qa" with fresh LoRA, so the gradient is that of LoRA's
B: the first step of training. The dial is lambda in the reward lambda E + (1 - lambda) L: E is the
share of the reference's first three words in place, so that prefixes decide it, L that of its last
three. Sentence BLEU stands beside it. A rule turns a batch of 64 responses into a gradient g; what
counts is cos(g, G), G being the true gradient of the expected reward, and the noise
E|g - E g|^2.

G is that of the policy itself: rollouts at temperature 1 and top-p 1, log-probabilities summed over
a response's tokens. Batches are as training has them: top-p 0.9, mean over a response's tokens. G
is linear in the reward, so those of E, L and BLEU serve every lambda. So are the leave-one-out
rules, which are not divided by a std here. "mean of the others" is the one without a tree: GRPO as
`law` has it. Squared lengths are products of independent halves or batches, without the noise that
would add to them; intervals are of the batches alone, G taken as known.

Half-way credit is the mean of leave-one-out credit with the tree and without, so its noise is at
most the mean of theirs, (1 + R) / 2 of GRPO's, which is what its predicted gain takes.
"""

import argparse
import itertools
import math
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import leaf
import train
from experiments.compare import save, student, table
from experiments.keep import RESULTS, environment
from experiments.law import relative, rounded
from experiments.methods import (
    BASELINE,
    HALF_WAY,
    NO_ROOT,
    OURS,
    PLAIN,
    even_boundaries,
    first_words,
    last_words,
    leave_one_out,
    token_noise,
)
from lora import lora_parameters
from model import PrefixTree, Prompts, Rollout, SpeechLM

SEED = 11  # of everything random here
ROWS = 1024  # of the training rows: the prompts
KS = (64, 32, 8)  # the cheapest first
RESPONSES = 64  # of a batch
BATCHES = 200  # for each K
BLOCKS = 20  # of batches, for the jackknife
TRUTH_PASSES = 2  # over all rows, for each of two halves
TRUTH_P, TRUTH_K = 16, 16

BASIS = {"E": first_words, "L": last_words, "BLEU": data.reward}
REWARDS = {f"λ = {x:g}": (x, 1 - x, 0.0) for x in (0, 0.25, 0.5, 0.75, 1)}
REWARDS["BLEU"] = (0.0, 0.0, 1.0)
MIX = torch.tensor(list(REWARDS.values()))  # (rewards, basis)


# --------------------------------------------------------------------------------------------------
# Rules: (tokens (K, T), lengths (K,), rewards [K], boundaries) -> the tokens' credit (K, T)


def grpo(tokens, lengths, rewards, boundaries, std_floor: float):
    advantages = leaf.grpo_advantages(rewards, lengths, std_floor)
    return F.pad(advantages, (0, tokens.shape[1] - advantages.shape[1]))


def leaf_at(tokens, lengths, rewards, boundaries, multiplicity: bool = True):
    options = {"multiplicity": multiplicity, "boundaries": boundaries}
    return leaf.leaf_advantages(tokens, lengths, None, rewards, **options)


OTHERS = "mean of the others"
LEAF = "LEAF"
RULES = {
    OTHERS: partial(leave_one_out, normalize=False, node_weight=0.0),
    OURS: partial(leave_one_out, normalize=False),
    BASELINE: partial(grpo, std_floor=1 / 3),
    PLAIN: partial(grpo, std_floor=0.0),
    LEAF: leaf_at,
    NO_ROOT: partial(leaf_at, multiplicity=False),
}
SURPRISING, EVEN = "surprisal", "even"
TREES = [(where, B) for where in (SURPRISING, EVEN) for B in (2, 4)]
# A rule at a tree's boundaries. Linear in the reward:
LINEAR = [(OTHERS, None), *itertools.product([OURS], TREES)]
OTHER = [(BASELINE, None), (PLAIN, None), *itertools.product([LEAF], TREES)]
OTHER += itertools.product([NO_ROOT], TREES[:2])
UNBIASED = [*LINEAR, *itertools.product([HALF_WAY], TREES)]
ALL = [*UNBIASED, *OTHER]
AGAINST = dict.fromkeys((LEAF, NO_ROOT), (BASELINE, PLAIN))  # with whom a rule is compared
AGAINST |= dict.fromkeys((OURS, HALF_WAY), (BASELINE, PLAIN, OTHERS))


def select(tree: tuple[str, int], surprisal, lengths) -> list[int]:
    where, B = tree
    if where == EVEN:
        return even_boundaries(lengths, B)
    return leaf.select_boundaries(surprisal, lengths, B)


# --------------------------------------------------------------------------------------------------
# The policy, its rollouts and its gradient


@dataclass
class Policy:
    model: SpeechLM
    split: data.Split
    cfg: train.Config

    @classmethod
    def load(cls, out: Path) -> "Policy":
        """The base, trained unless it is there, with fresh LoRA."""
        cfg = train.Config(base=str(out / "base"))
        device = torch.device("cpu")
        rows = train.load_rows(cfg)["train"]
        train.make_base(cfg, data.Split("train", rows, cfg.cache_gb), cfg.base_folder, device)
        split = data.Split("train", rows[:ROWS], cfg.cache_gb)
        model, tokenizer = train.load(cfg, device, torch.float32)
        train.adapt(cfg, model)
        split.hear(model, tokenizer)
        return cls(model, split, cfg)

    @property
    def parameters(self):
        return [p for name, p in lora_parameters(self.model).items() if name.endswith("lora_B")]


@dataclass
class Batch:
    rows: list[dict]  # P
    prompts: Prompts
    rollout: Rollout  # cut to the longest response
    texts: list[list[str]]  # P, K

    def rewards(self) -> torch.Tensor:
        """Of the basis: (3, P, K)."""
        pairs = list(zip(self.texts, self.rows))
        return torch.tensor(
            [
                [[reward(" ".join(text.split()), row) for text in group] for group, row in pairs]
                for reward in BASIS.values()
            ],
            dtype=torch.float64,
        )

    def boundaries(self, tree) -> list[list[int]]:
        """Of each prompt; none without a tree."""
        groups = zip(-self.rollout.logq, self.rollout.lengths)
        return [select(tree, *group) if tree else [] for group in groups]

    def credit(self, rule: str, tree, rewards) -> torch.Tensor:
        """rewards (R, P, K) -> (R, P, K, T)"""
        groups = list(zip(self.rollout.tokens, self.rollout.lengths))
        boundaries = self.boundaries(tree)
        credits = [
            RULES[rule](*group, of_group, bounds)
            for of_prompts in rewards.tolist()
            for group, of_group, bounds in zip(groups, of_prompts, boundaries)
        ]
        return torch.stack(credits).unflatten(0, rewards.shape[:2])

    def noise(self, tree, rewards) -> np.ndarray:
        """leaf.tail_noise and methods.token_noise, summed over prompts: (R, 2, 2)."""
        groups = zip(self.rollout.tokens, self.rollout.lengths, -self.rollout.logq)
        total = np.zeros((len(rewards), 2, 2))
        for p, (group, bounds) in enumerate(zip(groups, self.boundaries(tree))):
            for r, of_group in enumerate(rewards[:, p].tolist()):
                for m, measure in enumerate((leaf.tail_noise, token_noise)):
                    total[r, m] += measure(*group, of_group, bounds)
        return total

    def weight(self, token_mean: bool) -> torch.Tensor:
        """Of a token's log-probability (P, K, T), for a mean over responses of the sum or mean over
        their tokens."""
        length = self.rollout.lengths[..., None] if token_mean else 1
        return self.rollout.mask / length / self.rollout.lengths.numel()

    def logp(self, policy: Policy) -> torch.Tensor:
        groups = zip(self.rollout.tokens, self.rollout.lengths)
        trees = [PrefixTree(tokens, lengths) for tokens, lengths in groups]
        return policy.model.response_logp(self.prompts, trees)


def roll(policy: Policy, indices: list[int], n: int, stream: int, K: int, top_p: float) -> Batch:
    """Batch n of an endless stream: K responses to each of the rows at indices."""
    model, cfg = policy.model, policy.cfg
    tokenizer = policy.split.tokenizer
    P = len(indices)
    places = list(range(n * P, n * P + P))
    u = data.noise([SEED, stream], places, K, cfg.max_new_tokens, "cpu")
    with torch.no_grad():
        prompts = policy.split.prompts(model, indices)
    rollout = model.sample(prompts, u, tokenizer.eos_id, cfg.temperature, top_p).trimmed()
    groups = zip(rollout.tokens, rollout.lengths)
    texts = [train.decode(tokenizer, tokens, lengths) for tokens, lengths in groups]
    return Batch([policy.split.rows[i] for i in indices], prompts, rollout, texts)


def gradients(policy: Policy, logp, weights) -> torch.Tensor:
    """Of the sums of weights (..., P, K, T) times log-probabilities: (..., D).

    One after another: with is_grads_batched they are the same, and take longer on a CPU.
    """
    found = []
    for weight in weights.flatten(0, -4):
        parts = torch.autograd.grad(logp, policy.parameters, weight, retain_graph=True)
        found.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(found).unflatten(0, weights.shape[:-3])


# --------------------------------------------------------------------------------------------------
# The truth


def true_gradient(policy: Policy, half: int) -> torch.Tensor:
    """Of the expected rewards of the basis, from one half of the rollouts: (3, D). Every row has as
    many, so that which rows were drawn adds no noise."""
    rows = len(policy.split.rows)
    batches = TRUTH_PASSES * rows // TRUTH_P
    total = 0
    for n in tqdm(range(batches), desc=f"truth, half {half + 1}", disable=None):
        indices = [i % rows for i in range(n * TRUTH_P, (n + 1) * TRUTH_P)]
        batch = roll(policy, indices, n, half, TRUTH_K, top_p=1.0)
        credit = batch.credit(OTHERS, None, batch.rewards())
        weights = credit * batch.weight(token_mean=False)
        total += gradients(policy, batch.logp(policy), weights) / batches
    return total


def true_gradients(policy: Policy, out: Path) -> torch.Tensor:
    """Both halves, by reward: (2, R, D). Those of the basis are kept below out."""
    halves = []
    for half in range(2):
        file = out / f"truth-{half}.pt"
        if not file.exists():
            torch.save(true_gradient(policy, half), file.with_suffix(".part"))
            os.replace(file.with_suffix(".part"), file)
        halves.append(MIX @ torch.load(file))
    return torch.stack(halves)


# --------------------------------------------------------------------------------------------------
# Batches, and what they say


class Moments:
    """Signal |E g|^2 and noise E|g - E g|^2 of independent gradients (..., D) that come one by one.

    Every block of them estimates the noise by itself, so that no more than two sums are kept.
    """

    def __init__(self, block_size: int):
        self.block_size = block_size
        self.count = 0
        self.total = self.block = self.squares = self.block_squares = 0
        self.block_noise = []  # (...,) each

    def add(self, g: torch.Tensor):
        self.count += 1
        self.block = self.block + g
        self.block_squares = self.block_squares + g.square().sum(-1)
        if self.count % self.block_size == 0:
            n = self.block_size
            around_mean = self.block_squares - self.block.square().sum(-1) / n
            self.block_noise.append(around_mean / (n - 1))
            self.total = self.total + self.block
            self.squares = self.squares + self.block_squares
            self.block = self.block_squares = 0

    @property
    def noise(self) -> np.ndarray:
        """(blocks, ...)"""
        return torch.stack(self.block_noise).double().numpy()

    @property
    def signal(self) -> np.ndarray:
        """Of all pairs of gradients: (...)"""
        pairs = self.total.square().sum(-1) - self.squares
        return (pairs / self.count / (self.count - 1)).double().numpy()


def ratio(top: np.ndarray, bottom: np.ndarray) -> dict:
    """Of the sums over blocks, and half the width of its 95% interval, by the jackknife."""
    n = len(top)
    left_out = (top.sum() - top) / (bottom.sum() - bottom)
    variance = (n - 1) / n * ((left_out - left_out.mean()) ** 2).sum()
    return {"value": top.sum() / bottom.sum(), "ci": student(n - 1) * math.sqrt(variance)}


def measure(policy: Policy, K: int, truth: torch.Tensor) -> dict:
    """The cells of one K: every reward and tree, all on the same rollouts. truth (2, R, D)."""
    mean_truth = truth.mean(0)
    norms = (truth[0] * truth[1]).sum(-1).clamp(min=1e-30).sqrt()  # (R,)
    cosines = np.zeros((BATCHES, len(ALL), len(REWARDS)))
    moments = Moments(BATCHES // BLOCKS)
    logged = np.zeros((len(TREES), len(REWARDS), 2, 2))
    rng = np.random.default_rng([SEED, K])
    for n in tqdm(range(BATCHES), desc=f"K = {K}", disable=None):
        # With replacement: batches that take turns in one pass would not be independent.
        indices = rng.integers(len(policy.split.rows), size=RESPONSES // K).tolist()
        batch = roll(policy, indices, n, stream=K, K=K, top_p=policy.cfg.top_p)
        basis = batch.rewards()
        rewards = torch.einsum("rb,bpk->rpk", MIX.double(), basis)
        weight = batch.weight(token_mean=True)
        logp = batch.logp(policy)

        credit = torch.stack([batch.credit(*rule, basis) for rule in LINEAR])
        linear = MIX @ gradients(policy, logp, credit * weight)  # (rules, R, D)
        half_way = (linear[1:] + linear[:1]) / 2
        credit = torch.stack([batch.credit(*rule, rewards) for rule in OTHER])
        unbiased = torch.cat((linear, half_way))
        g = torch.cat((unbiased, gradients(policy, logp, credit * weight)))  # as ALL: (rules, R, D)

        along = (g * mean_truth).sum(-1) / norms
        # 0 for a batch without a gradient: all rewards of each prompt are equal.
        cosines[n] = along / g.norm(dim=-1).clamp(min=1e-12)
        moments.add(unbiased)
        logged += [batch.noise(tree, rewards) for tree in TREES]
    return {
        "environment": environment(),
        "cosines": cosines.tolist(),
        "noise": moments.noise.tolist(),
        "signal": moments.signal[0].tolist(),
        "logged": logged.tolist(),
    }


def cells(K: int, measured: dict) -> list[dict]:
    """Every tree and reward."""
    cosines, noise, logged = (np.array(measured[x]) for x in ("cosines", "noise", "logged"))
    found = []
    for (t, tree), (r, reward) in itertools.product(enumerate(TREES), enumerate(REWARDS)):
        place = {rule: i for i, (rule, at) in enumerate(ALL) if at in (None, tree)}
        cosine = {rule: cosines[:, i, r] for rule, i in place.items()}
        of_others = noise[:, place[OTHERS], r]
        gain = {
            rule: {other: relative(cosine[rule], cosine[other]) for other in others}
            for rule, others in AGAINST.items()
            if rule in place
        }
        tails, tokens = (leaf.noise_ratio(*sums) for sums in logged[t, r])
        cell = {
            "K": K,
            "boundaries": tree[0],
            "B": tree[1],
            "reward": reward,
            "logged": {"tails": tails, "tokens": tokens},
            "signal over noise": measured["signal"][r] / of_others.mean(),
            "cosine": {rule: values.mean() for rule, values in cosine.items()},
            "gain": gain,
            "noise": {x: ratio(noise[:, place[x], r], of_others) for x in (OURS, HALF_WAY)},
        }
        found.append(rounded(cell))
    return found


# --------------------------------------------------------------------------------------------------
# Table and figure


def predicted_gain(c: dict, noise_ratio: float) -> float:
    """In cosine over GRPO's, where nothing but the noise changes, by that factor."""
    snr = max(c["signal over noise"], 0.0)
    return math.sqrt((snr + 1) / (snr + noise_ratio)) - 1


def clear(gains: list[dict]) -> str:
    """How many are beyond their interval."""
    above = sum(gain["value"] > gain["ci"] for gain in gains)
    below = sum(-gain["value"] > gain["ci"] for gain in gains)
    return f"above in {above} and below in {below} of {len(gains)} cells"


def show(found: dict):
    """A table of the cells at LEAF's boundaries; for both kinds of boundaries, the answers."""

    def percent(gain: dict) -> str:
        return f"{100 * gain['value']:+.1f} ± {100 * gain['ci']:.1f}"

    rows = []
    for c in found["cells"]:
        if c["boundaries"] == SURPRISING:
            row = [c["reward"], c["K"], c["B"], f"{c['cosine'][OTHERS]:.3f}"]
            row += [f"{c['logged'][name]:.2f}" for name in ("tails", "tokens")]
            row.append(f"{c['noise'][OURS]['value']:.2f} ± {c['noise'][OURS]['ci']:.2f}")
            row.append(f"{100 * predicted_gain(c, c['logged']['tokens']):+.1f}")
            row += [percent(c["gain"][rule][OTHERS]) for rule in (OURS, HALF_WAY)]
            row += [percent(c["gain"][LEAF][other]) for other in (BASELINE, PLAIN)]
            row.append(percent(c["gain"][NO_ROOT][BASELINE]))
            rows.append(row)
    rows.sort(key=lambda row: (list(REWARDS).index(row[0]), *row[1:3]))
    header = ["reward", "K", "B", "GRPO's cosine", "logged, tails", "logged, all tokens", "noise"]
    header += ["predicted gain", OURS, HALF_WAY]
    header += [f"LEAF − {other}" for other in (BASELINE, PLAIN)] + [f"{NO_ROOT} − {BASELINE}"]
    print(table(header, rows))
    agree = ", ".join(f"{name} {value:.2f}" for name, value in found["halves agree"].items())
    print(
        f"Gains in % of the other's cosine, ± 95% over {found['batches']} batches of {RESPONSES} "
        f"responses; {found['comparisons']} intervals. Truth: temperature 1, top-p 1, sum over "
        f"tokens; batches: top-p 0.9, mean over tokens. Halves of the truth agree to: {agree}.\n"
    )
    for where in (SURPRISING, EVEN):
        cells = [c for c in found["cells"] if c["boundaries"] == where]
        print(f"Boundaries: {where}")
        ours = [c["gain"][OURS][OTHERS] for c in cells]
        print(f"- {OURS} against {OTHERS}: {clear(ours)}")
        beyond = [
            c
            for c in cells
            if abs(c["gain"][OURS][OTHERS]["value"]) > c["gain"][OURS][OTHERS]["ci"]
        ]
        for name in ("tails", "tokens"):
            right = sum(
                (c["logged"][name] < 1) == (c["gain"][OURS][OTHERS]["value"] > 0) for c in beyond
            )
            apart = [abs(c["logged"][name] - c["noise"][OURS]["value"]) for c in cells]
            print(
                f"- logged of {name}: the sign of {right} of {len(beyond)} clear gains of {OURS}; "
                f"{np.mean(apart):.3f} from the measured noise on average, {max(apart):.3f} at most"
            )
        print(
            f"- {HALF_WAY} against {OTHERS}: {clear([c['gain'][HALF_WAY][OTHERS] for c in cells])}"
        )
        for other in (BASELINE, PLAIN):
            gains = [c["gain"][LEAF][other] for c in cells]
            values = [gain["value"] for gain in gains]
            correlations = [
                f"{np.corrcoef([c['logged'][name] for c in cells], values)[0, 1]:.2f} of {name}"
                for name in ("tails", "tokens")
            ]
            told = ", ".join(correlations)
            print(
                f"- LEAF against {other}: {clear(gains)}; correlation with the logged ratio {told}"
            )


def plot(found: dict):
    import matplotlib.pyplot as plt

    figure, (noise, ours, leafs) = plt.subplots(1, 3, figsize=(13, 4.8))
    colours = dict(zip(REWARDS, [*plt.get_cmap("viridis")(np.linspace(0, 0.92, 5)), "tab:red"]))
    markers = dict(zip(KS, "os^"))
    for c in found["cells"]:
        points = (
            (noise, c["noise"][OURS]),
            (ours, c["gain"][OURS][OTHERS]),
            (leafs, c["gain"][LEAF][BASELINE]),
        )
        colour = colours[c["reward"]]
        for axes, point in points:
            axes.errorbar(
                c["logged"]["tokens"],
                point["value"],
                point["ci"],
                fmt=markers[c["K"]],
                color=colour,
                markerfacecolor=colour if c["boundaries"] == SURPRISING else "white",
                markersize=5,
                elinewidth=0.5,
            )
    x = np.linspace(*noise.get_xlim())
    noise.plot(x, x, color="gray", zorder=0)
    by_snr = sorted(found["cells"], key=lambda c: c["signal over noise"])
    low, high = ([predicted_gain(c, ratio) for ratio in x] for c in (by_snr[0], by_snr[-1]))
    ours.fill_between(x, low, high, color="gray", alpha=0.4, linewidth=0)
    noise.set_title("(a) noise of leave-one-out over GRPO's", fontsize=10)
    ours.set_title("(b) its gain in cosine over GRPO; band: predicted", fontsize=10)
    leafs.set_title("(c) LEAF's gain in cosine over GRPO", fontsize=10)
    for axes in (noise, ours, leafs):
        axes.axvline(1, color="black", linewidth=0.8)
        axes.axhline(1 if axes is noise else 0, color="black", linewidth=0.8)
        axes.set_xlabel("logged ratio, of all tokens")
        axes.grid(alpha=0.3)
    marks = [(reward, {"marker": "o", "color": colour}) for reward, colour in colours.items()]
    marks += [(f"K = {K}", {"marker": marker, "color": "gray"}) for K, marker in markers.items()]
    marks.append(("even boundaries", {"marker": "o", "color": "gray", "markerfacecolor": "white"}))
    handles = [plt.Line2D([], [], linestyle="", label=label, **style) for label, style in marks]
    noise.legend(handles=handles, fontsize=8)
    save(figure, "dial")


# --------------------------------------------------------------------------------------------------
# Everything in order


def run(out: Path):
    """What is measured already is read from files below out."""
    code = environment()
    policy = Policy.load(out)
    truth = true_gradients(policy, out)
    agree = torch.cosine_similarity(truth[0], truth[1], dim=-1).tolist()
    found = {
        "environment": code,
        "seed": SEED,
        "batches": BATCHES,
        "responses of the truth": 2 * TRUTH_PASSES * ROWS * TRUTH_K,
        "halves agree": rounded(dict(zip(REWARDS, agree))),
        "comparisons": 0,
        "cells": [],
    }
    for K in KS:
        file = out / f"K{K}.json"
        if not file.exists():
            began = time.time()
            train.write_json(file, measure(policy, K, truth))
            print(f"{file} after {time.time() - began:.0f} s", flush=True)
        found["cells"] += cells(K, train.read_json(file))
        gains = [gains for c in found["cells"] for gains in c["gain"].values()]
        found["comparisons"] = sum(map(len, gains))
        train.write_json(RESULTS / "dial.json", found)


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/credit"), help="folder of base, truth and batches"
    )
    parser.add_argument("--plot", action="store_true", help="from what is measured already")
    args = parser.parse_args()
    if not args.plot:
        with train.lock(args.out, wait=False):
            settings = {"seed": SEED, "rows": ROWS, "batches": BATCHES, "passes": TRUTH_PASSES}
            train.check_same(args.out, settings, "config.json")
            run(args.out)
    found = train.read_json(RESULTS / "dial.json")
    show(found)
    plot(found)


if __name__ == "__main__":
    main()
