"""Rewards, boundaries and credit rules that only `law` and `credit` measure with.

The leave-one-out variant is ours; even boundaries are a control. `leaf.grpo_advantages` divides by
max(std, floor); the authors' floor of 1/3 is above the spread that BLEU rewards have.
"""

from statistics import stdev

import torch

import leaf

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
# Names of rules

BASELINE = "GRPO, floor 1/3"
PLAIN = "GRPO, plain std"
OURS = "leave-one-out"
HALF_WAY = "half-way leave-one-out"
NO_MULTIPLICITY = "no multiplicity"
