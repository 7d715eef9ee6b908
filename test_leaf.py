"""The method and the claims: LEAF's credit by brute force, the sampler is the scorer, LoRA off is the
base, nobody's credit reaches another prompt, a stopped run goes on to the bit.

    pytest test_leaf.py    these
    pytest                 these, and those of all rooms

Every result is held against something independent: brute force, transformers, PEFT, torchaudio,
sacrebleu, or the same computation done the slow way. No network.
"""

import itertools
import math
import random
import signal
import timeit
from fractions import Fraction
from statistics import fmean, stdev

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import leaf
import lora
import train
from model import SpeechLM
from tests.helpers import (
    EOS,
    PADDINGS,
    ROOT,
    SUFFIXES,
    V,
    adapter,
    assert_same_run,
    base_of,
    by_letters,
    first_run,
    forward,
    load_policy,
    logits_of,
    make_model,
    make_prompts,
    metrics,
    near,
    pad_responses,
    rand,
    same,
    score_alone,
    seeded,
    shake_lora,
    stopping_at,
    tiny,
    truncated,
)
from upkeep.errors import UserError

__all__ = ["first_run", "seeded"]  # fixtures


# --------------------------------------------------------------------------------------------------
# leaf.py: boundaries, tree, credit, GRPO, loss, fork statistics


def token_mask(lengths, width):
    """(K, T) mask from lengths alone: EOS is also the padding id, the sampled one is trained."""
    return torch.arange(width) < lengths[:, None]


def random_group(rng, ended=False):
    """A small group whose prefixes collide often, tempting junk in its padding. ended: nobody is
    cut short or empty."""
    K = rng.randint(1, 10)
    T = rng.randint(1, 14)
    vocab = rng.randint(1, 3)
    whole = rng.random() < 0.6  # surprisals are whole numbers: ties
    responses = []
    for _ in range(K):
        shortest = 1 if ended or rng.random() < 0.9 else 0
        o = [rng.randint(1, vocab) for _ in range(rng.randint(shortest, T))]
        if responses and rng.random() < 0.5:  # share a prefix, then part
            o[: len(o) // 2] = [x or 1 for x in rng.choice(responses)[: len(o) // 2]]
        if o and (ended or rng.random() < 0.7):
            o[-1] = EOS
        responses.append(list(rng.choice(responses)) if responses and rng.random() < 0.25 else o)
    tokens, lengths = pad_responses(responses, T)
    mask = token_mask(lengths, T)
    junk = torch.tensor([[rng.randint(0, vocab) for _ in range(T)] for _ in range(K)])
    tokens = torch.where(mask, tokens, junk)
    surprisal = torch.tensor(
        [[rng.randint(0, 3) if whole else 4 * rng.random() for _ in range(T)] for _ in range(K)]
    )
    surprisal = torch.where(mask, surprisal.float(), 99.0)
    rewards = torch.tensor([rng.choice([0.0, 0.2, 0.5, 1.0]) for _ in range(K)])
    return responses, tokens, lengths, surprisal, rewards


def slow_boundaries(responses, surprisal, budget):
    """The paper's step 2, one pick at a time: the best position that is still far enough from
    every kept one."""
    peak = {}
    for o, row in zip(responses, surprisal.tolist()):
        for t in range(1, len(o)):
            peak[t] = max(row[t], peak.get(t, row[t]))
    gap = max(2, min(map(len, responses)) // (budget + 1))
    kept = []
    while len(kept) < budget:
        free = [t for t in peak if all(abs(t - k) >= gap for k in kept)]
        if not free:
            break
        kept.append(min(free, key=lambda t: (-peak[t], t)))
    return sorted(kept)


def slow_groups(responses, boundary):
    """The paper's step 3 at one boundary: everybody's companions (a slice stops at a response's
    end by itself)."""
    companions = [
        [j for j, p in enumerate(responses) if p[:boundary] == o[:boundary]] for o in responses
    ]
    return [g for i, g in enumerate(companions) if len(g) >= 2 and g[0] == i]


def slow_credit(responses, rewards, boundaries, terms, multiplicity, normalize):
    """The paper's steps 3 to 5 token by token, values as fractions -> {(response, token):
    credit}, number of pairs."""
    r = [Fraction(x) for x in rewards.tolist()]
    span_of = {}
    credit = {}
    root = sum(r) / len(r)
    for i, o in enumerate(responses):
        path = [
            (b, [r[j] for j in g]) for b in boundaries for g in slow_groups(responses, b) if i in g
        ]
        for t in range(len(o)):
            behind = [below for b, below in path if b <= t]  # the nodes this token has left behind
            ahead = [below for b, below in path if b > t]
            ahead.append([r[i]])  # a tail ends at the response itself, n = 1
            here = sum(ahead[0]) / len(ahead[0])
            parent = sum(behind[-1]) / len(behind[-1]) if behind else root
            total = {
                "global": here - root,
                "local": here - parent,
                "both": here - root + here - parent,
            }[terms]
            span_of[i, t] = i, len(behind)
            credit[span_of[i, t]] = float(total) / (math.sqrt(len(ahead[0])) if multiplicity else 1)
    mean = 0.0
    std = 1.0
    if len(set(r)) == 1 or len(credit) < 2:
        credit = dict.fromkeys(credit, 0.0)
    elif normalize:
        mean = fmean(credit.values())
        std = max(stdev(credit.values()), 1e-6)
    return {it: (credit[span] - mean) / std for it, span in span_of.items()}, len(credit)


def test_leaf_matches_slow_oracle_on_random_groups():
    """Boundaries, tree, credit and fork statistics of 1000 small groups."""
    rng = random.Random(0)
    for case in range(1000):
        responses, tokens, lengths, s, rewards = random_group(rng)
        B = rng.randint(0, 5)
        T = tokens.shape[1]
        terms = rng.choice(["both", "global", "local"])
        flags = {"terms": terms, "multiplicity": rng.random() < 0.6}
        where = f"case {case}: {responses}, {s.tolist()}, {rewards.tolist()}, {B=}, {flags}"
        bounds = slow_boundaries(responses, s, B)
        assert leaf.select_boundaries(s, lengths, B) == bounds, where
        if rng.random() < 0.3:  # any others, [] among them
            bounds = sorted(rng.sample(range(1, T + 1), rng.randint(0, min(3, T))))
        groups = [(b, g) for b in bounds for g in slow_groups(responses, b)]
        tree = leaf.build_tree(tokens, lengths, rewards, bounds)
        assert [(v.boundary, [int(i) for i in v.members]) for v in tree] == groups, where
        assert [v.value for v in tree] == pytest.approx(
            [rewards[g].double().mean().item() for _, g in groups]
        ), where
        spans = leaf.span_credits(lengths, rewards, tree, **flags)
        raw = leaf.token_credits(spans, tokens)
        A = leaf.token_credits(leaf.z_score(spans), tokens)
        if bounds == leaf.select_boundaries(s, lengths, B):
            A = leaf.leaf_advantages(tokens, lengths, s, rewards, B, **flags)
        for found, normalize in ((A, True), (raw, False)):
            credit, pairs = slow_credit(responses, rewards, bounds, normalize=normalize, **flags)
            assert found.shape == tokens.shape and found.dtype == torch.float32, where
            if pairs >= 2 or normalize:  # step 5 leaves a lone raw pair open
                want = np.array(
                    [[credit.get((i, t), 0.0) for t in range(T)] for i in range(len(responses))]
                )
                np.testing.assert_allclose(found.numpy(), want, rtol=1e-5, atol=1e-6, err_msg=where)
        for got, b in zip(leaf.fork_stats(tokens, lengths, rewards, bounds), bounds, strict=True):
            here = [
                ([len(responses[i]) for i in g], rewards[g].tolist()) for at, g in groups if at == b
            ]
            ahead = [r for n, r in here if max(n) > b]
            want = {
                "position": b,
                "fires": len(ahead) > 0,
                "usable": any(len(set(r)) > 1 for r in ahead),
                "group_size": fmean(len(n) for n, _ in here) if here else 0.0,
            }
            assert {k: got[k] for k in want} == pytest.approx(want), where


def raw_credit(tokens, lengths, surprisal, rewards, budget, **flags):
    """The paper's step 4 alone, for every token (K, T)."""
    boundaries = leaf.select_boundaries(surprisal, lengths, budget)
    nodes = leaf.build_tree(tokens, lengths, rewards, boundaries)
    return leaf.token_credits(leaf.span_credits(lengths, rewards, nodes, **flags), tokens)


def test_leaf_worked_example():
    """By hand: the root is .46667; all three share [0, 2); at 4 the two ended duplicates form a
    node of value .2."""
    abcdE, abE = [1, 2, 3, 4, EOS], [1, 2, EOS]
    tokens, lengths = pad_responses([abcdE, abE, abE])
    s = torch.full((3, 5), 0.1)
    rewards = torch.tensor([1.0, 0.2, 0.2])
    s[0, 4] = 3.0
    s[0, 2] = 2.0
    assert leaf.select_boundaries(s, lengths) == [2, 4]
    tree = [
        (v.boundary, list(v.members), v.value)
        for v in leaf.build_tree(tokens, lengths, rewards, [2, 4])
    ]
    assert tree == [(2, [0, 1, 2], pytest.approx(1.4 / 3)), (4, [1, 2], pytest.approx(0.2))]
    for normalize, shared, tail, ended in (
        (False, 0.0, 1.06667, -0.37712),
        (True, -0.09819, 1.91334, -0.80938),
    ):
        want = [
            [shared, shared, tail, tail, tail],
            [shared, shared, ended, 0, 0],
            [shared, shared, ended, 0, 0],
        ]
        A = leaf.leaf_advantages(tokens, lengths, s, rewards)
        if not normalize:
            A = raw_credit(tokens, lengths, s, rewards, 2)
        torch.testing.assert_close(A, torch.tensor(want), atol=6e-6, rtol=0)


def test_the_tree_as_text(capsys):
    """The README shows how `python leaf.py` begins; a rule that gives tokens of a span, or those who
    share it, different numbers is told by their mean; without rewards there are no values."""
    leaf.worked_example()
    begins, _, _ = capsys.readouterr().out.partition("raw credit")
    assert f"```\n{begins}```" in (ROOT / "README.md").read_text(encoding="utf-8")
    pieces = [list("abcdE"), list("abE"), list("xE")]
    nodes = [leaf.Node(2, [0, 1], 0.5)]
    credit = [[1.0, 2.0, 3.0, 4.0, 5.0], [5.0, 8.0, -1.0, 9.0, 9.0], [0.5, -0.5, 9.0, 9.0, 9.0]]
    tree = leaf.format_tree(pieces, [1.0, 0.0, 0.25], nodes, credit)
    assert tree.splitlines() == [
        "root  n=3  V=0.4167",
        "+- 'ab'  t=2  n=2  V=0.5000  A=+4.00000",
        "|  o- 'cdE'  response 1  r=1.0000  A=+4.00000",
        "|  o- 'E'  response 2  r=0.0000  A=-1.00000",
        "o- 'xE'  response 3  r=0.2500  A=+0.00000",
    ]
    assert leaf.format_tree(pieces, None, nodes).splitlines() == [
        "root  n=3",
        "+- 'ab'  t=2  n=2",
        "|  o- 'cdE'  response 1",
        "|  o- 'E'  response 2",
        "o- 'xE'  response 3",
    ]


def test_leaf_boundaries_by_hand():
    """The paper's step 2: D = max(2, l_min // (B + 1)); ties go to the smaller position, not the
    earlier response."""
    s = torch.zeros(2, 12)
    lengths = torch.tensor([9, 12])
    s[0, 6] = 5.0
    s[1, 3] = 5.0
    s[1, 5] = 4.0
    s[1, 11] = 1.0
    s[:, 0] = s[0, 9:] = 99.0  # neither first token nor padding count
    for B, want in ((0, []), (1, [3]), (2, [3, 6]), (3, [3, 6, 11])):
        got = leaf.select_boundaries(s, lengths, fork_budget=B)
        assert got == want and all(type(t) is int for t in got)


def spans_from_tree(tokens, lengths, rewards, boundaries):
    """[(start, end), ...] per response, cut at the retained nodes on its path."""
    nodes = leaf.build_tree(tokens, lengths, rewards, boundaries)
    out = []
    for i, n in enumerate(lengths.tolist()):
        cuts = [0] + [v.boundary for v in nodes if i in list(v.members) and v.boundary < n] + [n]
        out.append([(a, b) for a, b in zip(cuts, cuts[1:]) if a < b])
    return out


def test_leaf_spans_partition_each_response():
    """Credit is constant inside a span, zero past the end, and over (response, span) pairs has
    mean 0 and std 1."""
    rng = random.Random(1)
    for _ in range(200):
        _, tokens, lengths, s, rewards = random_group(rng)
        rewards = torch.tensor([rng.random() for _ in rewards])
        A = leaf.leaf_advantages(tokens, lengths, s, rewards, fork_budget=3)
        spans = spans_from_tree(tokens, lengths, rewards, leaf.select_boundaries(s, lengths, 3))
        assert torch.isfinite(A).all() and not A[~token_mask(lengths, A.shape[1])].any()
        assert all((A[i, a:b] == A[i, a]).all() for i, cuts in enumerate(spans) for a, b in cuts)
        pairs = [A[i, a].item() for i, cuts in enumerate(spans) for a, _ in cuts]
        if len(rewards) > 1 and len(pairs) > 1:
            assert abs(fmean(pairs)) < 1e-5 and (abs(stdev(pairs) - 1) < 1e-4 or not A.any())


def test_leaf_local_terms_telescope():
    """LA alone, raw and uncorrected: an EOS-ended response's spans add up to r - V(v0) (the
    paper's step 4). The reward is a function of the text here, because duplicates that end
    before a boundary have no tail to tell them apart."""
    rng = random.Random(4)
    for _ in range(300):
        responses, tokens, lengths, s, _ = random_group(rng, ended=True)
        score = {}
        B = rng.randint(0, 4)
        rewards = torch.tensor([score.setdefault(tuple(o), rng.random()) for o in responses])
        A = raw_credit(tokens, lengths, s, rewards, B, terms="local", multiplicity=False)
        spans = spans_from_tree(tokens, lengths, rewards, leaf.select_boundaries(s, lengths, B))
        total = torch.tensor([sum(A[i, a].item() for a, _ in cuts) for i, cuts in enumerate(spans)])
        torch.testing.assert_close(total, rewards - rewards.mean(), atol=1e-6, rtol=0)


def test_leaf_ignores_padding_and_permuting_responses_permutes_credit():
    """Other ids and surprisals past the end, or more columns of them, change nothing; the inputs
    stay as they were."""
    rng = random.Random(2)
    for _ in range(150):
        group = responses, tokens, lengths, s, rewards = random_group(rng)
        before = [x.clone() for x in group[1:]]
        T = tokens.shape[1]
        A = leaf.leaf_advantages(tokens, lengths, s, rewards)
        assert all(torch.equal(x, y) for x, y in zip(before, group[1:]))
        wide, _ = pad_responses(responses, T + 3, pad=rng.choice([0, 1, -100]))
        s2 = torch.full(wide.shape, rng.choice([-7.0, 0.0, 1e9]))
        s2[:, :T] = torch.where(token_mask(lengths, T), s, s2[:, :T])
        again = leaf.leaf_advantages(wide, lengths, s2, rewards)
        assert torch.equal(again[:, :T], A) and not again[:, T:].any()
        p = torch.tensor(rng.sample(range(len(rewards)), len(rewards)))
        permuted = leaf.leaf_advantages(tokens[p], lengths[p], s[p], rewards[p])
        torch.testing.assert_close(permuted, A[p], atol=1e-6, rtol=1e-5)


def test_leaf_equal_rewards_give_exact_zeros():
    """Exactly 0, although the mean of seven times .1 is not .1 in floating point. GRPO with no
    floor: noise at most."""
    tokens, lengths = pad_responses([[1, 2, 3, EOS], [1, 2, EOS], [1, EOS]] + 4 * [[2, EOS]])
    for reward in (0.0, 0.1, 0.2, 1 / 3, 0.7):
        for rewards in (torch.full((7,), reward), torch.full((7,), reward, dtype=torch.float64)):
            for kw in ({}, {"fork_budget": 0}):
                A = leaf.leaf_advantages(tokens, lengths, torch.rand(7, 4), rewards, **kw)
                assert not A.any()
            assert leaf.grpo_advantages(tokens, lengths, rewards, std_floor=0.0).abs().max() < 1e-6


def test_leaf_degenerate_groups_are_defined():
    """K = 1, empty responses, no tokens at all, identical responses, B = 0, rewards closer than
    the std's floor."""

    def credit(responses, rewards, B=2):
        tokens, lengths = pad_responses(responses)
        rewards = torch.tensor(rewards)
        A = leaf.leaf_advantages(tokens, lengths, torch.ones(tokens.shape), rewards, B)
        assert A.shape == leaf.grpo_advantages(tokens, lengths, rewards).shape == tokens.shape
        assert torch.isfinite(A).all()
        return A

    assert not credit([[1, 2, EOS]], [0.7]).any() and not credit([[]], [0.7]).any()
    assert not credit([[], []], [0.0, 1.0]).any()
    assert not credit([[], [1, 2]], [0.0, 1.0], B=0).any()  # a single pair
    A = credit([[1, 2, EOS]] * 3, [0.0, 0.5, 1.0])  # noisy reward: only the tails can differ
    assert A[0, 2] < A[1, 2] < A[2, 2] and torch.equal(A[0, :1], A[2, :1])
    # One span each: the z-scored reward.
    A = credit([[1, 2, EOS], [1, EOS], [2, EOS]], [0.0, 0.5, 1.0], B=0)
    torch.testing.assert_close(A, torch.tensor([[-1.0, -1, -1], [0, 0, 0], [1, 1, 0]]))
    A = credit([[1], [2], [3]], [0.5, 0.5 + 2.0**-22, 0.5], B=0)  # raw / 1e-6, float64 until then
    want = torch.tensor([[-2 / 3], [4 / 3], [-2 / 3]]) * 2.0**-22 / 1e-6
    torch.testing.assert_close(A, want, atol=1e-6, rtol=1e-5)


def test_global_credit_without_the_root_of_n_is_the_mean_baseline():
    """Whatever the tree: what all copies of a token get adds up to the same, so LEAF's GA alone
    is GRPO without std."""
    rng = random.Random(5)
    for _ in range(300):
        _, tokens, lengths, surprisal, rewards = random_group(rng)
        if int(lengths.max()) == 0:
            continue
        alone = {"terms": "global", "multiplicity": False}
        found = raw_credit(tokens, lengths, surprisal, rewards, 3, **alone)
        expected = leaf.grpo_advantages(tokens, lengths, rewards, std_floor=1.0)
        sums = {}
        for i, length in enumerate(lengths.tolist()):
            for t in range(length):
                key = tuple(tokens[i, : t + 1].tolist())
                a, b = sums.get(key, (0.0, 0.0))
                sums[key] = a + found[i, t].item(), b + expected[i, t].item()
        assert all(a == pytest.approx(b, abs=1e-5) for a, b in sums.values())


def test_grpo_advantages_by_hand():
    """(r - mean) / (max(unbiased std, floor) + 1e-6) on every token of a response; K = 1 gives
    zeros."""
    lengths = torch.tensor([3, 1, 0, 2])
    tokens = torch.ones(4, 3, dtype=torch.int64)
    below_a_third = np.array([0.1, 0.2, 0.15, 0.3])  # their std
    above_a_third = np.array([0.0, 1.0, 1.0, 0.0])
    for r in (below_a_third, above_a_third):
        for kw in ({}, {"std_floor": 0.0}, {"std_floor": 0.05}):
            a = (r - r.mean()) / (max(r.std(ddof=1), kw.get("std_floor", 1 / 3)) + 1e-6)
            A = leaf.grpo_advantages(tokens, lengths, torch.tensor(r).float(), **kw)
            want = torch.tensor(a)[:, None] * token_mask(lengths, 3)
            torch.testing.assert_close(A.double(), want, atol=1e-6, rtol=1e-5)
            alone = leaf.grpo_advantages(tokens[:1], lengths[:1], torch.tensor([0.8]), **kw)
            assert alone.shape == (1, 3) and not alone.any()


def loss_inputs():
    g = torch.Generator().manual_seed(0)
    mask = token_mask(torch.tensor([6, 3, 1, 4]), 6)
    old = -3 * torch.rand(4, 6, generator=g) - 0.1
    logp, ref = old + 0.4 * torch.randn(2, 4, 6, generator=g)
    return logp, old, ref, torch.randn(4, 6, generator=g), mask


@pytest.mark.parametrize("kw", [{}, {"clip": 0.1, "kl_coef": 1.0}, {"kl_coef": 0.0}])
def test_policy_loss_matches_formula(kw):
    """Token by token in float64; mean over the tokens of a response first, then over responses."""
    *inputs, mask = loss_inputs()
    e = kw.get("clip", 0.2)
    beta = kw.get("kl_coef", 0.02)
    rows = [[] for _ in mask]
    for i, t in np.argwhere(mask.numpy()):
        p, q, f, a = (x[i, t].item() for x in inputs)
        rho = math.exp(p - q)
        k3 = math.exp(f - p) - (f - p) - 1
        rows[i].append(-min(rho * a, min(max(rho, 1 - e), 1 + e) * a) + beta * k3)
    loss, _ = leaf.policy_loss(*inputs, mask, **kw)
    assert loss.shape == () and loss.item() == pytest.approx(fmean(map(fmean, rows)), abs=1e-5)


@pytest.mark.parametrize(
    "ratios, kl_coef", [([1.0], 0.0), ([0.5, 0.9, 1.1, 1.5], 0.0), ([1.0], 0.5)]
)
def test_policy_loss_gradient(ratios, kl_coef):
    """At ratio 1 every token, the EOS like any other, pulls with -A / (its response's length *
    K). A good token already made likelier, or a bad one already rarer, is left alone; the way
    back stays open. k3 adds 1 - e^(ref - logp)."""
    logp, _, ref, A, mask = loss_inputs()
    i = torch.arange(24).reshape(4, 6)  # the first 8 tokens: every ratio and sign
    rho = torch.tensor(ratios)[i % len(ratios)]
    A = torch.where(i // 4 % 2 == 1, A.abs(), -A.abs())
    logp.requires_grad_()
    leaf.policy_loss(logp, logp.detach() - rho.log(), ref, A, mask, kl_coef=kl_coef)[0].backward()
    blocked = (A > 0) & (rho > 1.2) | (A < 0) & (rho < 0.8)
    want = torch.where(blocked, 0.0, -A * rho) + kl_coef * (1 - (ref - logp.detach()).exp())
    want = want * mask / (mask.sum(1, keepdim=True) * len(mask))
    torch.testing.assert_close(logp.grad, want, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("junk", [7.0, 1e4, -1e4])
def test_policy_loss_ignores_padding(junk):
    """Finite junk, even where its exponential overflows, reaches neither loss, statistics nor
    gradient."""
    *inputs, mask = loss_inputs()
    results = []
    for fill in (0.0, junk):
        logp, old, ref, A = (torch.where(mask, x, k * fill) for x, k in zip(inputs, (1, -1, 2, 3)))
        logp.requires_grad_()
        loss, stats = leaf.policy_loss(logp, old, ref, A, mask)
        loss.backward()
        assert not logp.grad[~mask].any()
        numbers = [loss.item(), *map(float, stats.values()), *logp.grad[mask].tolist()]
        results.append(torch.tensor(numbers))
    torch.testing.assert_close(*results, atol=1e-7, rtol=1e-6)


def test_policy_loss_stats():
    """Mean ratio, share of clipped tokens, mean k3, without a graph; all finite when responses
    are empty."""
    old = torch.full((2, 4), -1.0)
    mask = torch.ones(2, 4, dtype=torch.bool)
    logp = (old + torch.tensor([[1.0, 1.0, 1.5, 1.5], [1.0, 1.1, 1.0, 1.5]]).log()).requires_grad_()
    _, stats = leaf.policy_loss(logp, old, logp.detach() + 1, torch.ones(2, 4), mask)
    got = [float(stats[k]) for k in ("ratio", "clip_fraction", "kl")]
    assert got == pytest.approx([1.2, 3 / 8, math.e - 2], rel=1e-5)
    assert not any(getattr(v, "requires_grad", False) for v in stats.values())
    for gap in (-3.0, -0.1, 0.0, 0.1, 3.0):  # positive on either side of zero
        loss, stats = leaf.policy_loss(old, old, old + gap, 0 * old, mask, kl_coef=0.5)
        k3 = math.exp(gap) - gap - 1
        assert [2 * loss.item(), float(stats["kl"])] == pytest.approx([k3, k3], rel=1e-5, abs=1e-6)
    for mask in (torch.tensor([[True], [False]]).expand(2, 4), torch.zeros(2, 4, dtype=torch.bool)):
        logp.grad = None
        loss, stats = leaf.policy_loss(logp, old, old, torch.ones(2, 4), mask)
        loss.backward()
        numbers = [loss.item(), *logp.grad.flatten().tolist(), *map(float, stats.values())]
        assert all(map(math.isfinite, numbers))


PARTING = [[1, 2, 3, EOS], [1, 2, 4, EOS], [3, EOS]]
ONE_ENDS = [[1, 2], [1, 2, 4, EOS], [3, EOS]]
ENDED_DUPLICATES = [[1, EOS], [1, EOS], [2, 1, 1, EOS]]


@pytest.mark.parametrize(
    "responses, rewards, fires, usable, size",
    [
        pytest.param(PARTING, [1.0, 0.0, 0.0], True, True, 2, id="a fork worth having"),
        pytest.param(PARTING, [0.5, 0.5, 0.0], True, False, 2, id="nothing to learn"),
        pytest.param(ONE_ENDS, [0.5, 0.0, 0.0], True, True, 2, id="one goes on: enough"),
        pytest.param(ENDED_DUPLICATES, [0.5, 0.0, 0.0], False, False, 2, id="all ended"),
        pytest.param(
            [*ENDED_DUPLICATES, [2, 1, EOS]],
            [0.5, 0.0, 0.2, 0.2],
            True,
            False,
            2,
            id="spread elsewhere",
        ),
    ],
)
def test_fork_stats_by_hand(responses, rewards, fires, usable, size):
    """A fork fires if a group of two or more has a member past it; it is usable if *that*
    group's rewards differ."""
    (got,) = leaf.fork_stats(*pad_responses(responses), torch.tensor(rewards), [2])
    want = {
        "position": 2,
        "fires": fires,
        "usable": usable,
        "group_size": size,
    }
    assert {k: got[k] for k in want} == pytest.approx(want)


def test_leaf_credit_takes_less_than_a_millisecond():
    """K = 8, T = 200: responses leave a common answer one after another. The best of many: the
    machine is shared."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.tensor([200] * 5 + [180, 150, 90])
    tokens = torch.randint(1, 1000, (1, 200), generator=g).repeat(8, 1)
    for i in range(1, 7):
        tokens[i, 20 * i :] += i
    s = torch.rand(8, 200, generator=g)
    rewards = torch.rand(8, generator=g)

    def work():
        leaf.leaf_advantages(tokens, lengths, s, rewards)

    best = min(timeit.repeat(work, number=1, repeat=100))
    assert best < 1e-3, f"{1e3 * best:.2f} ms"


# --------------------------------------------------------------------------------------------------
# Sampler, scorer, LoRA


@torch.no_grad()
@pytest.mark.parametrize("padding", PADDINGS[:2])
@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (1.0, 0.7), (0.6, 1.0), (1.7, 0.5)])
def test_sampler_equals_scorer(padding, temperature, top_p):
    """A sampled token's two log-probabilities, from the cache, are those of a plain causal pass
    over its sequence. At temperature 1 they differ by the log of the mass that top-p kept;
    without top-p not at all."""
    model = make_model()
    prompts = make_prompts([3, 8, 1, 5], padding)
    rollout = model.sample(prompts, rand(4, 6, 12), 2, temperature, top_p)
    mask = rollout.mask
    scored = model.response_logp(prompts, rollout.tokens, rollout.lengths)
    assert 2 in rollout.tokens[mask]
    assert (rollout.lengths == 12).any() and (rollout.lengths < 6).any()
    for i, k in itertools.product(range(4), range(6)):
        tokens, logq, logp = (
            getattr(rollout, name)[i, k][mask[i, k]] for name in ("tokens", "logq", "logp")
        )
        logits, want = score_alone(model, prompts.x[i][prompts.valid[i]], tokens)
        q, kept = zip(*(truncated(row, temperature, top_p) for row in logits))
        near((logp, scored[i, k][mask[i, k]]), (want, want))
        near(logq, torch.stack(q).gather(-1, tokens[:, None])[:, 0].log())
        near((logp - logq) * (temperature == 1), torch.tensor(kept) * (temperature == 1), atol=2e-5)


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("padding", PADDINGS[:2])
def test_shared_prompt_is_the_same_as_each_response_alone(padding, adapted):
    """Log-probabilities and gradients (LoRA's or the decoder's, and the prompt's): K ragged
    responses over one shared prompt, in smaller batches, one by one, or each as a plain causal
    sequence."""
    model = make_model()
    prompts = make_prompts([4, 9, 2], padding)
    tokens = (V * rand(3, 4, 7)).long()
    if adapted:
        shake_lora(model)
    lengths = torch.tensor([[7, 2, 1, 4], [3, 7, 7, 5], [1, 1, 6, 2]])
    weight = (rand(3, 4, 7, seed=1) - 0.5) * (torch.arange(7) < lengths[..., None])
    named = {n: p for n, p in model.named_parameters() if p.requires_grad and "language" in n}
    named["prompt"] = prompts.x.requires_grad_()
    together = model.response_logp(prompts, tokens, lengths)
    want = torch.autograd.grad((together * weight).sum(), named.values(), retain_graph=True)
    batches = []
    for some in (slice(0, 2), slice(2, 3)):
        logp = model.response_logp(prompts[some], tokens[some], lengths[some])
        batches.append((logp * weight[some]).sum())
    separate = []
    plain = []
    for i, k in itertools.product(range(3), range(4)):
        n = lengths[i, k]
        one = model.response_logp(prompts[[i]], tokens[[i], k : k + 1, :n], n.view(1, 1))[0, 0]
        _, brute = score_alone(model, prompts.x[i][prompts.valid[i]], tokens[i, k, :n])
        near((one, brute), (together[i, k, :n], together[i, k, :n]))
        separate.append((one * weight[i, k, :n]).sum())
        plain.append((brute * weight[i, k, :n]).sum())
    for loss in map(sum, (batches, separate, plain)):
        for name, a, b in zip(named, torch.autograd.grad(loss, named.values()), want):
            assert (a - b).norm() <= 1e-4 * b.norm() and b.norm() > 1e-3, name
    sampled = model.sample(prompts, rand(3, 1, 4), 2)  # the sampler's own tensors can be trained on
    model.response_logp(prompts, sampled.tokens, sampled.lengths).sum().backward()


def test_lora_off_is_the_base_bit_for_bit():
    """B = 0 changes nothing; training changes A and B alone; the switch nests and returns, after
    an exception too, to what was before."""
    model = make_model()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    base = logits_of(model)
    names = lora.apply_lora(model, r=3, alpha=6.0)
    parameters = lora.lora_parameters(model)
    same(logits_of(model), base)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(parameters)
    assert {f"{name}.{AB}" for name in names for AB in ("lora_A", "lora_B")} == set(parameters)
    optimizer = torch.optim.Adam(parameters.values(), lr=0.05)
    for _ in range(3):
        forward(model).sin().sum().backward()
        optimizer.step()
    adapted = logits_of(model)
    same({name: p for name, p in model.state_dict().items() if name in before}, before)
    with pytest.raises(KeyError), lora.lora_disabled(model):
        with lora.lora_disabled(model):
            same(logits_of(model), base)
        same(logits_of(model), base)
        raise KeyError
    same(logits_of(model), adapted)
    layers = list(lora.lora_layers(model).values())
    layers[0].enabled = False
    with lora.lora_disabled(model):
        pass
    assert [layer.enabled for layer in layers] == [False] + [True] * (len(layers) - 1)
    layers[0].enabled = True


# --------------------------------------------------------------------------------------------------
# The loop


# 3 updates in CTC, then 4 in next-token training, then 8 of the policy.
@pytest.mark.parametrize(
    "update, number",
    [
        (2, signal.SIGTERM),
        (6, signal.SIGINT),
        (11, signal.SIGHUP),
    ],
)
def test_a_stopped_run_resumes_exactly(update, number, first_run, tmp_path):
    with pytest.raises(SystemExit) as stop, stopping_at(update, number) as calls:
        train.main(tiny(out=tmp_path / "run"))
    assert stop.value.code == 128 + number and len(calls) < 15
    train.main(tiny(out=tmp_path / "run"))
    assert_same_run(first_run, tmp_path / "run")


def test_metrics_say_what_to_watch(first_run):
    rows = metrics(first_run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    wanted = set(
        "loss reward reward_std kl clip_fraction ratio ratio_gap grad_norm lr equal_rewards "
        "response_length fork_fire usable_fork_fire".split()
    )
    for row in rows:
        assert wanted <= row.keys() and all(math.isfinite(row[k]) for k in wanted)
        # A mean over all responses: shares add up to 1.
        assert row["ratio"] == pytest.approx(1, abs=0.1)
        assert row["first_ratio_gap"] < 1e-5  # LoRA's B is no longer zero from the second row on
    assert "validation_bleu" in rows[1] and "validation_bleu" not in rows[0]


def test_another_credit_rule_is_used(first_run, tmp_path):
    """One that turns GRPO's advantages around: the first update goes as far the other way."""
    seen = []

    def turned_around(cfg, tokens, lengths, surprisal, rewards):
        seen.append((tokens, lengths, surprisal, rewards))
        return -train.credit(cfg, tokens, lengths, surprisal, rewards)

    flags = "--algo grpo --steps 1 --update-prompts 4 --micro-prompts 4 --kl-coef 0 --eval-every 0"
    moved = []
    for rule in (train.credit, turned_around):
        policy = load_policy(first_run, tmp_path / rule.__name__, flags)
        train.train_policy(*policy, rule, by_letters)
        parameters = lora.lora_parameters(policy[1])
        moved.append({name: p.detach() for name, p in parameters.items() if "lora_B" in name})
    for name, B in moved[0].items():
        assert B.any()
        near(moved[1][name], -B)
    assert len(seen) == 4  # prompts
    for tokens, lengths, surprisal, rewards in seen:
        assert tokens.shape == surprisal.shape and lengths.shape == (4,) and len(rewards) == 4
        assert (surprisal[token_mask(lengths, tokens.shape[1])] >= 0).all()


def record_rollouts(monkeypatch):
    """Every call of the sampler with K > 1: its rollout."""
    rollouts = []
    sample = SpeechLM.sample

    def recording(self, prompts, noise, *args, **kwargs):
        rollout = sample(self, prompts, noise, *args, **kwargs)
        if noise.shape[1] > 1:
            rollouts.append(rollout)
        return rollout

    monkeypatch.setattr(SpeechLM, "sample", recording)
    return rollouts


def test_grpo_and_leaf_see_identical_rollouts_and_decode_as_much(first_run, tmp_path, monkeypatch):
    rollouts = record_rollouts(monkeypatch)
    for algo in ("leaf", "grpo"):
        out = tmp_path / algo
        train.main(
            tiny(f"--algo {algo} --steps 2", base=base_of(first_run), out=out), reward=by_letters
        )
    half = len(rollouts) // 2
    leafs = rollouts[:half]
    grpos = rollouts[half:]
    assert len(leafs) == len(grpos)
    assert all(a.tokens.shape == b.tokens.shape for a, b in zip(leafs, grpos))
    assert torch.equal(leafs[0].tokens, grpos[0].tokens)
    assert torch.equal(leafs[0].logp, grpos[0].logp)
    first_leaf = metrics(tmp_path / "leaf")[0]
    first_grpo = metrics(tmp_path / "grpo")[0]
    assert first_leaf["reward"] == first_grpo["reward"] and first_leaf["loss"] != first_grpo["loss"]
    a = adapter(tmp_path / "leaf")
    b = adapter(tmp_path / "grpo")
    assert any(not torch.equal(a[k], b[k]) for k in a)


def test_micro_batches_change_memory_and_nothing_else(first_run, tmp_path):
    """Four prompts one by one, as three and one, or together; encoder and decoder have LoRA."""
    sizes = ("1", "3", "4")
    flags = (
        f"--steps 2 --eval-every 0 --update-prompts 4 --lora-targets {SUFFIXES} --micro-prompts "
    )
    for size in sizes:
        train.main(
            tiny(flags + size, base=base_of(first_run), out=tmp_path / size), reward=by_letters
        )
    runs = [adapter(tmp_path / size) for size in sizes]
    for other in runs[1:]:
        for name, tensor in runs[0].items():
            torch.testing.assert_close(other[name], tensor, atol=2e-4, rtol=1e-3)
    gradients = [metrics(tmp_path / size)[0]["grad_norm"] for size in sizes]
    assert gradients[0] > 1e-3 and gradients == pytest.approx([gradients[0]] * 3, rel=1e-5)


def test_old_logp_of_the_sampler_is_as_good_as_a_rescoring(first_run, tmp_path):
    """In float32: the same training; the first ratio is 1 to rounding with the sampler's and
    exactly with --rescore."""
    flags = "--steps 3 --update-prompts 4 --micro-prompts 4"
    sampled_run = tmp_path / "sampler"
    rescored_run = tmp_path / "rescored"
    train.main(tiny(flags, base=base_of(first_run), out=sampled_run))
    train.main(tiny(flags + " --rescore", base=base_of(first_run), out=rescored_run))
    sampled = metrics(sampled_run)
    for a, b in zip(sampled, metrics(rescored_run), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3, abs=1e-5)
        assert a["first_ratio_gap"] < 1e-5 and b["first_ratio_gap"] == 0
    assert any(a["first_ratio_gap"] > 0 for a in sampled)
    for name, tensor in adapter(sampled_run).items():
        torch.testing.assert_close(adapter(rescored_run)[name], tensor, atol=2e-4, rtol=1e-3)


def test_nobodys_credit_reaches_another_prompt(first_run, tmp_path, monkeypatch):
    """All responses of one prompt get the same reward: only the others may be credited, and only
    their own tokens."""
    seen = []
    rewarded = []
    policy_loss = leaf.policy_loss

    def reward(answer, row):
        rewarded.append(row["prompt"])
        return 0.5 if row["prompt"].endswith("happened?") else len(rewarded) % 7 / 7

    def loss(logp, old_logp, ref_logp, advantages, mask, **settings):
        seen.append((advantages.clone(), mask.clone()))
        return policy_loss(logp, old_logp, ref_logp, advantages, mask, **settings)

    monkeypatch.setattr(leaf, "policy_loss", loss)
    for algo in ("leaf", "grpo"):
        seen.clear()
        rewarded.clear()
        flags = f"--algo {algo} --steps 3 --eval-every 0"
        train.main(tiny(flags, base=base_of(first_run), out=tmp_path / algo), reward=reward)
        advantages, masks = (
            torch.cat([F.pad(x, (0, 8 - x.shape[1])) for x in xs]) for xs in zip(*seen)
        )
        before = 2 * 6  # the base on 6 rows, and its ceiling
        training = rewarded[before:][: 3 * 4 * 4]
        equal = torch.tensor([prompt.endswith("happened?") for prompt in training])
        assert equal.any() and not equal.all() and len(equal) == len(advantages)
        assert not advantages[equal].any() and advantages[~equal].any(1).all()
        assert not advantages[~masks.bool()].any()


@pytest.mark.parametrize("targets", ["decoder", SUFFIXES])
def test_who_runs_with_lora_and_who_with_dropout(targets, first_run, tmp_path, monkeypatch):
    """Rollouts: LoRA on, no dropout. Reference log-probabilities: LoRA off. The update: LoRA on,
    with its dropout. An adapted encoder hears in the same three ways, and no other dropout or
    BatchNorm is ever in training."""
    modes = []
    train_policy = train.train_policy

    def from_here_on(*args):
        modes.clear()  # before that the base was measured, LoRA off
        train_policy(*args)

    def watch(name):
        original = getattr(SpeechLM, name)

        def watching(self, *args, **kwargs):
            result = original(self, *args, **kwargs)
            layers = list(lora.lora_layers(self).values())
            if layers:
                outputs = vars(result).values() if name == "sample" else result
                with_gradient = any(tensor.requires_grad for tensor in outputs)
                lora_on = all(layer.enabled for layer in layers)
                dropout_on = lora_on and all(layer.training for layer in layers)
                modes.append(((name, with_gradient), (lora_on, dropout_on)))
                in_training = {type(m) for m in self.modules() if m.training}
                assert in_training <= {lora.LoRALinear, nn.Dropout}
                block = type(self.encoder.layers[0])
                assert not any(m.training for m in self.encoder.modules() if type(m) is block)
            return result

        monkeypatch.setattr(SpeechLM, name, watching)

    watch("sample")
    watch("response_logp")
    watch("encode")
    monkeypatch.setattr(train, "train_policy", from_here_on)
    flags = f"--lora-dropout 0.5 --lora-targets {targets}"
    train.main(tiny(flags, base=base_of(first_run), out=tmp_path / "run"), reward=by_letters)
    expected = {  # (who, with gradient): (LoRA on, dropout on)
        (("sample", False), (True, False)),
        (("response_logp", False), (False, False)),
        (("response_logp", True), (True, True)),
    }
    if targets == SUFFIXES:
        expected |= {(("encode", False), (True, False)), (("encode", False), (False, False))}
        expected |= {(("encode", True), (True, True))}
    assert set(modes) == expected
    rows = metrics(tmp_path / "run")
    # B starts at zero: there is nothing to drop yet.
    assert rows[0]["first_ratio_gap"] < 1e-5 < rows[3]["first_ratio_gap"]
    assert rows[3]["kl"] > 1e-4


@pytest.mark.parametrize("poisoned, survives", [(1, True), (99, False)])
def test_a_non_finite_loss_skips_the_update(
    poisoned, survives, first_run, tmp_path, monkeypatch, capsys
):
    calls = []
    policy_loss = leaf.policy_loss

    def loss(*args, **settings):
        calls.append(None)
        value, stats = policy_loss(*args, **settings)
        if len(calls) <= poisoned:
            return value * math.nan, stats | {"loss": stats["loss"] * math.nan}
        return value, stats

    monkeypatch.setattr(leaf, "policy_loss", loss)
    command = tiny("--steps 6", base=base_of(first_run), out=tmp_path / "run")
    if survives:
        train.main(command)
        assert all(t.isfinite().all() for t in adapter(tmp_path / "run").values())
    else:
        with pytest.raises(UserError, match="10 updates in a row"):
            train.main(command)
    assert "skipped an update" in capsys.readouterr().out
