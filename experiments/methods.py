"""The methods under comparison, and the code of those that are not the paper's.

A method is a set of train.py's flags, and where flags do not suffice a credit rule, of the form of
train.credit, that train.train_policy is handed instead of it:

    rule(cfg, tokens, lengths, surprisal, rewards) -> advantages (K, T), boundaries

`--algo leaf` is the paper's method. The leave-one-out variant is ours; even boundaries are a
control. `leaf.grpo_advantages` divides by max(std, floor); the authors' floor of 1/3 is above the
spread that BLEU rewards have.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import stdev

import torch

import leaf
import train

# --------------------------------------------------------------------------------------------------
# Rewards other than BLEU, each decided in one part of the answer


def first_words(answer: str, row: dict) -> float:
    """Share of the reference's first three words in place; qa's references have seven and more."""
    return sum(a == b for a, b in zip(answer.split()[:3], row["reference"].split())) / 3


def last_words(answer: str, row: dict) -> float:
    """The same of the last three, counted from the end."""
    return sum(a == b for a, b in zip(answer.split()[:-4:-1], row["reference"].split()[::-1])) / 3


# --------------------------------------------------------------------------------------------------
# Boundaries that know nothing of surprisal


def even_boundaries(lengths, fork_budget: int, min_prefix: int = 1) -> list[int]:
    """Evenly spaced, at floor(l_min k / (B + 1)) for k = 1..B."""
    shortest = min(int(n) for n in lengths)
    spots = {shortest * k // (fork_budget + 1) for k in range(1, fork_budget + 1)}
    return sorted(b for b in spots if b >= max(1, min_prefix))


# --------------------------------------------------------------------------------------------------
# Leave-one-out credit, our variant of steps 4 and 5


def leave_one_out(
    tokens,
    lengths,
    rewards,
    boundaries: list[int],
    normalize: bool = True,
    node_weight: float = 1.0,
) -> torch.Tensor:
    """The variant's advantages (K, T), arguments as in leaf.leaf_advantages.

    normalize: divide as GRPO with the floor of 1/3 does. A z-score would weigh prompts and spans by
    what happened to be sampled.
    """
    rewards = [float(r) for r in rewards]
    if max(rewards) == min(rewards):  # nothing to learn from this prompt: exactly zero
        return torch.zeros(tokens.shape, device=tokens.device)
    nodes = leaf.build_tree(tokens, lengths, rewards, boundaries)
    spans = leaf.leave_one_out_credits(lengths, rewards, nodes, node_weight)
    if normalize:
        scale = max(stdev(rewards), 1 / 3) + 1e-6
        spans = [span._replace(credit=span.credit / scale) for span in spans]
    return leaf.token_credits(spans, tokens)


# --------------------------------------------------------------------------------------------------
# Credit rules. Their names are stored with a run's checkpoints.


def credit_leave_one_out(cfg: train.Config, tokens, lengths, surprisal, rewards):
    """Our variant, at LEAF's boundaries."""
    boundaries = leaf.select_boundaries(surprisal, lengths, cfg.fork_budget)
    return leave_one_out(tokens, lengths, rewards, boundaries), boundaries


def credit_half_way(cfg: train.Config, tokens, lengths, surprisal, rewards):
    """Half-way between leave-one-out values of node and root, at LEAF's boundaries."""
    boundaries = leaf.select_boundaries(surprisal, lengths, cfg.fork_budget)
    return leave_one_out(tokens, lengths, rewards, boundaries, node_weight=0.5), boundaries


def credit_scaled(cfg: train.Config, tokens, lengths, surprisal, rewards):
    """LEAF with a gradient as long as that of GRPO with the floor, so that the KL weighs as much."""
    advantages, boundaries = train.credit(cfg, tokens, lengths, surprisal, rewards)
    return advantages / LENGTH, boundaries


# --------------------------------------------------------------------------------------------------
# The methods


@dataclass(frozen=True)
class Method:
    flags: dict  # of train.Config
    credit: Callable = train.credit


BASELINE = "GRPO, floor 1/3"
PLAIN = "GRPO, plain std"
OURS = "leave-one-out"
HALF_WAY = "half-way leave-one-out"
NO_MULTIPLICITY = "no multiplicity"
LENGTH = 2.46  # of LEAF's gradient over that of GRPO with the floor: qa's base 0, BLEU, K 8
PAPERS = {
    "LEAF": Method({}),
    BASELINE: Method({"algo": "grpo"}),
    PLAIN: Method({"algo": "grpo", "std_floor": 0.0}),
}
METHODS = PAPERS | {
    NO_MULTIPLICITY: Method({"multiplicity": False}),
    OURS: Method({}, credit_leave_one_out),
    HALF_WAY: Method({}, credit_half_way),
}
# What else sets LEAF apart from GRPO with the floor: its gradient is LENGTH times as long, so the
# same KL weight is a lighter penalty.
CONFOUNDS = {
    f"{BASELINE}, KL 0.008": Method({"algo": "grpo", "kl_coef": 0.008}),  # 0.02 / LENGTH
    "LEAF, scaled": Method({}, credit_scaled),
}


def with_responses(method: Method, K: int, sampled: int = 64) -> Method:
    """A method with K responses to each prompt, and so many prompts per rollout batch that as many
    are sampled."""
    prompts = sampled // K
    sizes = {"responses": K, "prompts": prompts, "update_prompts": prompts // 2}
    return replace(method, flags=method.flags | sizes)
