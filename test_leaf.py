"""The tests, in the order of the files: leaf.py, model.py, lora.py, data.py, corpora/, train.py.

    pytest test_leaf.py

Every result is held against something independent: brute force, transformers, PEFT, torchaudio, sacrebleu, or the
same computation done the slow way. A few minutes on two CPU cores; no network.
"""

import contextlib
import gzip
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import timeit
import types
import warnings
from dataclasses import asdict
from fractions import Fraction
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
import soundfile
import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import leaf
import lora
import train
from corpora import asterisk, covost2, librispeech, librisqa, new_corpus, synthetic
from data import AUDIO, DataError, read_json
from experiments import compare, credit, large
from model import EncoderConfig, MaskedBatchNorm, ProjectorConfig, Prompts, Rollout, SpeechConfig, SpeechLM, TextConfig

os.environ["HF_HUB_OFFLINE"] = "1"  # PEFT would ask its hub about the base model
ROOT = Path(train.__file__).resolve().parent
torch.set_num_threads(1)  # tensors here are tiny: a second thread would only be waited for

# ---- leaf.py: boundaries, tree, credit, GRPO, loss, fork statistics ---------------------------------------------
EOS = 0


def pack(responses, width=None, pad=EOS):
    """Lists of token ids -> tokens (K, T), lengths (K,)."""
    width = max(map(len, responses)) if width is None else width
    rows = [list(o) + [pad] * (width - len(o)) for o in responses]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), width), torch.tensor([len(o) for o in responses])


def owned(lengths, width):
    """(K, T) mask from lengths alone: EOS is also the padding id, the sampled one is trained."""
    return torch.arange(width) < lengths[:, None]


def random_group(rng, ended=False):
    """A small group whose prefixes collide often, tempting junk in its padding. ended: nobody is cut short or empty."""
    K, T, vocab, whole = rng.randint(1, 10), rng.randint(1, 14), rng.randint(1, 3), rng.random() < 0.6
    responses = []
    for _ in range(K):
        o = [rng.randint(1, vocab) for _ in range(rng.randint(1 if ended or rng.random() < 0.9 else 0, T))]
        if responses and rng.random() < 0.5:  # share a prefix, then part
            o[: len(o) // 2] = [x or 1 for x in rng.choice(responses)[: len(o) // 2]]
        if o and (ended or rng.random() < 0.7):
            o[-1] = EOS
        responses.append(list(rng.choice(responses)) if responses and rng.random() < 0.25 else o)
    tokens, lengths = pack(responses, T)
    mask = owned(lengths, T)
    tokens = torch.where(mask, tokens, torch.tensor([[rng.randint(0, vocab) for _ in range(T)] for _ in range(K)]))
    s = torch.tensor([[rng.randint(0, 3) if whole else 4 * rng.random() for _ in range(T)] for _ in range(K)])  # ties
    rewards = torch.tensor([rng.choice([0.0, 0.2, 0.5, 1.0]) for _ in range(K)])
    return responses, tokens, lengths, torch.where(mask, s.float(), 99.0), rewards


def slow_boundaries(responses, surprisal, budget, min_prefix):
    """The paper's step 2, one pick at a time: the best position that is still far enough from every kept one."""
    peak = {}
    for o, row in zip(responses, surprisal.tolist()):
        for t in range(max(1, min_prefix), len(o)):
            peak[t] = max(row[t], peak.get(t, row[t]))
    gap, kept = max(2, min(map(len, responses)) // (budget + 1)), []
    while len(kept) < budget and (free := [t for t in peak if all(abs(t - k) >= gap for k in kept)]):
        kept.append(min(free, key=lambda t: (-peak[t], t)))
    return sorted(kept)


def slow_groups(responses, boundary):
    """The paper's step 3 at one boundary: everybody's companions (a slice stops at a response's end by itself)."""
    companions = [[j for j, p in enumerate(responses) if p[:boundary] == o[:boundary]] for o in responses]
    return [g for i, g in enumerate(companions) if len(g) >= 2 and g[0] == i]


def slow_credit(responses, rewards, boundaries, terms, multiplicity, normalize):
    """The paper's steps 3 to 5 token by token, values as fractions -> {(response, token): credit}, number of pairs."""
    r, span_of, credit = [Fraction(x) for x in rewards.tolist()], {}, {}
    root = sum(r) / len(r)
    for i, o in enumerate(responses):
        path = [(b, [r[j] for j in g]) for b in boundaries for g in slow_groups(responses, b) if i in g]
        for t in range(len(o)):
            behind = [below for b, below in path if b <= t]  # the nodes this token has left behind
            ahead = [below for b, below in path if b > t] + [[r[i]]]  # a tail ends at the response itself, n = 1
            here, parent = sum(ahead[0]) / len(ahead[0]), sum(behind[-1]) / len(behind[-1]) if behind else root
            total = {"global": here - root, "local": here - parent, "both": here - root + here - parent}[terms]
            span_of[i, t] = i, len(behind)
            credit[span_of[i, t]] = float(total) / (math.sqrt(len(ahead[0])) if multiplicity else 1)
    mean, std = 0.0, 1.0
    if len(set(r)) == 1 or len(credit) < 2:
        credit = dict.fromkeys(credit, 0.0)
    elif normalize:
        mean, std = fmean(credit.values()), max(stdev(credit.values()), 1e-6)
    return {it: (credit[span] - mean) / std for it, span in span_of.items()}, len(credit)


def test_leaf_matches_slow_oracle_on_random_groups():
    """Boundaries, tree, credit and fork statistics of 3000 small groups."""
    rng = random.Random(0)
    for case in range(3000):
        responses, tokens, lengths, s, rewards = random_group(rng)
        B, m, given, T = rng.randint(0, 5), rng.randint(0, 4), None, tokens.shape[1]
        terms, (multiplicity, normalize) = rng.choice(["both", "global", "local"]), (rng.random() < 0.6 for _ in "mn")
        flags = {"terms": terms, "multiplicity": multiplicity, "normalize": normalize}
        where = f"case {case}: {responses}, {s.tolist()}, {rewards.tolist()}, B={B}, min_prefix={m}, {flags}"
        bounds = slow_boundaries(responses, s, B, m)
        assert leaf.select_boundaries(s, lengths, B, m) == bounds, where
        if rng.random() < 0.3:  # hand boundaries in, [] among them
            given = bounds = sorted(rng.sample(range(1, T + 1), rng.randint(0, min(3, T))))
        groups = [(b, g) for b in bounds for g in slow_groups(responses, b)]
        tree = leaf.build_tree(tokens, lengths, rewards, bounds)
        assert [(v.boundary, [int(i) for i in v.members]) for v in tree] == groups, where
        assert [v.value for v in tree] == pytest.approx([rewards[g].double().mean().item() for _, g in groups]), where
        A = leaf.leaf_advantages(tokens, lengths, s, rewards, fork_budget=B, min_prefix=m, boundaries=given, **flags)
        credit, pairs = slow_credit(responses, rewards, bounds, **flags)
        assert A.shape == tokens.shape and A.dtype == torch.float32, where
        if pairs >= 2 or normalize:  # step 5 leaves a lone raw pair open
            want = np.array([[credit.get((i, t), 0.0) for t in range(T)] for i in range(len(responses))])
            np.testing.assert_allclose(A.numpy(), want, rtol=1e-5, atol=1e-6, err_msg=where)
        for got, b in zip(leaf.fork_stats(tokens, lengths, rewards, bounds), bounds, strict=True):
            here = [([len(responses[i]) for i in g], rewards[g].tolist()) for at, g in groups if at == b]
            ahead = [r for n, r in here if max(n) > b]
            want = {
                "position": b,
                "fires": len(ahead) > 0,
                "usable": any(len(set(r)) > 1 for r in ahead),
                "group_size": fmean(len(n) for n, _ in here) if here else 0.0,
                "reward_spread": fmean(max(r) - min(r) for _, r in here) if here else 0.0,
            }
            assert {k: got[k] for k in want} == pytest.approx(want), where


def test_leaf_worked_example():
    """By hand: the root is .46667; all three share [0, 2); at 4 the two ended duplicates form a node of value .2."""
    tokens, lengths = pack([[1, 2, 3, 4, EOS], [1, 2, EOS], [1, 2, EOS]])  # abcdE, abE, abE
    s, rewards = torch.full((3, 5), 0.1), torch.tensor([1.0, 0.2, 0.2])
    s[0, 4], s[0, 2] = 3.0, 2.0
    assert leaf.select_boundaries(s, lengths) == [2, 4]
    tree = [(v.boundary, list(v.members), v.value) for v in leaf.build_tree(tokens, lengths, rewards, [2, 4])]
    assert tree == [(2, [0, 1, 2], pytest.approx(1.4 / 3)), (4, [1, 2], pytest.approx(0.2))]
    for normalize, shared, tail, ended in ((False, 0.0, 1.06667, -0.37712), (True, -0.09819, 1.91334, -0.80938)):
        want = [[shared, shared, tail, tail, tail], [shared, shared, ended, 0, 0], [shared, shared, ended, 0, 0]]
        A = leaf.leaf_advantages(tokens, lengths, s, rewards, normalize=normalize)
        torch.testing.assert_close(A, torch.tensor(want), atol=6e-6, rtol=0)


def test_leaf_boundaries_by_hand():
    """The paper's step 2: D = max(2, l_min // (B + 1)); ties go to the smaller position, not the earlier response."""
    s, lengths = torch.zeros(2, 12), torch.tensor([9, 12])
    s[0, 6], s[1, 3], s[1, 5], s[1, 11] = 5.0, 5.0, 4.0, 1.0
    s[:, 0] = s[0, 9:] = 99.0  # neither first token nor padding count
    for B, m, want in ((0, 1, []), (1, 0, [3]), (2, 1, [3, 6]), (3, 1, [3, 6, 11]), (2, 4, [6, 11])):
        got = leaf.select_boundaries(s, lengths, fork_budget=B, min_prefix=m)
        assert got == want and all(type(t) is int for t in got)


def spans_from_tree(tokens, lengths, rewards, boundaries):
    """[(start, end), ...] per response, cut at the retained nodes on its path."""
    nodes, out = leaf.build_tree(tokens, lengths, rewards, boundaries), []
    for i, n in enumerate(lengths.tolist()):
        cuts = [0] + [v.boundary for v in nodes if i in list(v.members) and v.boundary < n] + [n]
        out.append([(a, b) for a, b in zip(cuts, cuts[1:]) if a < b])
    return out


def test_leaf_spans_partition_each_response():
    """Credit is constant inside a span, zero past the end, and over (response, span) pairs has mean 0 and std 1."""
    rng = random.Random(1)
    for _ in range(200):
        _, tokens, lengths, s, rewards = random_group(rng)
        rewards = torch.tensor([rng.random() for _ in rewards])
        A = leaf.leaf_advantages(tokens, lengths, s, rewards, fork_budget=3)
        spans = spans_from_tree(tokens, lengths, rewards, leaf.select_boundaries(s, lengths, 3))
        assert torch.isfinite(A).all() and not A[~owned(lengths, A.shape[1])].any()
        assert all((A[i, a:b] == A[i, a]).all() for i, cuts in enumerate(spans) for a, b in cuts)
        pairs = [A[i, a].item() for i, cuts in enumerate(spans) for a, _ in cuts]
        if len(rewards) > 1 and len(pairs) > 1:
            assert abs(fmean(pairs)) < 1e-5 and (abs(stdev(pairs) - 1) < 1e-4 or not A.any())


def test_leaf_local_terms_telescope():
    """LA alone, raw and uncorrected: an EOS-ended response's spans add up to r - V(v0) (the paper's step 4). The reward
    is a function of the text here, because duplicates that end before a boundary have no tail to tell them apart."""
    rng = random.Random(4)
    for _ in range(300):
        responses, tokens, lengths, s, _ = random_group(rng, ended=True)
        score, B = {}, rng.randint(0, 4)
        rewards = torch.tensor([score.setdefault(tuple(o), rng.random()) for o in responses])
        A = leaf.leaf_advantages(tokens, lengths, s, rewards, B, terms="local", multiplicity=False, normalize=False)
        spans = spans_from_tree(tokens, lengths, rewards, leaf.select_boundaries(s, lengths, B))
        total = torch.tensor([sum(A[i, a].item() for a, _ in cuts) for i, cuts in enumerate(spans)])
        torch.testing.assert_close(total, rewards - rewards.mean(), atol=1e-6, rtol=0)


def test_leaf_ignores_padding_and_permuting_responses_permutes_credit():
    """Other ids and surprisals past the end, or more columns of them, change nothing; the inputs stay as they were."""
    rng = random.Random(2)
    for _ in range(150):
        group = responses, tokens, lengths, s, rewards = random_group(rng)
        before, T = [x.clone() for x in group[1:]], tokens.shape[1]
        A = leaf.leaf_advantages(tokens, lengths, s, rewards)
        assert all(torch.equal(x, y) for x, y in zip(before, group[1:]))
        wide, _ = pack(responses, T + 3, pad=rng.choice([0, 1, -100]))
        s2 = torch.full(wide.shape, rng.choice([-7.0, 0.0, 1e9]))
        s2[:, :T] = torch.where(owned(lengths, T), s, s2[:, :T])
        again = leaf.leaf_advantages(wide, lengths, s2, rewards)
        assert torch.equal(again[:, :T], A) and not again[:, T:].any()
        p = torch.tensor(rng.sample(range(len(rewards)), len(rewards)))
        permuted = leaf.leaf_advantages(tokens[p], lengths[p], s[p], rewards[p])
        torch.testing.assert_close(permuted, A[p], atol=1e-6, rtol=1e-5)


def test_leaf_equal_rewards_give_exact_zeros():
    """Exactly 0, although the mean of seven times .1 is not .1 in floating point. GRPO with no floor: noise at most."""
    tokens, lengths = pack([[1, 2, 3, EOS], [1, 2, EOS], [1, EOS]] + 4 * [[2, EOS]])
    for reward in (0.0, 0.1, 0.2, 1 / 3, 0.7):
        for rewards in (torch.full((7,), reward), torch.full((7,), reward, dtype=torch.float64)):
            for kw in ({}, {"normalize": False}, {"fork_budget": 0}):
                assert not leaf.leaf_advantages(tokens, lengths, torch.rand(7, 4), rewards, **kw).any()
            assert leaf.grpo_advantages(rewards, lengths, std_floor=0.0).abs().max() < 1e-6


def test_leaf_degenerate_groups_are_defined():
    """K = 1, empty responses, no tokens at all, identical responses, B = 0, rewards closer than the std's floor."""

    def credit(responses, rewards, B=2):
        (tokens, lengths), rewards = pack(responses), torch.tensor(rewards)
        A = leaf.leaf_advantages(tokens, lengths, torch.ones(tokens.shape), rewards, B)
        assert A.shape == leaf.grpo_advantages(rewards, lengths).shape == tokens.shape and torch.isfinite(A).all()
        return A

    assert not credit([[1, 2, EOS]], [0.7]).any() and not credit([[]], [0.7]).any()
    assert not credit([[], []], [0.0, 1.0]).any()
    assert not credit([[], [1, 2]], [0.0, 1.0], B=0).any()  # a single pair
    A = credit([[1, 2, EOS]] * 3, [0.0, 0.5, 1.0])  # noisy reward: only the tails can differ
    assert A[0, 2] < A[1, 2] < A[2, 2] and torch.equal(A[0, :1], A[2, :1])
    A = credit([[1, 2, EOS], [1, EOS], [2, EOS]], [0.0, 0.5, 1.0], B=0)  # one span each: the z-scored reward
    torch.testing.assert_close(A, torch.tensor([[-1.0, -1, -1], [0, 0, 0], [1, 1, 0]]))
    A = credit([[1], [2], [3]], [0.5, 0.5 + 2.0**-22, 0.5], B=0)  # raw / 1e-6, float64 until then
    torch.testing.assert_close(A, torch.tensor([[-2 / 3], [4 / 3], [-2 / 3]]) * 2.0**-22 / 1e-6, atol=1e-6, rtol=1e-5)


def test_global_credit_without_the_root_of_n_is_the_mean_baseline():
    """Whatever the tree: what all copies of a token get adds up to the same, so LEAF's GA alone is GRPO without std."""
    rng = random.Random(5)
    for _ in range(300):
        _, tokens, lengths, surprisal, rewards = random_group(rng)
        if int(lengths.max()) == 0:
            continue
        raw = dict(terms="global", multiplicity=False, normalize=False)
        found = leaf.leaf_advantages(tokens, lengths, surprisal, rewards, 3, **raw)
        expected = leaf.grpo_advantages(rewards, lengths, std_floor=1.0)
        sums = {}
        for i, length in enumerate(lengths.tolist()):
            for t in range(length):
                key = tuple(tokens[i, : t + 1].tolist())
                a, b = sums.get(key, (0.0, 0.0))
                sums[key] = a + found[i, t].item(), b + expected[i, t].item()
        assert all(a == pytest.approx(b, abs=1e-5) for a, b in sums.values())


@pytest.mark.parametrize("boundaries", [[], [1], [2], [1, 2]])
def test_leave_one_out_values_leave_the_gradient_unbiased(boundaries):
    """Every group of 3 responses of a policy with a logit per prefix, each with its probability: nothing is sampled."""
    T, vocab, rng = 3, (EOS, 1, 2), random.Random(sum(boundaries))
    prefixes = [p for n in range(T) for p in itertools.product(vocab[1:], repeat=n)]
    logits = torch.tensor([[rng.gauss(0, 1) for _ in vocab] for _ in prefixes], dtype=torch.float64, requires_grad=True)
    logp = logits.log_softmax(-1)
    responses = [(*p, v) for p in prefixes for v in vocab if v == EOS or len(p) == T - 1]
    steps = [[(prefixes.index(o[:t]), o[t]) for t in range(len(o))] for o in responses]
    probability = torch.stack([sum(logp[s] for s in row).exp() for row in steps])
    rewards = [rng.random() for _ in responses]
    assert probability.sum().item() == pytest.approx(1)
    (truth,) = torch.autograd.grad(probability @ torch.tensor(rewards, dtype=torch.float64), logits, retain_graph=True)

    weight = {}  # of each log-probability in the expected surrogate
    for group in itertools.product(range(len(responses)), repeat=3):
        chance = math.prod(probability[o].item() for o in group)
        tokens, lengths = pack([responses[o] for o in group], T)
        r = [rewards[o] for o in group]
        nodes = leaf.build_tree(tokens, lengths, r, boundaries)
        for i, start, end, value in leaf.leave_one_out_credits(lengths, r, nodes):
            for step in steps[group[i]][start:end]:
                weight[step] = weight.get(step, 0) + chance * value / 3
    (expected,) = torch.autograd.grad(sum(w * logp[step] for step, w in weight.items()), logits)
    assert torch.allclose(expected, truth, rtol=0, atol=1e-12)


def test_leave_one_out_is_rloo_without_a_tree_and_keeps_grpos_scale():
    tokens, lengths = pack([[1, 2, EOS], [2, EOS], [2, 1, 1]])
    rewards = [0.9, 0.1, 0.4]
    found = leaf.leaf_advantages(tokens, lengths, None, rewards, terms="leave-one-out", boundaries=[])
    expected = leaf.grpo_advantages(rewards, lengths) * 3 / 2  # r - mean of the others is (r - mean) K / (K - 1)
    assert torch.allclose(found, expected, atol=1e-6)


def test_grpo_advantages_by_hand():
    """(r - mean) / (max(unbiased std, floor) + 1e-6) on every token of a response; K = 1 gives zeros."""
    lengths = torch.tensor([3, 1, 0, 2])
    for r in (np.array([0.1, 0.2, 0.15, 0.3]), np.array([0.0, 1.0, 1.0, 0.0])):  # std below and above a third
        for kw in ({}, {"std_floor": 0.0}, {"std_floor": 0.05}):
            a = (r - r.mean()) / (max(r.std(ddof=1), kw.get("std_floor", 1 / 3)) + 1e-6)
            A = leaf.grpo_advantages(torch.tensor(r).float(), lengths, **kw)
            torch.testing.assert_close(A.double(), torch.tensor(a)[:, None] * owned(lengths, 3), atol=1e-6, rtol=1e-5)
            assert not leaf.grpo_advantages(torch.tensor([0.8]), torch.tensor([2]), **kw).any()


def loss_inputs():
    g, mask = torch.Generator().manual_seed(0), owned(torch.tensor([6, 3, 1, 4]), 6)
    old = -3 * torch.rand(4, 6, generator=g) - 0.1
    logp, ref = old + 0.4 * torch.randn(2, 4, 6, generator=g)
    return logp, old, ref, torch.randn(4, 6, generator=g), mask


@pytest.mark.parametrize("kw", [{}, {"clip": 0.1, "kl_coef": 1.0}, {"kl_coef": 0.0}])
def test_policy_loss_matches_formula(kw):
    """Token by token in float64; mean over the tokens of a response first, then over responses."""
    *inputs, mask = loss_inputs()
    e, beta, rows = kw.get("clip", 0.2), kw.get("kl_coef", 0.02), [[] for _ in mask]
    for i, t in np.argwhere(mask.numpy()):
        p, q, f, a = (x[i, t].item() for x in inputs)
        rho, k3 = math.exp(p - q), math.exp(f - p) - (f - p) - 1
        rows[i].append(-min(rho * a, min(max(rho, 1 - e), 1 + e) * a) + beta * k3)
    loss, _ = leaf.policy_loss(*inputs, mask, **kw)
    assert loss.shape == () and loss.item() == pytest.approx(fmean(map(fmean, rows)), abs=1e-5)


@pytest.mark.parametrize("ratios, kl_coef", [([1.0], 0.0), ([0.5, 0.9, 1.1, 1.5], 0.0), ([1.0], 0.5)])
def test_policy_loss_gradient(ratios, kl_coef):
    """At ratio 1 every token, the EOS like any other, pulls with -A / (its response's length * K). A good token already
    made likelier, or a bad one already rarer, is left alone; the way back stays open. k3 adds 1 - e^(ref - logp)."""
    logp, _, ref, A, mask = loss_inputs()
    i = torch.arange(24).reshape(4, 6)  # the first 8 tokens: every ratio and sign
    rho, A = torch.tensor(ratios)[i % len(ratios)], torch.where(i // 4 % 2 == 1, A.abs(), -A.abs())
    logp.requires_grad_()
    leaf.policy_loss(logp, logp.detach() - rho.log(), ref, A, mask, kl_coef=kl_coef)[0].backward()
    blocked = (A > 0) & (rho > 1.2) | (A < 0) & (rho < 0.8)
    want = torch.where(blocked, 0.0, -A * rho) + kl_coef * (1 - (ref - logp.detach()).exp())
    want = want * mask / (mask.sum(1, keepdim=True) * len(mask))
    torch.testing.assert_close(logp.grad, want, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("junk", [7.0, 1e4, -1e4])
def test_policy_loss_ignores_padding(junk):
    """Finite junk, even where its exponential overflows, reaches neither loss, statistics nor gradient."""
    *inputs, mask = loss_inputs()
    results = []
    for fill in (0.0, junk):
        logp, old, ref, A = (torch.where(mask, x, k * fill) for x, k in zip(inputs, (1, -1, 2, 3)))
        logp.requires_grad_()
        loss, stats = leaf.policy_loss(logp, old, ref, A, mask)
        loss.backward()
        assert not logp.grad[~mask].any()
        results.append(torch.tensor([loss.item(), *(float(stats[k]) for k in stats), *logp.grad[mask].tolist()]))
    torch.testing.assert_close(*results, atol=1e-7, rtol=1e-6)


def test_policy_loss_stats():
    """Mean ratio, share of clipped tokens, mean k3, without a graph; all finite when responses are empty."""
    old, mask = torch.full((2, 4), -1.0), torch.ones(2, 4, dtype=torch.bool)
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
        assert all(map(math.isfinite, [loss.item(), *logp.grad.flatten().tolist(), *map(float, stats.values())]))


@pytest.mark.parametrize(
    "responses, rewards, fires, usable, size, spread",
    [
        ([[1, 2, 3, EOS], [1, 2, 4, EOS], [3, EOS]], [1.0, 0.0, 0.0], True, True, 2, 1.0),  # a fork worth having
        ([[1, 2, 3, EOS], [1, 2, 4, EOS], [3, EOS]], [0.5, 0.5, 0.0], True, False, 2, 0.0),  # nothing to learn
        ([[1, 2], [1, 2, 4, EOS], [3, EOS]], [0.5, 0.0, 0.0], True, True, 2, 0.5),  # one goes on: enough
        ([[1, EOS], [1, EOS], [2, 1, 1, EOS]], [0.5, 0.0, 0.0], False, False, 2, 0.5),  # ended duplicates
        (
            [[1, EOS], [1, EOS], [2, 1, 1, EOS], [2, 1, EOS]],
            [0.5, 0.0, 0.2, 0.2],
            True,
            False,
            2,
            0.25,
        ),  # spread elsewhere
    ],
)
def test_fork_stats_by_hand(responses, rewards, fires, usable, size, spread):
    """A fork fires if a group of two or more has a member past it; it is usable if *that* group's rewards differ."""
    (got,) = leaf.fork_stats(*pack(responses), torch.tensor(rewards), [2])
    want = {"position": 2, "fires": fires, "usable": usable, "group_size": size, "reward_spread": spread}
    assert {k: got[k] for k in want} == pytest.approx(want)


def test_random_boundaries_keep_the_separation_and_are_uniform():
    """Candidates, D and budget of the paper's step 2; fewer than B only when no candidate is left; seeded."""
    rng, g, before = random.Random(5), torch.Generator().manual_seed(0), torch.random.get_rng_state()
    for _ in range(300):
        lengths, B, m = [rng.randint(0, 20) for _ in range(rng.randint(1, 8))], rng.randint(0, 4), rng.randint(0, 4)
        got, D = leaf.random_boundaries(torch.tensor(lengths), B, g, min_prefix=m), max(2, min(lengths) // (B + 1))
        allowed = range(max(1, m), max(lengths))
        assert len(got) <= B and set(got) <= set(allowed) and all(b - a >= D for a, b in zip(got, got[1:]))
        assert len(got) == B or all(any(abs(t - k) < D for k in got) for t in allowed)
    a, b = (leaf.random_boundaries(torch.tensor([90, 99]), 2, torch.Generator().manual_seed(1)) for _ in "ab")
    assert a == b and torch.equal(before, torch.random.get_rng_state())  # only the generator handed in is used
    count = np.bincount([leaf.random_boundaries(torch.tensor([11, 11]), 1, g)[0] for _ in range(3000)], minlength=11)
    assert count[0] == 0 and np.abs(count[1:] - 300).max() < 5 * math.sqrt(3000 * 0.1 * 0.9)


def test_even_boundaries_by_hand():
    for lengths, B, m, want in (
        ([9, 12], 2, 1, [3, 6]),
        ([12, 9], 3, 1, [2, 4, 6]),
        ([9, 12], 3, 3, [4, 6]),
        ([2, 9], 3, 0, [1]),
        ([0, 9], 3, 1, []),
        ([9], 0, 1, []),
    ):
        assert leaf.even_boundaries(torch.tensor(lengths), B, min_prefix=m) == want


def test_leaf_credit_takes_less_than_a_millisecond():
    """K = 8, T = 200: responses leave a common answer one after another. The best of many: the machine is shared."""
    g, lengths = torch.Generator().manual_seed(0), torch.tensor([200] * 5 + [180, 150, 90])
    tokens = torch.randint(1, 1000, (1, 200), generator=g).repeat(8, 1)
    for i in range(1, 7):
        tokens[i, 20 * i :] += i
    s, rewards = torch.rand(8, 200, generator=g), torch.rand(8, generator=g)
    best = min(timeit.repeat(lambda: leaf.leaf_advantages(tokens, lengths, s, rewards), number=1, repeat=100))
    assert best < 1e-3, f"{1e3 * best:.2f} ms"


# ---- model.py: parity with transformers, padding, sampling, scoring -------------------------------------------------
V, near = 23, partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)  # vocabulary; V is also the audio token's id
roughly, same = partial(near, atol=1e-4, rtol=1e-4), partial(near, atol=0, rtol=0)


def rand(*shape, seed=0, kind=torch.rand):
    return kind(shape, generator=torch.Generator().manual_seed(seed))


randn = partial(rand, kind=torch.randn)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)  # what a test finds must not depend on which tests ran before it


@torch.no_grad()
def shake(net, scale=0.1):
    """Every weight and running statistic away from its initial value, so that none is ignored unnoticed."""
    for seed, p in enumerate(net.parameters()):
        p += scale * randn(*p.shape, seed=seed)
    for seed, (name, b) in enumerate(net.named_buffers()):
        b.copy_(rand(*b.shape, seed=seed) + 0.5 if "running" in name else b)
    return net.eval()


def odd_config(seed):
    """Odd sizes and no multiplier at 1. Four seeds: 1 to 4 encoder layers; GQA, MHA, one KV head; tied and untied."""
    tied, context = seed % 2 == 1, 9 + 7 * seed
    window, downsample, heads, kv_heads, head_dim = [
        (15, 5, 4, 2, None),
        (6, 2, 4, 4, None),
        (8, 4, 6, 3, 10),
        (7, 7, 6, 1, 10),
    ][seed]
    return SpeechConfig(
        EncoderConfig(
            num_layers=1 + seed,
            hidden_dim=24,
            feedforward_mult=1 + seed,
            num_heads=3,
            dim_head=5 + seed,
            output_dim=[6, 7, 5, 9][seed],
            context_size=context,
            max_pos_emb=context + 8 * tied,
            conv_kernel_size=4 + seed,
            conv_expansion_factor=2 - tied,
            dropout=0.0,
        ),
        ProjectorConfig(
            hidden_size=32,
            num_hidden_layers=1 + seed,
            num_attention_heads=2 + 2 * tied,
            intermediate_size=40,
            encoder_hidden_size=24,
            cross_attention_frequency=1 + tied,
            layer_norm_eps=[1e-12, 1e-2][tied],
        ),
        TextConfig(
            vocab_size=V,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2 + tied,
            head_dim=head_dim,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            rms_norm_eps=[1e-5, 0.1][tied],
            rope_theta=10.0 ** (2 + seed),
            embedding_multiplier=1.5,
            attention_multiplier=0.4,
            residual_multiplier=0.7,
            logits_scaling=1.6,
        ),
        audio_token_index=V,
        window_size=window,
        downsample_rate=downsample,
        tie_word_embeddings=tied,
    )


def make_model(seed=2, scale=0.3):
    """Nothing of it at its initial value; scale: how far from uniform its distributions are."""
    return shake(SpeechLM(odd_config(seed)).init_weights(0), scale)


def make_transformers(seed, folder):
    """The same in transformers, saved under folder as IBM publishes it. Their Granite Speech forgets logits_scaling."""
    hf, config = pytest.importorskip("transformers"), asdict(odd_config(seed))
    config["projector_config"] |= {"model_type": "blip_2_qformer", "vocab_size": 1}
    text = {k: v for k, v in config["text_config"].items() if v is not None}  # head_dim
    config["text_config"] = text | {"model_type": "granite", "pad_token_id": 0, "tie_word_embeddings": seed % 2 == 1}
    torch.manual_seed(seed)
    theirs = hf.GraniteSpeechForConditionalGeneration(hf.GraniteSpeechConfig(**config, has_lora_adapter=False))
    shake(theirs, 0.3).generation_config.eos_token_id = None
    theirs.save_pretrained(folder, max_shard_size="60KB" if seed % 2 else "1GB")  # several files with an index, or one
    assert (folder / "model.safetensors.index.json").exists() == (seed % 2 == 1)
    return theirs


def their_logits(theirs, mel):
    """Ids and logits of 4 <audio> 5 6."""
    c = theirs.config
    ids = [4, *[V] * (math.ceil(mel.shape[1] / c.window_size) * (c.window_size // c.downsample_rate)), 5, 6]
    ids = torch.tensor([ids] * len(mel))
    return ids, theirs(input_ids=ids, input_features=mel).logits / c.text_config.logits_scaling


def granite(theirs):
    """Their decoder as GraniteForCausalLM, which does divide by logits_scaling."""
    model = pytest.importorskip("transformers").GraniteForCausalLM(theirs.config.text_config).eval()
    model.model, model.lm_head = theirs.model.language_model, theirs.lm_head
    return model


def causal(model, x):
    """Logits for embeddings (B, S, C) as plain causal sequences: no padding, no sharing, no cache."""

    def attend(layer, q, k, v):  # (B, S, H, D)
        k, v = (y.repeat_interleave(q.shape[2] // y.shape[2], dim=2) for y in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * model.config.text_config.attention_multiplier
        scores = scores.masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1) > 0, -math.inf)
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)

    hidden = model.language_model.model(x, torch.arange(x.shape[1]).expand(len(x), -1), attend)
    return model.language_model.logits(hidden)


def alone(model, x, tokens):
    """Logits (T, V) that predict each token of one response (T,) after one prompt (L, C); their log-probabilities."""
    logits = causal(model, torch.cat((x, model.language_model.model.embed_tokens(tokens)))[None])[0, len(x) - 1 : -1]
    return logits, logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def make_prompts(lengths, side, width=None):
    """Ragged prompts of random embeddings, padded with junk on the left, on the right or on both sides."""
    slot, lengths = torch.arange(width or max(lengths)), torch.tensor(lengths)[:, None]
    start = (len(slot) - lengths) * {"left": 2, "right": 0, "both": 1}[side] // 2
    return Prompts(randn(len(lengths), len(slot), 24), (slot >= start) & (slot < start + lengths))


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_same_as_transformers(seed, tmp_path):
    """Weights and config.json as they write them. In a ragged batch of ours, every row has the frames, embeddings,
    logits and 20 greedy tokens that theirs has alone."""
    theirs = make_transformers(seed, tmp_path)
    ours, decoder = SpeechLM.from_pretrained(tmp_path).eval(), granite(theirs)
    assert SpeechConfig.from_dict(theirs.config.to_dict()) == ours.config == odd_config(seed)
    mels = [randn(n, 160, seed=n) for n in (7, 1, 65, 2, 31, 13, 20, 47)]
    frames = ours.encode(mels)
    sounds = ours.project(frames)
    prompts = ours.embed_prompts([[4, V, 5, 6]] * len(mels), sounds)
    greedy = ours.sample(prompts, torch.zeros(len(mels), 1, 20), eos_id=-1, temperature=0).tokens[:, 0].tolist()
    for i, mel in enumerate(mels):
        hidden = theirs.model.encoder(mel[None]).last_hidden_state
        near((frames[i], sounds[i]), (hidden[0], theirs.model.projector(hidden)[0]), atol=3e-5)
        x, (ids, logits) = prompts.x[i][None, prompts.valid[i]], their_logits(theirs, mel[None])
        roughly(causal(ours, x), logits)
        roughly(logits, decoder(inputs_embeds=x).logits)
        want = theirs.generate(input_ids=ids, input_features=mel[None], do_sample=False, max_new_tokens=20)
        assert greedy[i] == want[0, ids.shape[1] :].tolist() and len(sounds[i]) == ours.projector.count(len(mel))
    assert len(set(sum(greedy, []))) > 6


@torch.no_grad()
def test_padded_audio_gives_the_same():
    """Every length from 1 to 65 in one batch, whatever stands in the padding, is what the recording is alone."""
    model, lengths, mel = make_model(scale=0.1), (torch.arange(65) * 8) % 65 + 1, randn(65, 70, 160)
    frames, middle = model.encoder(mel, lengths)
    sound, counts = model.projector(frames, lengths)
    for i, n in enumerate(lengths.tolist()):
        one = model.encoder(mel[i : i + 1, :n], torch.tensor([n]))
        near((frames[i, :n], middle[i, :n]), (one[0][0], one[1][0]))
        near(sound[i, : counts[i]], model.projector(one[0], torch.tensor([n]))[0][0])
        assert not frames[i, n:].any() and counts[i] == 2 * math.ceil(n / 8)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_rollout_does_not_depend_on_padding_or_company(side):
    """A response is its own noise's: alone, in any batch and place, with 1 or 8 to a prompt, with more time to come."""
    model, prompts, u = make_model(), make_prompts([5, 1, 9, 4, 6], side, width=11), rand(5, 8, 10)
    whole = model.sample(prompts, u, 2, top_p=0.9)
    scored = model.response_logp(prompts, whole.tokens, whole.lengths)
    assert len({tuple(r) for r in whole.tokens.flatten(0, 1).tolist()}) > 30 and scored.isfinite().all()
    for rows, K, T in [*(([i], 8, 10) for i in range(5)), ([4, 1], 8, 10), ([3, 0, 2, 1, 4], 2, 10), ([1, 3], 1, 4)]:
        some = prompts[rows]
        if len(rows) == 1:  # without its padding
            some = Prompts(some.x[some.valid][None], some.valid[some.valid][None])
        part = model.sample(some, u[rows, :K, :T], 2, top_p=0.9)
        same(part.lengths, whole.lengths[rows, :K].clamp(max=T))
        for name in ("tokens", "logq", "logp"):
            near(getattr(part, name)[part.mask], getattr(whole, name)[rows, :K, :T][part.mask])
        again = model.response_logp(some, whole.tokens[rows, :K, :T], part.lengths)
        near(again, scored[rows, :K, :T] * part.mask)


def test_batch_norm_sees_real_frames_only():
    """In training: output, gradient and running statistics are BatchNorm1d's on the real frames, end to end."""
    ours, plain = shake(MaskedBatchNorm(6)).train(), shake(nn.BatchNorm1d(6)).train()
    mask = torch.arange(9) < torch.tensor([[5], [1], [9]])
    for seed in range(3):
        x = torch.where(mask[..., None], 3 * randn(3, 9, 6, seed=seed) + 1, 1e4).requires_grad_()
        y = x.detach()[mask].requires_grad_()
        got, want = ours(x, mask)[mask], plain(y)
        for out in (got, want):
            (out.sin() * torch.arange(len(out))[:, None]).sum().backward()
        near((got, x.grad[mask]), (want, y.grad))
    near(list(ours.buffers()), list(plain.buffers()))


def truncated(logits, temperature, top_p):
    """Sampling distribution (V,), in float64 and one token at a time; and the log of the mass that was kept."""
    p, mass = (logits.double() / temperature).softmax(-1), 0.0
    q = torch.zeros_like(p)
    for token in p.argsort(descending=True):
        if mass < top_p:
            q[token], mass = p[token], mass + p[token].item()
    return (q / mass).float(), math.log(mass)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (1.0, 0.7), (0.6, 1.0), (1.7, 0.5)])
def test_sampler_equals_scorer(side, temperature, top_p):
    """A sampled token's two log-probabilities, from the cache, are those of a plain causal pass over its sequence. At
    temperature 1 they differ by the log of the mass that top-p kept; without top-p not at all."""
    model, prompts = make_model(), make_prompts([3, 8, 1, 5], side)
    rollout = model.sample(prompts, rand(4, 6, 12), 2, temperature, top_p)
    mask, scored = rollout.mask, model.response_logp(prompts, rollout.tokens, rollout.lengths)
    assert 2 in rollout.tokens[mask] and (rollout.lengths == 12).any() and (rollout.lengths < 6).any()
    for i, k in itertools.product(range(4), range(6)):
        tokens, logq, logp = (getattr(rollout, name)[i, k][mask[i, k]] for name in ("tokens", "logq", "logp"))
        logits, want = alone(model, prompts.x[i][prompts.valid[i]], tokens)
        q, kept = zip(*(truncated(row, temperature, top_p) for row in logits))
        near((logp, scored[i, k][mask[i, k]]), (want, want))
        near(logq, torch.stack(q).gather(-1, tokens[:, None])[:, 0].log())
        near((logp - logq) * (temperature == 1), torch.tensor(kept) * (temperature == 1), atol=2e-5)


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_shared_prompt_is_the_same_as_each_response_alone(side, adapted):
    """Log-probabilities and gradients (LoRA's or the decoder's, and the prompt's): K ragged responses over one shared
    prompt, in smaller batches, one by one, or each as a plain causal sequence."""
    model, prompts, tokens = make_model(), make_prompts([4, 9, 2], side), (V * rand(3, 4, 7)).long()
    if adapted:
        shake_lora(model)
    lengths = torch.tensor([[7, 2, 1, 4], [3, 7, 7, 5], [1, 1, 6, 2]])
    weight = (rand(3, 4, 7, seed=1) - 0.5) * (torch.arange(7) < lengths[..., None])
    named = {n: p for n, p in model.named_parameters() if p.requires_grad and "language" in n}
    named["prompt"] = prompts.x.requires_grad_()
    together = model.response_logp(prompts, tokens, lengths)
    want = torch.autograd.grad((together * weight).sum(), named.values(), retain_graph=True)
    chunks = torch.arange(3).split(2)
    batches = [(model.response_logp(prompts[c], tokens[c], lengths[c]) * weight[c]).sum() for c in chunks]
    separate, plain = [], []
    for i, k in itertools.product(range(3), range(4)):
        n = lengths[i, k]
        one = model.response_logp(prompts[[i]], tokens[i : i + 1, k : k + 1, :n], n.view(1, 1))[0, 0]
        _, brute = alone(model, prompts.x[i][prompts.valid[i]], tokens[i, k, :n])
        near((one, brute), (together[i, k, :n], together[i, k, :n]))
        separate.append((one * weight[i, k, :n]).sum())
        plain.append((brute * weight[i, k, :n]).sum())
    for loss in map(sum, (batches, separate, plain)):
        for name, a, b in zip(named, torch.autograd.grad(loss, named.values()), want):
            assert (a - b).norm() <= 1e-4 * b.norm() and b.norm() > 1e-3, name
    sampled = model.sample(prompts, rand(3, 1, 4), 2)  # the sampler's own tensors can be trained on
    model.response_logp(prompts, sampled.tokens, sampled.lengths).sum().backward()


@pytest.mark.parametrize("share", [False, True])
def test_what_is_shared_is_computed_once(share):
    """The decoder sees each real prompt token once, and each distinct prefix that something follows."""
    model, prompts, rng = make_model(), make_prompts([4, 9, 2], "both", width=11), random.Random(0)
    tokens, lengths, seen = [], [], []
    for _ in range(3):
        group = [[rng.randrange(3 if share else V) for _ in range(rng.randint(1, 9))] for _ in range(5)]
        group[4] = list(group[1])
        packed, n = pack(group, 9)
        packed[0], n[0] = packed[3], rng.randint(1, len(group[3]))  # stops where another goes on, with junk behind
        tokens, lengths = [*tokens, packed], [*lengths, n]
    tokens, lengths = torch.stack(tokens), torch.stack(lengths)
    wanted = int(prompts.valid.sum())
    for group, ends in zip(tokens.tolist(), lengths.tolist()):
        wanted += len({tuple(row[:t]) for row, n in zip(group, ends) for t in range(1, n)})
    model.language_model.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    logp = model.response_logp(prompts, tokens, lengths)
    assert seen == [wanted] and wanted < 15 + int((lengths - 1).sum())
    for i, k in itertools.product(range(3), range(5)):
        n = lengths[i, k]
        near(logp[i, k, :n], alone(model, prompts.x[i][prompts.valid[i]], tokens[i, k, :n])[1])
        assert not logp[i, k, n:].any()


def test_logits_in_parts_are_the_same():
    model, hidden, tokens = make_model(seed=1), randn(11, 24).requires_grad_(), (V * rand(11)).long()
    weights = [hidden, model.language_model.model.embed_tokens.weight]  # tied
    whole, parts = (model.token_logp(hidden, tokens, held) for held in (2**25, 3 * V))
    near(whole, parts)
    near(*(torch.autograd.grad((x * x).sum(), weights) for x in (whole, parts)), atol=1e-4)


def test_attention_kernels_may_lay_out_memory_as_they_like(monkeypatch):
    """CUDA's memory-efficient kernel returns (B, H, S, D) that lies in memory as (B, S, H, D)."""
    model, prompts, tokens = make_model(), make_prompts([4, 9, 2], "left"), (V * rand(3, 4, 7)).long()
    lengths = torch.full((3, 4), 7)
    plain, mel = model.response_logp(prompts, tokens, lengths), randn(20, 160)
    frames = model.encode([mel])[0]
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: attend(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2),
    )
    same(model.response_logp(prompts, tokens, lengths), plain)
    same(model.encode([mel])[0], frames)
    model.project([frames]), model.sample(prompts, rand(3, 4, 3), 2)


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (1.0, 0.9), (0.5, 0.8), (2.0, 0.3), (1.0, 1e-6)])
def test_draw_follows_the_distribution(temperature, top_p):
    """Evenly spaced noise reproduces each probability to 1 / N, random noise to its standard error."""
    N = 4001
    for seed in range(5):
        logits = 2 * randn(13, seed=seed)
        q, _ = truncated(logits, temperature, top_p)
        for u, slack in (((torch.arange(N) + 0.5) / N, 0), (rand(N, seed=seed), 4.5 * (q * (1 - q) / N).sqrt())):
            token, logq, logp = leaf.draw(logits.expand(N, 13), u, temperature, top_p)
            count = torch.bincount(token, minlength=13)
            assert ((count / N - q).abs() <= slack + 1.01 / N).all() and not count[q == 0].any()
            near((logp, logq.exp()), (logits.log_softmax(-1)[token], q[token]))


def test_draw_at_its_edges():
    """Top-p keeps the smallest set that reaches it, exactly where masses are exact. u = 0 is the first token kept, the
    last float below 1 the last one, though a sum over a large vocabulary is not 1. Temperature 0 is greedy."""
    even, halves = [1 / 8] * 8, [1 / 8, 1 / 4, 1 / 2, 1 / 8]
    for p, top_p, kept in ((even, 0.5, 4), (even, 0.51, 5), (even, 1, 8), (even, 0.1, 1), (halves, 0.75, 2)):
        token, logq, _ = leaf.draw(torch.tensor(p).log().expand(1024, -1), torch.arange(1024) / 1024, 1.0, top_p)
        q = torch.zeros(len(p)).index_add(0, token.unique(), torch.tensor(p)[token.unique()])
        q = q / q.sum()
        near((logq.exp(), token.bincount(minlength=len(p)) / 1024), (q[token], q), atol=0.9 / 1024)
        assert len(token.unique()) == kept
    last = torch.full((8,), float(np.nextafter(np.float32(1), np.float32(0))))
    for size, spread, top_p in itertools.product((3, 300, 20000), (0.1, 3.0, 30.0), (0.0, 0.3, 0.9, 1.0)):
        logits = spread * randn(8, size)
        logits[:, ::3] = -1e9  # probability 0
        best, p = logits.argmax(-1), logits.double().softmax(-1)
        token, logq, _ = leaf.draw(logits, last, 1.0, top_p)
        above = torch.where(p > p.gather(-1, token[:, None]), p, 0).sum(-1)  # the mass before it
        assert (above < top_p + 1e-4).all() and (token % 3 > 0).all() and logq.isfinite().all()
        for i, first in enumerate(leaf.draw(logits, 0 * last, 1.0, top_p)[0].tolist()):
            q, _ = truncated(logits[i], 1.0, top_p + 1e-4)
            assert q[first] > 0 and (q[:first] < 1e-3).all() and (q[token[i] + 1 :] < 1e-3).all()
        assert top_p > 0 or torch.equal(token, best)
        near(leaf.draw(logits, last, 0, top_p), (best, 0 * last, p.amax(-1).log().float()))


@torch.no_grad()
def test_responses_end_at_the_first_eos():
    """The EOS counts, a response cut short has length T, and the decoder stops when everybody has ended."""
    model, prompts, u, calls = make_model(), make_prompts([3, 8, 1], "right"), rand(3, 5, 9), []
    free = model.sample(prompts, u, eos_id=-1)
    model.language_model.model.register_forward_hook(lambda *_: calls.append(1))
    for eos in range(0, V, 2):
        rollout = model.sample(prompts, u, eos)  # the noise is the same, so are the tokens up to the end
        for i, k in itertools.product(range(3), range(5)):
            tokens, n = free.tokens[i, k].tolist(), rollout.lengths[i, k]
            assert n == (tokens.index(eos) + 1 if eos in tokens else 9)
            same((rollout.tokens[i, k, :n], rollout.mask[i, k]), (free.tokens[i, k, :n], torch.arange(9) < n))
            calls.clear()
            assert model.sample(prompts[[i]], u[[i], k : k + 1], eos).lengths.item() == n == len(calls)
    junk = torch.where(rollout.mask, rollout.tokens, (rollout.tokens + 5) % V)
    near(*(model.response_logp(prompts, x, rollout.lengths) for x in (rollout.tokens, junk)))


class OnDevice(TorchDispatchMode):
    """Refuses tensors that are not on CUDA: a copy from the host may wait, which fake tensors do not."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        places = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}
        assert places <= {"cuda"}, f"{function} on {places}"
        return out


@pytest.mark.parametrize("temperature, top_p", [(1.0, 0.9), (0.7, 1.0), (0.0, 1.0)])
def test_a_cuda_graph_can_hold_the_sampler(temperature, top_p, monkeypatch):
    """On tensors of a GPU that have no contents, so that whatever waits for some raises, and whatever mixes devices.
    The third token on is captured once and replayed, up to the end; without graphs, the decoder runs for each."""
    calls = []

    class Graph:
        def replay(self):
            calls.append("replay")

    @contextlib.contextmanager
    def capture(graph):
        assert isinstance(graph, Graph)
        with OnDevice():
            yield
        calls.append("captured")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    with FakeTensorMode():
        with torch.device("cuda"):
            model = SpeechLM(odd_config(2)).eval()
            weights = {name: torch.empty(w.shape, dtype=torch.bfloat16) for name, w in model.state_dict().items()}
            model.load_state_dict(weights, assign=True)
            lora.apply_lora(model, r=3, alpha=6.0)  # contents, B's included, are unknown: none can be skipped
            prompts = Prompts(torch.empty(3, 5, 24, dtype=torch.bfloat16), torch.ones(3, 5, dtype=torch.bool))
            noise = torch.empty(3, 4, 8)  # of 9 tokens and more, every eighth waits: have all ended?
        model.language_model.model.register_forward_hook(lambda *_: calls.append("decoder"))
        for model.cuda_graph in (True, False):
            calls.clear()
            rollout = model.sample(prompts, noise, 2, temperature, top_p)
            assert calls == (["decoder"] * 3 + ["captured"] + ["replay"] * 6 if model.cuda_graph else ["decoder"] * 8)
            assert {x.device.type for x in vars(rollout).values()} == {"cuda"} and rollout.tokens.shape == (3, 4, 8)
        for waits in (lambda: rollout.lengths.max().item(), lambda: bool(rollout.mask.all()), rollout.mask.nonzero):
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                waits()


@torch.no_grad()
def test_bfloat16():
    """Logits and log-softmax are float32; sampler and scorer differ by rounding, so old_logp must be the sampler's."""
    model, prompts = make_model(scale=0.1).bfloat16(), make_prompts([3, 8, 1, 5], "left")
    prompts.x = prompts.x.bfloat16()
    rollout = model.sample(prompts, rand(4, 6, 12), 2)
    scored = model.response_logp(prompts, rollout.tokens, rollout.lengths)
    assert model.language_model.logits(prompts.x).dtype == scored.dtype == rollout.logp.dtype == torch.float32
    assert scored.isfinite().all() and (rollout.logp - scored)[rollout.mask].abs().max() < 0.1
    assert len(scored.unique()) > 200  # of 288; rounded to bfloat16's 8 bits they would coincide


@pytest.mark.parametrize(
    "ours, others",
    [
        ("encoder.out.bias", ["model.encoder.out.bias"]),
        ("projector.query", ["model.projector.query"]),
        ("language_model.lm_head.weight", ["lm_head.weight"]),
        (
            "language_model.model.norm.weight",
            [
                "model.language_model.norm.weight",
                "language_model.model.model.norm.weight",
            ],  # the second: transformers 5.20
        ),
        (
            "language_model.model.layers.0.self_attn.q_proj.lora_A.weight",
            [
                "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight",
                "base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_A.weight",
            ],
        ),
    ],
)
def test_names(ours, others):
    assert [lora.released_name(name) for name in (ours, *others)] == [ours] * (1 + len(others))
    assert "lm_head" in ours or lora.released_name(lora.transformers_name(ours)) == ours


@pytest.mark.parametrize("seed", [1, 2])
def test_model_files(seed, tmp_path):
    """What we save, we load; and under the names that tensors have in transformers' memory."""
    model = make_model(seed)
    model.save(tmp_path)
    config, weights = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    again = SpeechLM.from_pretrained(tmp_path)
    assert again.config == model.config
    same(again.state_dict(), model.state_dict())
    assert all(p.requires_grad for p in again.parameters())
    half = SpeechLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.state_dict().values()} == {torch.bfloat16, torch.int64}
    half.save(tmp_path)
    same(SpeechLM.from_pretrained(tmp_path).state_dict(), half.state_dict())  # as stored
    tied = {part: config[part] for part in ("encoder_config", "projector_config", "text_config")}
    for value, want in (({}, True), ({"tie_word_embeddings": False}, False)):  # 3.3 says it in text_config alone
        text = {"text_config": tied["text_config"] | value}
        assert SpeechConfig.from_dict(tied | text).tie_word_embeddings == want
        assert not SpeechConfig.from_dict(tied | text | {"tie_word_embeddings": False}).tie_word_embeddings
    in_memory = {
        n.replace("language_model.lm_head", "lm_head")
        if "lm_head" in n
        else "model." + n.replace("language_model.model.", "language_model."): w
        for n, w in weights.items()
    }
    save_file(in_memory, tmp_path / "model.safetensors")
    same(SpeechLM.from_pretrained(tmp_path).state_dict(), model.state_dict())
    save_file({n: w for n, w in in_memory.items() if "num_batches" not in n}, tmp_path / "model.safetensors")
    same(SpeechLM.from_pretrained(tmp_path).state_dict(), model.state_dict())  # as in the 3.3 releases

    def refused(*words):
        with pytest.raises(ValueError) as error:
            SpeechLM.from_pretrained(tmp_path)
        assert all(word in str(error.value) for word in (str(tmp_path), *words)), error.value

    some, (name, tensor) = dict(in_memory), next(item for item in in_memory.items() if "o_proj" in item[0])
    del some[name]
    save_file(some | {"model.encoder.extra": tensor}, tmp_path / "model.safetensors")
    refused(
        "2 problems", "missing language_model.model.layers.0.self_attn.o_proj.weight", "unknown model.encoder.extra"
    )
    save_file(in_memory | {name: tensor[1:].contiguous()}, tmp_path / "model.safetensors")
    refused("1 problems", f"{name} is {tuple(tensor[1:].shape)}, not {tuple(tensor.shape)}")
    (tmp_path / "model.safetensors").write_bytes(b"Entry not found, says the server, in place of a model")
    refused("model.safetensors cannot be read")
    save_file(in_memory, tmp_path / "model.safetensors")
    for part in ("text_config", "encoder_config"):
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != part}))
        refused("config.json", part)
    for rope in ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_parameters": {"rope_type": "yarn"}}):
        (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": config["text_config"] | rope}))
        refused("rotary")
    (tmp_path / "config.json").write_text(json.dumps(config | {"has_lora_adapter": True}))
    refused("adapter_config.json and adapter_model.safetensors are missing")


# Loads a model in bfloat16 and prints by how much the process grew at its peak, in bytes.
LOADING = r"""
import re, sys, torch
from model import SpeechLM
peak = lambda: 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1])
torch.nn.Embedding(9, 9, device="meta").requires_grad_(False), torch.randn(9, device="meta")  # imports a lot
before = peak()
model = SpeechLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
assert sum(p.sum() for p in model.parameters()).isfinite()  # touches all
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    config = odd_config(0)
    config.text_config.vocab_size, config.text_config.hidden_size, config.text_config.intermediate_size = (
        30_000,
        768,
        8192,
    )
    config.text_config.num_hidden_layers = 4
    model = SpeechLM(config).bfloat16()
    size = sum(p.nbytes for p in model.parameters())
    model.save(tmp_path)
    del model
    grown = subprocess.run(
        [sys.executable, "-c", LOADING, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout
    assert size > 200e6 and 0.9 < int(grown) / size < 1.3, int(grown) / size


def test_a_lora_in_the_folder_belongs_to_the_checkpoint(tmp_path):
    """Whatever config.json says of it, as in transformers."""
    model = make_model()
    model.save(tmp_path)
    shake_lora(model, ["q_proj"])
    lora.save_adapter(model, tmp_path, ["q_proj"])
    roughly(logits_of(SpeechLM.from_pretrained(tmp_path).eval()), logits_of(model))


# ---- lora.py: adapters, the switch, PEFT's files --------------------------------------------------------------------
PLAIN, MEL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], randn(2, 20, 160)


def shake_lora(model, targets=lora.DECODER_TARGETS, r=3, alpha=12.0, dropout=0.0):
    """Adapters whose B is not zero."""
    names = lora.apply_lora(model, targets, r, alpha, dropout)
    for seed, p in enumerate(lora.lora_parameters(model).values()):
        p.data += 0.2 * randn(*p.shape, seed=seed)
    return names


def forward(model, mel=MEL):
    """Logits of 4 <audio> 5 6, through every module."""
    lengths = torch.tensor([mel.shape[1]] * len(mel))
    sound, _ = model.projector(model.encoder(mel, lengths)[0], lengths)
    return causal(model, model.embed_prompts([[4, V, 5, 6]] * len(mel), list(sound)).x)


logits_of = torch.no_grad()(forward)  # where gradients are wanted, other kernels may round differently


@pytest.mark.parametrize("bias", [True, False])
def test_lora_layer_is_its_formula(bias):
    """y = W x + b + (alpha / r) B A x; gradients reach A and B alone; dropout acts on x, and in training only."""
    net, x = nn.Sequential(nn.Linear(7, 5, bias=bias)).eval(), randn(4, 3, 7)
    base = net(x).detach()
    assert shake_lora(net, ["0"], r=2, alpha=5.0, dropout=0.5) == ["0"]
    want = base + 5 / 2 * x @ net[0].lora_A.T @ net[0].lora_B.T
    near(net(x), want)  # an adapter is born in its layer's mode
    net(x).sum().backward()
    assert {n for n, p in net.named_parameters() if p.grad is not None} == {"0.lora_A", "0.lora_B"}
    net.train()
    near(torch.stack([net(x) for _ in range(2000)]).mean(0), want, atol=0.3)
    assert not torch.allclose(net(x), net(x))


def test_lora_off_is_the_base_bit_for_bit():
    """B = 0 changes nothing; training changes A and B alone; the switch nests and returns, after an exception too, to
    what was before; merged weights cannot be switched off, and unmerging brings everything back."""
    model = make_model()
    before, base = {name: p.clone() for name, p in model.state_dict().items()}, logits_of(model)
    names, parameters = lora.apply_lora(model, r=3, alpha=6.0), lora.lora_parameters(model)
    same(logits_of(model), base)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(parameters)
    assert {f"{name}.{which}" for name in names for which in ("lora_A", "lora_B")} == set(parameters)
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
    layers[0].enabled, weights = True, [p.clone() for p in model.parameters()]
    for act, merged in ((lora.merge, True), (lora.merge, True), (lora.unmerge, False), (lora.unmerge, False)):
        act(model)  # twice does nothing more
        roughly(logits_of(model), adapted)
        assert merged == any((a - b).abs().max() > 1e-3 for a, b in zip(model.parameters(), weights))
        if merged:
            with pytest.raises(ValueError, match="merged"), lora.lora_disabled(model):
                pytest.fail("switched off")
    with lora.lora_disabled(model):
        roughly(logits_of(model), base)
        assert not torch.allclose(base, adapted, atol=1e-2)


def test_lora_rounded_once_is_lora_rounded_each_time():
    """In bfloat16, to the bit; afterwards, and after an exception, adapters count as they are again."""
    model = make_model(scale=0.1).bfloat16()
    shake_lora(model)
    plain = forward(model, MEL.bfloat16())
    with pytest.raises(KeyError), lora.lora_rounded(model):
        same(forward(model, MEL.bfloat16()), plain)
        for parameter in lora.lora_parameters(model).values():
            parameter.data.zero_()
        same(forward(model, MEL.bfloat16()), plain)
        raise KeyError
    assert not torch.equal(forward(model, MEL.bfloat16()), plain)


def test_lora_targets():
    """The pattern names the decoder; plain suffixes also hit the Conformer's feed-forwards; refusals change nothing."""
    model, names, layers = make_model(), shake_lora(make_model()), itertools.product((0, 1), PLAIN)
    places = {p: "mlp" if p in PLAIN[4:] else "self_attn" for p in PLAIN}
    assert sorted(names) == sorted(f"language_model.model.layers.{i}.{places[p]}.{p}" for i, p in layers)
    more = set(shake_lora(make_model(), PLAIN)) - set(names)
    assert more == {f"encoder.layers.{i}.{f}.{p}" for i in range(3) for f in ("ff1", "ff2") for p in PLAIN[5:]}
    assert shake_lora(make_model(), names[:1]) == names[:1]
    for nothing in (["nope"], ["proj"], "q_proj", r".*layers\.7.*", []):
        with pytest.raises(ValueError, match="LoRA targets"):
            lora.apply_lora(model, nothing)
    assert all(p.requires_grad for p in model.parameters())
    shake_lora(model.bfloat16())
    with pytest.raises(ValueError, match="already"):
        lora.apply_lora(model)
    forward(model, MEL.bfloat16()).sum().backward()  # adapters stay float32, or small steps would be rounded away
    assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.any() for p in lora.lora_parameters(model).values())


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "targets", [lora.DECODER_TARGETS, PLAIN, PLAIN[:3], r".*language_model.*\.1\.self_attn\.(k|o)_proj"]
)
def test_adapters_travel_to_peft_and_back(targets, tmp_path):
    """PEFT, on transformers' model, reads what we write, and writes what we read."""
    peft, theirs = pytest.importorskip("peft"), make_transformers(0, tmp_path / "base")
    ours, again = (SpeechLM.from_pretrained(tmp_path / "base").eval() for _ in "ab")
    base, _ = logits_of(ours), shake_lora(ours, targets, r=3, alpha=9.0, dropout=0.1)
    lora.save_adapter(ours, tmp_path / "ours", targets, base=str(tmp_path / "base"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)  # PEFT only warns of missing keys
        adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
    config, held = adapted.peft_config["default"], peft.get_peft_model_state_dict(adapted)
    assert (config.base_model_name_or_path, config.lora_dropout) == (str(tmp_path / "base"), 0.1)
    assert len(held) == len(lora.lora_parameters(ours)) and not torch.allclose(base, logits_of(ours), atol=1e-2)
    roughly(their_logits(adapted, MEL)[1], logits_of(ours))
    config = peft.LoraConfig(r=3, lora_alpha=9, target_modules=targets, lora_dropout=0.1, init_lora_weights=False)
    adapted = peft.get_peft_model(adapted.unload(), config).eval()
    adapted.save_pretrained(tmp_path / "theirs")
    tensors, settings = (
        [read(tmp_path / name / file) for name in ("ours", "theirs")]
        for read, file in ((load_file, "adapter_model.safetensors"), (read_json, "adapter_config.json"))
    )
    assert {k: v.shape for k, v in tensors[0].items()} == {k: v.shape for k, v in tensors[1].items()}
    for key in ("peft_type", "r", "lora_alpha", "lora_dropout", "bias", "inference_mode"):
        assert settings[0][key] == settings[1][key]
    assert sorted(settings[0]["target_modules"]) == sorted(settings[1]["target_modules"])
    lora.load_adapter(again, tmp_path / "theirs")
    roughly(logits_of(again), their_logits(adapted, MEL)[1])
    assert not torch.allclose(logits_of(again), logits_of(ours), atol=1e-2)
    with lora.lora_disabled(again):
        same(logits_of(again), base)


def test_adapter_files(tmp_path):
    """A round trip keeps every bit; files that do not fit, or say what is not implemented, are refused by name."""
    model, again = make_model(), make_model()
    shake_lora(model, r=3, alpha=12.0, dropout=0.25)
    lora.save_adapter(model, tmp_path)
    lora.load_adapter(again, tmp_path)
    same(logits_of(again), logits_of(model))
    assert {layer.dropout.p for layer in lora.lora_layers(again).values()} == {0.25}
    config, names = json.loads((tmp_path / "adapter_config.json").read_text()), sorted(lora.lora_layers(model))
    theirs = ["model." + name.replace("language_model.model.", "language_model.") for name in names]
    del config["bias"]  # older files may lack keys
    for targets in (names, theirs):  # or name layers in full, as we or as transformers call them
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": targets}))
        again = make_model()
        assert lora.load_adapter(again, tmp_path) == targets
        same(logits_of(again), logits_of(model))
    patterns = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 4}}
    lists = {"modules_to_save": ["lm_head"], "layers_to_transform": [0], "exclude_modules": ["q_proj"]}
    switches = {"use_rslora": True, "use_dora": True, "lora_bias": True, "bias": "all", "peft_type": "IA3"}
    wrong = {"r": 4, "target_modules": PLAIN[:1]}, {"target_modules": PLAIN}, {"target_modules": ["embed_tokens"]}
    again = make_model()
    for changed in (*wrong, *({k: v} for k, v in (patterns | lists | switches).items())):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changed}))
        with pytest.raises(ValueError, match=tmp_path.name):
            lora.load_adapter(again, tmp_path)
    for key in ("r", "lora_alpha", "target_modules"):
        (tmp_path / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != key}))
        with pytest.raises(ValueError, match="not a LoRA as PEFT writes it"):
            lora.load_adapter(again, tmp_path)
    assert not lora.lora_layers(again) and all(p.requires_grad for p in again.parameters())  # as it was


def test_fold_leaves_plain_layers_rounded_once():
    model = make_model().bfloat16().train()
    names = shake_lora(model, ["ff1.up_proj", "q_proj"])
    layers = {name: model.get_submodule(name) for name in names}
    want = {n: (x.weight.float() + 4 * x.lora_B @ x.lora_A).bfloat16() for n, x in layers.items()}
    lora.fold(model)
    assert not lora.lora_layers(model) and not lora.lora_parameters(model)
    for name, layer in layers.items():
        plain = model.get_submodule(name)
        same((plain.weight, plain.bias), (want[name], layer.bias))
        assert type(plain) is nn.Linear and plain.training and (plain.bias is not None) == ("ff1" in name)
    shake_lora(model)  # ready for the next


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"],
                                     ["language_model.model.layers.1.self_attn.q_proj", "ff1.up_proj"]])  # fmt: skip
def test_every_target_counts_here_and_in_peft(targets, tmp_path):
    peft, theirs = pytest.importorskip("peft"), make_transformers(0, tmp_path / "base")
    ours = SpeechLM.from_pretrained(tmp_path / "base").eval()
    base, _ = logits_of(ours), shake_lora(ours, targets)
    assert not torch.allclose(base, logits_of(ours), atol=1e-2)
    lora.save_adapter(ours, tmp_path / "ours", targets, base=str(tmp_path / "base"))
    roughly(their_logits(peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval(), MEL)[1], logits_of(ours))


def test_targets_without_a_layer_are_refused():
    for targets in (["q_proj", "vproj"], ["decoder", "out"]):
        with pytest.raises(ValueError, match="LoRA targets"):
            lora.apply_lora(make_model(), targets)


def test_adapters_that_changed_their_base_are_refused(tmp_path):
    model = make_model()
    shake_lora(model)
    lora.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for init in ("pissa", "pissa_niter_4", "olora", "corda"):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": init}))
        with pytest.raises(ValueError, match="init_lora_weights"):
            lora.load_adapter(make_model(), tmp_path)


# ---- data.py: features, BLEU, corpora, text, synthetic speech -------------------------------------------------------


@pytest.mark.parametrize("samples", [400, 559, 560, 719, 720, 1601, 16000, 33333])
def test_log_mel_is_granite_speechs(samples):
    """Of a single recording: transformers' feature extractor, which is torchaudio's MelSpectrogram inside."""
    pytest.importorskip("torchaudio")
    extractor, time = pytest.importorskip("transformers").GraniteSpeechFeatureExtractor(), torch.arange(samples) / 16000
    audio = 0.3 * torch.sin(4000 * time * (1 + time)) * (time > 0.01) + 1e-4 * randn(samples) * (time < 0.9)
    near(data.log_mel(audio), extractor(audio)["input_features"][0], atol=2e-5)
    assert data.log_mel(0 * audio).isfinite().all() and len(data.log_mel(audio)) == (samples // 160 + 1) // 2


PIECES = """the cat sat on a mat The CAT Mat don't it's 'quoted' "said" “curly” e.g. U.S. Mr. 3.14 1,000 1,000.5 1-2
-7 7- 50% $5 #1 a/b a_b (x) [y] {z} <b> a&b &quot; &amp; &lt; &gt; &amp;quot; <skipped> - -- — … ... . , ; : ! ? .5 5.
naïve café Ünïcödé 日本 日本語。 你好， ١٢٣ ½ № ß ﬁ 🎉 e\u0301 \u200b x\u00a0y 3.a a.3 3,a well-known co-\nop \n- -\n \n
\t \r \u2028 \x1c \\ * + = @ | ~ ^ ` a.b""".split(" ")


def nasty_pairs(n, seed):
    """Hypotheses and references that share words, from none to all of them; some empty, many short."""
    rng = random.Random(seed)
    for _ in range(n):
        reference = rng.choices(PIECES, k=rng.choice([0, 1, 2, 3, 4, 5, 8, 13, 30]))
        hypothesis = [w for w in reference if rng.random() < 0.9] if rng.random() < 0.8 else []
        for _ in range(rng.choice([0, 0, 1, 3, 6])):
            hypothesis.insert(rng.randint(0, len(hypothesis)), rng.choice(PIECES))
        yield tuple(rng.choice([" ", " ", " ", "", "  "]).join(words) for words in (hypothesis, reference))


def test_bleu_is_sacrebleus():
    sacrebleu, rewards = pytest.importorskip("sacrebleu"), []
    metric, exactly = sacrebleu.BLEU(effective_order=True), partial(pytest.approx, abs=1e-9)
    for hypothesis, reference in nasty_pairs(4000, seed=0):
        want = metric.sentence_score(hypothesis, [reference]).score
        assert data.sentence_bleu(hypothesis, reference) == exactly(want), (hypothesis, reference)
        want = metric.sentence_score(" ".join(hypothesis.split()), [" ".join(reference.split())]).score
        rewards.append(data.reward(hypothesis, {"reference": reference}))
        assert 100 * rewards[-1] == exactly(want) and 0 <= rewards[-1] <= 1
    assert 0.1 < np.mean(np.array(rewards) > 0.5) < 0.9
    for seed, lowercase in itertools.product(range(300), (False, True)):
        answers, references = map(list, zip(*nasty_pairs([1, 2, 5, 20][seed % 4], seed + 1)))
        want = sacrebleu.corpus_bleu(answers, [references], lowercase=lowercase).score
        assert data.corpus_bleu(answers, references, lowercase) == exactly(want)


def test_reward_and_slots_by_hand():
    row = {"reference": "Anna  bought\tthe \n seven apples ."}
    assert data.reward(" Anna\nbought the  seven apples.", row) == data.reward(row["reference"], row) == 1
    assert data.reward("", row) == data.reward(" \n", row) == data.reward("zebra", row) == 0
    assert 0 < data.reward("anna bought the seven apples.", row) < 1  # case counts
    rows = [{"slots": ["Seven", "bought|purchased"]}, {}, {"slots": ["red"]}]
    assert data.slot_accuracy(["She PURCHASED seven.", "red", "reddish"], rows) == 2 / 3
    assert data.slot_accuracy(["seventy boughts", "", "a red, hat"], rows) == 1 / 3
    assert math.isnan(data.slot_accuracy(["a"], [{}]))


def longest_common(a, b):
    """Length of the longest common subsequence, by its definition."""
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + longest_common(a[1:], b[1:])
    return max(longest_common(a[1:], b), longest_common(a, b[1:]))


def test_scores():
    """What evaluation reports, against sacrebleu and brute force."""
    sacrebleu, rng = pytest.importorskip("sacrebleu"), random.Random(0)
    words = "Anna anna, bought BOUGHT the über red-hot apples. apples".split()
    texts = [[" ".join(rng.choices(words, k=rng.randint(0, 7))) for _ in range(12)] for _ in range(5)]
    references, greedy, *passes = texts
    references, greedy = [r or "the" for r in references], [references[0] + " ", *greedy[1:]]
    passes[0][1] = references[1]
    rows = [{"prompt": AUDIO + "?", "reference": r} for r in references]
    for i, row in enumerate(rows):
        row |= {"slots": ["Anna", "red"]} | ({"group": "odd"} if i % 2 else {})
    swapped = rng.sample(greedy, 12)
    got, exactly = data.scores(rows, greedy, passes, swapped), partial(pytest.approx, rel=1e-9, abs=1e-9)
    bleu = [sacrebleu.corpus_bleu(p, [references], lowercase=True).score for p in passes]
    assert got["BLEU greedy"] == exactly(sacrebleu.corpus_bleu(greedy, [references], lowercase=True).score)
    assert (got["BLEU sampled"], got["BLEU sampled, std"]) == exactly((fmean(bleu), stdev(bleu)))
    assert data.scores(rows, greedy, passes[:1], None)["BLEU sampled, std"] == 0
    odd = sacrebleu.corpus_bleu(greedy[1::2], [references[1::2]], lowercase=True).score
    assert got["BLEU greedy, odd"] == exactly(odd) and "slots heard %" not in data.scores(rows, greedy, passes, None)
    assert got["exact match %"] == exactly(100 / 12) and got["exact match sampled %"] == exactly(100 / 36)
    f1 = []
    for answer, reference in zip(sum(passes, []), references * 3):
        a, b = (re.sub(r"[.,-]", " ", text.lower()).split() for text in (answer, reference))
        f1.append(2 * longest_common(a, b) / (len(a) + len(b)))
    assert got["ROUGE-L sampled"] == exactly(100 * fmean(f1)) and 0 < min(filter(None, f1)) < max(f1) == 1
    rewards = [sacrebleu.sentence_bleu(a, [r]).score for a, r in zip(sum(passes, []), references * 3)]
    assert got["mean reward x100"] == exactly(fmean(rewards))
    for name, answers in (
        ("slots heard %", greedy),
        ("slots, audio swapped %", swapped),
        ("slots, chance %", [references[j] for j in data.swap(rows)]),
    ):
        hits = [slot in re.findall(r"\w+", a.lower()) for a in answers for slot in ("anna", "red")]
        assert got[name] == exactly(100 * fmean(hits))


def write_tone(path, seconds, rate, channels=1):
    """440 Hz on the first channel, silence on the others."""
    time = np.arange(round(seconds * rate)) / rate
    soundfile.write(path, np.stack([0.5 * np.sin(2 * np.pi * 440 * time), 0 * time], axis=1)[:, :channels], rate)


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
def test_any_audio_becomes_16_khz_mono(kind, rate, tmp_path):
    if rate != 16000:
        pytest.importorskip("torchaudio")
    for channels in (1, 2):
        write_tone(tmp_path / f"tone.{kind}", 1.3, rate, channels)
        line = json.dumps({"audio": f"tone.{kind}", "prompt": AUDIO + "?", "reference": "a"})
        audio = data.load_audio(data.check_row(line.encode(), tmp_path, 30))
        assert audio.dtype == torch.float32 and audio.ndim == 1
        assert len(audio) == pytest.approx(1.3 * 16000, abs=1 if kind in ("wav", "flac") else 1200)
        spectrum = torch.fft.rfft(audio[4000:12000]).abs() / 4000  # 2 Hz a bin
        assert spectrum.argmax() == 220 and spectrum[220].item() == pytest.approx(0.5 / channels, abs=0.05)
    for samples in (np.zeros(399), np.full(1000, np.nan), np.zeros(0)):
        soundfile.write(tmp_path / "bad.wav", samples, 16000, subtype="FLOAT")
        with pytest.raises(DataError, match="bad.wav"):
            data.load_audio({"audio": str(tmp_path / "bad.wav")})


def bad_lines(folder, row):
    """What the error must say -> a line that must be refused."""
    for name, seconds in (("long.wav", 2.1), ("empty.wav", 0), ("cut.flac", 1.5)):
        write_tone(folder / name, seconds, 8000, 2)
    (folder / "cut.flac").write_bytes((folder / "cut.flac").read_bytes()[:-3000])
    (folder / "text.wav").write_text("this is no audio " * 99)
    lines = {
        "not JSON": b'{"audio": ',
        "not a JSON object": b'["a"]',
        "not UTF-8": json.dumps(row, ensure_ascii=False).encode("latin-1", "replace"),
    }
    for reason, field, value in (
        ("gone.wav does not exist", "audio", "gone.wav"),
        ("audio file [^,]* does not exist", "audio", "."),
        ("text.wav cannot be read", "audio", "text.wav"),
        ("empty.wav is empty", "audio", "empty.wav"),
        ("cut.flac", "audio", "cut.flac"),
        (r"long.wav lasts 2.1 s.*--max-audio-seconds 2", "audio", "long.wav"),
        ("'audio' is missing", "audio", ...),
        ("'prompt' is missing", "prompt", ...),
        ("'slots' is not", "slots", "ja"),
        ("'reference' is missing", "reference", "  "),
        ("'reference' .* not a string", "reference", 3),
        ("'target' is not", "target", ["a"]),
        ("'transcript' is not", "transcript", 1),
        ("has 0 times", "prompt", "what?"),
        ("has 2 times", "prompt", AUDIO + AUDIO),
    ):
        lines[reason] = json.dumps({k: v for k, v in {**row, field: value}.items() if v is not ...}).encode()
    return lines


def test_corpora_are_checked(tmp_path, capsys):
    """Bad rows: file, line and reason of each; all counted, the first shown; --skip-bad-rows goes on and says so."""
    files = {split: tmp_path / f"{split}.jsonl" for split in ("train", "validation", "test")}
    row = {"audio": "a b.wav", "prompt": f"Hör:{AUDIO} was?", "reference": "日本 \u2028", "slots": ["ja"], "my": 1}
    good, lines = 2 * (json.dumps(row, ensure_ascii=False).encode() + b"\n"), bad_lines(tmp_path, row)
    write_tone(tmp_path / "a b.wav", 0.5, 16000)
    for file in files.values():
        file.write_bytes(good)
    want = {**row, "audio": str(tmp_path / "a b.wav")}
    assert data.load_corpus(tmp_path, 2) == {split: [want, want] for split in files}
    for file in files.values():  # missing, or empty; test never stands in for validation
        for change in (lambda path: path.unlink(), lambda path: path.write_text("")):
            change(file)
            with pytest.raises(DataError, match=file.name):
                data.load_corpus(tmp_path, 2)
        file.write_bytes(good)
    for reason, line in lines.items():
        files["validation"].write_bytes(good + line + b"\n" + good)
        with pytest.raises(DataError, match=rf"(?s)\b1 bad row.*validation\.jsonl, line 3: .*{reason}"):
            data.load_corpus(tmp_path, 2)
        assert [len(rows) for rows in data.load_corpus(tmp_path, 2, skip_bad_rows=True).values()] == [2, 4, 2]
        assert "1 bad row" in capsys.readouterr().out
    files["train"].write_bytes(b"\n".join(lines.values()))  # and nothing left to go on with
    with pytest.raises(DataError, match=rf"{len(lines) + 1} bad rows(.*\n)+.*--skip-bad-rows") as error:
        data.load_corpus(tmp_path, 2)
    assert all(f"train.jsonl, line {n}:" in str(error.value) for n in (1, 2, 3)) and len(str(error.value)) < 2000
    with pytest.raises(DataError, match="train.jsonl"):
        data.load_corpus(tmp_path, 2, skip_bad_rows=True)


@pytest.mark.parametrize("task", ["qa", "translation"])
def test_synthetic_corpus(task):
    """No content twice, in whatever split; every slot is in reference and target and, asked for, in the audio; the
    supervised wording is mostly not the rewarded one; who does not listen has few slots right."""
    sizes = {"train": 400, "validation": 60, "test": 90}
    splits = synthetic.rows(task, sizes, seed=3)
    rows, prompts = sum(splits.values(), []), {row["prompt"] for row in splits["train"]}
    assert splits == synthetic.rows(task, sizes, seed=3) != synthetic.rows(task, sizes, seed=4)
    assert {name: len(part) for name, part in splits.items()} == sizes
    assert len({row["transcript"] for row in rows}) == len({row["audio"].phones for row in rows}) == len(rows)
    for row in rows:
        assert row["prompt"].count(AUDIO) == 1 and not any(slot in row["prompt"] for slot in row["slots"])
        for text in ("reference", "target", *["transcript"] * (task == "qa")):
            assert data.slot_accuracy([row[text]], [row]) == 1
    assert 0.8 < np.mean([row["target"] != row["reference"] for row in rows]) < 0.95
    assert 20 < np.mean([data.sentence_bleu(row["target"], row["reference"]) for row in rows]) < 80
    assert data.slot_accuracy([row["reference"] for row in rows], rows[1:] + rows[:1]) < 0.4
    wording = {(row["prompt"], *row["slots"]): row["reference"] for row in rows}  # one for one content, always
    assert all(row["reference"] == wording[(row["prompt"], *row["slots"])] for row in rows)
    assert len(wording) < len(rows) - 10 or task == "translation"
    assert len({(row["prompt"], len(row["slots"])) for row in rows}) == len(prompts) == (3 if task == "qa" else 1)
    assert set("".join(row["audio"].phones for row in rows)) <= set(synthetic.PHONES)


@pytest.mark.parametrize("phones", ["anV bot sevVn red apVlz", "hjugo wA getsujou ni"])
def test_synthesize(phones):
    """16 kHz, audible, finite; the seed decides everything, nothing outside does; voices and phones differ."""
    audio, state = data.load_audio({"audio": synthetic.Speech(phones, 7)}), torch.random.get_rng_state()
    np.random.seed(1)
    same((audio, state), (synthetic.synthesize(phones, 7), torch.random.get_rng_state()))
    assert audio.dtype == torch.float32 and audio.ndim == 1 and audio.isfinite().all()
    assert 0.02 < audio.square().mean().sqrt() < 0.2 and audio.abs().max() < 1
    assert 0.7 < len(audio) / sum(16 * synthetic.PHONES[p][-1] for p in f" {phones} ") < 1.4
    speakers = [data.log_mel(synthetic.synthesize(phones, seed)) for seed in range(6)]
    assert all((a[: len(b)] - b[: len(a)]).abs().mean() > 0.02 for a, b in itertools.combinations(speakers, 2))
    vowels = [synthetic.synthesize("u" * 20, seed)[4000:5600] for seed in range(8)]
    periods = [torch.fft.irfft(torch.fft.rfft(x, 3200).abs() ** 2)[62:240].argmax() + 62 for x in vowels]  # samples
    assert max(periods) > 1.4 * min(periods)
    spectra = [data.log_mel(synthetic.synthesize(p * 8, 5)).unflatten(1, (2, 80)).mean((0, 1)) for p in "iAus"]
    assert torch.pdist(torch.stack(spectra)).min() > 0.5


def test_tokenizer_and_alphabet(tmp_path):
    rows = [row for task in ("qa", "translation") for row in synthetic.rows(task, {"train": 150}, 0)["train"]]
    (tmp_path / "tokenizer.model").write_bytes(data.Tokenizer.train(rows))
    assert data.Tokenizer.train(rows) == (tmp_path / "tokenizer.model").read_bytes()
    tokenizer = data.Tokenizer(tmp_path / "tokenizer.model")
    eos, audio, answer, size = tokenizer.eos_id, tokenizer.audio_id, tokenizer.answer_id, tokenizer.vocab_size
    assert len({eos, audio, answer}) == 3 and all(0 < i < size for i in (eos, audio, answer))
    for text in (*(row["reference"] for row in rows), "日本語 🎉 ñ", "Zürich, 3.14% <b>", "q\u0301 </s> \u200b|", ""):
        ids = tokenizer.encode_answer(text)
        assert tokenizer.decode(ids) == tokenizer.decode(ids[:-1]) == text
        assert ids[-1] == eos and ids.count(eos) == 1 and len(ids) < 35
    for ids in (tokenizer.encode_prompt(row["prompt"]) for row in rows):
        assert ids.count(audio) == ids.count(answer) == 1 and ids[-1] == answer
    for ids in np.random.default_rng(0).integers(size, size=(200, 12)).tolist():  # whatever a model says can be shown
        assert isinstance(tokenizer.decode(ids), str) and len(tokenizer.pieces(ids)) == 12
    alphabet = data.Alphabet.of([{"transcript": "cab a"}, {}, {"transcript": "bad"}])
    assert len(alphabet) == 6 and sorted(alphabet.encode("abcd ")) == [1, 2, 3, 4, 5]  # 0 is CTC's blank
    assert alphabet.encode("bad?") == [alphabet.encode(c)[0] for c in "bad"] and alphabet.encode("") == []


@pytest.mark.parametrize("budget, batches, kept", [(0, 1, 0), (40, 2, 3), (10000, 3, 9)])
def test_cache_does_not_depend_on_the_order_of_questions(budget, batches, kept):
    """Items are computed in fixed company, or alone, whoever asks for what; and the budget in bytes is kept."""
    calls = []

    def compute(indices):  # 4 (i + 1) bytes each, and a trace of the company
        calls.append(indices)
        return [torch.full((i + 1,), i + len(indices) / 100) for i in indices]

    cache = data.Cache(compute, 9, budget * 1e-9, "testing", batch=3)
    first = [cache([i])[0] for i in range(9)]
    assert [(len(t), int(t[0])) for t in first] == [(i + 1, i) for i in range(9)]
    for asked in np.random.default_rng(0).integers(9, size=(20, 5)).tolist():
        same(cache(asked), [first[i] for i in asked])
    assert calls[:batches] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]][:batches] and {len(c) for c in calls[batches:]} <= {1}
    assert len(cache.kept) == kept and sum(tensor.nbytes for tensor in cache.kept) <= budget


# ---- corpora/asterisk.py --------------------------------------------------------------------------------------------


def make_packages(root):
    """A made-up tree in the packages' layout: each recording a short sine burst of its own pitch, 30 sentences each."""
    rng = np.random.default_rng(0)

    def burst(path, seconds):
        path.parent.mkdir(parents=True, exist_ok=True)
        time = np.arange(int(8000 * seconds)) / 8000
        tone = 0.3 * np.sin(2 * np.pi * rng.uniform(200, 3000) * time).astype(np.float32)
        soundfile.write(path, np.pad(tone, 400), 8000, subtype="PCM_16")

    for language, voice in asterisk.VOICES.items():
        for name in asterisk.LEXICON[language]:
            burst(root / "sounds" / voice / f"{name}.wav", rng.uniform(0.1, 0.3))
        if language not in asterisk.TRANSCRIBED:
            continue
        lines = ["; a comment", "digits/1: one", "beep: [a tone]", "vm-none:", "unrecorded: Nobody said this."]
        for i in range(30):
            burst(root / "sounds" / voice / f"vm-{i}.wav", 0.6)
            first, last = divmod(i, 6)
            lines.append(f"vm-{i}: Sentence{'abcdef'[first]} number{'uvwxyz'[last]}, café 7...")
        path = root / "doc" / asterisk.TRANSCRIPT.format(language)
        path.parent.mkdir(parents=True)
        path.write_bytes(gzip.compress("\n".join(lines).encode()))


def build_asterisk(root, name, *extra):
    asterisk.main(
        [
            "--out",
            str(root / name),
            "--sounds",
            str(root / "sounds"),
            "--transcripts",
            str(root / "doc"),
            "--train",
            "64",
            "--validation",
            "24",
            "--test",
            "24",
            *extra,
        ]
    )
    return {
        split: [json.loads(line) for line in (root / name / f"{split}.jsonl").open(encoding="utf-8")]
        for split in asterisk.SPLITS
    }


def words(text):
    return re.sub(r"[^\w\s']", " ", text.lower()).split()


def test_asterisk_corpus(tmp_path, capsys):
    pytest.importorskip("torchaudio")
    make_packages(tmp_path)
    rows = build_asterisk(tmp_path, "made")
    assert {split: len(part) for split, part in rows.items()} == {"train": 64, "validation": 24, "test": 24}
    assert {row["group"] for row in rows["train"]} == set(asterisk.MIX)
    differ = 0
    for row in (row for part in rows.values() for row in part):
        assert row["prompt"].startswith("<|audio|>") and row["prompt"].count("<|audio|>") == 1
        assert re.fullmatch(r"[a-z' ]+", row["transcript"])
        info = soundfile.info(tmp_path / "made" / row["audio"])
        assert info.samplerate == 16000 and info.channels == 1 and 0.3 < info.duration < 7
        if row["group"].startswith("prompts-"):
            assert "slots" not in row and row["reference"] == row["target"]
            assert re.fullmatch(r"Sentence[a-f] number[u-z], café (seven|sept|siete)", row["reference"])
            continue
        differ += row["reference"] != row["target"]
        for text in (row["reference"], row["target"]):
            assert 7 <= len(words(text)) <= 16
            assert all(words(text).count(slot) == 1 for slot in row["slots"]), row  # there, and not in the carrier
        assert not set(row["slots"]) & set(words(row["prompt"]))
    assert differ > 60  # taste is at random in targets, a function of the content in references

    # Splits are disjoint: contents across languages and questions (told by slots), sentences by their words.
    def contents(split):
        composed = {
            (row["group"].split("-")[1], tuple(row["slots"]))
            for row in rows[split]
            if "slots" in row and row["group"] != "en-sequence-question"
        }  # whose slots may be a part
        numbers = {row["transcript"] for row in rows[split] if row["group"] == "en-sequence-question"}
        return composed | numbers | {(row["group"], row["transcript"]) for row in rows[split] if "slots" not in row}

    train, validation, test = map(contents, asterisk.SPLITS)
    assert not (train & validation or train & test or validation & test)

    # The same seed gives the same bytes, another one does not; a folder in use is left alone, and nothing half-made.
    capsys.readouterr()
    build_asterisk(tmp_path, "again")
    printed = capsys.readouterr().out
    assert all(group in printed for group in asterisk.MIX) and "hours" in printed
    for path in (tmp_path / "made").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "made")).read_bytes(), path
    other = build_asterisk(tmp_path, "other", "--seed", "1")
    assert [row["reference"] for row in other["train"]] != [row["reference"] for row in rows["train"]]
    with pytest.raises(SystemExit, match="not empty"):
        build_asterisk(tmp_path, "made")
    assert {path.name for path in tmp_path.iterdir()} == {"sounds", "doc", "made", "again", "other"}


def test_asterisk_without_torchaudio(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio.functional", None)  # makes its import fail
    with pytest.raises(SystemExit, match="torchaudio does not import .*; fix: pip install"):
        asterisk.resample(np.zeros(8000, np.float32), 8000)


def test_asterisk_missing_packages(tmp_path, capsys):
    make_packages(tmp_path)
    (tmp_path / "sounds" / asterisk.VOICES["ru"] / "digits" / "3.wav").unlink()
    (tmp_path / "doc" / asterisk.TRANSCRIPT.format("fr")).unlink()
    with pytest.raises(SystemExit) as stop:
        build_asterisk(tmp_path, "made")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and not (tmp_path / "made").exists()
    assert re.search(r"apt-get install .*asterisk-core-sounds-fr asterisk-core-sounds-ru-wav\n", message)
    assert "asterisk-core-sounds-en" not in message


# ---- corpora/librispeech.py, librisqa.py, covost2.py: made-up trees in the publishers' layouts ----------------------


def run(script, *arguments):
    script.main([str(argument) for argument in arguments])


def refused(capsys, script, why, *arguments):
    """The script says why in one line, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(script, *arguments)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(why, message) and message.count("\n") == 1, message


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def make_librispeech(root, sizes):
    """Subset/speaker/chapter folders, three recordings a chapter and its .trans.txt. Returns {subset: files}."""
    files = {subset: [] for subset in sizes}
    for speaker, (subset, size) in enumerate(sizes.items(), start=61):
        for i in range(size):
            name, folder = f"{speaker}-{i // 3}", root / "LibriSpeech" / subset / str(speaker) / str(i // 3)
            folder.mkdir(parents=True, exist_ok=True)
            files[subset].append(str(folder / f"{name}-{i % 3:04d}.flac"))
            write_tone(files[subset][-1], 0.1, 16000)
            with open(folder / f"{name}.trans.txt", "a") as file:
                file.write(f"{name}-{i % 3:04d} IT'S {'OH ' * i}ONE OF {speaker}\n")
    return files


def test_librispeech_corpus(tmp_path, capsys, monkeypatch):
    sizes = {"train-clean-100": 9, "dev-clean": 2, "test-clean": 4, "test-other": 3}
    files, speech = make_librispeech(tmp_path, sizes), tmp_path / "LibriSpeech"
    test = ["--test", "test-clean", "test-other", "--out"]
    run(librispeech, "--librispeech", speech, *test, tmp_path / "made")
    rows = data.load_corpus(tmp_path / "made", 1)
    for split, *subsets in ("train", *list(sizes)[:1]), ("validation", "dev-clean"), ("test", *list(sizes)[2:]):
        want = []
        for subset in subsets:
            for i, file in enumerate(files[subset]):
                words = f"it's {'oh ' * i}one of {61 + list(sizes).index(subset)}"
                row = {"audio": file, "prompt": AUDIO + "Write down what is said.", "reference": words}
                want.append({**row, "transcript": words} | ({"group": subset} if split == "test" else {}))
        assert sorted(map(str, rows[split])) == sorted(map(str, want))
    assert len({row["group"] for row in rows["test"][:4]}) == 2  # the first rows come from everywhere
    monkeypatch.chdir(tmp_path)
    run(librispeech, "--librispeech", ".", *test, "again")  # the folder around it will do, and a relative path
    assert contents(tmp_path / "made") == contents(tmp_path / "again")

    test.append(tmp_path / "new")
    for why, folder, extra in (
        ("made is there already and not empty", speech, ["--out", tmp_path / "made"]),
        ("named twice", speech, ["--validation", "test-other"]),
        ("LibriSpeech: expected .* and dev-other and .*, found dev-clean, t", speech, ["--validation", "dev-other"]),
        ("dev-clean: expected train-clean-100 and .*test-other in it, found 62$", speech / "dev-clean", []),
        ("/no: expected train-clean-100 and .*, found no such folder$", tmp_path / "no", []),
    ):
        refused(capsys, librispeech, why, "--librispeech", folder, *test, *extra)
    test = ["--librispeech", speech, *test]
    Path(files["dev-clean"][1]).unlink()
    refused(capsys, librispeech, r"dev-clean: 1 of 2 recordings are missing, e\.g\. \S*62-0-0001\.flac", *test)
    spoken = speech / "dev-clean/62/0/62-0.trans.txt"
    for line in ("62-0-0001", "62-1-0001 TWO"):
        spoken.write_text(f"62-0-0000 ONE\n{line}\n")
        refused(capsys, librispeech, rf"62-0\.trans\.txt, line 2: expected the name .*'{line}'", *test)
    spoken.write_text("")
    refused(capsys, librispeech, "no row is left for the validation split", *test)
    spoken.unlink()
    refused(capsys, librispeech, "dev-clean: expected SPEAKER/CHAPTER/", *test)
    with pytest.raises(TypeError), new_corpus(tmp_path / "new") as rows:  # stopped while it writes the second file
        rows |= {"train": [1], "validation": [{2}], "test": [3]}
    assert {path.name for path in tmp_path.iterdir()} == {"LibriSpeech", "made", "again"}  # whole, or not at all


def test_librispeech_download(tmp_path, monkeypatch, capsys):
    asked = []

    def fetch(root, url, download):  # as torchaudio's: what is there already is left alone
        asked.append((root, url, download))
        if len(asked) == 3:
            raise RuntimeError("invalid hash value")
        if not (Path(root) / "LibriSpeech" / url).is_dir():
            make_librispeech(Path(root), {url: 1})

    monkeypatch.setitem(sys.modules, "torchaudio.datasets", types.SimpleNamespace(LIBRISPEECH=fetch))
    options = ["--download", "--out", tmp_path / "made", "--librispeech"]
    why = r"test-clean could not be downloaded to \S+data \(invalid hash value\)"
    refused(capsys, librispeech, why, *options, tmp_path / "data")
    run(librispeech, *options, tmp_path / "data" / "LibriSpeech")  # either folder means the same
    assert asked == 2 * [(str(tmp_path / "data"), s, True) for s in ("train-clean-100", "dev-clean", "test-clean")]
    assert [len(part) for part in data.load_corpus(tmp_path / "made", 1).values()] == [1, 1, 1]
    monkeypatch.setitem(sys.modules, "torchaudio.datasets", None)  # makes its import fail
    refused(capsys, librispeech, "fix: pip install", *options, tmp_path / "data", "--out", tmp_path / "new")


def test_librisqa_corpus(tmp_path, capsys):
    files = make_librispeech(tmp_path, {"train-clean-360": 11, "test-clean": 5})
    questions, items = tmp_path / "LibriSQA" / "LibriSQA-PartI", {}
    questions.mkdir(parents=True)

    def write(name, items):
        (questions / f"LibriSQA-PartI-{name}.json").write_text(json.dumps(items), encoding="utf-8")

    for name, subset in (("train", "train-clean-360"), ("test", "test-clean")):
        paths = [str(Path(file).relative_to(tmp_path)).replace(".flac", ".wav") for file in files[subset]]
        paths[0] = paths[0].removeprefix("LibriSpeech/").replace(".wav", ".flac")
        items[name] = [{"speech_path": path, "question": f"Why {i} {{}}? ", "answer": f" Since {i} é.",
                        "text": f"OH {i}", "duration": 0.1} for i, path in enumerate(paths)]  # fmt: skip
        write(name, items[name])
    options = ["--librispeech", tmp_path, "--librisqa", tmp_path / "LibriSQA", "--out"]
    run(librisqa, *options, tmp_path / "made")
    rows = data.load_corpus(tmp_path / "made", 1)
    numbers = {split: [int(row["reference"].split()[1]) for row in part] for split, part in rows.items()}
    # What datasets 5.2.0 makes of 0..10 with train_test_split(test_size=0.2, seed=0): validation is its test split.
    assert numbers["train"] == [2, 0, 3, 5, 10, 9, 8, 1] and numbers["validation"] == [4, 6, 7]
    assert sorted(numbers["test"]) == [0, 1, 2, 3, 4] != numbers["test"]
    for split, part in rows.items():
        subset = files["test-clean" if split == "test" else "train-clean-360"]
        for i, row in zip(numbers[split], part):
            assert (row["audio"], row["reference"], row["transcript"]) == (subset[i], f"Since {i} é.", f"oh {i}")
            assert row["prompt"] in [wording.format(f"Why {i} {{}}?") for wording in librisqa.WORDINGS]
            assert split != "test" or row["prompt"] == f"{AUDIO}Why {i} {{}}?"
    # Chosen by a hash, the same on every machine: `printf 'Why 2 {}?' | sha256sum` starts with a byte that is 0 mod 3.
    wordings = [librisqa.WORDINGS.index(re.sub(r"Why \d {}\?", "{}", row["prompt"])) for row in rows["train"][:3]]
    assert wordings == [0, 2, 1]

    run(librisqa, *options, tmp_path / "again", "--librisqa", questions, "--librispeech", tmp_path / "LibriSpeech")
    assert contents(tmp_path / "made") == contents(tmp_path / "again")
    run(librisqa, *options, tmp_path / "seed1", "--seed", "1")
    assert contents(tmp_path / "made")["train.jsonl"] != contents(tmp_path / "seed1")["train.jsonl"]

    # Gone: recording 5 and answer 10. The rest stays in its split.
    Path(files["train-clean-360"][5]).unlink()
    items["train"][10]["answer"] = " "
    write("train", items["train"])
    why = r"train: 1 of 8 .* not in \S+, e\.g\. \S+1-0002.wav; .*--skip-missing"
    refused(capsys, librisqa, why, *options, tmp_path / "new")
    run(librisqa, *options, tmp_path / "new", "--skip-missing")
    printed = capsys.readouterr().out
    assert "train: 1 of 8 recordings are not in" in printed and "train: 1 of 8 rows have no question or no" in printed
    assert data.load_corpus(tmp_path / "new", 1) == {**rows, "train": rows["train"][:3] + rows["train"][5:]}
    for why, changed in (
        (r"test\.json: expected a list of questions, found \{'speech_path'", items["test"][0]),
        (r"item 3: expected .*answer, found \{'question': 'Why\?'\}", items["test"][:2] + [{"question": "Why?"}]),
        (r"item 1: expected .*'answer': None", [{**items["test"][0], "answer": None}]),
        ("no row is left for the test split", []),
    ):
        write("test", changed)
        refused(capsys, librisqa, why, *options, tmp_path / "bad", "--skip-missing")
    (questions / "LibriSQA-PartI-test.json").write_text('[{"speech_path"')
    refused(capsys, librisqa, r"test\.json is not JSON \(", *options, tmp_path / "bad")
    why = "/LibriSpeech: expected LibriSQA-PartI-train.json and .* in it, found test-clean, train-clean-360$"
    refused(capsys, librisqa, why, *options, tmp_path / "bad", "--librisqa", tmp_path / "LibriSpeech")


def test_covost2_corpus(tmp_path, capsys):
    clips, tsv = tmp_path / "cv" / "en" / "clips", tmp_path / "covost_v2.en_de.tsv"
    clips.mkdir(parents=True)
    spoken, translated, want = ["client_id\tpath\tsentence\tup_votes"], ["path\ttranslation\tsplit"], {}
    ours = {"train": "train", "dev": "validation", "test": "test", "train_covost": "train", "dev_covost": "none"}
    for i, (theirs, split) in enumerate(ours.items()):
        for k in range(4):
            write_tone(clips / f"en_{i}{k}.mp3", 0.1, 48000)
            spoken.append(f'c\ten_{i}{k}.mp3\t"{k}, he said\t2')  # a quotation that never ends
            translated.append(f'en_{i}{k}.mp3\t {i}\\"{k}\\\\ "ä\t{theirs}')  # and characters escaped
            want.setdefault(split, set()).add((str(clips / f"en_{i}{k}.mp3"), f'"{k}, he said', f'{i}"{k}\\ "ä'))
    for name in ("old", "gone", "empty", "mute"):
        spoken += [f"c\t{name}.mp3\tSo.\t2"] if name != "old" else []
        translated.append(f"{name}.mp3\t{'So.' if name != 'mute' else ''}\ttest")
        if name != "gone":
            (clips / f"{name}.mp3").write_bytes(b"x" if name != "empty" else b"")

    def write(spoken, translated):
        (clips.parent / "validated.tsv").write_text("\n".join(spoken) + "\n", encoding="utf-8")
        tsv.write_text("\n".join(translated) + "\n", encoding="utf-8")

    write(spoken, translated)
    options = ["--common-voice", clips.parent, "--translations", tsv, "--out"]
    run(covost2, *options, tmp_path / "made")
    printed = capsys.readouterr().out
    assert "1 recordings not in validated.tsv, e.g. old.mp3\n" in printed
    assert "2 recordings missing or empty in clips, e.g. gone.mp3, empty.mp3\n" in printed
    assert "1 recordings without translation, e.g. mute.mp3\n" in printed
    rows = data.load_corpus(tmp_path / "made", 1)
    for split, part in rows.items():
        assert {(row["audio"], row["transcript"], row["reference"]) for row in part} == want[split]
        assert len(part) == len(want[split])
        assert [row["audio"] for row in part] != sorted(row["audio"] for row in part)  # speakers mixed
    assert {row["prompt"] for row in rows["test"]} == {AUDIO + "Say this in German."}
    prompts = {row["transcript"]: row["prompt"] for row in rows["train"]}
    assert len(prompts) == 4 and len(set(prompts.values())) > 1 and all("German" in p for p in prompts.values())
    assert all(row["prompt"] == prompts[row["transcript"]] for row in rows["train"] + rows["validation"])
    run(covost2, *options, tmp_path / "again", "--common-voice", tmp_path / "cv")  # the folder around it will do
    assert contents(tmp_path / "made") == contents(tmp_path / "again")

    options.append(tmp_path / "new")
    for why, *changed in (
        ("validated.tsv: expected the columns path, sentence, found path, text$", ["path\ttext"], translated),
        ("validated.tsv, line 3: expected 4 fields, found 2$", [*spoken[:2], "c\ten_01.mp3", *spoken[2:]], translated),
        ("en_de.tsv, line 2: expected 3 fields, found 4$", spoken, [translated[0], "a\tb\ttest\tc"]),
        ("en_de.tsv: expected the columns .*split, found <!DOCTYPE html>$", spoken, ["<!DOCTYPE html>"]),
        ("no row is left for the train split", spoken[:1], translated),
    ):
        write(*changed)
        refused(capsys, covost2, why, *options)
    tsv.write_bytes(b"path\ttranslation\tsplit\na\t\xff\ttest\n")
    refused(capsys, covost2, "en_de.tsv, after line .*decode", *options)
    for name in ("covost_v2.en_de.tsv.tar.gz", "covost_v2.en_xx.tsv", "covost_v2.de_en.tsv"):
        if "de_en" not in name:  # which is not there
            (clips / name).write_text("path\ttranslation\tsplit\n")
        why = f"{name}: expected a file covost_v2.SOURCE_TARGET.tsv"
        refused(capsys, covost2, why, *options, "--translations", clips / name)
    why = r"clips: expected validated.tsv and clips in it, found covost_v2.en_de.*, empty.mp3, .*, \.\.\.$"
    refused(capsys, covost2, why, *options, "--common-voice", clips)
    assert {path.name for path in tmp_path.iterdir()} == {"cv", tsv.name, "made", "again"}


# ---- released checkpoints, as IBM publishes them: shards, chat template, modality LoRA ------------------------------
TEMPLATE = """\
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}
{%- else %}{% set system = 'Today is ' + strftime_now('%d %B %Y') + '.' %}{% endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system + eos_token + '\\n' }}
{%- for message in messages %}
    {%- if message.role not in ('user', 'assistant') %}{{ raise_exception('no such role') }}{% endif %}
    {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}
"""


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A random checkpoint in the layout of granite-speech-3.3, made by transformers and PEFT, and their model."""
    hf, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("released")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", AUDIO],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Who was where and when? What happened? Anna bought those red apples."] * 3, trainer)
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end_of_text|>", pad_token="<|end_of_text|>"
    )
    processor = hf.GraniteSpeechProcessor(hf.GraniteSpeechFeatureExtractor(), fast, chat_template=TEMPLATE)
    processor.save_pretrained(folder)
    config = asdict(odd_config(3)) | {"has_lora_adapter": True, "window_size": 15, "downsample_rate": 5}
    config["audio_token_index"] = fast.convert_tokens_to_ids(AUDIO)
    config["projector_config"] |= {"model_type": "blip_2_qformer", "vocab_size": 1}
    config["text_config"] |= {"model_type": "granite", "vocab_size": len(fast), "pad_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    theirs = shake(hf.GraniteSpeechForConditionalGeneration(hf.GraniteSpeechConfig(**config)), 0.2)
    theirs.save_pretrained(folder, max_shard_size="60KB")
    modality = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(theirs, modality).eval()
    theirs.save_pretrained(folder)
    adapter_file = folder / "adapter_model.safetensors"  # IBM's has the decoder's released names
    save_file({lora.released_name(name): tensor for name, tensor in load_file(adapter_file).items()}, adapter_file)
    (folder / "model-00001-of-00099.safetensors").write_bytes(b"left behind; the index does not name it")
    assert len(list(folder.glob("model-*.safetensors"))) > 1 and (folder / "adapter_model.safetensors").exists()
    return folder, processor, theirs


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_released_checkpoint_says_what_it_says_in_transformers(released):
    """From the recording and the question to the logits, through the chat template and with its LoRA merged."""
    folder, processor, theirs = released
    ours, tokenizer = SpeechLM.from_pretrained(folder).eval(), data.load_tokenizer(folder, "Be brief.")
    assert not lora.lora_layers(ours) and all(p.requires_grad for p in ours.parameters())
    for samples, question in ((16000, "What happened?"), (33333, "Who\n was  where, naïve <|end_of_text|> Anna?")):
        audio = 0.1 * randn(samples, seed=samples)
        chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": AUDIO + question}]
        text = processor.tokenizer.apply_chat_template(
            chat, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=True
        )
        inputs = processor(text, audio, return_tensors="pt")
        sound = ours.project(ours.encode([data.log_mel(audio)]))
        ids = tokenizer.encode_prompt(AUDIO + question)
        at = ids.index(tokenizer.audio_id)
        expanded = ids[:at] + [tokenizer.audio_id] * len(sound[0]) + ids[at + 1 :]
        assert expanded == inputs["input_ids"][0].tolist()
        prompts = ours.embed_prompts([ids], sound)
        logits = theirs(**{k: v for k, v in inputs.items() if "mask" not in k}).logits
        roughly(causal(ours, prompts.x), logits / ours.config.text_config.logits_scaling)
        same(prompts.x.shape[1], len(expanded))
    answer = "Anna bought naïve apples. 漢"
    ids = processor.tokenizer(answer).input_ids
    assert tokenizer.decode(ids + [tokenizer.eos_id]) == answer and "".join(tokenizer.pieces(ids[:3])) in answer
    assert tokenizer.eos_id == processor.tokenizer.eos_token_id


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_readmes_way_into_transformers(released, tmp_path):
    """What the README tells users of transformers and PEFT to do with our adapter gives our logits."""
    folder, _, _ = released
    ours = SpeechLM.from_pretrained(folder).eval()
    shake_lora(ours, PLAIN, r=3, alpha=9.0)
    lora.save_adapter(ours, tmp_path / "adapter", PLAIN, base=str(folder))
    code = re.search(r"```python\n(from peft import .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    code = code.replace("granite-speech-3.3-2b", str(folder)).replace("runs/sqa-leaf-seed0", str(tmp_path))
    names = {}
    exec(code.replace('dtype="bfloat16"', 'dtype="float32"'), names)
    theirs, mel = names["model"].eval(), randn(47, 160)
    sounds = ours.project(ours.encode([mel]))
    audio = ours.config.audio_token_index
    prompts = ours.embed_prompts([[4, audio, 5, 6]], sounds)
    ids = torch.tensor([[4] + [audio] * len(sounds[0]) + [5, 6]])
    logits = theirs(input_ids=ids, input_features=mel[None]).logits / ours.config.text_config.logits_scaling
    roughly(causal(ours, prompts.x), logits)
    with lora.lora_disabled(ours):
        assert not torch.allclose(causal(ours, prompts.x), logits, atol=1e-2)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_chat_templates_are_found_and_kept_in_their_sandbox(released, tmp_path):
    """In any of the three places; without a system prompt the date is a fixed one; a template cannot reach out."""
    folder, processor, _ = released
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    with pytest.raises(DataError, match="no chat template"):
        data.load_tokenizer(tmp_path)

    def text(system=""):
        tokenizer = data.load_tokenizer(tmp_path, system)
        return tokenizer.tokenizer.decode(tokenizer.encode_prompt(AUDIO + "?"), skip_special_tokens=False)

    for file, content in (
        ("tokenizer_config.json", json.dumps(settings | {"chat_template": TEMPLATE})),
        ("chat_template.json", json.dumps({"chat_template": TEMPLATE.replace("Today", "Now")})),
        ("chat_template.jinja", TEMPLATE.replace("Today", "It")),
    ):
        (tmp_path / file).write_text(content)
        word = {"tokenizer_config.json": "Today", "chat_template.json": "Now", "chat_template.jinja": "It"}[file]
        assert re.match(rf"<.start_of_role.>system<.end_of_role.>{word} is 09 April 2025\.<.end_of_text.>\n", text())
        assert text().endswith(f"{AUDIO}?<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>")
    for changed in ({"eos_token": None}, {"eos_token": "<|nowhere|>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | changed))
        with pytest.raises(DataError, match="no eos_token"):
            data.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(settings | {"eos_token": {"content": "<|end_of_text|>"}})
    )
    (tmp_path / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message | tojson }}{% break %}{% endfor %}\n  {% if add_generation_prompt %}\n"
        "{{ eos_token }}{% endif %}"
    )
    assert text() == '{"role": "user", "content": "' + AUDIO + '?"}<|end_of_text|>'
    for template, error in (
        ("{{ messages[-1].content * 2 }}", "without one"),
        ("{{ raise_exception('no audio here') }}", "no audio here"),
        ("{{ messages[-1].content }}", "no place for a system prompt"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages[0].content.replace('audio', 'x') }}", "audio"),
        ("{% if %}", "chat template"),
    ):
        (tmp_path / "chat_template.jinja").write_text(template)
        with pytest.raises(DataError, match=error):
            text("Be brief." if "system" in error else "")
    tokens = json.loads((folder / "tokenizer.json").read_text())
    tokens["added_tokens"] = [token for token in tokens["added_tokens"] if token["content"] != AUDIO]
    del tokens["model"]["vocab"][AUDIO]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(DataError, match=re.escape(f"no {AUDIO}")):
        data.load_tokenizer(tmp_path)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_chat_templates_get_what_transformers_gives_them(released, tmp_path):
    """White space, loop controls, tojson, special tokens; the date is fixed."""
    folder, processor, _ = released
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    special = {"content": "<|end_of_text|>", "lstrip": False, "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": special, "bos_token": "<|end_of_role|>"}))
    chat = [{"role": "user", "content": AUDIO + "<é> & 'x'"}]
    for template in (
        "  {% for m in messages %}\n  {{ bos_token }}{{ m.content }}\n  {% endfor %}\n{{ eos_token }}",
        "{% for x in 'abc' %}{% if x == 'b' %}{% break %}{% endif %}{{ x }}{% endfor %}{{ messages | tojson }}",
        "{{ messages[0] | tojson(indent=2) }}",
    ):
        (tmp_path / "chat_template.jinja").write_text(template)
        text = processor.tokenizer.apply_chat_template(
            chat, chat_template=template, tokenize=False, eos_token="<|end_of_text|>", bos_token="<|end_of_role|>"
        )
        assert data.load_tokenizer(tmp_path).encode_prompt(chat[0]["content"]) == processor.tokenizer(text).input_ids
    tokenizer = data.load_tokenizer(tmp_path)
    assert tokenizer.pieces([tokenizer.eos_id, tokenizer.audio_id]) == ["<|end_of_text|>", AUDIO]
    (tmp_path / "chat_template.jinja").write_text("{{ strftime_now('%d %B %Y') }}" + AUDIO)
    tokenizer = data.load_tokenizer(tmp_path)
    assert tokenizer.tokenizer.decode(tokenizer.encode_prompt("")) == "09 April 2025"
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}{{ messages[0].content }}")
    with pytest.raises(DataError, match="without one"):
        data.load_tokenizer(tmp_path).encode_prompt(AUDIO)
    for settings, old in (({}, ""), ({"eos_token": "</s>"}, ""), ({"eos_token": special}, AUDIO)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        if old:
            file = tmp_path / "tokenizer.json"
            file.write_text(file.read_text(encoding="utf-8").replace(old, "<|other|>"), encoding="utf-8")
        with pytest.raises(DataError, match="no eos_token"):
            data.load_tokenizer(tmp_path)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_tokenizer_neither_cuts_nor_pads_nor_says_none(released, tmp_path):
    folder, _, _ = released
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    tokenizer["padding"] = {"strategy": {"Fixed": 40}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
                            "pad_type_id": 0, "pad_token": "<|end_of_text|>"}  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|end_of_text|>", "bos_token": null}')
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    ours = data.load_tokenizer(tmp_path)
    assert ours.tokenizer.decode(ours.encode_prompt(AUDIO + "What happened?"), skip_special_tokens=False) == (
        AUDIO + "What happened?"
    )


# ---- train.py: resuming, the loop, bad input ------------------------------------------------------------------------
TINY = """
    --train-rows 24 --validation-rows 4 --test-rows 6 --ctc-steps 3 --sft-steps 4 --base-batch 4 --steps 4 --prompts 4
    --update-prompts 2 --micro-prompts 2 --responses 4 --max-new-tokens 8 --lora-r 4 --eval-every 2 --eval-passes 1
    --save-every 2 --device cpu
""".split()
TIMINGS = ("seconds", "sampling_share", "credit_share", "tokens_per_second")


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """A whole run in miniature that nobody interrupts; its base model is shared by the tests below."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    train.main([*TINY, "--out", str(folder)])
    return folder


def base_of(run):
    return str(run.parent / "base-qa-seed0")


def metrics(folder, stage="policy"):
    rows = [json.loads(line) for line in (folder / f"{stage}.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same_run(a, b):
    """Weights bit for bit, metrics and results to the last digit."""
    weights_a, weights_b = adapter(a), adapter(b)
    assert weights_a.keys() == weights_b.keys() and all(torch.equal(weights_a[k], weights_b[k]) for k in weights_a)
    base_a, base_b = (load_file(folder.parent / "base-qa-seed0" / "model.safetensors") for folder in (a, b))
    assert all(torch.equal(base_a[k], base_b[k]) for k in base_a)
    assert repr(metrics(a)) == repr(metrics(b))  # repr: nan equals nan
    results_a, results_b = (json.loads((folder / "results.json").read_text()) for folder in (a, b))
    assert repr(results_a["base"]) == repr(results_b["base"]) and repr(results_a["trained"]) == repr(
        results_b["trained"]
    )


@pytest.mark.parametrize("update", [2, 6, 11])  # of 3 in CTC, then 4 in next-token training, then 8 of the policy
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_resumes_exactly(update, number, first_run, tmp_path, monkeypatch):
    calls, step = [], train.Updater.step

    def interrupted(self, *args):
        calls.append(None)
        if len(calls) == update:
            os.kill(os.getpid(), number)
        return step(self, *args)

    monkeypatch.setattr(train.Updater, "step", interrupted)
    with pytest.raises(SystemExit) as stop:
        train.main([*TINY, "--out", str(tmp_path / "run")])
    assert stop.value.code == 128 + number and len(calls) < 15
    train.main([*TINY, "--out", str(tmp_path / "run")])
    assert_same_run(first_run, tmp_path / "run")


# Dies without a chance to clean up, at the n-th call of the named function.
KILLED = """
import os, sys, train
module, name, count = {where}
original, calls = getattr(module, name), []
def dying(*args, **kwargs):
    calls.append(None)
    if len(calls) == count:
        os.kill(os.getpid(), 9)
    return original(*args, **kwargs)
setattr(module, name, dying)
train.main(sys.argv[1:])
"""


@pytest.mark.parametrize("where", [
    "(os, 'rename', 5)",  # the policy's first checkpoint is written and not yet in place
    "(train.data, 'save_file', 6)",  # in the middle of its second checkpoint
    "(train.shutil, 'rmtree', 1)",  # while an old checkpoint or the base's work is cleaned away
    "(train.Updater, 'step', 13)",  # between checkpoints, with metrics already logged past the last one
    "(train.data, 'write_json', 4)",
])  # fmt: skip
def test_kill_9_at_any_moment_loses_nothing(where, first_run, tmp_path):
    command = [sys.executable, "-c", KILLED.format(where=where), *TINY, "--out", str(tmp_path / "run")]
    killed = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert killed.returncode == -9, killed.stderr
    train.main([*TINY, "--out", str(tmp_path / "run")])
    assert_same_run(first_run, tmp_path / "run")
    assert not list((tmp_path / "run").rglob("saving-*"))


def test_evaluation_swaps_the_audio(first_run, tmp_path, monkeypatch):
    heard, batch = [], data.Split.batch

    def listening(self, model, indices, sounds_of=None):
        heard.append((indices, sounds_of))
        return batch(self, model, indices, sounds_of)

    monkeypatch.setattr(data.Split, "batch", listening)
    rows = synthetic.rows("qa", {"train": 24, "validation": 4, "test": 6}, 0)["test"]
    train.main(["--eval-only", "--out", str(first_run), "--device", "cpu"])
    assert heard == [(list(range(6)), None)] * 2 + [(list(range(6)), data.swap(rows))]


def test_metrics_say_what_to_watch(first_run):
    rows = metrics(first_run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    wanted = set(
        "loss reward reward_std kl clip_fraction ratio ratio_gap grad_norm lr equal_rewards response_length fork_fire "
        "usable_fork_fire".split()
    )
    for row in rows:
        assert wanted <= row.keys() and all(math.isfinite(row[k]) for k in wanted)
        assert row["ratio"] == pytest.approx(1, abs=0.1)  # a mean over all responses: shares add up to 1
        assert row["first_ratio_gap"] < 1e-5  # LoRA's B is no longer zero from the second row on
    assert "validation_bleu" in rows[1] and "validation_bleu" not in rows[0]


def test_a_finished_run_is_not_run_again_and_other_settings_are_refused(first_run, capsys):
    before = (first_run / "policy.jsonl").read_bytes()
    train.main([*TINY, "--out", str(first_run)])
    assert "is finished" in capsys.readouterr().out and (first_run / "policy.jsonl").read_bytes() == before
    with pytest.raises(data.UserError, match=r"(?s)another configuration.*lr: 0.00\d+ there, 0.5 now"):
        train.main([*TINY, "--out", str(first_run), "--lr", "0.5"])
    with pytest.raises(data.UserError, match=r"(?s)base-qa-seed0.*ctc_steps: 3 there, 5 now"):
        train.main([*TINY, "--out", str(first_run.parent / "other"), "--ctc-steps", "5"])


def test_a_folder_serves_one_process_and_is_taken_by_what_trains_there(first_run, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with data.lock(run, wait=False), pytest.raises(data.DataError, match="in use by another process"):
        train.main([*TINY, "--out", str(run)])
    with monkeypatch.context() as broken, pytest.raises(data.UserError, match=r"data.reward gave nan for the answer"):
        broken.setattr(data, "reward", lambda answer, row: math.nan)
        train.main([*TINY, "--lr", "0.1", "--base", base_of(first_run), "--out", str(run)])
    train.main([*TINY, "--base", base_of(first_run), "--out", str(run)])  # nothing had been done there yet
    (run / "results.json").write_text("{")
    with pytest.raises(data.DataError, match=r"results.json cannot be read"):
        train.main([*TINY, "--base", base_of(first_run), "--out", str(run)])


@pytest.mark.parametrize("flags, word", [
    (["--algo", "ppo"], "algo"), (["--no-such-flag"], "no-such-flag"), (["--lr", "fast"], "lr"),
    (["--top-p", "0"], "top_p"),
    (["--prompts", "4", "--update-prompts", "3"], "update_prompts"), (["--responses", "0"], "responses"),
    (["--data", "nowhere"], "train.jsonl"), (["--samples", "3"], "--ask"),
    (["--ask", "nowhere.wav", "What?"], "no finished run"),
])  # fmt: skip
def test_bad_flags_get_one_line_and_exit_code_2(flags, word, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--out", str(tmp_path / "run"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and word in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def by_letters(answer, row):
    """A reward that tells answers apart: the tiny base never earns any BLEU."""
    return sum(map(ord, answer)) % 11 / 11


def record_rollouts(monkeypatch):
    """Every call of the sampler with K > 1: its rollout."""
    rollouts, sample = [], SpeechLM.sample

    def recording(self, prompts, noise, *args):
        rollout = sample(self, prompts, noise, *args)
        if noise.shape[1] > 1:
            rollouts.append(rollout)
        return rollout

    monkeypatch.setattr(SpeechLM, "sample", recording)
    return rollouts


def test_grpo_and_leaf_see_identical_rollouts_and_decode_as_much(first_run, tmp_path, monkeypatch):
    rollouts = record_rollouts(monkeypatch)
    monkeypatch.setattr(data, "reward", by_letters)
    for algo in ("leaf", "grpo"):
        train.main([*TINY, "--algo", algo, "--base", base_of(first_run), "--out", str(tmp_path / algo), "--steps", "2"])
    half = len(rollouts) // 2
    leafs, grpos = rollouts[1:half], rollouts[half + 1 :]  # without the examples shown before training
    assert len(leafs) == len(grpos) and all(a.tokens.shape == b.tokens.shape for a, b in zip(leafs, grpos))
    assert torch.equal(leafs[0].tokens, grpos[0].tokens) and torch.equal(leafs[0].logp, grpos[0].logp)
    first_leaf, first_grpo = metrics(tmp_path / "leaf")[0], metrics(tmp_path / "grpo")[0]
    assert first_leaf["reward"] == first_grpo["reward"] and first_leaf["loss"] != first_grpo["loss"]
    a, b = adapter(tmp_path / "leaf"), adapter(tmp_path / "grpo")
    assert any(not torch.equal(a[k], b[k]) for k in a)


SUFFIXES = ",".join(PLAIN)  # as the paper's runs: the Conformer's feed-forwards are adapted, too


@pytest.mark.parametrize("targets", ["decoder", SUFFIXES])
def test_micro_batches_change_memory_and_nothing_else(targets, first_run, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "reward", by_letters)
    runs = []
    for micro in ("1", "2", "4"):
        flags = ["--steps", "2", "--update-prompts", "4", "--micro-prompts", micro, "--lora-targets", targets]
        train.main([*TINY, "--base", base_of(first_run), "--out", str(tmp_path / micro), *flags])
        runs.append(adapter(tmp_path / micro))
    for other in runs[1:]:
        for name, tensor in runs[0].items():
            torch.testing.assert_close(other[name], tensor, atol=2e-4, rtol=1e-3)
    gradients = [metrics(tmp_path / micro)[0]["grad_norm"] for micro in ("1", "2", "4")]
    assert gradients[0] > 1e-3 and gradients == pytest.approx([gradients[0]] * 3, rel=1e-5)


def test_two_processes_are_one(first_run, tmp_path):
    """Prompts shared out over two processes give the update of one. Stopped in the middle, both save and go on; only
    the first writes."""
    flags = [*TINY, "--steps", "6", "--save-every", "1", "--eval-every", "3", "--base", str(base_of(first_run))]
    one, two = ([*flags, "--out", str(tmp_path / name)] for name in ("one", "two"))
    train.main(one)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *two]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while not (tmp_path / "two/checkpoints/policy/step-000001").exists():
        assert process.poll() is None, process.stdout.read()
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode and 1 <= len(metrics(tmp_path / "two")) < 6
    said = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert said.count("6 steps of") == 1 and said.count("took") == 1
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a.keys() == b.keys()
        for key in ("loss", "reward", "kl", "grad_norm", "response_length", "usable_fork_fire", "equal_rewards", "lr"):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-6), key
    for name, tensor in adapter(tmp_path / "one").items():
        torch.testing.assert_close(adapter(tmp_path / "two")[name], tensor, atol=2e-4, rtol=1e-3)


def test_old_logp_of_the_sampler_is_as_good_as_a_rescoring(first_run, tmp_path):
    """In float32: the same training; the first ratio is 1 to rounding with the sampler's and exactly with --rescore."""
    flags = [*TINY, "--base", str(base_of(first_run)), "--steps", "3", "--update-prompts", "4", "--micro-prompts", "4"]
    for name in ("sampler", "--rescore"):
        train.main([*flags, "--out", str(tmp_path / name), *[name] * name.startswith("--")])
    sampler, rescored = (metrics(tmp_path / name) for name in ("sampler", "--rescore"))
    for a, b in zip(sampler, rescored):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3, abs=1e-5)
        assert a["first_ratio_gap"] < 1e-5 and b["first_ratio_gap"] == 0
    assert any(a["first_ratio_gap"] > 0 for a in sampler)
    for name, tensor in adapter(tmp_path / "sampler").items():
        torch.testing.assert_close(adapter(tmp_path / "--rescore")[name], tensor, atol=2e-4, rtol=1e-3)


def test_nobodys_credit_reaches_another_prompt(first_run, tmp_path, monkeypatch):
    """All responses of one prompt get the same reward: only the others may be credited, and only their own tokens."""
    seen, rewards, policy_loss = [], [], leaf.policy_loss

    def reward(answer, row):
        rewards.append(row["prompt"])
        return 0.5 if row["prompt"].endswith("happened?") else len(rewards) % 7 / 7

    def loss(logp, old_logp, ref_logp, advantages, mask, **settings):
        seen.append((advantages.clone(), mask.clone()))
        return policy_loss(logp, old_logp, ref_logp, advantages, mask, **settings)

    monkeypatch.setattr(data, "reward", reward)
    monkeypatch.setattr(leaf, "policy_loss", loss)
    for algo in ("leaf", "grpo"):
        seen.clear(), rewards.clear()
        train.main([*TINY, "--algo", algo, "--base", base_of(first_run), "--out", str(tmp_path / algo), "--steps", "3",
                    "--eval-every", "0"])  # fmt: skip
        advantages, masks = (torch.cat([F.pad(x, (0, 8 - x.shape[1])) for x in xs]) for xs in zip(*seen))
        training = rewards[6 + 2 * 4 :][
            : 3 * 4 * 4
        ]  # after the base's evaluation (6 rows) and 2 examples of 4 responses
        equal = torch.tensor([p.endswith("happened?") for p in training])
        assert equal.any() and not equal.all() and len(equal) == len(advantages)
        assert not advantages[equal].any() and advantages[~equal].any(1).all()
        assert not advantages[~masks.bool()].any()


@pytest.mark.parametrize("targets", ["decoder", SUFFIXES])
def test_who_runs_with_lora_and_who_with_dropout(targets, first_run, tmp_path, monkeypatch):
    """Rollouts: LoRA on, no dropout. Reference log-probabilities: LoRA off. The update: LoRA on, with its dropout.
    An adapted encoder hears in the same three ways, and no other dropout or BatchNorm is ever in training."""
    modes, train_policy = [], train.train_policy

    def from_here_on(*args):
        modes.clear()  # before that the base was measured, LoRA off
        train_policy(*args)

    def watch(name):
        original = getattr(SpeechLM, name)

        def watching(self, *args, **kwargs):
            layers = list(lora.lora_layers(self).values())
            if layers:
                on = all(x.enabled for x in layers)
                modes.append(((name, torch.is_grad_enabled()), (on, on and all(x.training for x in layers))))
                assert {type(m) for m in self.modules() if m.training} <= {lora.LoRALinear, nn.Dropout}
                assert not any(m.training for m in self.encoder.modules() if type(m) is type(self.encoder.layers[0]))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(SpeechLM, name, watching)

    watch("sample"), watch("response_logp"), watch("encode"), monkeypatch.setattr(train, "train_policy", from_here_on)
    monkeypatch.setattr(data, "reward", by_letters)
    command = [*TINY, "--lora-dropout", "0.5", "--lora-targets", targets, "--base", base_of(first_run)]
    train.main([*command, "--out", str(tmp_path / "run")])
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
    assert rows[0]["first_ratio_gap"] < 1e-5 < rows[3]["first_ratio_gap"]  # B starts at zero: nothing to drop yet
    assert rows[3]["kl"] > 1e-4


@pytest.mark.parametrize("poisoned, survives", [(1, True), (99, False)])
def test_a_non_finite_loss_skips_the_update(poisoned, survives, first_run, tmp_path, monkeypatch, capsys):
    calls, policy_loss = [], leaf.policy_loss

    def loss(*args, **settings):
        calls.append(None)
        value, stats = policy_loss(*args, **settings)
        return (
            (value * math.nan, stats | {"loss": stats["loss"] * math.nan}) if len(calls) <= poisoned else (value, stats)
        )

    monkeypatch.setattr(leaf, "policy_loss", loss)
    command = [*TINY, "--base", base_of(first_run), "--out", str(tmp_path / "run"), "--steps", "6"]
    if survives:
        train.main(command)
        assert all(t.isfinite().all() for t in adapter(tmp_path / "run").values())
    else:
        with pytest.raises(data.UserError, match="10 updates in a row"):
            train.main(command)
    assert "skipped an update" in capsys.readouterr().out


def write_corpus(folder, transcripts=True, rows=12):
    """A corpus of short tones at 16 kHz; the reference names the tone."""
    folder.mkdir()
    for split in ("train", "validation", "test"):
        lines = []
        for i in range(rows):
            time = torch.arange(6400 + 160 * i) / 16000
            soundfile.write(
                folder / f"{split}{i}.wav", (0.3 * torch.sin(2 * math.pi * 300 * (1 + i % 3) * time)).numpy(), 16000
            )
            row = {
                "audio": f"{split}{i}.wav",
                "prompt": "<|audio|>Which tone?",
                "reference": f"Tone {'abc'[i % 3]} it is.",
            }
            lines.append(json.dumps(row | ({"transcript": "abc"[i % 3], "group": "g"} if transcripts else {})))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("transcripts", [True, False])
def test_a_corpus_of_ones_own(transcripts, tmp_path, capsys):
    corpus = write_corpus(tmp_path / "tones", transcripts)
    train.main([*TINY, "--train-rows", "2", "--data", str(corpus), "--out", str(tmp_path / "run")])
    out = capsys.readouterr().out
    assert "tones: 12 train, 4 validation, 6 test rows" in out  # the first is not limited
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    before, after = results["base"]["mean reward x100"], results["trained"]["mean reward x100"]
    assert f"mean reward x100 {before:15.2f} {after:9.2f} {after - before:+11.2f}".split() == next(
        line.split() for line in out.splitlines() if line.startswith("mean reward")
    )
    assert ("CTC is skipped" in out) != transcripts and ("BLEU greedy, g" in out) == transcripts
    assert (tmp_path / "base-tones-seed0" / "ctc.jsonl").exists() == transcripts
    train.main(["--ask", str(corpus / "test0.wav"), "Which tone?", "--out", str(tmp_path / "run"), "--device", "cpu"])


def test_a_bad_corpus_is_refused_whole(tmp_path, capsys):
    """Every bad row is counted, nothing is written; --skip-bad-rows goes on without them and says how many."""
    corpus = write_corpus(tmp_path / "tones")
    lines = (corpus / "train.jsonl").read_text().splitlines()
    (corpus / "train.jsonl").write_text(
        "\n".join(lines + ['{"audio": "gone.wav", "prompt": "<|audio|>?", "reference": "x"}', "{"])
    )
    command = [*TINY, "--data", str(corpus), "--out", str(tmp_path / "run")]
    with pytest.raises(data.DataError, match=r"(?s)2 bad rows.*train.jsonl, line 13: .*gone.wav.*line 14: not JSON"):
        train.main(command)
    assert {p.name for p in tmp_path.iterdir()} == {"tones"}
    train.main([*command, "--skip-bad-rows"])
    assert "skipping 2 bad rows" in capsys.readouterr().out
    (corpus / "validation.jsonl").write_text("\n")
    with pytest.raises(data.DataError, match="validation.jsonl has no rows"):
        train.main([*TINY, "--data", str(corpus), "--out", str(tmp_path / "other")])
    (corpus / "validation.jsonl").unlink()
    with pytest.raises(data.DataError, match="validation.jsonl is missing"):
        train.main([*TINY, "--data", str(corpus), "--out", str(tmp_path / "other")])


def test_ask_answers_and_draws_the_tree(first_run, capsys):
    command = ["--ask", str(first_run / "example.wav"), "What happened?", "--out", str(first_run), "--device", "cpu"]
    train.main(command)
    answer = capsys.readouterr().out
    train.main([*command, "--samples", "4", "--reference", "Anna bought the two red apples at the market on Monday."])
    tree = capsys.readouterr().out
    assert tree.startswith(answer) and "root  n=4  V=" in tree and "boundaries [" in tree
    assert sum("response" in line and "r=" in line for line in tree.splitlines()) == 4
    with pytest.raises(data.DataError, match="missing.wav"):
        train.main(["--ask", "missing.wav", "What?", "--out", str(first_run), "--device", "cpu"])


def test_an_encoder_with_lora_is_trained_and_never_heard_stale(first_run, tmp_path, monkeypatch):
    """Its adapters move, and after that sampler and scorer still agree: both hear with the encoder as it is."""
    monkeypatch.setattr(data, "reward", by_letters)
    command = [*TINY, "--lora-targets", SUFFIXES, "--base", base_of(first_run), "--lr", "0.02", "--out"]
    train.main([*command, str(tmp_path / "run")])
    moved = [t.abs().max() for name, t in adapter(tmp_path / "run").items() if "encoder" in name and "lora_B" in name]
    assert len(moved) == 16 and min(moved) > 1e-4
    assert all(row["first_ratio_gap"] < 1e-5 for row in metrics(tmp_path / "run"))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    base = json.loads((first_run / "results.json").read_text())["base"]
    assert all(results["base"][k] == v for k, v in base.items() if "reward" not in k)  # measured with LoRA off


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_checkpoint_is_trained_evaluated_and_goes_on(released, first_run, tmp_path, monkeypatch, capsys):
    """--init with its chat and its LoRA merged; a run that was stopped; --resume-adapter; --eval-only on both."""
    folder, _, _ = released
    monkeypatch.setattr(data, "reward", by_letters)
    corpus = write_corpus(tmp_path / "tones")
    command = [
        *TINY,
        "--init",
        str(folder),
        "--data",
        str(corpus),
        "--lora-targets",
        SUFFIXES,
        "--system-prompt",
        "Hm.",
        "--lr",
        "0.05",
    ]
    train.main([*command, "--out", str(tmp_path / "whole"), "--eval-passes", "2"])
    assert {"base-tones-seed0", "whole-training"}.isdisjoint(p.name for p in tmp_path.iterdir())
    results = json.loads((tmp_path / "whole" / "results.json").read_text())

    # The base column is the checkpoint's own, the trained one the run's; predictions are a judge's to read.
    train.main([*command, "--eval-only", "--eval-passes", "2", "--out", str(tmp_path / "base")])
    base = json.loads((tmp_path / "base" / "evaluation-tones.json").read_text())
    train.main(["--eval-only", "--out", str(tmp_path / "whole"), "--device", "cpu"])
    trained = json.loads((tmp_path / "whole" / "evaluation-tones.json").read_text())
    for name, value in results["trained"].items():
        assert (base[name], trained[name]) == (results["base"][name], value), name
    lines = (tmp_path / "whole" / "predictions-tones.jsonl").read_text().splitlines()
    assert lines == (tmp_path / "whole" / "predictions-trained.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 6 and all(len(row["sampled"]) == 2 for row in rows)
    assert [row["reference"] for row in rows] == [f"Tone {'abc'[i % 3]} it is." for i in range(6)]

    # What was answered is what the model says, with the adapter on the right base.
    cfg = train.Config(init=str(folder), system_prompt="Hm.", max_new_tokens=8)
    test = data.Split("test", data.load_corpus(corpus, 30.0, False, ("test",))["test"][:6], 1.0)
    for adapter_folder, file in (("", "base"), (tmp_path / "whole" / "adapter", "trained")):
        model, tokenizer = train.load(cfg, torch.device("cpu"), torch.float32, adapter_folder)
        assert tokenizer.system[0]["content"] == "Hm." and not any(m.training for m in model.modules())
        test.frames = None  # of the other model
        test.project(model, tokenizer)
        lines = (tmp_path / "whole" / f"predictions-{file}.jsonl").read_text().splitlines()
        greedy = [json.loads(line)["greedy"] for line in lines]
        assert greedy == train.answer(model, tokenizer, test, cfg)
        train.main(
            ["--ask", str(corpus / "test0.wav"), "Which tone?", "--out", str(tmp_path / "whole"), "--device", "cpu"]
        )
        assert (capsys.readouterr().out.rstrip("\n").endswith(greedy[0].rstrip("\n"))) == (file == "trained")
    same(test.batch(model, [2, 0], [0, 2]).x, test.batch(model, [0, 2]).x[[0, 1]])  # one question; the other's audio
    half, _ = train.load(cfg, torch.device("cpu"), torch.bfloat16)
    assert half.dtype == half.projector.query.dtype == torch.bfloat16

    # Its settings are the run's unless given; a checkpoint without --out has a folder of its own.
    train.main(
        ["--eval-only", "--out", str(tmp_path / "whole"), "--device", "cpu", "--test-rows", "3", "--eval-passes", "1"]
    )
    some = json.loads((tmp_path / "whole" / "evaluation-tones.json").read_text())
    assert (some["test_rows"], some["config"]["eval_passes"], some["config"]["lora_r"]) == (3, 1, 4)
    monkeypatch.chdir(tmp_path)
    calls, sample = [], SpeechLM.sample

    def recording(self, prompts, noise, eos_id, *how):
        calls.append((how, noise.sum().item()))
        return sample(self, prompts, noise, eos_id, *how)

    monkeypatch.setattr(SpeechLM, "sample", recording)
    train.main([*command, "--eval-only", "--eval-passes", "3", "--resume-adapter", str(tmp_path / "whole" / "adapter")])
    monkeypatch.setattr(SpeechLM, "sample", sample)
    again = json.loads((tmp_path / "runs" / f"tones-{folder.name}-evaluation" / "evaluation-tones.json").read_text())
    assert again["BLEU greedy"] == trained["BLEU greedy"] and again["exact match %"] == trained["exact match %"]
    assert [how for how, _ in calls] == [(0.0, 1.0)] + [(0.9, 0.9)] * 3 and len(set(calls)) == 4  # each its own noise
    greedy = [
        json.loads(x)["greedy"]
        for x in (tmp_path / f"runs/tones-{folder.name}-evaluation/predictions-tones.jsonl").open()
    ]
    assert greedy == [row["greedy"] for row in rows]
    (corpus / "train.jsonl").rename(corpus / "kept")  # only the test split is asked for
    train.main(["--eval-only", "--out", str(tmp_path / "whole"), "--device", "cpu", "--eval-passes", "1"])
    (corpus / "kept").rename(corpus / "train.jsonl")

    # An adapter goes on from where it was, with its own settings.
    train.main([*command, "--resume-adapter", str(tmp_path / "whole" / "adapter"), "--lora-r", "9", "--lr", "0",
                "--out", str(tmp_path / "more"), "--eval-passes", "2"])  # fmt: skip
    same(adapter(tmp_path / "more"), adapter(tmp_path / "whole"))
    more = json.loads((tmp_path / "more" / "results.json").read_text())
    assert more["base"] == results["base"] and more["trained"] == results["trained"]
    config = json.loads((tmp_path / "more" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["target_modules"]) == (4, PLAIN)
    train.main(["--ask", str(corpus / "test0.wav"), "Which tone?", "--out", str(tmp_path / "more"), "--device", "cpu"])

    # Mistakes get one line.
    for flags, words in (
        (["--init", str(corpus)], "no folder with a checkpoint"),
        (["--eval-only", "--init", "", "--out", str(tmp_path / "z")], "no finished run"),
        (["--lora-targets", "nothing", "--out", str(tmp_path / "x")], "no linear layer matches"),
        (["--resume-adapter", str(first_run / "adapter"), "--out", str(tmp_path / "y")], "does not fit the model"),
    ):
        with pytest.raises(data.UserError, match=words):
            train.main([*command, *flags])
    with pytest.raises(SystemExit):
        train.main([*command, "--base", str(tmp_path / "b")])


def test_which_model_is_meant(first_run, tmp_path, monkeypatch):
    """A run by its --out, wherever one stands; a checkpoint otherwise."""
    monkeypatch.chdir(tmp_path)
    own = str(first_run / "adapter")
    checkpoint, _ = train.parse(["--eval-only", "--init", "ck", "--data", "d"])
    assert (checkpoint.init, checkpoint.resume_adapter, str(checkpoint.run_folder)) == (
        "ck",
        "",
        "runs/d-ck-evaluation",
    )
    base, _ = train.parse(["--eval-only", "--base", base_of(first_run)])
    assert (base.base, base.resume_adapter, base.out) == (base_of(first_run), "", "runs/qa-base-qa-seed0-evaluation")
    for flags in (["--out", str(first_run)], ["--out", str(first_run), "--base", base_of(first_run)]):
        for action in (["--eval-only"], ["--ask", "x.wav", "What?"]):
            cfg, _ = train.parse([*action, *flags])
            assert cfg.resume_adapter == own and cfg.lora_r == 4 and cfg.base_folder.samefile(base_of(first_run))
    for flags in (["--eval-only"], ["--ask", "x.wav", "?", "--init", "ck"], ["--ask", "x.wav", "?", "--base", "b"]):
        with pytest.raises(data.UserError, match="no finished run"):
            train.parse(flags)
    with pytest.raises(SystemExit):
        train.parse(["--init", "a", "--base", "b"])
    config = json.loads((first_run / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base_of(first_run)
    seen, ours = [], train.answer
    monkeypatch.setattr(train, "answer", lambda model, *rest: seen.append(model) or ours(model, *rest))
    train.main(["--ask", str(first_run / "example.wav"), "What?", "--out", str(first_run), "--device", "cpu"])
    assert all(layer.lora_B.any() for layer in lora.lora_layers(seen[0]).values()) and lora.lora_layers(seen[0])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_run_on_a_checkpoint_is_found_from_elsewhere(released, tmp_path, monkeypatch):
    """Its checkpoint by the run folder and not by the working directory; no split but test is needed."""
    folder, _, _ = released
    os.symlink(folder, tmp_path / "ck")
    corpus = write_corpus(tmp_path / "tones")
    monkeypatch.chdir(tmp_path)
    train.main([*TINY, "--init", "ck", "--data", str(corpus), "--out", "run", "--steps", "1", "--eval-every", "0"])
    (corpus / "train.jsonl").unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    train.main(["--eval-only", "--out", str(tmp_path / "run"), "--device", "cpu"])
    results, again = (json.loads((tmp_path / "run" / f"{n}.json").read_text()) for n in ("results", "evaluation-tones"))
    assert all(again[name] == value for name, value in results["trained"].items())


def test_a_run_is_evaluated_with_what_it_learned(first_run, tmp_path):
    """Its own command with --eval-only, --resume-adapter included, means the run; unfinished, it is refused."""
    command = [*TINY, "--base", base_of(first_run), "--resume-adapter", str(first_run / "adapter")]
    cfg, _ = train.parse([*command, "--out", str(first_run), "--eval-only"])
    assert cfg.resume_adapter == str(first_run / "adapter")
    cfg, _ = train.parse([*command[:-1], "elsewhere", "--out", str(first_run), "--eval-only"])
    assert cfg.resume_adapter == str(first_run / "adapter")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(data.UserError, match="unfinished"):
        train.parse([*command, "--out", str(tmp_path), "--eval-only"])
    outs = {train.parse(["--eval-only", "--init", ck, "--data", "d"])[0].out for ck in ("a", "b")}
    assert len(outs) == 2  # the second checkpoint's figures do not replace the first's


def test_a_moved_base_gets_one_line(first_run, tmp_path):
    with pytest.raises(data.UserError, match=r"tokenizer.json"):
        train.main(
            ["--ask", "x.wav", "?", "--out", str(first_run), "--base", str(tmp_path / "gone"), "--device", "cpu"]
        )


def test_order_and_swap():
    assert sorted(data.order(10, [0], 0, 10)) == list(range(10)) and sorted(data.order(10, [0], 10, 10)) == list(
        range(10)
    )
    assert data.order(10, [0], 0, 25)[7:25] == data.order(10, [0], 7, 18) and data.order(10, [0], 0, 10) != data.order(
        10, [1], 0, 10
    )
    rows = [{"prompt": p} for p in "abaabcb"]
    other = data.swap(rows)
    assert sorted(other) == list(range(7)) and all(rows[i]["prompt"] == rows[j]["prompt"] for i, j in enumerate(other))
    assert [i for i, j in enumerate(other) if i == j] == [5]  # the only row of its prompt


def test_noise_is_keyed_by_prompt_and_response():
    u = data.noise([3, 1], [5, 9], 4, 6, "cpu")
    assert torch.equal(u[1:, :2], data.noise([3, 1], [9], 2, 6, "cpu")) and u.unique().numel() == 48
    assert not torch.equal(u, data.noise([3, 2], [5, 9], 4, 6, "cpu"))


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    rates = [leaf.learning_rate(2.0, 0.1, 0.1, p) for p in (0.05, 0.1, 0.55, 1.0)]
    assert rates == pytest.approx([1.0, 2.0, 2.0 * (0.1 + 0.9 * 0.5), 0.2])


# ---- experiments/ ---------------------------------------------------------------------------------------------------


def test_intervals_are_students_over_bases():
    """The quantiles against the density itself; ten runs of one base count as one."""
    for df, quantile in enumerate(compare.T, 1):
        x = torch.linspace(0, quantile, 20001, dtype=torch.float64)
        log_scale = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
        density = math.exp(log_scale) * (1 + x**2 / df) ** (-(df + 1) / 2)
        assert 0.5 + torch.trapezoid(density, x).item() == pytest.approx(0.975, abs=3e-5)
    assert compare.student(3) == compare.T[2] and compare.student(31) == 1.96
    mean, half = compare.interval({0: [1.0] * 10, 1: [2.0], 2: [2.5, 3.5], 3: [4.0]})
    assert (mean, half) == pytest.approx((2.5, compare.student(3) * math.sqrt(5 / 3) / 2))


def a_result(method, base, seed, score, stage="main", **more):
    return {"stage": stage, "task": "qa", "method": method, "base": base, "seed": seed, "lr": 1e-3, **more} | {
        "test": {m: score for m in compare.METRICS}
    }


def test_differences_are_paired_by_base_and_seed():
    rng, lines = random.Random(0), []
    for base, seed in itertools.product(range(4), range(5)):
        luck = rng.uniform(0, 50)  # what a base and a seed bring cancels
        lines += [a_result("LEAF", base, seed, luck + 2 + base), a_result(compare.BASELINE, base, seed, luck)]
    lines.append(a_result("LEAF", 0, 77, 1e6))  # without a partner
    rng.shuffle(lines)
    runs = {(r["task"], r["method"], r["base"], r["seed"]): r for r in lines}
    half = compare.student(3) * math.sqrt(5 / 3) / 2
    found = compare.paired(runs, "qa", "LEAF", compare.BASELINE, compare.METRICS[0])
    assert found == f"+3.50 ± {half:.2f}"


def test_the_best_rate_is_the_best_mean_at_the_end():
    at_end = {1e-3: (50, 60), 2e-3: (40, 71), 4e-3: (80, 20)}
    runs = [
        {"task": "qa", "method": "LEAF", "lr": lr, "validation": {"25": 99.0, "50": float(score)}}
        for lr, scores in at_end.items()
        for score in scores
    ]
    assert compare.best_rates(runs, 2) == {("qa", "LEAF"): [2e-3, 1e-3]}
    runs += [runs[0], runs[1]]  # run again, as the two best are: a rate tried less often is out
    assert compare.best_rates(runs, 1) == {("qa", "LEAF"): [1e-3]}


def test_forks_are_counted_by_phase_and_place():
    rng = random.Random(1)
    forks = [
        [
            dict(place=rng.random() * 1.2, fires=rng.random() < 0.5, usable=False, group_size=3, reward_spread=0.5)
            for _ in range(rng.randint(0, 3))
        ]
        for _ in range(200)
    ]
    cells = {(c["phase"], c["place"]): c for c in compare.forkability(forks)}
    assert sum(c["boundaries"] for c in cells.values()) == sum(map(len, forks))
    third = [f for report in forks[80:120] for f in report if 0.25 <= f["place"] < 0.5]  # phase 2 of 5, place 1 of 4
    assert cells[2, 1]["boundaries"] == len(third)
    assert cells[2, 1]["fires"] == pytest.approx(fmean(f["fires"] for f in third), abs=1e-4)


def test_a_comparison_pairs_its_runs_and_tests_what_it_reports(tmp_path, monkeypatch):
    """In miniature: bases, rates on validation alone, then LEAF and GRPO from the same rollouts; a line for each."""
    tiny = dict(train_rows=24, validation_rows=4, test_rows=6, ctc_steps=1, sft_steps=2, base_batch=4, eval_passes=1)
    loop = dict(steps=4, prompts=2, responses=4, update_prompts=1, eval_every=2, max_new_tokens=6, device="cpu")
    monkeypatch.setattr(compare, "RUN", tiny | loop)
    monkeypatch.setattr(compare, "BASES", range(1))
    monkeypatch.setitem(compare.RATES, "qa", (1e-3, 2e-3))
    args = types.SimpleNamespace(out=tmp_path, tasks=["qa"], corpus=None, ablation_seeds=1, lr=None)
    with pytest.raises(data.UserError, match="run the stage rates"):
        compare.missing(args, "main")
    compare.make_base(args, "qa", 0)
    with monkeypatch.context() as m:
        m.setattr(train, "evaluate", lambda *_: pytest.fail("the test split was touched to choose a learning rate"))
        for job in (job for stage in ("rates", "finals") for job in compare.plan(args, stage)):
            compare.run(args, *job)
    assert len(compare.finished(args, "rates")) == 2 * len(compare.COMPARED)
    assert len(compare.finished(args, "finals")) == 2 * len(compare.COMPARED)
    final = next((tmp_path / "finals").glob("*.json"))
    final.rename(tmp_path / "away")
    with pytest.raises(data.UserError, match="run the stage finals"):
        compare.missing(args, "main")
    (tmp_path / "away").rename(final)
    jobs = [job for job in compare.missing(args, "main") if job[4] == 3]
    assert [job[2] for job in jobs] == list(compare.COMPARED)
    asked = compare.plan(types.SimpleNamespace(**vars(args) | {"lr": 5e-4}), "main")
    assert asked == [(*job[:-1], 5e-4) for job in compare.plan(args, "main")]
    for job in jobs:
        compare.run(args, *job)
    leaf_run, *grpo_runs = sorted(compare.finished(args, "main"), key=lambda r: r["method"] != "LEAF")
    assert all("BLEU greedy" in r["test"] for r in (leaf_run, *grpo_runs))
    assert {r["curves"]["reward"][0] for r in grpo_runs} == {leaf_run["curves"]["reward"][0]}  # before any update
    assert [f.name for f in (tmp_path / "main").iterdir() if f.is_dir()] == []
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    compare.keep(args)
    lines = [json.loads(line) for line in (tmp_path / "compare.jsonl").read_text().splitlines()]
    compare.report(lines)
    made = {f"{name}.{kind}" for name in ("compare", "forks") for kind in ("png", "svg")}
    assert made <= {f.name for f in tmp_path.iterdir()} and "| qa | LEAF |" in (tmp_path / "compare.md").read_text()


def test_every_method_of_the_comparison_is_flags_of_train():
    """And gives credit that differs from LEAF's on rollouts where it can."""
    rng, seen = random.Random(2), set()
    for method, flags in compare.ALL.items():
        cfg = train.Config(**flags)
        assert cfg.prompts * cfg.responses == 64 and cfg.prompts == 2 * cfg.update_prompts, method
        rng.seed(2)
        torch.manual_seed(0)
        rows = [[rng.randint(1, 2) for _ in range(20)] for _ in range(6)]
        tokens, lengths = pack([[1] * 6 + row for row in rows] + [[1] * 6 + rows[0][:10] + [2] * 10] * 2)
        surprisal = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(3))
        advantages, _ = train.credit(cfg, tokens, lengths, surprisal, [rng.random() for _ in lengths])
        if ", K" not in method:
            seen.add(tuple(advantages.flatten().tolist()))
    assert len(seen) == len(compare.METHODS)


def test_the_microscopes_statistics_are_those_of_all_pairs():
    """SNR and the mean gradient's cosine from sums over blocks, against every pair of batches written out."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(2, 30, generator=generator) * 0.1 + torch.arange(30.0)
    target = credit.Target.of(truth)
    assert target.norm**2 == pytest.approx(float(truth[0] @ truth[1])) and torch.equal(target.mean, truth.mean(0))
    gradients = torch.randn(60, 30, generator=generator) * 9 + torch.arange(30.0)
    sums = credit.Sums(60, [target])
    for n, g in enumerate(gradients):
        sums.add(n, g)
    for left_out, (snr, bias) in zip((None, *range(credit.BLOCKS)), sums.whole()):
        kept = gradients[torch.from_numpy(sums.member != left_out)]
        products, n = kept @ kept.T, len(kept)
        square = float(products.sum() - products.trace()) / n / (n - 1)
        assert snr == pytest.approx(square / (float(products.trace()) / n - square), rel=1e-4)
        assert bias == pytest.approx(float(kept.mean(0) @ target.mean) / square**0.5 / target.norm, rel=1e-4)
    assert sums.cosines()[3, 0] == pytest.approx(float(gradients[3] @ target.mean / gradients[3].norm()) / target.norm)


def test_boundaries_near_decisions_are_counted_over_prompts():
    shares = credit.summarise_landings([[0, 2, None], [0, -1]])
    assert [x["value"] for x in shares.values()] == pytest.approx([2 / 5, 1 / 5, 3 / 4])
    assert shares["mean distance"]["ci"] == pytest.approx([1 / 2, 1])  # the prompts on their own
    alike = credit.summarise_landings([[0, 1, None]] * 5)
    assert all(x["ci"] == [x["value"]] * 2 for x in alike.values())


def test_the_microscope_weighs_tokens_as_the_loss_does():
    """In the training setting, weight times advantage is the gradient of the trainer's loss at ratio 1 without KL."""
    lengths = torch.tensor([[1, 4, 3], [5, 2, 2]])
    shape = (2, 3, 5)
    logp, advantages = torch.randn(shape, requires_grad=True), torch.randn(shape)
    rollout = Rollout(torch.zeros(shape, dtype=torch.int64), lengths, *torch.zeros(2, *shape))
    batch = credit.Batch([], [], None, rollout, [])
    flat = (x.flatten(0, 1) for x in (logp, logp.detach(), logp.detach(), advantages, rollout.mask))
    loss, _ = leaf.policy_loss(*flat, kl_coef=0.0)
    (gradient,) = torch.autograd.grad(-loss, logp)
    assert torch.allclose(batch.weight(credit.SETTINGS["training"]) * advantages, gradient, atol=1e-7)
    summed = batch.weight(credit.SETTINGS["exact"])
    assert torch.equal(summed, rollout.mask / 6)


def test_a_fully_trained_model_has_its_own_past_as_reference():
    """Inside, the values of when it was made; outside, the trained ones in the same storage, whatever happened."""
    model = nn.Linear(3, 2)
    parameters = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    reference = large.held(parameters)
    with torch.no_grad():
        for p in parameters.values():
            p.add_(1)
    storage = [p.data_ptr() for p in parameters.values()]
    with pytest.raises(ZeroDivisionError), reference(model):
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        1 / 0
    assert [p.data_ptr() for p in parameters.values()] == storage
    assert all(torch.equal(p, before[name] + 1) for name, p in model.named_parameters())


def test_intervals_of_one_base_are_over_seeds_and_of_several_over_bases():
    one = large.interval({(0, seed): float(seed) for seed in range(3)})
    assert (one["mean"], one["units"]) == (1, 3) and one["half_width_95"] == pytest.approx(compare.student(2) / 3**0.5)
    several = large.interval({(base, seed): base + 10.0 * seed for base in range(2) for seed in range(3)})
    assert (several["mean"], several["units"]) == (10.5, 2)
    assert several["half_width_95"] == pytest.approx(compare.student(1) * 0.5)
