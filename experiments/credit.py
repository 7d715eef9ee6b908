"""The credit microscope: one fixed policy, the same rollouts, every credit rule, and a dial that
turns the reward from what a tree can help with to what it cannot.

    python -m experiments.credit --out runs/credit     trains the base, measures; resumable
    python -m experiments.credit --plot                from results/dial.json: the table, dial.png

The policy is the default base of the task "qa" with fresh LoRA, so the gradient is that of LoRA's
B: the first step of training. The dial is lambda in the reward lambda E + (1 - lambda) L, of which
E is the share of the reference's first three words in place and L that of its last three; beside it
stands sentence BLEU. A rule turns a batch of 64 responses into a gradient g. What counts is
cos(g, G), G being the true gradient of the expected reward, and the noise E|g - E g|^2.

G is that of the policy itself: temperature 1, top-p 1, log-probabilities summed over tokens.
Batches are as in training: temperature 1, top-p 0.9, mean over a response's tokens. G is linear in
the reward, so those of E, L and BLEU serve every lambda. So is leave-one-out credit, which no std
divides here; without a tree it is "mean of the others", GRPO as `law` has it. Half-way credit is
the mean of the two.
"""

import itertools
import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import leaf
import train
from experiments import methods
from experiments.common import RESULTS, command_line, environment, rounded, save, student, table
from experiments.law import predicted_gain, relative
from experiments.methods import BASELINE, HALF_WAY, NO_MULTIPLICITY, OURS, PLAIN
from lora import lora_parameters
from model import Prompts, Rollout, SpeechLM

SEED = 11  # of everything random here
ROWS = 1024  # of the training rows: the prompts
KS = (64, 32, 8)  # the cheapest first
RESPONSES = 64  # of a batch
BATCHES = 200  # for each K
BLOCKS = 20  # of batches, for the jackknife
TRUTH_PASSES = 2  # over all rows, for each of two halves
TRUTH_P, TRUTH_K = 16, 16

BASIS = (methods.first_words, methods.last_words, data.reward)  # E, L, BLEU
REWARDS = {f"λ = {x:g}": (x, 1 - x, 0) for x in (0, 0.25, 0.5, 0.75, 1)} | {"BLEU": (0, 0, 1)}
MIX = torch.tensor([[float(x) for x in weights] for weights in REWARDS.values()])  # (R, 3)


# --------------------------------------------------------------------------------------------------
# Rules: tokens (K, T), lengths (K,), rewards [K] and boundaries -> the tokens' credit (K, T)


def grpo(tokens, lengths, rewards, boundaries, std_floor: float):
    """Behind a response's end, too, where gradients() gives it no weight."""
    return leaf.grpo_advantages(rewards, [tokens.shape[1]] * len(tokens), std_floor)


OTHERS, LEAF = "mean of the others", "LEAF"
RULES = {
    OTHERS: partial(methods.leave_one_out, normalize=False, node_weight=0.0),
    OURS: partial(methods.leave_one_out, normalize=False),
    BASELINE: partial(grpo, std_floor=1 / 3),
    PLAIN: partial(grpo, std_floor=0.0),
    LEAF: partial(leaf.leaf_advantages, surprisal=None),  # the boundaries are given
    NO_MULTIPLICITY: partial(leaf.leaf_advantages, surprisal=None, multiplicity=False),
}
SURPRISAL, EVEN = "surprisal", "even"
NO_TREE = (SURPRISAL, 0)
TREES = [(where, B) for where in (SURPRISAL, EVEN) for B in (2, 4)]
# Rules and where they cut: gradients that are measured for the basis, combined, measured for all.
FOR_BASIS = [(OTHERS, NO_TREE), *itertools.product([OURS], TREES)]
COMBINED = [*FOR_BASIS, *itertools.product([HALF_WAY], TREES)]
FOR_ALL = [(BASELINE, NO_TREE), (PLAIN, NO_TREE), *itertools.product([LEAF], TREES)]
FOR_ALL += itertools.product([NO_MULTIPLICITY], TREES[:2])
COLUMNS = [*COMBINED, *FOR_ALL]
RIVALS = dict.fromkeys((OURS, HALF_WAY), (BASELINE, PLAIN, OTHERS))
RIVALS |= dict.fromkeys((LEAF, NO_MULTIPLICITY), (BASELINE, PLAIN))


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


@dataclass
class Batch:
    prompts: Prompts
    rollout: Rollout  # cut to the longest response
    rewards: torch.Tensor  # of the basis (3, P, K)

    def groups(self, tree: tuple[str, int]) -> list[tuple]:
        """Tokens (K, T), lengths (K,), surprisal (K, T) and boundaries of each prompt."""
        where, B = tree
        rollout = self.rollout
        found = []
        for tokens, lengths, surprisal in zip(rollout.tokens, rollout.lengths, -rollout.logq):
            if where == EVEN:
                boundaries = methods.even_boundaries(lengths, B)
            else:
                boundaries = leaf.select_boundaries(surprisal, lengths, B)
            found.append((tokens, lengths, surprisal, boundaries))
        return found

    def credit(self, rule: str, tree: tuple[str, int], rewards) -> torch.Tensor:
        """rewards (R, P, K) -> (R, P, K, T)"""
        credits = []
        groups = self.groups(tree)
        for of_prompts in rewards.tolist():
            for r, (tokens, lengths, _, cuts) in zip(of_prompts, groups):
                group = {"tokens": tokens, "lengths": lengths, "boundaries": cuts}
                credits.append(RULES[rule](rewards=r, **group))
        return torch.stack(credits).unflatten(0, rewards.shape[:2])

    def noise(self, tree: tuple[str, int], rewards) -> np.ndarray:
        """leaf.gradient_noise, summed over prompts: (R, 2)."""
        total = np.zeros((len(rewards), 2))
        for p, (*group, boundaries) in enumerate(self.groups(tree)):
            for i, r in enumerate(rewards[:, p].tolist()):
                total[i] += leaf.gradient_noise(*group, r, boundaries)
        return total


def roll(policy: Policy, indices: list[int], n: int, stream: int, K: int, top_p: float) -> Batch:
    """Batch n of an endless stream: K responses to each of the rows at indices."""
    model, split, cfg = policy.model, policy.split, policy.cfg
    P = len(indices)
    places = list(range(n * P, n * P + P))
    u = data.noise([SEED, stream], places, K, cfg.max_new_tokens, "cpu")
    with torch.no_grad():
        prompts = split.prompts(model, indices)
    eos_id = split.tokenizer.eos_id
    rollout = model.sample(prompts, u, eos_id, cfg.temperature, top_p).trimmed()
    rewards = torch.zeros(len(BASIS), P, K, dtype=torch.float64)
    for p, i in enumerate(indices):
        texts = train.decode(split.tokenizer, rollout.tokens[p], rollout.lengths[p])
        of_basis = [[reward(text, split.rows[i]) for text in texts] for reward in BASIS]
        rewards[:, p] = torch.tensor(of_basis)
    return Batch(prompts, rollout, rewards)


def gradients(policy: Policy, batch: Batch, credits, token_mean: bool) -> torch.Tensor:
    """Of credit times log-probability, its mean over responses of the mean or sum over a response's
    tokens: credits (n, P, K, T) -> (n, D)."""
    lengths = batch.rollout.lengths
    logp = policy.model.response_logp(batch.prompts, batch.rollout.tokens, lengths)  # (P, K, T)
    per = lengths[..., None] if token_mean else 1
    weights = credits * batch.rollout.mask / per / lengths.numel()
    parameters = [p for n, p in lora_parameters(policy.model).items() if n.endswith("lora_B")]
    found = []
    for weight in weights:  # is_grads_batched gives the same, and takes longer on a CPU
        parts = torch.autograd.grad(logp, parameters, weight, retain_graph=True)
        found.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(found)


# --------------------------------------------------------------------------------------------------
# The truth


def true_gradients(policy: Policy, out: Path) -> torch.Tensor:
    """Of the expected rewards, from two halves of the rollouts: (2, R, D). Those of the basis are
    kept below out. Every row has as many rollouts, so that drawing rows adds no noise."""
    rows = len(policy.split.rows)
    batches = TRUTH_PASSES * rows // TRUTH_P
    halves = []
    for half in range(2):
        file = out / f"truth-{half}.pt"
        if not file.exists():
            total = 0
            for n in tqdm(range(batches), desc=f"truth, half {half + 1}", disable=None):
                indices = [i % rows for i in range(n * TRUTH_P, (n + 1) * TRUTH_P)]
                batch = roll(policy, indices, n, half, TRUTH_K, top_p=1.0)
                credits = batch.credit(OTHERS, NO_TREE, batch.rewards)
                total += gradients(policy, batch, credits, token_mean=False) / batches
            torch.save(total, file.with_suffix(".part"))
            os.replace(file.with_suffix(".part"), file)
        halves.append(MIX @ torch.load(file))
    return torch.stack(halves)


# --------------------------------------------------------------------------------------------------
# Batches, and what they say


def squared_mean(g: torch.Tensor) -> torch.Tensor:
    """|E g|^2 from independent g (n, ..., D): the mean product of two different ones."""
    n = len(g)
    return (g.sum(0).square().sum(-1) - g.square().sum((0, -1))) / n / (n - 1)


def ratio(top: np.ndarray, bottom: np.ndarray) -> dict:
    """Of sums over blocks, and half the width of its 95% interval, by the jackknife."""
    n = len(top)
    left_out = (top.sum() - top) / (bottom.sum() - bottom)
    variance = (n - 1) / n * ((left_out - left_out.mean()) ** 2).sum()
    return {"value": top.sum() / bottom.sum(), "ci": student(n - 1) * math.sqrt(variance)}


def measure(policy: Policy, K: int, truth: torch.Tensor) -> dict:
    """All rules and rewards on the same batches; truth (2, R, D)."""
    norms = squared_mean(truth).clamp(min=1e-30).sqrt()  # (R,)
    cosines, noise, means, block = [], [], [], []
    logged = np.zeros((len(TREES), len(REWARDS), 2))
    rng = np.random.default_rng([SEED, K])
    for n in tqdm(range(BATCHES), desc=f"K = {K}", disable=None):
        # With replacement: batches that take turns in one pass would not be independent.
        indices = rng.integers(len(policy.split.rows), size=RESPONSES // K).tolist()
        batch = roll(policy, indices, n, stream=K, K=K, top_p=policy.cfg.top_p)
        rewards = torch.einsum("rb,bpk->rpk", MIX.double(), batch.rewards)
        credits = [batch.credit(*rule, batch.rewards) for rule in FOR_BASIS]
        credits += [batch.credit(*rule, rewards) for rule in FOR_ALL]
        g = gradients(policy, batch, torch.cat(credits), token_mean=True)
        of_basis, of_all = g.split((len(FOR_BASIS) * len(BASIS), len(FOR_ALL) * len(REWARDS)))
        linear = MIX @ of_basis.unflatten(0, (-1, len(BASIS)))  # (rules, R, D)
        block.append(torch.cat((linear, (linear[1:] + linear[:1]) / 2)))  # as COMBINED
        g = torch.cat((block[-1], of_all.unflatten(0, (-1, len(REWARDS)))))  # as COLUMNS

        along = (g * truth.mean(0)).sum(-1) / norms
        # 0 for a batch without a gradient: all rewards of each prompt are equal.
        cosines.append((along / g.norm(dim=-1).clamp(min=1e-12)).tolist())
        logged += [batch.noise(tree, rewards) for tree in TREES]
        if len(block) == BATCHES // BLOCKS:
            block = torch.stack(block)
            noise.append(block.var(0).sum(-1).tolist())
            means.append(block[:, 0].mean(0))
            block = []
    return {
        "cosines": cosines,  # (batches, rules, R)
        "noise": noise,  # (blocks, combined rules, R)
        "signal": squared_mean(torch.stack(means)).tolist(),  # of mean of the others: (R,)
        "logged": logged.tolist(),  # (trees, R, with a tree and without)
    }


def cells(K: int, measured: dict):
    """What is reported, for each tree and reward."""
    cosines, noise, logged = (np.array(measured[x]) for x in ("cosines", "noise", "logged"))
    for (t, tree), (r, reward) in itertools.product(enumerate(TREES), enumerate(REWARDS)):
        place = {rule: i for i, (rule, at) in enumerate(COLUMNS) if at in (NO_TREE, tree)}
        cosine = {rule: cosines[:, i, r] for rule, i in place.items()}
        of_others = noise[:, place[OTHERS], r]
        cell = {
            "K": K,
            "boundaries": tree[0],
            "B": tree[1],
            "reward": reward,
            "logged": leaf.noise_ratio(*logged[t, r]),
            "signal over noise": measured["signal"][r] / of_others.mean(),
            "noise": {x: ratio(noise[:, place[x], r], of_others) for x in (OURS, HALF_WAY)},
            "cosine": {rule: values.mean() for rule, values in cosine.items()},
            "gain": {
                rule: {rival: relative(cosine[rule], cosine[rival]) for rival in rivals}
                for rule, rivals in RIVALS.items()
                if rule in place
            },
        }
        yield rounded(cell)


# --------------------------------------------------------------------------------------------------
# Table and figure


def gains(cells: list[dict], rule: str, rival: str) -> np.ndarray:
    """And half the widths of their intervals: (2, cells)."""
    return np.array([[c["gain"][rule][rival][x] for c in cells] for x in ("value", "ci")])


def show(found: dict):
    """The cells with LEAF's boundaries as a table; of all, what they answer."""
    shown = [(OURS, OTHERS), (HALF_WAY, OTHERS), (LEAF, BASELINE), (LEAF, PLAIN)]
    columns = [*shown, (NO_MULTIPLICITY, BASELINE)]
    rows = []
    for c in found["cells"]:
        if c["boundaries"] == SURPRISAL:
            row = [c["K"], c["B"], c["reward"], f"{c['cosine'][OTHERS]:.3f}"]
            row += [f"{x:.2f}" for x in (c["logged"], c["noise"][OURS]["value"])]
            predicted = predicted_gain(c["signal over noise"], c["logged"])
            row.append(f"{100 * predicted:+.1f}")
            for value, half in (gains([c], *pair)[:, 0] for pair in columns):
                row.append(f"{100 * value:+.1f} ± {100 * half:.1f}")
            rows.append(row)
    header = ["K", "B", "reward", "GRPO's cosine", "logged"]
    header += ["noise, leave-one-out", "predicted gain", *(f"{a} − {b}" for a, b in columns)]
    print(table(header, rows))
    agree = ", ".join(f"{name} {value:.2f}" for name, value in found["halves agree"].items())
    print(
        f"GRPO is {OTHERS}. Gains in %, ± 95% over {found['batches']} batches of {RESPONSES}; in all "
        f"{found['comparisons']} intervals. Batches: top-p 0.9, mean over a response's tokens; truth: "
        f"top-p 1, sum over them. Its halves agree to {agree}.\n"
    )
    for where in (SURPRISAL, EVEN):
        at = [c for c in found["cells"] if c["boundaries"] == where]
        logged = np.array([c["logged"] for c in at])
        print(f"Boundaries by {where}, {len(at)} cells:")
        for pair in shown:
            value, half = gains(at, *pair)
            r = np.corrcoef(logged, value)[0, 1]
            told = f"above in {sum(value > half)} and below in {sum(-value > half)} cells, clearly"
            print(f"- {' − '.join(pair)}: {told}; correlation with the logged ratio {r:.2f}")
        value, half = gains(at, OURS, OTHERS)
        clear = abs(value) > half
        right = sum(((logged < 1) == (value > 0))[clear])
        apart = abs(logged - [c["noise"][OURS]["value"] for c in at]).mean()
        told = f"the sign of {right} of {sum(clear)} clear gains of {OURS}"
        print(f"- logged: {told}; {apart:.3f} off the measured noise on average")
        apart = abs(value - [predicted_gain(c["signal over noise"], c["logged"]) for c in at])
        print(f"- its predicted gain: {100 * apart.mean():.1f} points off on average")


def plot(found: dict):
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(13, 4.8), sharex=True)
    colours = dict(zip(REWARDS, [*plt.get_cmap("plasma")(np.linspace(0, 0.9, 5)), "black"]))
    markers = dict(zip(KS, "^so"))
    for c in found["cells"]:
        colour = colours[c["reward"]]
        style = {"color": colour, "fmt": markers[c["K"]], "markersize": 5, "elinewidth": 0.5}
        style["markerfacecolor"] = colour if c["boundaries"] == SURPRISAL else "white"
        points = c["noise"][OURS], c["gain"][OURS][OTHERS], c["gain"][LEAF][BASELINE]
        for axes, point in zip(panels, points):
            axes.errorbar(c["logged"], point["value"], point["ci"], **style)
    noise, ours, leafs = panels
    x = np.linspace(*noise.get_xlim())
    noise.plot(x, x, color="gray", zorder=0, label="predicted")
    snr = np.median([c["signal over noise"] for c in found["cells"]])
    ours.plot(x, [predicted_gain(snr, ratio) for ratio in x], color="gray", zorder=0)
    for axes, level, title in (
        (noise, 1, "(a) noise of leave-one-out over GRPO's"),
        (ours, 0, "(b) its gain in cosine over GRPO"),
        (leafs, 0, "(c) LEAF's gain in cosine over GRPO, floor 1/3"),
    ):
        axes.set_title(title, fontsize=10)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.axhline(level, color="black", linewidth=0.8)
        axes.set_xlabel("noise ratio as logged")
        axes.grid(alpha=0.3)
    for reward, colour in colours.items():
        noise.plot([], [], "o", color=colour, label=reward)
    for K, marker in markers.items():
        noise.plot([], [], marker, color="gray", label=f"K = {K}")
    noise.plot([], [], "o", color="gray", markerfacecolor="white", label="even boundaries")
    noise.legend(fontsize=8)
    save(figure, "dial")


# --------------------------------------------------------------------------------------------------
# Everything in order


def run(out: Path) -> dict:
    """What is measured already is read from files below out."""
    code = environment()
    policy = Policy.load(out)
    truth = true_gradients(policy, out)
    found = []
    for K in KS:
        file = out / f"K{K}.json"
        if not file.exists():
            train.write_json(file, measure(policy, K, truth))
        found += cells(K, train.read_json(file))
    agree = torch.cosine_similarity(*truth, dim=-1).tolist()
    return {
        "environment": code,
        "seed": SEED,
        "batches": BATCHES,
        "responses of the truth": 2 * TRUTH_PASSES * ROWS * TRUTH_K,
        "halves agree": rounded(dict(zip(REWARDS, agree))),
        "comparisons": sum(len(rivals) for cell in found for rivals in cell["gain"].values()),
        "cells": found,
    }


def main():
    parser = command_line(__doc__)
    parser.add_argument("--out", type=Path, default="runs/credit", help="for base and numbers")
    parser.add_argument("--plot", action="store_true", help="from what is measured already")
    args = parser.parse_args()
    file = RESULTS / "dial.json"
    if not args.plot:
        with train.lock(args.out, wait=False):
            settings = {"seed": SEED, "rows": ROWS, "batches": BATCHES, "passes": TRUTH_PASSES}
            train.check_same(args.out, settings, "config.json")
            train.write_json(file, run(args.out))
    found = train.read_json(file)
    show(found)
    plot(found)


if __name__ == "__main__":
    main()
