"""LEAF: credit for the tokens of K sampled responses, from the prefix tree they already form (arXiv 2606.07610).

GRPO scores each response once and gives that number to all of its tokens. LEAF uses the same K responses and the
same K rewards, but looks back at where the responses part:

    1. rollouts       K responses o_i with per-token surprisal s_i(t) and one terminal reward r_i           draw
    2. boundaries     the B most surprising positions, well apart                           select_boundaries
    3. tree           at each boundary, responses with the same prefix form a node          build_tree
    4. span credit    global + local advantage of the node at which a span ends             leaf_advantages
    5. normalise      z-score over all (response, span) pairs; tokens inherit their span's  leaf_advantages

Shapes: K responses padded to T tokens. `lengths` counts the end-of-sequence token where one was sampled; what stands
past a response's length is never read. Inputs may be on any device; the tree is built on the host from plain numbers.
This file is the method and nothing else. `python leaf.py` prints a worked example to check by hand.
"""

import math
from dataclasses import dataclass
from statistics import fmean, stdev

import torch


# ---------------------------------------------------------------------------------------------------------------------
# Step 1: the tokens of rollouts, and their surprisal


def draw(logits, u, temperature: float, top_p: float):
    """One token per row of logits (..., V) by inverting the cumulative distribution at u (...) in [0, 1).

    Returns token, log q (after temperature and top-p truncation and renormalisation), log p (full softmax).
    """
    logp = logits.log_softmax(-1)
    if temperature == 0:
        token = logp.argmax(-1)
        return token, torch.zeros_like(u), logp.gather(-1, token[..., None])[..., 0]
    q = nucleus((logits / temperature).softmax(-1), top_p)
    mass = q.cumsum(-1)
    total = mass[..., -1:]
    token = torch.searchsorted(mass, u[..., None] * total, right=True).clamp(max=q.shape[-1] - 1)
    # Where rounding steps past the end or, in a sum made in parallel, onto a token of no probability: the likeliest.
    token = torch.where(q.gather(-1, token) > 0, token, q.argmax(-1, keepdim=True))
    logq = (q.gather(-1, token) / total).log()
    return token[..., 0], logq[..., 0], logp.gather(-1, token)[..., 0]


def nucleus(q, top_p: float):
    """Probabilities (..., V) with zeros outside the smallest set of most probable tokens whose mass reaches top_p."""
    if top_p == 1:
        return q
    values = ascending(q)
    mass = values.cumsum(-1)  # of a token and all less probable ones: it stays if that is more than may be cut
    cut = torch.searchsorted(mass, mass[..., -1:] - top_p, right=True).clamp(max=q.shape[-1] - 1)  # how many go
    least = values.gather(-1, cut)
    room = q.shape[-1] - cut - (q > least).sum(-1, keepdim=True)  # for tokens that are just as probable as the last
    ties = q == least
    return q.masked_fill((q < least) | ties & (ties.cumsum(-1, dtype=torch.float32) > room), 0)


def ascending(q):
    if q.device.type != "cpu":
        return q.sort(-1).values
    values = q.clone()
    values.numpy().sort(axis=-1)  # with vector instructions, ten times as fast as torch on the CPU
    return values


# ---------------------------------------------------------------------------------------------------------------------
# Steps 2 to 5


@dataclass
class Node:
    """A prefix shared by two or more responses (a "retained prefix node" v of the paper)."""

    boundary: int  # the prefix is the first `boundary` tokens
    members: list[int]  # D(v): the responses that share it; n(v) = len(members)
    value: float  # V(v): their mean reward


def separation(lengths, fork_budget: int) -> int:
    """The least distance D between two boundaries: max(2, floor(l_min / (B + 1)))."""
    return max(2, min(_to_list(lengths)) // (fork_budget + 1))


def select_boundaries(surprisal, lengths, fork_budget: int = 2, min_prefix: int = 1) -> list[int]:
    """The B most surprising positions of the group, at least D apart, in ascending order (step 2).

    surprisal: (K, T) float, -log q of each sampled token under the *sampling* distribution; lengths: (K,) int.
    A boundary at t means: the prefix is tokens 0..t-1 and the surprising token is token t.
    """
    surprisal, lengths = torch.as_tensor(surprisal).cpu(), torch.as_tensor(lengths).cpu()
    first, last = max(1, min_prefix), int(lengths.max())  # candidates: first <= t < len(o_i)
    # A position can be kept once, so only the most surprised response at each position matters.
    ended = torch.arange(last) >= lengths[:, None]  # (K, last)
    peak = surprisal[:, :last].masked_fill(ended, -math.inf).amax(0)  # (last,)
    ranked = peak[first:].sort(descending=True, stable=True).indices + first  # stable: ties keep the smaller t first
    return _keep_apart(ranked.tolist(), fork_budget, separation(lengths, fork_budget))


def random_boundaries(lengths, fork_budget: int, generator=None, min_prefix: int = 1) -> list[int]:
    """Ablation: positions in uniformly random order instead of by surprisal, under the same separation rule."""
    first, last = max(1, min_prefix), max(_to_list(lengths))
    shuffled = torch.randperm(max(0, last - first), generator=generator) + first
    return _keep_apart(shuffled.tolist(), fork_budget, separation(lengths, fork_budget))


def even_boundaries(lengths, fork_budget: int, min_prefix: int = 1) -> list[int]:
    """Ablation: evenly spaced boundaries, at floor(l_min k / (B + 1)) for k = 1..B."""
    shortest = min(_to_list(lengths))
    spots = {shortest * k // (fork_budget + 1) for k in range(1, fork_budget + 1)}
    return sorted(b for b in spots if b >= max(1, min_prefix))


def choose_boundaries(how: str, surprisal, lengths, fork_budget: int = 2, min_prefix: int = 1) -> list[int]:
    """By "surprisal" as LEAF does, or as its ablations do: "random" (from torch's global generator) or "even"."""
    if how == "surprisal":
        return select_boundaries(surprisal, lengths, fork_budget, min_prefix)
    choose = {"random": random_boundaries, "even": even_boundaries}[how]
    return choose(lengths, fork_budget, min_prefix=min_prefix)


def _keep_apart(ranked: list[int], budget: int, distance: int) -> list[int]:
    """Walk down the ranking and keep what is at least `distance` from everything kept, until `budget` are kept."""
    kept: list[int] = []
    for t in ranked:
        if len(kept) < budget and all(abs(t - other) >= distance for other in kept):
            kept.append(t)
    return sorted(kept)


def build_tree(tokens, lengths, rewards, boundaries: list[int]) -> list[Node]:
    """The retained nodes, by boundary and then by first member (step 3). tokens: (K, T) int; rewards: (K,) float.

    A response of length <= b has no more than its own tokens to compare, so it groups by all of them.
    """
    rewards = _to_list(rewards)
    rows = [row[:n] for row, n in zip(_to_list(tokens), _to_list(lengths))]
    nodes = []
    for b in sorted(set(boundaries)):
        groups: dict[tuple, list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault(tuple(row[:b]), []).append(i)
        for members in groups.values():
            if len(members) >= 2:  # singletons are not retained: alone, V(v) is just r_i
                nodes.append(Node(b, members, sum(rewards[i] for i in members) / len(members)))
    return nodes


def first_copies(tokens, real):
    """Which tokens (P, K, T), of those that are real, end a prefix that no response before had: (P, K, T) bool; and the
    place k * T + t of the first to end the same prefix: (P, K * T)."""
    K, T = tokens.shape[1:]
    apart = ((tokens[:, :, None] != tokens[:, None]) | ~real[:, None]).cumsum(-1) > 0  # (P, K, K, T)
    first = apart.byte().argmin(2)  # (P, K, T)
    response, time = (torch.arange(n, device=tokens.device) for n in (K, T))
    return real & (first == response[:, None]), (first * T + time).flatten(1)


def span_credits(lengths, rewards, nodes: list[Node], terms: str = "both", multiplicity: bool = True):
    """Step 4: the non-empty spans of every response as tuples (response, start, end, A), before normalisation."""
    if terms not in ("both", "global", "local"):
        raise ValueError(f"terms must be 'both', 'global' or 'local', not {terms!r}")
    use_global, use_local = terms != "local", terms != "global"
    rewards, lengths = _to_list(rewards), _to_list(lengths)
    root_value = sum(rewards) / len(rewards)  # V(v0)
    spans = []
    for i, length in enumerate(lengths):
        start, parent_value = 0, root_value
        for node in (node for node in nodes if i in node.members):  # the path of response i, in boundary order
            credit = use_global * (node.value - root_value) + use_local * (node.value - parent_value)  # GA + LA
            if multiplicity:  # all n descendants repeat this span, so n copies of its gradient add up
                credit /= math.sqrt(len(node.members))
            end = min(node.boundary, length)  # a twin that ended before the boundary: its span stops with it
            if start < end:
                spans.append((i, start, end, credit))
            start, parent_value = end, node.value
        if start < length:  # the tail, after the last shared prefix, is this response's own
            credit = use_global * (rewards[i] - root_value) + use_local * (rewards[i] - parent_value)
            spans.append((i, start, length, credit))
    return spans


def leave_one_out_credits(lengths, rewards, nodes: list[Node]):
    """A variant of step 4, ours and not the paper's: r_i minus a value, of the prefix so far, that r_i has no part in.

    V_i(v0) is the mean reward of the other responses. At a node v it is V(v) with the value before it, V_i(u), in the
    place of r_i. So for given boundaries the gradient is unbiased: a baseline may depend on the prefix and on the other
    responses, and on nothing else. Spans as span_credits has them; at least two responses.
    """
    rewards, lengths = _to_list(rewards), _to_list(lengths)
    spans = []
    for i, (length, reward) in enumerate(zip(lengths, rewards)):
        start, value = 0, (sum(rewards) - reward) / (len(rewards) - 1)
        for node in (node for node in nodes if i in node.members):
            end = min(node.boundary, length)
            if start < end:
                spans.append((i, start, end, reward - value))
            start, value = end, node.value + (value - reward) / len(node.members)
        if start < length:
            spans.append((i, start, length, reward - value))
    return spans


def leaf_advantages(
    tokens, lengths, surprisal, rewards, fork_budget: int = 2, terms: str = "both", multiplicity: bool = True,
    normalize: bool = True, min_prefix: int = 1, boundaries: list[int] | None = None,
) -> torch.Tensor:  # fmt: skip
    """LEAF's advantage of every token of one prompt's K responses: (K, T) float32, zero past each length.

    tokens (K, T) int, lengths (K,) int, surprisal (K, T) float in nats, rewards (K,) float. terms ("both", "global",
    "local"), multiplicity and normalize switch off parts of the rule for ablations; boundaries, if given, replace the
    selected ones. terms="leave-one-out" is our variant, in GRPO's scale. The result is on the tokens' device. Raises
    ValueError on a non-finite reward.
    """
    tokens, lengths, rewards = torch.as_tensor(tokens), _to_list(lengths), _to_list(rewards)
    if not all(map(math.isfinite, rewards)):
        raise ValueError(f"rewards must be finite, got {rewards}")
    if max(rewards) == min(rewards):  # nothing to learn from this prompt: exactly zero
        return torch.zeros(tokens.shape, device=tokens.device)
    if boundaries is None:
        boundaries = select_boundaries(surprisal, lengths, fork_budget, min_prefix)
    nodes, loo = build_tree(tokens, lengths, rewards, boundaries), terms == "leave-one-out"
    if loo:
        spans = leave_one_out_credits(lengths, rewards, nodes)
    else:
        spans = span_credits(lengths, rewards, nodes, terms, multiplicity)
    credits = [credit for *_, credit in spans]
    if normalize and loo:  # as GRPO does: a z-score would weigh prompts and spans by what happened to be sampled
        credits = [credit / (max(stdev(rewards), 1 / 3) + 1e-6) for credit in credits]
    elif normalize and spans:  # step 5: a span shared by n responses is in the list n times; a lone pair gets 0
        mean = math.fsum(credits) / len(credits)
        std = math.sqrt(math.fsum((credit - mean) ** 2 for credit in credits) / max(1, len(credits) - 1))  # unbiased
        credits = [(credit - mean) / max(std, 1e-6) for credit in credits]
    # A response's spans follow each other without a gap, so each token inherits its span's credit in reading order.
    owned = torch.arange(tokens.shape[1]) < torch.as_tensor(lengths)[:, None]  # (K, T)
    span_lengths = torch.tensor([end - start for _, start, end, _ in spans], dtype=torch.int64)
    of_tokens = torch.tensor(credits, dtype=torch.float32).repeat_interleave(span_lengths)
    return torch.zeros(tokens.shape).masked_scatter_(owned, of_tokens).to(tokens.device)


def grpo_advantages(rewards, lengths, std_floor: float = 1 / 3) -> torch.Tensor:
    """The GRPO baseline: one number per response for all of its tokens, (K, T) float32 with T the longest length.

    A_i = (r_i - mean r) / (max(std r, std_floor) + 1e-6), unbiased std. The floor of 1/3 is the LEAF authors'; since
    BLEU rewards spread less than that, it also shrinks the step. std_floor=0 is plain GRPO.
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    lengths = torch.as_tensor(lengths, device=rewards.device)
    credit = torch.zeros_like(rewards)
    if len(rewards) > 1 and rewards.max() > rewards.min():
        credit = (rewards - rewards.mean()) / (rewards.std().clamp(min=std_floor) + 1e-6)
    mask = torch.arange(int(lengths.max()), device=rewards.device) < lengths[:, None]  # (K, T)
    return (credit[:, None] * mask).float()


def policy_loss(logp, old_logp, ref_logp, advantages, mask, clip: float = 0.2, kl_coef: float = 0.02):
    """The objective of LEAF and GRPO alike: clipped policy gradient plus k3 estimate of the KL; returns (loss, stats).

    All (N, T), N responses of any prompts: log-probabilities of the sampled tokens under the model's full softmax, and
    a mask of each response's tokens, EOS included. Mean over a response's tokens, then over responses: micro-batches
    weighted by their share of responses add up to the whole.
    """
    mask = mask.to(logp.dtype)
    weight = mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)  # (N, T), sums to 1

    def mean(x):
        return (x * weight).sum()

    log_ratio = (logp - old_logp) * mask  # masked before exp: padding must not overflow
    ratio = log_ratio.exp()  # rho
    clipped = ratio.clamp(1 - clip, 1 + clip)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    log_ref_ratio = (ref_logp - logp) * mask
    k3 = torch.expm1(log_ref_ratio) - log_ref_ratio
    loss = mean(-surrogate + kl_coef * k3)
    stats = {
        "loss": loss.detach(),
        "kl": mean(k3.detach()),
        "clip_fraction": mean((ratio * advantages > clipped * advantages).to(logp.dtype)),
        "ratio": mean(ratio.detach()),
        "ratio_gap": mean((ratio.detach() - 1).abs()),  # 0 before a batch's first update, but for rounding
    }
    return loss, stats


def learning_rate(peak: float, warmup: float, final: float, progress: float) -> float:
    """Linear warm-up over a share of the steps, then a cosine to a share of the peak; progress runs from 0 to 1."""
    if progress < warmup:
        return peak * progress / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
    return peak * (final + (1 - final) * cosine)


def fork_stats(tokens, lengths, rewards, boundaries: list[int]) -> list[dict]:
    """Forkability: for each selected boundary, does a fork fire there, and is it usable?

    A fork fires when a group of two or more has a member that goes on past the boundary; it is usable when such a
    group also has different rewards inside. group_size and reward_spread are means over retained groups, or 0.
    """
    lengths, rewards = _to_list(lengths), _to_list(rewards)
    nodes, report = build_tree(tokens, lengths, rewards, boundaries), []
    for b in sorted(set(boundaries)):
        groups = [node.members for node in nodes if node.boundary == b]
        spreads = [max(rewards[i] for i in g) - min(rewards[i] for i in g) for g in groups]
        going_on = [any(lengths[i] > b for i in g) for g in groups]
        usable = any(on and spread > 0 for on, spread in zip(going_on, spreads))
        size, spread = (sum(x) / max(1, len(groups)) for x in (map(len, groups), spreads))
        report.append(dict(position=b, fires=any(going_on), usable=usable, group_size=size, reward_spread=spread))
    return report


def group_stats(rewards: list[list[float]], forks: list[dict]) -> dict[str, float]:
    """What to watch: means over prompts, of the rewards of their K responses, and over boundaries, of fork_stats."""
    forks = forks or [{"fires": False, "usable": False}]
    return {
        "reward": fmean(map(fmean, rewards)),
        "reward_std": fmean(stdev(group) if len(group) > 1 else 0 for group in rewards),
        "equal_rewards": fmean(max(group) == min(group) for group in rewards),
        "fork_fire": fmean(fork["fires"] for fork in forks),
        "usable_fork_fire": fmean(fork["usable"] for fork in forks),
    }


def format_tree(pieces: list[list[str]], rewards, nodes: list[Node], advantages=None) -> str:
    """The prefix tree as text. pieces: each response as a list of token strings; rewards may be None (no values)."""
    known = rewards is not None
    lines = [f"root  n={len(pieces)}" + (f"  V={sum(rewards) / len(rewards):.4f}" if known else "")]

    def draw(members, start, level, indent):
        # Groups only split as b grows: this node's children are the retained nodes of later boundaries inside it.
        pending = list(members)
        for depth, node in enumerate(nodes[level:], start=level):
            if set(node.members) <= set(pending):
                text = "".join(pieces[node.members[0]][start : node.boundary])
                value = f"  V={node.value:.4f}" if known else ""
                lines.append(f"{indent}+- {text!r}  t={node.boundary}  n={len(node.members)}{value}")
                draw(node.members, node.boundary, depth + 1, indent + "|  ")
                pending = [i for i in pending if i not in node.members]
        for i in pending:
            reward = f"  r={rewards[i]:.4f}" if known else ""
            lines.append(f"{indent}o- {''.join(pieces[i][start:])!r}  response {i + 1}{reward}")

    draw(range(len(pieces)), 0, 0, "")
    if advantages is not None:
        lines.append("advantage of each token:")
        for i, row in enumerate(pieces):
            lines.append(f"  response {i + 1}: " + "  ".join(f"{p} {a:+.5f}" for p, a in zip(row, advantages[i])))
    return "\n".join(lines)


def shade(pieces: list[str], advantages: list[float], colour: bool) -> str:
    """A response with each token on a background of its credit: green is praise, red is blame; numbers if no colour."""
    if not colour:
        return "".join(f"{piece}[{a:+.1f}]" for piece, a in zip(pieces, advantages)).strip()
    out = ""
    for piece, a in zip(pieces, advantages):
        shades = ((157, 120, 34) if a > 0 else (224, 217, 203)) if abs(a) > 0.05 else (255,) * 3  # 256-colour codes
        out += f"\033[48;5;{shades[min(2, int(abs(a) * 1.5))]}m\033[38;5;16m{piece}\033[0m"
    return out


def _to_list(x) -> list:
    return x.tolist() if isinstance(x, torch.Tensor) else list(x)


if __name__ == "__main__":
    # Three responses to one prompt; E ends a response. The first is good and leaves the others at its third token.
    pieces, rewards, lengths = [list("abcdE"), list("abE"), list("abE")], [1.0, 0.2, 0.2], [5, 3, 3]
    tokens = [["abcdE".index(p) for p in row] + [0] * (5 - len(row)) for row in pieces]
    surprisal = [[0.1, 0.1, 2.0, 0.3, 3.0], [0.1, 0.1, 0.4, 0, 0], [0.1, 0.1, 0.4, 0, 0]]
    boundaries = select_boundaries(surprisal, lengths, fork_budget=2)
    nodes = build_tree(tokens, lengths, rewards, boundaries)
    print(f"boundaries {boundaries}")
    print(format_tree(pieces, rewards, nodes, leaf_advantages(tokens, lengths, surprisal, rewards).tolist()))
    print("raw credit of each span, (GA + LA) / sqrt(n), before the z-score:")
    for i, start, end, credit in span_credits(lengths, rewards, nodes):
        print(f"  response {i + 1}  [{start}, {end})  {''.join(pieces[i][start:end]):4} {credit:+.5f}")
    print("GRPO, all tokens of a response:", [round(a, 5) for a in grpo_advantages(rewards, lengths)[:, 0].tolist()])
