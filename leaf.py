"""LEAF: credit for the tokens of K sampled responses, from the prefix tree they already form
(Gerogiannis et al., arXiv 2606.07610).

GRPO scores each response once and gives that number to all of its tokens. LEAF uses the same K
responses and the same K rewards, but looks back at where the responses part:

    1. rollouts       K responses o_i with surprisal s_i(t) and one reward r_i     (model.py)
    2. boundaries     the B most surprising positions, well apart                  select_boundaries
    3. tree           at each boundary, responses with one prefix form a node      build_tree
    4. span credit    global + local advantage of the node at which a span ends    span_credits
    5. normalise      z-score over all (response, span) pairs                      z_score

`leaf_advantages` runs steps 2 to 5: every token inherits the number of its span.

Shapes: K responses padded to T tokens. `lengths` counts the end-of-sequence token where one was
sampled; what stands past a response's length is never read. Inputs may be on any device; the tree
is built on the host from plain numbers. `python leaf.py` prints an example to check by hand.
"""

import math
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import NamedTuple

import torch

# --------------------------------------------------------------------------------------------------
# Step 2: boundaries


def select_boundaries(surprisal, lengths, fork_budget: int = 2) -> list[int]:
    """The B most surprising positions of the group, at least D apart, in ascending order.

    surprisal: (K, T) float, -log q of each token under the *sampling* distribution, in nats;
    lengths: (K,) int. A boundary at t means: the prefix is tokens 0..t-1, and token t surprises.
    t = 0 cannot be one: its prefix would be empty.
    """
    surprisal = torch.as_tensor(surprisal).cpu()
    lengths = torch.as_tensor(lengths).cpu()
    longest = int(lengths.max())
    ended = torch.arange(longest) >= lengths[:, None]  # (K, longest)
    # (longest,): at each position the largest surprisal of the responses that reach it.
    peak = surprisal[:, :longest].masked_fill(ended, -math.inf).amax(0)
    ranked = peak[1:].argsort(descending=True, stable=True) + 1  # ties: the smaller first
    return keep_apart(ranked.tolist(), fork_budget, separation(lengths, fork_budget))


def separation(lengths, fork_budget: int) -> int:
    """The least distance D between two boundaries: max(2, floor(l_min / (B + 1)))."""
    return max(2, min(_to_list(lengths)) // (fork_budget + 1))


def keep_apart(ranked: list[int], budget: int, distance: int) -> list[int]:
    """Walk down a ranking of positions; keep each that is `distance` or more from all kept."""
    kept: list[int] = []
    for t in ranked:
        if len(kept) == budget:
            break
        if all(abs(t - other) >= distance for other in kept):
            kept.append(t)
    return sorted(kept)


# --------------------------------------------------------------------------------------------------
# Step 3: the tree


@dataclass
class Node:
    """A prefix that two or more responses share (a "retained prefix node" v of the paper)."""

    boundary: int  # the prefix is the first `boundary` tokens
    members: list[int]  # the responses that share it; n(v) = len(members)
    value: float  # V(v), their mean reward


def build_tree(tokens, lengths, rewards, boundaries: list[int]) -> list[Node]:
    """The retained nodes, by boundary and then by first member.

    tokens: (K, T) int; lengths: (K,) int; rewards: (K,) float. A response that has ended by b is
    grouped by all of its tokens.
    """
    rewards = _to_list(rewards)
    responses = [row[:n] for row, n in zip(_to_list(tokens), _to_list(lengths))]
    nodes = []
    for b in sorted(set(boundaries)):
        groups: dict[tuple, list[int]] = {}
        for i, response in enumerate(responses):
            groups.setdefault(tuple(response[:b]), []).append(i)
        for members in groups.values():
            if len(members) >= 2:  # a response on its own has nobody to be compared with here
                value = sum(rewards[i] for i in members) / len(members)
                nodes.append(Node(b, members, value))
    return nodes


def path_of(response: int, nodes: list[Node]) -> list[Node]:
    """The nodes that a response passes through, in boundary order."""
    return [node for node in nodes if response in node.members]


# --------------------------------------------------------------------------------------------------
# Steps 4 and 5: credit of spans, normalised, for every token


class Span(NamedTuple):
    """Tokens start..end-1 of a response, which share one credit."""

    response: int
    start: int
    end: int
    credit: float  # A


def span_credits(
    lengths, rewards, nodes: list[Node], terms: str = "both", multiplicity: bool = True
) -> list[Span]:
    """Step 4: the non-empty spans of every response with A = (GA + LA) / sqrt(n), not normalised.

    terms: "both", "global" (GA alone) or "local" (LA alone); multiplicity: divide by sqrt(n).
    """
    rewards = _to_list(rewards)
    root_value = sum(rewards) / len(rewards)  # V(v0)

    def advantage(value, parent_value):
        global_advantage = value - root_value  # GA: is this prefix good for this prompt?
        local_advantage = value - parent_value  # LA: was the last decision good?
        if terms == "global":
            return global_advantage
        if terms == "local":
            return local_advantage
        if terms == "both":
            return global_advantage + local_advantage
        raise ValueError(f"terms must be 'both', 'global' or 'local', not {terms!r}")

    spans = []
    for i, length in enumerate(_to_list(lengths)):
        start = 0
        parent_value = root_value
        for node in path_of(i, nodes):
            credit = advantage(node.value, parent_value)
            if multiplicity:  # n responses repeat this span; sqrt(n) makes up for that (paper)
                credit /= math.sqrt(len(node.members))
            end = min(node.boundary, length)  # who ends before b: its later spans are empty
            if start < end:
                spans.append(Span(i, start, end, credit))
            start = end
            parent_value = node.value
        if start < length:  # the tail, after the last node: the reward is this response's own
            spans.append(Span(i, start, length, advantage(rewards[i], parent_value)))
    return spans


def z_score(spans: list[Span]) -> list[Span]:
    """Step 5: credits minus their mean, over their unbiased standard deviation (at least 1e-6).

    A span that n responses share is in the list n times, whatever its length. Fewer than two
    spans have no spread: 0.
    """
    if len(spans) < 2:
        return [span._replace(credit=0.0) for span in spans]
    credits = [span.credit for span in spans]
    mean = math.fsum(credits) / len(credits)
    variance = math.fsum((credit - mean) ** 2 for credit in credits) / (len(credits) - 1)
    std = max(math.sqrt(variance), 1e-6)
    return [span._replace(credit=(span.credit - mean) / std) for span in spans]


def token_credits(spans: list[Span], tokens) -> torch.Tensor:
    """The credit of every token, which is its span's: (K, T) float32, zero outside of all spans."""
    credits = torch.zeros(tokens.shape)
    for span in spans:
        credits[span.response, span.start : span.end] = span.credit
    return credits.to(tokens.device)


def leaf_advantages(
    tokens,
    lengths,
    surprisal,
    rewards,
    fork_budget: int = 2,
    terms: str = "both",
    multiplicity: bool = True,
) -> torch.Tensor:
    """LEAF's advantage of every token of one prompt's K responses: (K, T) float32.

    tokens (K, T) int, lengths (K,) int, surprisal (K, T) float in nats, rewards (K,) float.
    `terms` and `multiplicity` switch parts of the rule off, for ablations. Zero past each length;
    on the tokens' device. Raises ValueError on a non-finite reward.
    """
    tokens = torch.as_tensor(tokens)
    rewards = _to_list(rewards)
    if not all(math.isfinite(reward) for reward in rewards):
        raise ValueError(f"rewards must be finite, got {rewards}")
    if max(rewards) == min(rewards):  # nothing to learn from this prompt: exactly zero
        return torch.zeros(tokens.shape, device=tokens.device)
    boundaries = select_boundaries(surprisal, lengths, fork_budget)
    nodes = build_tree(tokens, lengths, rewards, boundaries)
    spans = span_credits(lengths, rewards, nodes, terms, multiplicity)
    return token_credits(z_score(spans), tokens)


# --------------------------------------------------------------------------------------------------
# GRPO, the baseline


def grpo_advantages(tokens, lengths, rewards, std_floor: float = 1 / 3) -> torch.Tensor:
    """One number per response for all of its tokens: (K, T) float32, zero past each length.

    A_i = (r_i - mean r) / (max(std r, std_floor) + 1e-6), unbiased std. The floor of 1/3 is the
    LEAF authors'; BLEU rewards spread less than that, so it also shrinks the step. std_floor=0 is
    plain GRPO (Shao et al., arXiv 2402.03300).
    """
    tokens = torch.as_tensor(tokens)  # (K, T)
    lengths = torch.as_tensor(lengths, device=tokens.device)
    rewards = torch.as_tensor(rewards, dtype=torch.float64, device=tokens.device)
    advantages = torch.zeros_like(rewards)
    if len(rewards) > 1 and rewards.max() > rewards.min():
        advantages = (rewards - rewards.mean()) / (rewards.std().clamp(min=std_floor) + 1e-6)
    mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]  # (K, T)
    return (advantages[:, None] * mask).float()


# --------------------------------------------------------------------------------------------------
# The objective, the same for both


def policy_loss(
    logp, old_logp, ref_logp, advantages, mask, clip: float = 0.2, kl_coef: float = 0.02
):
    """Clipped policy gradient plus the k3 estimate of the KL to the reference: (loss, statistics).

    All (N, T), for N responses of any prompts, padded:
    logp, old_logp, ref_logp  log-probabilities (full softmax) of their tokens under the policy now,
                              the policy that sampled them, and the reference
    advantages, mask          the mask is true on a response's tokens, EOS included

    The loss is a mean over a response's tokens, then over responses: micro-batches weighted by
    their share of responses add up to the whole.
    """
    mask = mask.to(logp.dtype)
    weight = mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)  # (N, T), sums to 1

    def mean(x):
        return (x * weight).sum()

    log_ratio = (logp - old_logp) * mask  # masked before exp: padding must not overflow
    ratio = log_ratio.exp()  # rho
    clipped_ratio = ratio.clamp(1 - clip, 1 + clip)
    surrogate = torch.minimum(ratio * advantages, clipped_ratio * advantages)
    log_ref_ratio = (ref_logp - logp) * mask
    k3 = torch.expm1(log_ref_ratio) - log_ref_ratio
    loss = mean(-surrogate + kl_coef * k3)
    was_clipped = ratio * advantages > clipped_ratio * advantages
    statistics = {
        "loss": loss.detach(),
        "kl": mean(k3.detach()),
        "clip_fraction": mean(was_clipped.to(logp.dtype)),
        "ratio": mean(ratio.detach()),
        "ratio_gap": mean((ratio.detach() - 1).abs()),  # before a first update only rounding
    }
    return loss, statistics


# --------------------------------------------------------------------------------------------------
# Fork statistics: is there anything for a tree to see?


def fork_stats(tokens, lengths, rewards, boundaries: list[int]) -> list[dict]:
    """For each selected boundary: does a fork fire there, is it usable, how large are its groups?

    A fork fires when a group of two or more has a member that goes on past the boundary; it is
    usable when such a group also has different rewards inside. group_size is the mean over the
    retained groups, 0 where there is none.
    """
    lengths = _to_list(lengths)
    rewards = _to_list(rewards)
    nodes = build_tree(tokens, lengths, rewards, boundaries)
    report = []
    for b in sorted(set(boundaries)):
        groups = [node.members for node in nodes if node.boundary == b]
        firing = [group for group in groups if any(lengths[i] > b for i in group)]
        fork = {
            "position": b,
            "fires": bool(firing),
            "usable": any(len({rewards[i] for i in group}) > 1 for group in firing),
            "group_size": fmean(len(group) for group in groups) if groups else 0.0,
        }
        report.append(fork)
    return report


def group_stats(rewards: list[list[float]], forks: list[dict]) -> dict[str, float]:
    """What to watch. reward, reward_std, equal_rewards are means over prompts; fork_fire and
    usable_fork_fire are shares of the boundaries of all prompts."""
    forks = forks or [{"fires": False, "usable": False}]
    return {
        "reward": fmean(fmean(group) for group in rewards),
        "reward_std": fmean(stdev(group) if len(group) > 1 else 0.0 for group in rewards),
        "equal_rewards": fmean(max(group) == min(group) for group in rewards),
        "fork_fire": fmean(fork["fires"] for fork in forks),
        "usable_fork_fire": fmean(fork["usable"] for fork in forks),
    }


# --------------------------------------------------------------------------------------------------
# To look at: the tree as text


def format_tree(pieces: list[list[str]], rewards, nodes: list[Node], advantages=None) -> str:
    """The tree as text. pieces: each response as token strings; rewards None: no values shown;
    advantages [K][T]: a line shows A, the mean over its tokens, which by LEAF have one number."""
    lines = [f"root  n={len(pieces)}" + (f"  V={fmean(rewards):.4f}" if rewards else "")]
    tails = [Node(len(row), [i], rewards[i] if rewards else 0.0) for i, row in enumerate(pieces)]

    def branch(members: list[int], candidates: list[Node], start: int, indent: str):
        """Lines for responses that have shown `start` tokens; a tail is drawn like a node of one."""
        pending = set(members)
        # Nodes come by rising boundary and groups only split, so a node within `pending` is a child
        # here. The recursion draws its descendants; when this loop comes to them, their members
        # have left `pending`.
        for at, node in enumerate(candidates):
            if pending.issuperset(node.members):
                pending -= set(node.members)
                n = len(node.members)
                first = node.members[0]
                end = min(node.boundary, len(pieces[first]))
                text = "".join(pieces[first][start:end])
                line = f"t={node.boundary}  n={n}" if n > 1 else f"response {first + 1}"
                if rewards:
                    line += f"  {'V' if n > 1 else 'r'}={node.value:.4f}"
                if advantages and text:
                    credits = [a for i in node.members for a in advantages[i][start:end]]
                    line += f"  A={fmean(credits):+.5f}"
                lines.append(f"{indent}{'+-' if n > 1 else 'o-'} {text!r}  {line}")
                branch(node.members, candidates[at + 1 :], end, indent + "|  ")

    branch(list(range(len(pieces))), [*nodes, *tails], 0, "")
    return "\n".join(lines)


def _to_list(x) -> list:
    return x.tolist() if isinstance(x, torch.Tensor) else list(x)


def worked_example():
    """Three responses to one prompt; E ends a response. The first is good, and leaves the others at
    its third token."""
    pieces = [list("abcdE"), list("abE"), list("abE")]
    rewards = [1.0, 0.2, 0.2]
    lengths = [5, 3, 3]
    tokens = [[0, 1, 2, 3, 4], [0, 1, 4, 0, 0], [0, 1, 4, 0, 0]]
    surprisal = [[0.1, 0.1, 2.0, 0.3, 3.0], [0.1, 0.1, 0.4, 0, 0], [0.1, 0.1, 0.4, 0, 0]]

    boundaries = select_boundaries(surprisal, lengths, fork_budget=2)
    nodes = build_tree(tokens, lengths, rewards, boundaries)
    advantages = leaf_advantages(tokens, lengths, surprisal, rewards)
    print(f"boundaries {boundaries}")
    print(format_tree(pieces, rewards, nodes, advantages.tolist()))
    print("raw credit of each span, (GA + LA) / sqrt(n), before the z-score:")
    for i, start, end, credit in span_credits(lengths, rewards, nodes):
        text = "".join(pieces[i][start:end])
        print(f"  response {i + 1}  [{start}, {end})  {text:4} {credit:+.5f}")
    grpo = grpo_advantages(tokens, lengths, rewards)[:, 0].tolist()
    print("GRPO, all tokens of a response:", [round(a, 5) for a in grpo])


if __name__ == "__main__":
    worked_example()
