"""The tests of the five files, in their order: leaf.py, model.py, lora.py, data.py, train.py.

    pytest test_leaf.py    these
    pytest                 these, and those beside corpora, released, tools and experiments

Every result is held against something independent: brute force, transformers, PEFT, torchaudio,
sacrebleu, or the same computation done the slow way. A few minutes on two CPU cores; no network.
"""

import contextlib
import errno
import gzip
import io
import itertools
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import timeit
import types
import warnings
from dataclasses import asdict, fields
from fractions import Fraction
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
import sentencepiece
import soundfile
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
from torch.utils.data import DataLoader

import data
import leaf
import lora
import train
from corpora import load, synthetic
from data import AUDIO
from model import (
    DecodingCache,
    EncoderConfig,
    MaskedBatchNorm,
    ProjectorConfig,
    PromptCache,
    Prompts,
    Sampling,
    SpeechConfig,
    SpeechLM,
    TextConfig,
    draw_token,
    pad_ragged,
)
from pretrain import init_weights
from released import load_model
from released.config import from_dict
from upkeep import checkpoints
from upkeep.checkpoints import load_checkpoint, save_checkpoint, saved_steps
from upkeep.errors import DataError, UserError
from upkeep.files import lock, read_json
from upkeep.machine import choose_device, peak_memory
from upkeep.optim import Updater, learning_rate
from upkeep.tensors import our_name, transformers_name

os.environ["HF_HUB_OFFLINE"] = "1"  # PEFT would ask its hub about the base model
ROOT = Path(train.__file__).resolve().parent
torch.set_num_threads(1)  # tensors here are tiny: a second thread would only be waited for

EOS = 0
V = 23  # vocabulary of the models here, and the audio token's id

near = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
roughly = partial(near, atol=1e-4, rtol=1e-4)
same = partial(near, atol=0, rtol=0)


def rand(*shape, seed=0, kind=torch.rand):
    return kind(shape, generator=torch.Generator().manual_seed(seed))


randn = partial(rand, kind=torch.randn)


@pytest.fixture(autouse=True)
def seeded():
    """What a test finds must not depend on which tests ran before it."""
    torch.manual_seed(0)


# --------------------------------------------------------------------------------------------------
# leaf.py: boundaries, tree, credit, GRPO, loss, fork statistics


def pad_responses(responses, width=None, pad=EOS):
    """Lists of token ids -> tokens (K, T), lengths (K,)."""
    width = max(map(len, responses)) if width is None else width
    rows = [list(o) + [pad] * (width - len(o)) for o in responses]
    tokens = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), width)
    return tokens, torch.tensor([len(o) for o in responses])


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
    """Boundaries, tree, credit and fork statistics of 3000 small groups."""
    rng = random.Random(0)
    for case in range(3000):
        responses, tokens, lengths, s, rewards = random_group(rng)
        B = rng.randint(0, 5)
        given = None  # the boundaries handed to leaf_advantages, or none: those it selects
        T = tokens.shape[1]
        terms = rng.choice(["both", "global", "local"])
        flags = {"terms": terms, "multiplicity": rng.random() < 0.6}
        where = f"case {case}: {responses}, {s.tolist()}, {rewards.tolist()}, {B=}, {flags}"
        bounds = slow_boundaries(responses, s, B)
        assert leaf.select_boundaries(s, lengths, B) == bounds, where
        if rng.random() < 0.3:  # any others, [] among them
            given = bounds = sorted(rng.sample(range(1, T + 1), rng.randint(0, min(3, T))))
        groups = [(b, g) for b in bounds for g in slow_groups(responses, b)]
        tree = leaf.build_tree(tokens, lengths, rewards, bounds)
        assert [(v.boundary, [int(i) for i in v.members]) for v in tree] == groups, where
        assert [v.value for v in tree] == pytest.approx(
            [rewards[g].double().mean().item() for _, g in groups]
        ), where
        A = leaf.leaf_advantages(tokens, lengths, s, rewards, B, boundaries=given, **flags)
        raw = leaf.token_credits(leaf.span_credits(lengths, rewards, tree, **flags), tokens)
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
            assert leaf.grpo_advantages(rewards, lengths, std_floor=0.0).abs().max() < 1e-6


def test_leaf_degenerate_groups_are_defined():
    """K = 1, empty responses, no tokens at all, identical responses, B = 0, rewards closer than
    the std's floor."""

    def credit(responses, rewards, B=2):
        tokens, lengths = pad_responses(responses)
        rewards = torch.tensor(rewards)
        A = leaf.leaf_advantages(tokens, lengths, torch.ones(tokens.shape), rewards, B)
        assert A.shape == leaf.grpo_advantages(rewards, lengths).shape == tokens.shape
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
        expected = leaf.grpo_advantages(rewards, lengths, std_floor=1.0)
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
    below_a_third = np.array([0.1, 0.2, 0.15, 0.3])  # their std
    above_a_third = np.array([0.0, 1.0, 1.0, 0.0])
    for r in (below_a_third, above_a_third):
        for kw in ({}, {"std_floor": 0.0}, {"std_floor": 0.05}):
            a = (r - r.mean()) / (max(r.std(ddof=1), kw.get("std_floor", 1 / 3)) + 1e-6)
            A = leaf.grpo_advantages(torch.tensor(r).float(), lengths, **kw)
            want = torch.tensor(a)[:, None] * token_mask(lengths, 3)
            torch.testing.assert_close(A.double(), want, atol=1e-6, rtol=1e-5)
            assert not leaf.grpo_advantages(torch.tensor([0.8]), torch.tensor([2]), **kw).any()


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
# model.py: parity with transformers, padding, sampling, scoring, files


@torch.no_grad()
def shake(net, scale=0.1):
    """Every weight and running statistic away from its initial value, so that none is ignored
    unnoticed."""
    for seed, p in enumerate(net.parameters()):
        p += scale * randn(*p.shape, seed=seed)
    for seed, (name, b) in enumerate(net.named_buffers()):
        b.copy_(rand(*b.shape, seed=seed) + 0.5 if "running" in name else b)
    return net.eval()


def odd_config(seed):
    """Odd sizes and no multiplier at 1. Four seeds: 1 to 4 encoder layers; GQA, MHA, one KV
    head; tied and untied."""
    tied = seed % 2 == 1
    context = 9 + 7 * seed
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
    return shake(init_weights(SpeechLM(odd_config(seed)), 0), scale)


def make_transformers(seed, folder, max_shard_size="1GB"):
    """The same in transformers, saved under folder as IBM publishes it. Their Granite Speech
    forgets logits_scaling."""
    hf = pytest.importorskip("transformers")
    config = asdict(odd_config(seed))
    config["projector_config"] |= {"model_type": "blip_2_qformer", "vocab_size": 1}
    text = {k: v for k, v in config["text_config"].items() if v is not None}  # head_dim
    text |= {"model_type": "granite", "pad_token_id": 0, "tie_word_embeddings": seed % 2 == 1}
    config["text_config"] = text
    torch.manual_seed(seed)
    config = hf.GraniteSpeechConfig(**config, has_lora_adapter=False)
    theirs = shake(hf.GraniteSpeechForConditionalGeneration(config), 0.3)
    theirs.generation_config.eos_token_id = None
    theirs.save_pretrained(folder, max_shard_size=max_shard_size)
    return theirs


def their_logits(theirs, mel):
    """Ids and logits of 4 <audio> 5 6."""
    c = theirs.config
    windows = math.ceil(mel.shape[1] / c.window_size)
    audio = [V] * (windows * (c.window_size // c.downsample_rate))
    ids = torch.tensor([[4, *audio, 5, 6]] * len(mel))
    return ids, theirs(input_ids=ids, input_features=mel).logits / c.text_config.logits_scaling


def their_decoder(theirs):
    """Their decoder as GraniteForCausalLM, which does divide by logits_scaling."""
    model = pytest.importorskip("transformers").GraniteForCausalLM(theirs.config.text_config).eval()
    model.model = theirs.model.language_model
    model.lm_head = theirs.lm_head
    return model


def rms_norm(x, layer):
    """nn.RMSNorm by its formula."""
    mean_square = x.float().square().mean(-1, keepdim=True)
    return (x.float() * (mean_square + layer.eps).rsqrt()).to(x.dtype) * layer.weight


def turn(x, angle):
    """Rotary positions: x (B, S, H, D) as D / 2 complex numbers, turned by angle (S, D / 2)."""
    real, imaginary = x.float().chunk(2, dim=-1)
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)


def causal_logits(model, x):
    """Logits for embeddings (B, S, C) as plain causal sequences, written out from the layers'
    weights: nothing of model.py's decoder runs but its linear layers, which may have LoRA."""
    text = model.config.text_config
    decoder = model.language_model.model
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    D = text.head_dim or text.hidden_size // heads
    S = x.shape[1]
    future = torch.ones(S, S).triu(1) > 0
    angle = torch.arange(S)[:, None] * text.rope_theta ** (-torch.arange(0, D, 2) / D)
    x = x * text.embedding_multiplier
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        normed = rms_norm(x, layer.input_layernorm)
        q = turn(attention.q_proj(normed).unflatten(-1, (heads, D)), angle)
        k = turn(attention.k_proj(normed).unflatten(-1, (kv_heads, D)), angle)
        v = attention.v_proj(normed).unflatten(-1, (kv_heads, D))
        k = k.repeat_interleave(heads // kv_heads, dim=2)
        v = v.repeat_interleave(heads // kv_heads, dim=2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * text.attention_multiplier
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        found = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)
        x = x + text.residual_multiplier * attention.o_proj(found)
        normed = rms_norm(x, layer.post_attention_layernorm)
        gate = mlp.gate_proj(normed)
        x = x + text.residual_multiplier * mlp.down_proj(
            gate * gate.sigmoid() * mlp.up_proj(normed)
        )
    hidden = rms_norm(x, decoder.norm)
    if text_head := getattr(model.language_model, "lm_head", None):
        return text_head(hidden).float() / text.logits_scaling
    return (hidden @ decoder.embed_tokens.weight.T).float() / text.logits_scaling


def score_alone(model, x, tokens):
    """Logits (T, V) that predict each token of one response (T,) after one prompt (L, C); their
    log-probabilities."""
    sequence = torch.cat((x, model.language_model.model.embed_tokens(tokens)))
    logits = causal_logits(model, sequence[None])[0, len(x) - 1 : -1]
    return logits, logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def make_prompts(lengths, padding=(0, 1.0)):
    """Ragged prompts of random embeddings, padded with junk on the left. padding: how many columns
    of it more than the longest prompt needs, and how large it is."""
    more, size = padding
    L = max(lengths) + more
    valid = torch.arange(L) >= L - torch.tensor(lengths)[:, None]
    x = randn(len(lengths), L, 24)
    return Prompts(torch.where(valid[..., None], x, size * x), valid)


PADDINGS = [(0, 1.0), (2, 1e3), (8, -30.0)]


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_same_as_transformers(seed, tmp_path):
    """Weights and config.json as they write them. In a ragged batch of ours, every row has the
    frames, embeddings, logits and 20 greedy tokens that theirs has alone."""
    theirs = make_transformers(seed, tmp_path)
    ours = load_model(tmp_path).eval()
    decoder = their_decoder(theirs)
    assert from_dict(theirs.config.to_dict()) == ours.config == odd_config(seed)
    mels = [randn(n, 160, seed=n) for n in (7, 1, 65, 2, 31, 13, 20, 47)]
    frames = ours.encode(mels)
    sounds = ours.project(frames)
    prompts = ours.embed_prompts([[4, V, 5, 6]] * len(mels), sounds)
    assert (prompts.valid.diff(dim=1).int() >= 0).all() and prompts.valid[:, -1].all()
    rollout = ours.sample(prompts, torch.zeros(len(mels), 1, 20), eos_id=-1, temperature=0)
    greedy = rollout.tokens[:, 0].tolist()
    for i, mel in enumerate(mels):
        hidden = theirs.model.encoder(mel[None]).last_hidden_state
        near((frames[i], sounds[i]), (hidden[0], theirs.model.projector(hidden)[0]), atol=3e-5)
        x = prompts.x[i][None, prompts.valid[i]]
        ids, logits = their_logits(theirs, mel[None])
        roughly(causal_logits(ours, x), logits)
        roughly(logits, decoder(inputs_embeds=x).logits)
        want = theirs.generate(
            input_ids=ids, input_features=mel[None], do_sample=False, max_new_tokens=20
        )
        assert greedy[i] == want[0, ids.shape[1] :].tolist()
        assert len(sounds[i]) == ours.projector.count(len(mel))
    assert len(set(sum(greedy, []))) > 6


@torch.no_grad()
def test_padded_audio_gives_the_same():
    """Every length from 1 to 65 in one batch, whatever stands in the padding, is what the
    recording is alone."""
    model = make_model(scale=0.1)
    lengths = (torch.arange(65) * 8) % 65 + 1
    mel = randn(65, 70, 160)
    frames, middle = model.encoder(mel, lengths)
    sound, counts = model.projector(frames, lengths)
    for i, n in enumerate(lengths.tolist()):
        one = model.encoder(mel[i : i + 1, :n], torch.tensor([n]))
        near((frames[i, :n], middle[i, :n]), (one[0][0], one[1][0]))
        near(sound[i, : counts[i]], model.projector(one[0], torch.tensor([n]))[0][0])
        assert not frames[i, n:].any() and counts[i] == 2 * math.ceil(n / 8)


@torch.no_grad()
@pytest.mark.parametrize("padding", PADDINGS)
def test_rollout_does_not_depend_on_padding_or_company(padding):
    """A response is its own noise's: alone, in any batch and place, with 1 or 8 to a prompt,
    with more time to come."""
    model = make_model()
    prompts = make_prompts([5, 1, 9, 4, 6], padding)
    u = rand(5, 8, 10)
    whole = model.sample(prompts, u, 2, top_p=0.9)
    scored = model.response_logp(prompts, whole.tokens, whole.lengths)
    assert len({tuple(r) for r in whole.tokens.flatten(0, 1).tolist()}) > 30
    assert scored.isfinite().all()
    for rows, K, T in [
        *(([i], 8, 10) for i in range(5)),
        ([4, 1], 8, 10),
        ([3, 0, 2, 1, 4], 2, 10),
        ([1, 3], 1, 4),
    ]:
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
    """In training: output, gradient and running statistics are BatchNorm1d's on the real frames,
    end to end."""
    ours = shake(MaskedBatchNorm(6)).train()
    plain = shake(nn.BatchNorm1d(6)).train()
    mask = torch.arange(9) < torch.tensor([[5], [1], [9]])
    for seed in range(3):
        x = torch.where(mask[..., None], 3 * randn(3, 9, 6, seed=seed) + 1, 1e4).requires_grad_()
        y = x.detach()[mask].requires_grad_()
        got = ours(x, mask)[mask]
        want = plain(y)
        for out in (got, want):
            (out.sin() * torch.arange(len(out))[:, None]).sum().backward()
        near((got, x.grad[mask]), (want, y.grad))
    near(list(ours.buffers()), list(plain.buffers()))


def truncated(logits, temperature, top_p):
    """Sampling distribution (V,), in float64 and one token at a time; and the log of the mass
    that was kept. Tokens as probable as the last one that is needed are kept, too."""
    p = (logits.double() / temperature).softmax(-1)
    probability = p.tolist()
    mass = 0.0
    last = math.inf
    kept = []
    for token in p.argsort(descending=True).tolist():
        if mass >= top_p and probability[token] < last:
            break
        last = probability[token]
        mass += last
        kept.append(token)
    q = torch.zeros_like(p)
    q[kept] = p[kept]
    return (q / mass).float(), math.log(mass)


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


def test_what_is_shared_is_computed_once(monkeypatch):
    """The decoder sees each prompt once, and then each distinct response, in a batch as wide as the
    longest needs; logits are made of what predicts their tokens, and of nothing else."""
    model = make_model()
    prompts = make_prompts([4, 9, 2], (2, 1.0))
    tokens = (V * rand(3, 5, 9)).long()
    lengths = torch.tensor([[7, 2, 7, 4, 4], [1, 1, 1, 1, 1], [6, 6, 6, 3, 2]])
    tokens[0, 4, :4] = tokens[0, 3, :4]  # equal, with other junk behind
    tokens[1] = 5  # all equal, and to other prompts' first tokens
    tokens[2, :3, 0] = 5
    tokens[2, 3, :3] = tokens[2, 0, :3]  # stops where another goes on
    distinct = [4, 1, 5]
    scored = (7 + 2 + 7 + 4) + 1 + (6 + 6 + 6 + 3 + 2)
    seen = []
    made = []
    decoder = model.language_model.model
    decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    make_logits = model.language_model.logits

    def logits_of_hidden(hidden):
        made.append(len(hidden))
        return make_logits(hidden)

    monkeypatch.setattr(model.language_model, "logits", logits_of_hidden)
    logp = model.response_logp(prompts, tokens, lengths)
    assert seen == [(3, 11, 24), (sum(distinct), 6, 24)] and made == [scored]
    assert logp.shape == (3, 5, 9)
    for i, k in itertools.product(range(3), range(5)):
        n = lengths[i, k]
        _, want = score_alone(model, prompts.x[i][prompts.valid[i]], tokens[i, k, :n])
        near(logp[i, k, :n], want)
        assert not logp[i, k, n:].any()


@torch.no_grad()
def test_responses_of_one_token_are_scored():
    """Where no response has a second token, the prompts are all that the decoder sees."""
    model = make_model()
    prompts = make_prompts([4, 9])
    tokens = (V * rand(2, 3, 5)).long()
    lengths = torch.ones(2, 3, dtype=torch.int64)
    logp = model.response_logp(prompts, tokens, lengths)
    assert logp.shape == tokens.shape and not logp[..., 1:].any()
    for i, k in itertools.product(range(2), range(3)):
        _, want = score_alone(model, prompts.x[i][prompts.valid[i]], tokens[i, k, :1])
        near(logp[i, k, :1], want)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_cached_decoding_is_the_full_forward_pass(seed):
    """Some tokens at once and the others one by one, with keys and values kept: the hidden states
    of one pass over all, whose logits are those of the weights written out."""
    model = make_model(seed)
    decoder = model.language_model.model
    B, S, first = 3, 9, 4
    x = randn(B, S, 24)
    positions = torch.arange(S).expand(B, S)
    sees = torch.ones(B, S, S, dtype=torch.bool).tril()
    whole = decoder(x, positions, sees)
    near(model.language_model.logits(whole), causal_logits(model, x))
    prompts = PromptCache()
    near(
        decoder(x[:, :first], positions[:, :first], sees[:, :first, :first], prompts),
        whole[:, :first],
    )
    K = 2  # the same sequence twice
    cache = DecodingCache(prompts, K, S - first + 2)
    for t in range(first, S):
        cache.slots = torch.tensor([t])
        cache.end = t + 1
        step = (y[:, t : t + 1].repeat_interleave(K, 0) for y in (x, positions, sees[..., : t + 1]))
        hidden = decoder(*step, cache)
        near(hidden, whole[:, t : t + 1].repeat_interleave(K, 0))
    prompts.prompt_of = torch.tensor([2, 0, 1, 2])  # or all at once, in any order
    rest = (y[prompts.prompt_of, first:] for y in (x, positions, sees))
    near(decoder(*rest, prompts), whole[prompts.prompt_of, first:])


def test_logits_in_parts_are_the_same():
    model = make_model(seed=1)
    hidden = randn(11, 24).requires_grad_()
    tokens = (V * rand(11)).long()
    weights = [hidden, model.language_model.model.embed_tokens.weight]  # tied
    whole, parts = (model.token_logp(hidden, tokens, limit) for limit in (2**25, 3 * V))
    near(whole, parts)
    near(*(torch.autograd.grad((x * x).sum(), weights) for x in (whole, parts)), atol=1e-4)


def test_attention_kernels_may_lay_out_memory_as_they_like(monkeypatch):
    """CUDA's memory-efficient kernel returns (B, H, S, D) that lies in memory as (B, S, H, D)."""
    model = make_model()
    prompts = make_prompts([4, 9, 2])
    group = ((V * rand(3, 4, 7)).long(), torch.full((3, 4), 7))
    plain = model.response_logp(prompts, *group)
    mel = randn(20, 160)
    frames = model.encode([mel])[0]
    attend = F.scaled_dot_product_attention

    def other_layout(*args, **kwargs):
        return attend(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", other_layout)
    same(model.response_logp(prompts, *group), plain)
    same(model.encode([mel])[0], frames)
    model.project([frames])
    model.sample(prompts, rand(3, 4, 3), 2)


@pytest.mark.parametrize(
    "temperature, top_p", [(1.0, 1.0), (1.0, 0.9), (0.5, 0.8), (2.0, 0.3), (1.0, 1e-6)]
)
def test_draw_follows_the_distribution(temperature, top_p):
    """Evenly spaced noise reproduces each probability to 1 / N, random noise to its standard
    error."""
    N = 4001
    for seed in range(5):
        logits = 2 * randn(13, seed=seed)
        q, _ = truncated(logits, temperature, top_p)
        for u, slack in (
            ((torch.arange(N) + 0.5) / N, 0),
            (rand(N, seed=seed), 4.5 * (q * (1 - q) / N).sqrt()),
        ):
            token, logq, logp = draw_token(logits.expand(N, 13), u, temperature, top_p)
            count = torch.bincount(token, minlength=13)
            assert ((count / N - q).abs() <= slack + 1.01 / N).all() and not count[q == 0].any()
            near((logp, logq.exp()), (logits.log_softmax(-1)[token], q[token]))


def test_draw_at_its_edges():
    """Top-p keeps the smallest set that reaches it and its ties, exactly where masses are exact.
    u = 0 is the first token kept, the last float below 1 the last one, though a sum over a large
    vocabulary is not 1. Temperature 0 is greedy."""
    even = [1 / 8] * 8
    halves = [1 / 8, 1 / 4, 1 / 2, 1 / 8]
    for p, top_p, kept in (
        (even, 0.5, 8),
        (even, 0.51, 8),
        (even, 1, 8),
        (even, 0.1, 8),
        (halves, 0.5, 1),
        (halves, 0.51, 2),
        (halves, 0.75, 2),
        (halves, 0.76, 4),
    ):
        token, logq, _ = draw_token(
            torch.tensor(p).log().expand(1024, -1), torch.arange(1024) / 1024, 1.0, top_p
        )
        q = torch.zeros(len(p)).index_add(0, token.unique(), torch.tensor(p)[token.unique()])
        q = q / q.sum()
        near((logq.exp(), token.bincount(minlength=len(p)) / 1024), (q[token], q), atol=0.9 / 1024)
        assert len(token.unique()) == kept
    last = torch.full((8,), float(np.nextafter(np.float32(1), np.float32(0))))
    for size, spread, top_p in itertools.product(
        (3, 300, 20000), (0.1, 3.0, 30.0), (0.0, 0.3, 0.9, 1.0)
    ):
        logits = spread * randn(8, size)
        logits[:, ::3] = -1e9  # probability 0
        best = logits.argmax(-1)
        p = logits.double().softmax(-1)
        token, logq, _ = draw_token(logits, last, 1.0, top_p)
        above = torch.where(p > p.gather(-1, token[:, None]), p, 0).sum(-1)  # the mass before it
        assert (above < top_p + 1e-4).all() and (token % 3 > 0).all() and logq.isfinite().all()
        for i, first in enumerate(draw_token(logits, 0 * last, 1.0, top_p)[0].tolist()):
            q, _ = truncated(logits[i], 1.0, top_p + 1e-4)
            assert q[first] > 0 and (q[:first] < 1e-3).all() and (q[token[i] + 1 :] < 1e-3).all()
        assert top_p > 0 or torch.equal(token, best)
        near(draw_token(logits, last, 0, top_p), (best, 0 * last, p.amax(-1).log().float()))


@torch.no_grad()
def test_responses_end_at_the_first_eos():
    """The EOS counts, a response cut short has length T, and the decoder stops when everybody
    has ended."""
    model = make_model()
    prompts = make_prompts([3, 8, 1])
    u = rand(3, 5, 9)
    calls = []
    free = model.sample(prompts, u, eos_id=-1)
    model.language_model.model.register_forward_hook(lambda *_: calls.append(1))
    for eos in range(0, V, 2):
        rollout = model.sample(prompts, u, eos)  # the same noise: the same tokens up to the end
        for i, k in itertools.product(range(3), range(5)):
            tokens = free.tokens[i, k].tolist()
            n = rollout.lengths[i, k]
            assert n == (tokens.index(eos) + 1 if eos in tokens else 9)
            same(
                (rollout.tokens[i, k, :n], rollout.mask[i, k]),
                (free.tokens[i, k, :n], torch.arange(9) < n),
            )
            calls.clear()
            one = model.sample(prompts[[i]], u[[i], k : k + 1], eos)
            assert one.lengths.item() == n == len(calls)
    junk = torch.where(rollout.mask, rollout.tokens, (rollout.tokens + 5) % V)
    near(*(model.response_logp(prompts, t, rollout.lengths) for t in (rollout.tokens, junk)))


class OnDevice(TorchDispatchMode):
    """Refuses tensors that are not on CUDA: a copy from the host may wait, which fake tensors do
    not."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        values = tree_leaves((args, kwargs, out))
        places = {x.device.type for x in values if isinstance(x, torch.Tensor)}
        assert places <= {"cuda"}, f"{function} on {places}"
        return out


@pytest.mark.parametrize("temperature, top_p", [(1.0, 0.9), (0.7, 1.0), (0.0, 1.0)])
def test_a_cuda_graph_can_hold_the_sampler(temperature, top_p, monkeypatch):
    """On tensors of a GPU that have no contents, so that whatever waits for some raises, and
    whatever mixes devices. The third token on is captured once and replayed, up to the end;
    without graphs, the decoder runs for each."""
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
            shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
            half = {name: torch.empty(s, dtype=torch.bfloat16) for name, s in shapes.items()}
            model.load_state_dict(half, assign=True)
            # Contents, B's included, are unknown: none can be skipped.
            lora.apply_lora(model, r=3, alpha=6.0)
            x = torch.empty(3, 5, 24, dtype=torch.bfloat16)
            prompts = Prompts(x, torch.ones(3, 5, dtype=torch.bool))
            # Of 9 tokens and more, every eighth waits: have all ended?
            noise = torch.empty(3, 4, 8)
        model.language_model.model.register_forward_hook(lambda *_: calls.append("decoder"))
        for model.cuda_graph in (True, False):
            calls.clear()
            rollout = model.sample(prompts, noise, 2, temperature, top_p)
            want = ["decoder"] * 8
            if model.cuda_graph:
                want = ["decoder"] * 3 + ["captured"] + ["replay"] * 6
            assert calls == want
            assert {x.device.type for x in vars(rollout).values()} == {"cuda"}
            assert rollout.tokens.shape == (3, 4, 8)
        for waits in (
            lambda: rollout.lengths.max().item(),
            lambda: bool(rollout.mask.all()),
            rollout.mask.nonzero,
        ):
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                waits()


@torch.no_grad()
def test_bfloat16():
    """Logits and log-softmax are float32; sampler and scorer differ by rounding, so old_logp
    must be the sampler's."""
    model = make_model(scale=0.1).bfloat16()
    prompts = make_prompts([3, 8, 1, 5])
    prompts.x = prompts.x.bfloat16()
    rollout = model.sample(prompts, rand(4, 6, 12), 2)
    scored = model.response_logp(prompts, rollout.tokens, rollout.lengths)
    logits = model.language_model.logits(prompts.x)
    assert logits.dtype == scored.dtype == rollout.logp.dtype == torch.float32
    assert scored.isfinite().all() and (rollout.logp - scored)[rollout.mask].abs().max() < 0.1
    assert len(scored.unique()) > 200  # of 288; rounded to bfloat16's 8 bits they would coincide


def edit_json(file, **changes):
    """Change fields of a JSON file; ... removes one."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


@pytest.mark.parametrize("seed", [1, 2])
def test_model_files(seed, tmp_path):
    """What we save, we load; what does not fit is refused by name."""
    model = make_model(seed)
    model.save(tmp_path)
    config_text = (tmp_path / "config.json").read_text()
    config = json.loads(config_text)
    weights = load_file(tmp_path / "model.safetensors")
    again = SpeechLM.from_pretrained(tmp_path)
    assert again.config == model.config
    same(again.state_dict(), model.state_dict())
    assert all(p.requires_grad for p in again.parameters())
    half = SpeechLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.state_dict().values()} == {torch.bfloat16, torch.int64}
    half.save(tmp_path)
    same(SpeechLM.from_pretrained(tmp_path).state_dict(), half.state_dict())  # as stored

    def refused(*words):
        with pytest.raises(ValueError) as error:
            SpeechLM.from_pretrained(tmp_path)
        assert all(word in str(error.value) for word in (str(tmp_path), *words)), error.value

    name, tensor = next(item for item in weights.items() if "o_proj" in item[0])
    some = {n: w for n, w in weights.items() if n != name}
    save_file(some | {"encoder.extra": tensor}, tmp_path / "model.safetensors")
    refused("2 problems", f"missing {name}", "unknown encoder.extra")
    save_file(weights | {name: tensor[1:].contiguous()}, tmp_path / "model.safetensors")
    refused("1 problems", f"{name} is {tuple(tensor[1:].shape)}, not {tuple(tensor.shape)}")
    (tmp_path / "model.safetensors").write_bytes(b"Entry not found, says the server")
    refused("model.safetensors cannot be read")
    save_file(weights, tmp_path / "model.safetensors")
    for part in ("text_config", "encoder_config"):
        edit_json(tmp_path / "config.json", **{part: ...})
        refused("config.json", part)
        (tmp_path / "config.json").write_text(config_text)
    for rope in (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "yarn"}},
    ):
        edit_json(tmp_path / "config.json", text_config=config["text_config"] | rope)
        refused("rope_")


# Loads a model in bfloat16 and prints by how much the process grew at its peak, in bytes.
LOADING = r"""
import re, sys, torch
{imports}
def peak():
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1])
torch.nn.Embedding(9, 9, device="meta").requires_grad_(False)  # these import a lot
torch.randn(9, device="meta")
before = peak()
model = {load}(sys.argv[1], dtype=torch.bfloat16)
assert sum(p.sum() for p in model.parameters()).isfinite()  # touches all
print(peak() - before)
"""


def growth_in_loading(folder, imports, load):
    """By how much a process grows at its peak when it loads the model in a folder, in bytes."""
    command = [sys.executable, "-c", LOADING.format(imports=imports, load=load), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return int(done.stdout)


def make_large_model():
    """In bfloat16, more than 200 MB."""
    config = odd_config(0)
    config.text_config.vocab_size = 30_000
    config.text_config.hidden_size = 768
    config.text_config.intermediate_size = 8192
    config.text_config.num_hidden_layers = 4
    return SpeechLM(config).bfloat16()


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    model = make_large_model()
    size = sum(p.nbytes for p in model.parameters())
    model.save(tmp_path)
    del model
    grown = growth_in_loading(tmp_path, "from model import SpeechLM", "SpeechLM.from_pretrained")
    assert size > 200e6 and 0.9 < grown / size < 1.3, grown / size


# --------------------------------------------------------------------------------------------------
# lora.py: adapters, the switch, names, PEFT's files


PLAIN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MEL = randn(2, 20, 160)


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
    return causal_logits(model, model.embed_prompts([[4, V, 5, 6]] * len(mel), list(sound)).x)


# Without gradients; where they are wanted, other kernels may round differently.
logits_of = torch.no_grad()(forward)


@pytest.mark.parametrize("bias", [True, False])
def test_lora_layer_is_its_formula(bias):
    """y = W x + b + (alpha / r) B A x; gradients reach A and B alone; dropout acts on x, and in
    training only."""
    net = nn.Sequential(nn.Linear(7, 5, bias=bias)).eval()
    x = randn(4, 3, 7)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_for_sampling_is_lora(dtype):
    """Up to rounding in float32, to the bit in bfloat16, where a sum with the weight would lose
    most of it; weights stay what they are, and adapters made ready are what they were then. After
    an exception adapters count as they are again."""
    model = make_model(scale=0.1).to(dtype)
    shake_lora(model)
    mel = MEL.to(dtype)
    with torch.no_grad():
        plain = forward(model, mel)
    parameters = lora.lora_parameters(model)
    before = {n: p.clone() for n, p in model.state_dict().items() if n not in parameters}
    check = roughly if dtype == torch.float32 else same
    with pytest.raises(KeyError), torch.no_grad(), lora.lora_for_sampling(model):
        check(forward(model, mel), plain)
        for parameter in parameters.values():
            parameter.zero_()
        check(forward(model, mel), plain)
        same({n: p for n, p in model.state_dict().items() if n not in parameters}, before)
        raise KeyError
    with lora.lora_disabled(model), torch.no_grad():
        base = forward(model, mel)
    same(forward(model, mel), base)
    assert (plain - base).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_is_sampled_where_lora_is_off(dtype):
    """Whichever of the two contexts is entered first."""
    model = make_model().to(dtype)
    prompts = make_prompts([5, 1, 9])
    prompts.x = prompts.x.to(dtype)
    u = rand(3, 4, 12)
    base = model.sample(prompts, u, EOS)
    logits = forward(model, MEL.to(dtype))
    shake_lora(model)
    assert not torch.equal(model.sample(prompts, u, EOS).tokens, base.tokens)
    with lora.lora_disabled(model):
        same(vars(model.sample(prompts, u, EOS)), vars(base))
    with lora.lora_for_sampling(model), lora.lora_disabled(model):
        same(forward(model, MEL.to(dtype)), logits)


def test_lora_targets():
    """The pattern names the decoder; plain suffixes also hit the Conformer's feed-forwards;
    refusals change nothing."""
    model = make_model()
    names = shake_lora(make_model())
    places = {p: "mlp" if p in PLAIN[4:] else "self_attn" for p in PLAIN}
    in_layer = [f"{places[p]}.{p}" for p in PLAIN]
    want = [f"language_model.model.layers.{i}.{name}" for i in (0, 1) for name in in_layer]
    assert sorted(names) == sorted(want)
    more = set(shake_lora(make_model(), PLAIN)) - set(names)
    feed_forwards = itertools.product(range(3), ("ff1", "ff2"), ("up_proj", "down_proj"))
    assert more == {f"encoder.layers.{i}.{ff}.{p}" for i, ff, p in feed_forwards}
    assert shake_lora(make_model(), names[:1]) == names[:1]
    for nothing in (["nope"], ["proj"], "q_proj", r".*layers\.7.*", []):
        with pytest.raises(ValueError, match="LoRA targets"):
            lora.apply_lora(model, nothing)
    assert all(p.requires_grad for p in model.parameters())
    shake_lora(model.bfloat16())
    with pytest.raises(ValueError, match="already"):
        lora.apply_lora(model)
    forward(model, MEL.bfloat16()).sum().backward()
    for p in lora.lora_parameters(model).values():  # float32: small steps would be rounded away
        assert p.dtype == p.grad.dtype == torch.float32 and p.grad.any()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "targets",
    [lora.DECODER_TARGETS, PLAIN, PLAIN[:3], r".*language_model.*\.1\.self_attn\.(k|o)_proj"],
)
def test_adapters_travel_to_peft_and_back(targets, tmp_path):
    """PEFT, on transformers' model, reads what we write, and writes what we read."""
    peft = pytest.importorskip("peft")
    theirs = make_transformers(0, tmp_path / "base")
    ours, again = (load_model(tmp_path / "base").eval() for _ in "ab")
    base = logits_of(ours)
    shake_lora(ours, targets, r=3, alpha=9.0, dropout=0.1)
    lora.save_adapter(ours, tmp_path / "ours", targets, base=str(tmp_path / "base"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)  # PEFT only warns of missing keys
        adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
    config = adapted.peft_config["default"]
    held = peft.get_peft_model_state_dict(adapted)
    assert (config.base_model_name_or_path, config.lora_dropout) == (str(tmp_path / "base"), 0.1)
    assert len(held) == len(lora.lora_parameters(ours))
    assert not torch.allclose(base, logits_of(ours), atol=1e-2)
    roughly(their_logits(adapted, MEL)[1], logits_of(ours))
    config = peft.LoraConfig(
        r=3, lora_alpha=9, target_modules=targets, lora_dropout=0.1, init_lora_weights=False
    )
    adapted = peft.get_peft_model(adapted.unload(), config).eval()
    adapted.save_pretrained(tmp_path / "theirs")
    tensors = [
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")
    ]
    settings = [read_json(tmp_path / name / "adapter_config.json") for name in ("ours", "theirs")]
    shapes, their_shapes = ({k: v.shape for k, v in part.items()} for part in tensors)
    assert shapes == their_shapes
    for key in ("peft_type", "r", "lora_alpha", "lora_dropout", "bias", "inference_mode"):
        assert settings[0][key] == settings[1][key]
    assert sorted(settings[0]["target_modules"]) == sorted(settings[1]["target_modules"])
    lora.load_adapter(again, tmp_path / "theirs")
    roughly(logits_of(again), their_logits(adapted, MEL)[1])
    assert not torch.allclose(logits_of(again), logits_of(ours), atol=1e-2)
    with lora.lora_disabled(again):
        same(logits_of(again), base)


def test_adapter_files(tmp_path):
    """A round trip keeps every bit; files that do not fit, or say what is not implemented, are
    refused by name."""
    model = make_model()
    again = make_model()
    shake_lora(model, r=3, alpha=12.0, dropout=0.25)
    lora.save_adapter(model, tmp_path)
    lora.load_adapter(again, tmp_path)
    same(logits_of(again), logits_of(model))
    assert {layer.dropout.p for layer in lora.lora_layers(again).values()} == {0.25}
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    names = sorted(lora.lora_layers(model))
    theirs = ["model." + name.replace("language_model.model.", "language_model.") for name in names]
    del config["bias"]  # older files may lack keys
    for targets in (names, theirs):  # or name layers in full, as we or as transformers call them
        file.write_text(json.dumps({**config, "target_modules": targets}))
        again = make_model()
        assert lora.load_adapter(again, tmp_path) == targets
        same(logits_of(again), logits_of(model))
    again = make_model()
    for changed in (
        {"r": 4, "target_modules": PLAIN[:1]},
        {"target_modules": PLAIN},
        {"target_modules": ["embed_tokens"]},
        {"rank_pattern": {"q_proj": 4}},
        {"alpha_pattern": {"q_proj": 4}},
        {"modules_to_save": ["lm_head"]},
        {"layers_to_transform": [0]},
        {"exclude_modules": ["q_proj"]},
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"peft_type": "IA3"},
        {"fan_in_fan_out": True},
        {"what_peft_will_have_next_year": {"alpha": 2}},
        {"r": 0},
        {"r": 3.0},
        {"r": True},
        {"lora_alpha": "12"},
        {"lora_alpha": math.nan},
        {"lora_alpha": 10**400},
        {"lora_dropout": [0.1]},
        {"lora_dropout": 1},
        {"target_modules": []},
        {"target_modules": [PLAIN]},
        {"target_modules": {"q_proj": 1}},
        {"target_modules": "(q_proj"},
    ):
        file.write_text(json.dumps({**config, **changed}))
        with pytest.raises(DataError, match=f"{tmp_path.name}.*adapter_"):
            lora.load_adapter(again, tmp_path)
    for key in ("peft_type", "r", "lora_alpha", "target_modules"):
        for without in ({k: v for k, v in config.items() if k != key}, {**config, key: None}):
            file.write_text(json.dumps(without))
            with pytest.raises(DataError, match=f"not a LoRA as PEFT writes it.*{key} = None"):
                lora.load_adapter(again, tmp_path)
    assert not lora.lora_layers(again)  # as it was
    assert all(p.requires_grad for p in again.parameters())
    unset = {"use_dora": False, "rank_pattern": {}, "modules_to_save": None, "of_next_year": ""}
    file.write_text(json.dumps({**config, **unset, "peft_version": "9", "lora_dropout": None}))
    lora.load_adapter(again, tmp_path)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "targets",
    [
        ["lm_head"],
        ["q_proj", "lm_head"],
        ["language_model.model.layers.1.self_attn.q_proj", "ff1.up_proj"],
    ],
)
def test_every_target_counts_here_and_in_peft(targets, tmp_path):
    peft = pytest.importorskip("peft")
    theirs = make_transformers(0, tmp_path / "base")
    ours = load_model(tmp_path / "base").eval()
    base = logits_of(ours)
    shake_lora(ours, targets)
    assert not torch.allclose(base, logits_of(ours), atol=1e-2)
    lora.save_adapter(ours, tmp_path / "ours", targets, base=str(tmp_path / "base"))
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
    roughly(their_logits(adapted, MEL)[1], logits_of(ours))


def test_targets_without_a_layer_are_refused():
    for targets in (["q_proj", "vproj"], ["decoder", "out"]):
        with pytest.raises(ValueError, match="LoRA targets"):
            lora.apply_lora(make_model(), targets)


def test_adapters_that_changed_their_base_are_refused(tmp_path):
    model = make_model()
    shake_lora(model)
    lora.save_adapter(model, tmp_path)
    for init in ("pissa", "pissa_niter_4", "olora", "corda", "mica", "of_next_year", 5, []):
        edit_json(tmp_path / "adapter_config.json", init_lora_weights=init)
        with pytest.raises(ValueError, match="init_lora_weights"):
            lora.load_adapter(make_model(), tmp_path)


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
                "language_model.model.model.norm.weight",  # transformers 5.20
            ],
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
    assert [our_name(name) for name in (ours, *others)] == [ours] * (1 + len(others))
    assert "lm_head" in ours or our_name(transformers_name(ours)) == ours


# --------------------------------------------------------------------------------------------------
# data.py: features, BLEU, corpora on disk, text, order and noise


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
    for hypothesis, reference in nasty_pairs(4000, seed=0):
        want = metric.sentence_score(hypothesis, [reference]).score
        assert data.sentence_bleu(hypothesis, reference) == exactly(want), (hypothesis, reference)
        plain, plain_reference = (" ".join(x.split()) for x in (hypothesis, reference))
        want = metric.sentence_score(plain, [plain_reference]).score
        rewards.append(data.reward(hypothesis, {"reference": reference}))
        assert 100 * rewards[-1] == exactly(want) and 0 <= rewards[-1] <= 1
    assert 0.1 < np.mean(np.array(rewards) > 0.5) < 0.9
    for seed, lowercase in itertools.product(range(300), (False, True)):
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
    table = train.score_table({"base": older, "trained": columns["trained"]})
    assert table == [["BLEU greedy", "50.00", f"{greedy:.2f}", f"{greedy - 50:+.2f}"]]
    rows = [row | {"slots": [*row["slots"].values()]} for row in rows]
    scores = data.evaluation_scores(rows, base, [base], base)
    assert scores["heard %"] == heard["heard %"] and "heard %, verb" not in scores
    assert [name for name, *_ in train.score_table({"": scores})] == list(scores)


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


def write_tone(path, seconds, rate, channels=1):
    """440 Hz on the first channel, silence on the others."""
    time = np.arange(round(seconds * rate)) / rate
    both = np.stack([0.5 * np.sin(2 * np.pi * 440 * time), 0 * time], axis=1)
    soundfile.write(path, both[:, :channels], rate)


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
def test_any_audio_becomes_16_khz_mono(kind, rate, tmp_path):
    for channels in (1, 2):
        write_tone(tmp_path / f"tone.{kind}", 1.3, rate, channels)
        line = json.dumps({"audio": f"tone.{kind}", "prompt": AUDIO + "?", "reference": "a"})
        audio = load.parse_row(line.encode(), tmp_path)["audio"].samples(30)
        assert audio.dtype == torch.float32 and audio.ndim == 1
        assert len(audio) == pytest.approx(1.3 * 16000, abs=1 if kind in ("wav", "flac") else 1200)
        spectrum = torch.fft.rfft(audio[4000:12000]).abs() / 4000  # 2 Hz a bin
        assert spectrum.argmax() == 220
        assert spectrum[220].item() == pytest.approx(0.5 / channels, abs=0.05)
    for samples in (np.zeros(399), np.full(1000, np.nan), np.zeros(0)):
        soundfile.write(tmp_path / "bad.wav", samples, 16000, subtype="FLOAT")
        with pytest.raises(DataError, match="bad.wav"):
            load.Recording(tmp_path / "bad.wav").samples()


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 24000, 44100, 48000, 96000])
@pytest.mark.parametrize("length", [1, 401, 5003])
def test_resampling_is_torchaudios(rate, length):
    functional = pytest.importorskip("torchaudio.functional")
    audio = rand(length) * 2 - 1
    near(load.resample(audio, rate), functional.resample(audio, rate, 16000), atol=1e-3, rtol=0)


@pytest.mark.parametrize("rate", [15999, 44101, 999983])
def test_a_rate_without_a_common_factor(rate):
    """Nothing repeats within a second: torchaudio would need gigabytes."""
    audio = torch.sin(2 * math.pi * 440 * torch.arange(rate // 2) / rate)
    got = load.resample(audio, rate)
    want = torch.sin(2 * math.pi * 440 * torch.arange(len(got)) / 16000)
    assert len(got) == math.ceil(len(audio) * 16000 / rate)
    near(got[100:-100], want[100:-100], atol=2e-3, rtol=0)


def noisy_tone(seconds=2.0, rate=16000):
    noise = 0.05 * np.random.default_rng(0).standard_normal(round(seconds * rate))
    return 0.3 * np.sin(2 * np.pi * 300 * np.arange(len(noise)) / rate) + noise


def recording(kind, change=bytes, samples=None, rate=16000, **options):
    """A function that writes a file: `samples` as soundfile encodes them, changed as bytes."""

    def write(path):
        audio = noisy_tone(rate=rate) if samples is None else samples
        soundfile.write(path, audio, rate, format=kind, **options)
        path.write_bytes(change(path.read_bytes()))

    return write


def without_header(mp3):
    """As ffmpeg writes to a pipe: no Info frame, so that libsndfile has to guess the length."""
    second = mp3.index(mp3[:2], 4)  # frames begin alike
    assert b"Info" in mp3[:second] or b"Xing" in mp3[:second]
    return mp3[second:]


def with_size(value):
    return lambda wav: wav[:40] + value.to_bytes(4, "little") + wav[44:]


def flipped(content):
    middle = len(content) // 2
    return (
        content[:middle] + bytes(b ^ 0x5A for b in content[middle:][:400]) + content[middle + 400 :]
    )


def part(share):
    return lambda content: content[: int(len(content) * share)]


MP3 = {"kind": "MP3", "rate": 32000, "bitrate_mode": "CONSTANT", "compression_level": 0.5}
QUIET_FIRST = np.concatenate([np.zeros(16000), noisy_tone(1.5, 32000)])
USABLE = {
    "mp3 without header": recording(**MP3, change=without_header),
    "mp3 of varying bitrate without header": recording(  # its length is guessed twice too long
        **MP3 | {"bitrate_mode": "VARIABLE"}, change=without_header, samples=QUIET_FIRST
    ),
    "gsm": recording("WAV", rate=8000, subtype="GSM610"),
    "g721": recording("AU", subtype="G721_32"),
    "opus": recording("OGG", subtype="OPUS"),
    "wav of a pipe, 0": recording("WAV", with_size(0)),
    "wav of a pipe, -1": recording("WAV", with_size(2**32 - 1)),
    "wav of a pipe, 2 GB": recording("WAV", with_size(2**31 - 37)),
    "aiff": recording("AIFF"),
    "loud": recording("WAV", samples=noisy_tone() * 3e4, subtype="FLOAT"),
    "prime rate": recording("WAV", rate=44101),
}
REFUSED = {
    "absurd": ("absurd", recording("WAV", samples=noisy_tone() * 1e25, subtype="FLOAT")),
    "1e300": ("not finite", recording("WAV", samples=noisy_tone() * 1e300, subtype="DOUBLE")),
    "infinite": ("not finite", recording("CAF", samples=np.full(999, np.inf), subtype="FLOAT")),
    "damaged flac": ("cannot be read", recording("FLAC", flipped)),
    "cut wav": ("cut short", recording("WAV", part(0.9))),
    "cut gsm": ("cut short", recording("WAV", part(0.9), rate=8000, subtype="GSM610")),
    "cut aiff": ("cut short", recording("AIFF", part(0.9))),
    "cut au": ("cut short", recording("AU", part(0.9))),
    "cut caf": ("cut short", recording("CAF", part(0.95))),
    "cut flac": ("cannot be read", recording("FLAC", part(0.9))),
    "cut vorbis": ("cut short", recording("OGG", part(0.9))),
    "cut opus": ("cut short", recording("OGG", part(0.9), subtype="OPUS")),
    "cut mp3 with header": ("cut short", recording(**MP3, change=part(0.8))),
    "dwvw": ("cannot be read", recording("AIFF", subtype="DWVW_16")),
    "raw": ("cannot be read", recording("RAW", subtype="PCM_16")),
    "a header alone": ("empty", recording("WAV", samples=np.zeros(0))),
    "too long": ("--max-audio-seconds 3", recording("WAV", samples=noisy_tone(3.1))),
}


def corpus_with(folder, name, **fields):
    """One split of three rows; the audio of the second is `name`."""
    write_tone(folder / "good.wav", 0.5, 16000)
    rows = [{"audio": "good.wav", "prompt": AUDIO + "?", "reference": "a"} for _ in range(3)]
    rows[1] |= {"audio": name, **fields}
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("name", USABLE)
def test_what_passes_the_check_loads(name, tmp_path):
    file = "odd." + ("raw" if name == "raw" else "sound")
    USABLE[name](tmp_path / file)
    rows = load.load_corpus(corpus_with(tmp_path, file), 3, splits=("test",))["test"]
    audio = rows[1]["audio"].samples()
    assert len(audio) == pytest.approx(32000, abs=2304)  # two frames of an MP3 at 32 kHz
    power = torch.fft.rfft(audio[8000:24000]).abs()  # 1 Hz a bin
    assert power.argmax() == 300 and data.log_mel(audio).isfinite().all()


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_load_is_refused_by_line(name, tmp_path, capsys):
    reason, write = REFUSED[name]
    file = "odd." + ("raw" if name == "raw" else "sound")
    write(tmp_path / file)
    corpus = corpus_with(tmp_path, file)
    with pytest.raises(DataError, match=rf"1 bad rows\n.*test.jsonl, line 2: .*{file}.*{reason}"):
        load.load_corpus(corpus, 3, splits=("test",))
    assert len(load.load_corpus(corpus, 3, True, ("test",))["test"]) == 2
    assert "skipping 1 bad rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    "kind, content",
    [
        ("a JSON array", lambda lines: b"[\n" + b",\n".join(lines) + b"]"),
        ("a JSON array", lambda lines: b"[" + b",".join(lines) + b"]"),
        ("compressed", lambda lines: gzip.compress(b"\n".join(lines))),
        ("utf-16", lambda lines: b"\n".join(lines).decode().encode("utf-16")),
        ("utf-16-le", lambda lines: b"\n".join(lines).decode().encode("utf-16-le")),
    ],
)
def test_a_manifest_of_another_kind_is_told_once(kind, content, tmp_path):
    lines = (corpus_with(tmp_path, "good.wav") / "test.jsonl").read_bytes().splitlines()
    (tmp_path / "test.jsonl").write_bytes(content(lines))
    with pytest.raises(DataError, match=f"test.jsonl is {kind}.*; it must be") as error:
        load.load_corpus(tmp_path, 3, splits=("test",))
    assert "\n" not in str(error.value)


def test_what_was_checked_is_remembered(tmp_path, monkeypatch):
    """By several processes, in order; unchanged recordings are not decoded a second time, a changed
    one is, and so is everything under another limit."""
    cut = part(0.9)
    rows = []
    for i in range(130):  # enough for two processes
        write_tone(tmp_path / f"{i}.wav", 0.1, 16000)
        rows.append({"audio": f"{i}.wav", "prompt": AUDIO + "?", "reference": "a"})
    for i in (7, 100):
        (tmp_path / f"{i}.wav").write_bytes(cut((tmp_path / f"{i}.wav").read_bytes()))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    check = partial(load.load_corpus, tmp_path, splits=("test",), checked=tmp_path / "of" / "file")
    torch.manual_seed(0)
    words = "(?s)2 bad rows.*line 8: .*cut short.*line 101: .*cut short"
    with pytest.raises(DataError, match=words):
        check(3)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))  # the check draws no random number of the run's
    decoded = []

    def decode(file, max_seconds, original=load.decode):
        decoded.append(Path(file).name)
        return original(file, max_seconds)

    monkeypatch.setattr(load, "decode", decode)
    monkeypatch.setattr(load, "DataLoader", lambda *a, num_workers, **k: DataLoader(*a, **k))
    with pytest.raises(DataError, match=words):
        check(3)
    assert len(check(3, skip_bad_rows=True)["test"]) == 128 and decoded == []
    write_tone(tmp_path / "7.wav", 0.1, 16000)
    assert len(check(3, skip_bad_rows=True)["test"]) == 129 and "7.wav" in decoded
    decoded.clear()
    with pytest.raises(DataError, match="130 bad rows"):
        check(0.01)
    assert len(decoded) == 130
    (tmp_path / "of" / "file").write_text('{"cut sh')
    assert len(check(3, skip_bad_rows=True)["test"]) == 129


def test_rows_are_told_apart_by_place_and_content(tmp_path):
    """A replaced recording of the same length is another corpus; a folder that moved is not."""

    def fingerprint(folder):
        return load.fingerprint(load.load_corpus(folder, 30)["train"], folder)

    corpus = write_corpus(tmp_path / "one", rows=3)
    before = fingerprint(corpus)
    corpus = corpus.rename(tmp_path / "two")
    assert fingerprint(corpus) == before
    os.utime(corpus / "train0.wav", (1, 1))  # a copy has other times
    assert fingerprint(corpus) == before
    recording = corpus / "train0.wav"
    samples, rate = soundfile.read(recording)
    for changed in (samples[::-1], samples * 0.999):
        soundfile.write(recording, changed, rate)
        assert fingerprint(corpus) != before
    soundfile.write(recording, samples, rate)
    assert fingerprint(corpus) == before
    recording.rename(corpus / "elsewhere.wav")
    text = (corpus / "train.jsonl").read_text()
    (corpus / "train.jsonl").write_text(text.replace("train0", "elsewhere"))
    assert fingerprint(corpus) != before


def test_a_file_is_known_by_both_its_ends(tmp_path):
    content = bytearray(random.Random(0).randbytes(1000))
    seen = set()
    for changed in (None, 0, 40, 960, 999):  # of the 100 bytes at either end
        if changed is not None:
            content[changed] ^= 1
        (tmp_path / "file").write_bytes(content)
        seen.add(load.ends(tmp_path / "file", 100))
    assert len(seen) == 5
    (tmp_path / "file").write_bytes(content[:150])  # whole where it is small
    known = load.ends(tmp_path / "file", 100)
    content[120] ^= 1
    (tmp_path / "file").write_bytes(content[:150])
    assert load.ends(tmp_path / "file", 100) != known


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
        "5000|4300": b'{"n": ' + 5000 * b"1" + b"}",
        "RecursionError": b'{"n": ' + 10**5 * b"[" + 10**5 * b"]" + b"}",
    }
    for reason, field, value in (
        ("gone.wav does not exist", "audio", "gone.wav"),
        ("audio file [^,]* does not exist", "audio", "."),
        ("text.wav cannot be read", "audio", "text.wav"),
        ("empty.wav is empty", "audio", "empty.wav"),
        ("cut.flac", "audio", "cut.flac"),
        (r"long.wav lasts longer than --max-audio-seconds 2", "audio", "long.wav"),
        ("audio .*File name too long", "audio", "a" * 5000),
        ("audio .*does not exist|null", "audio", "a\0b"),
        ("'audio' is missing", "audio", ...),
        ("'prompt' is missing", "prompt", ...),
        ("'slots' is neither a list nor an object", "slots", "ja"),
        ("'slots' is neither .* of strings", "slots", ["ja", 3]),
        ("'slots' is neither", "slots", {"a": "ja", "b": ["ja"]}),
        (r"slot '\?\|' holds no word", "slots", ["ja", "?|"]),
        (r"slot '\?' holds no word", "slots", {"a": "ja", "b": "?"}),
        ("'reference' is missing", "reference", "  "),
        ("'reference' .* not a string", "reference", 3),
        ("'target' is not", "target", ["a"]),
        ("'transcript' is not", "transcript", 1),
        ("has 0 times", "prompt", "what?"),
        ("has 2 times", "prompt", AUDIO + AUDIO),
    ):
        changed = {k: v for k, v in {**row, field: value}.items() if v is not ...}
        lines[reason] = json.dumps(changed).encode()
    return lines


def test_corpora_are_checked(tmp_path, capsys):
    """Bad rows: file, line and reason of each; all counted, the first shown; --skip-bad-rows
    goes on and says so."""
    files = {split: tmp_path / f"{split}.jsonl" for split in ("train", "validation", "test")}
    row = {
        "audio": "a b.wav",
        "prompt": f"Hör:{AUDIO} was?",
        "reference": "日本 \u2028",
        "slots": ["ja"],
        "my": 1,
    }
    good = 2 * (json.dumps(row, ensure_ascii=False).encode() + b"\n")
    lines = bad_lines(tmp_path, row)
    write_tone(tmp_path / "a b.wav", 0.5, 16000)
    for file in files.values():
        file.write_bytes(good)
    want = {**row, "audio": str(tmp_path / "a b.wav")}
    assert load.load_corpus(tmp_path, 2) == {split: [want, want] for split in files}
    by_field = {**row, "slots": {"what": "ja"}}
    assert load.parse_row(json.dumps(by_field).encode(), tmp_path)["slots"] == {"what": "ja"}
    for file in files.values():  # missing, or empty; test never stands in for validation
        for change in (lambda path: path.unlink(), lambda path: path.write_text("")):
            change(file)
            with pytest.raises(DataError, match=file.name):
                load.load_corpus(tmp_path, 2)
        file.write_bytes(good)
    for reason, line in lines.items():
        files["validation"].write_bytes(good + line + b"\n" + good)
        words = rf"(?s)\b1 bad row.*validation\.jsonl, line 3: .*{reason}"
        with pytest.raises(DataError, match=words):
            load.load_corpus(tmp_path, 2)
        kept = load.load_corpus(tmp_path, 2, skip_bad_rows=True)
        assert [len(rows) for rows in kept.values()] == [2, 4, 2]
        assert "1 bad row" in capsys.readouterr().out
    files["train"].write_bytes(b"\n".join(lines.values()))  # and nothing left to go on with
    words = rf"{len(lines) + 1} bad rows(.*\n)+.*--skip-bad-rows"
    with pytest.raises(DataError, match=words) as error:
        load.load_corpus(tmp_path, 2)
    assert all(f"train.jsonl, line {n}:" in str(error.value) for n in (1, 2, 3))
    assert len(str(error.value)) < 2000
    with pytest.raises(DataError, match="train.jsonl"):
        load.load_corpus(tmp_path, 2, skip_bad_rows=True)


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
    alphabet = data.Alphabet.of([{"transcript": "cab a"}, {}, {"transcript": "bad"}])
    assert len(alphabet) == 6
    assert sorted(alphabet.encode("abcd ")) == [1, 2, 3, 4, 5]  # 0 is CTC's blank
    assert alphabet.encode("bad?") == [alphabet.encode(c)[0] for c in "bad"]
    assert alphabet.encode("") == []


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
    train.main(tiny("--steps 1 --train-rows 40", out=tmp_path / "run"))
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


# --------------------------------------------------------------------------------------------------
# train.py: the loop, resuming, evaluation, bad input


TINY = """
    --train-rows 24 --validation-rows 4 --test-rows 6 --ctc-steps 3 --sft-steps 4 --base-batch 4
    --steps 4 --prompts 4 --update-prompts 2 --micro-prompts 2 --responses 4 --max-new-tokens 8
    --lora-r 4 --eval-every 2 --eval-passes 1 --save-every 2 --device cpu
""".split()
TIMINGS = ("seconds", "sampling_share", "tokens_per_second")
SUFFIXES = ",".join(PLAIN)  # as the paper's runs: the Conformer's feed-forwards are adapted, too


def tiny(flags="", **paths):
    """The command line of a run in miniature: more flags as one would type them, and --NAME PATH
    for each of the paths."""
    command = [*TINY, *flags.split()]
    for name, path in paths.items():
        command += ["--" + name.replace("_", "-"), str(path)]
    return command


@pytest.fixture(scope="session")
def first_run(tmp_path_factory):
    """A whole run in miniature that nobody interrupts; its base model is shared by the tests
    below. Made once, whichever file of tests asks first: a finished run is not run again."""
    folder = tmp_path_factory.getbasetemp() / "runs" / "first"
    train.main(tiny(out=folder))
    return folder


def base_of(run):
    return run.parent / "base-qa-seed0"


def read_json_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def metrics(folder, stage="policy"):
    rows = read_json_lines(folder / f"{stage}.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@contextlib.contextmanager
def stopping_at(update, number=signal.SIGTERM):
    """A signal arrives during the update of that number."""
    calls = []
    step = Updater.step

    def interrupted(self, *args):
        calls.append(None)
        if len(calls) == update:
            os.kill(os.getpid(), number)
        return step(self, *args)

    # As in a terminal: under nohup, or behind a shell's &, some signals are ignored from the start.
    before = signal.signal(number, lambda *_: pytest.fail("the run did not take the signal"))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Updater, "step", interrupted)
            yield calls
    finally:
        signal.signal(number, before)


def assert_same_run(a, b, base=True):
    """Weights bit for bit, the base's too, metrics and results to the last digit."""
    weights_a = adapter(a)
    weights_b = adapter(b)
    assert weights_a.keys() == weights_b.keys()
    assert all(torch.equal(weights_a[k], weights_b[k]) for k in weights_a)
    if base:
        base_a, base_b = (load_file(base_of(folder) / "model.safetensors") for folder in (a, b))
        assert all(torch.equal(base_a[k], base_b[k]) for k in base_a)
    assert repr(metrics(a)) == repr(metrics(b))  # repr: nan equals nan
    results_a, results_b = (read_json(folder / "results.json") for folder in (a, b))
    assert repr(results_a["base"]) == repr(results_b["base"])
    assert repr(results_a["trained"]) == repr(results_b["trained"])


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    rates = [learning_rate(2.0, 0.1, progress) for progress in (0.05, 0.1, 0.55, 1.0)]
    assert rates == pytest.approx([1.0, 2.0, 2.0 * (0.1 + 0.9 * 0.5), 0.2])


# 3 updates in CTC, then 4 in next-token training, then 8 of the policy.
@pytest.mark.parametrize(
    "update, number",
    [
        (2, signal.SIGTERM),
        (6, signal.SIGINT),
        (11, signal.SIGTERM),
        (11, signal.SIGINT),
        (11, signal.SIGHUP),
    ],
)
def test_a_stopped_run_resumes_exactly(update, number, first_run, tmp_path):
    with pytest.raises(SystemExit) as stop, stopping_at(update, number) as calls:
        train.main(tiny(out=tmp_path / "run"))
    assert stop.value.code == 128 + number and len(calls) < 15
    train.main(tiny(out=tmp_path / "run"))
    assert_same_run(first_run, tmp_path / "run")


FILE_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def die_at(where, count, folder):
    """Kill this process without a chance to clean up: at the count-th call of a function (module,
    name), or the count-th time that something below folder is opened, made, renamed or removed."""
    calls = []

    def count_call():
        calls.append(None)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, args):
        if event in FILE_OPERATIONS and str(args[0]).startswith(str(folder)):
            count_call()

    def dying(*args, **kwargs):
        count_call()
        return original(*args, **kwargs)

    if where == "files":
        sys.addaudithook(hook)
    else:
        original = getattr(*where)
        setattr(*where, dying)


# A run makes some 120 of these operations.
POINTS = [("files", count) for count in range(3, 120, 15)]
POINTS += [
    ((checkpoints, "save_file"), 6),  # in the middle of the policy's second checkpoint
    ((Updater, "step"), 13),  # between checkpoints, with metrics logged past the last one
]


@pytest.mark.parametrize("where, count", POINTS)
def test_kill_9_at_any_moment_loses_nothing(where, count, first_run, tmp_path):
    child = os.fork()
    if child == 0:
        try:
            die_at(where, count, tmp_path)
            train.main(tiny(out=tmp_path / "run"))
        finally:  # not the end of pytest, whatever happens
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    train.main(tiny(out=tmp_path / "run"))
    assert_same_run(first_run, tmp_path / "run")
    left = [path.name for path in tmp_path.rglob("*")]
    assert not [name for name in left if name.startswith("saving-") or name.endswith(".tmp")]


@pytest.mark.parametrize("count", [1, 20])
def test_a_full_disk_is_named_and_the_same_command_goes_on(
    count, first_run, tmp_path, monkeypatch, capsys
):
    """Whatever is being written: here, the count-th time that something must reach the disk."""
    calls = []
    fsync = os.fsync

    def full(handle):
        calls.append(None)
        if len(calls) == count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    assert run_as_script(*tiny(out=tmp_path / "run")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path}") and "No space left on device" in error
    train.main(tiny(out=tmp_path / "run"))
    assert_same_run(first_run, tmp_path / "run")


def test_a_reader_that_leaves_is_a_request_to_stop(first_run, tmp_path):
    """`python train.py | head -1`: the run saves, and goes on later."""
    command = [sys.executable, "train.py", *tiny("--eval-every 1", out=tmp_path / "run")]
    one_thread = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(
        command, cwd=ROOT, env=one_thread, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if "LEAF: 4 steps" in line:
                break
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "Traceback" not in said and "Exception" not in said
    assert len(metrics(tmp_path / "run")) == 2  # noticed after the first, saved after the second
    train.main(tiny("--eval-every 1", out=tmp_path / "run"))
    rows = [{k: v for k, v in row.items() if "validation" not in k} for row in metrics(first_run)]
    for row, want in zip(metrics(tmp_path / "run"), rows, strict=True):
        assert repr({k: v for k, v in row.items() if "validation" not in k}) == repr(want)


def test_closed_streams_are_no_error(first_run, tmp_path):
    command = [sys.executable, "train.py", *tiny(out=first_run)]
    closed = 'exec "$@" >&- 2>&-'
    subprocess.run(["sh", "-c", closed, "sh", *command], cwd=ROOT, check=True)


@pytest.mark.parametrize("damage", ["cut", "no tensors", "no step", "a list", "nan", "no moment"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(damage, first_run, tmp_path, capsys):
    """And what has another name there is not ours."""
    run = tmp_path / "run"
    command = tiny("--save-every 1", base=base_of(first_run), out=run)
    with pytest.raises(SystemExit), stopping_at(5):
        train.main(command)
    checkpoints = run / "checkpoints" / "policy"
    assert [path.name for path in saved_steps(checkpoints)] == ["step-000002", "step-000003"]
    newest = checkpoints / "step-000003"
    tensors = newest / "tensors.safetensors"
    if damage == "cut":
        os.truncate(tensors, 1000)
    elif damage == "no tensors":
        tensors.unlink()
    elif damage == "no step":
        (newest / "state.json").write_text("")
    elif damage == "a list":
        (newest / "state.json").write_text("[3]")
    else:
        saved = load_file(tensors)
        name = next(name for name in saved if name.startswith("exp_avg."))
        saved[name] = saved[name] * math.nan if damage == "nan" else saved[name][:1].clone()
        save_file(saved, tensors)
    shutil.copytree(checkpoints / "step-000002", checkpoints / "step-000009.bak")
    (checkpoints / "step-last").write_text("mine")
    train.main(command)
    assert "a checkpoint is damaged and left out" in capsys.readouterr().out
    assert_same_run(first_run, run, base=False)
    assert (checkpoints / "step-last").exists() and (checkpoints / "step-000009.bak").exists()


def test_what_is_not_finite_is_not_saved(tmp_path):
    weights = {"a": torch.tensor([1.0, math.inf])}
    adam = torch.optim.AdamW(weights.values())
    with pytest.raises(DataError, match="step 7 is not saved.*value.a has values that are not fin"):
        save_checkpoint(tmp_path, 7, weights, adam)
    assert not saved_steps(tmp_path)


def test_a_skipped_step_leaves_the_model_as_it_was():
    """BatchNorm's statistics, too, which the forward pass has moved."""
    encoder = make_model().encoder.train()
    updater = Updater(encoder.parameters(), 1.0, encoder.buffers())

    def learn(mels):
        updater.zero_grad()
        mel, lengths = pad_ragged(mels, torch.device("cpu"))
        encoder(mel, lengths)[0].square().sum().backward()
        return updater.step(0.01)

    assert math.isfinite(learn([randn(20, 160), randn(31, 160)]))
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    assert not math.isfinite(learn([randn(20, 160), 1e30 * randn(31, 160)]))
    same(encoder.state_dict(), before)
    assert math.isfinite(learn([randn(20, 160), randn(31, 160)]))
    moved = {n: not torch.equal(t, before[n]) for n, t in encoder.state_dict().items()}
    assert all(moved[name] for name in moved if "running" in name or "num_batches" in name)


@pytest.mark.parametrize("name", ["config.json", "base.json", "tokenizer.model"])
def test_the_first_write_of_all_may_have_been_killed(name, first_run, tmp_path):
    folder = tmp_path / ("run" if name == "config.json" else "base-qa-seed0-training")
    folder.mkdir()
    (folder / (name + ".tmp")).write_text("{")
    train.main(tiny(out=tmp_path / "run"))
    assert_same_run(first_run, tmp_path / "run")


def test_the_best_step_is_kept(first_run, tmp_path, monkeypatch):
    """The first with the greatest validation BLEU; a stop in between changes nothing."""
    bleu = [10.0, 30.0, 30.0, 20.0]
    weights = []

    def measured(model, tokenizer, split, cfg):
        weights.append({n: p.detach().clone() for n, p in lora.lora_parameters(model).items()})
        return bleu[len(weights) - 1]

    monkeypatch.setattr(train, "greedy_bleu", measured)
    for stop in (None, 3, 5):  # updates of the policy; two a step
        weights.clear()
        run = tmp_path / f"run-{stop}"
        command = tiny("--eval-every 1", base=base_of(first_run), out=run)
        if stop:
            with pytest.raises(SystemExit), stopping_at(stop):
                train.main(command)
        train.main(command)
        results = read_json(run / "results.json")
        assert results["best"] == {"step": 2, "validation_bleu": 30.0}
        best = load_file(run / "adapter-best" / "adapter_model.safetensors")
        for name, tensor in weights[1].items():
            same(best[f"base_model.model.{transformers_name(name)}.weight"], tensor)
        assert not torch.equal(next(iter(adapter(run).values())), next(iter(best.values())))
    monkeypatch.undo()
    train.main(["--eval-only", "--best", "--out", str(run), "--device", "cpu"])
    figures = read_json(run / "evaluation-qa-best.json")
    assert figures["config"]["resume_adapter"] == str(run / "adapter-best")
    with pytest.raises(UserError, match="no adapter-best"):
        shutil.rmtree(run / "adapter-best")
        train.main(["--eval-only", "--best", "--out", str(run), "--device", "cpu"])


def test_a_second_epoch_starts_from_the_first_and_is_measured_to_the_base(first_run, tmp_path):
    """A fresh optimiser and schedule; the policy is the first's, the reference the base."""
    run = tmp_path / "second"
    trained = {name: tensor.clone() for name, tensor in adapter(first_run).items()}
    cfg = train.Config(resume_adapter=str(first_run / "adapter"), base=str(base_of(first_run)))
    model, _ = train.load(cfg, torch.device("cpu"), torch.float32)
    train.adapt(cfg, model)
    for name, parameter in lora.lora_parameters(model).items():
        same(parameter, trained[f"base_model.model.{transformers_name(name)}.weight"])
    resumed = {"base": base_of(first_run), "resume_adapter": first_run / "adapter"}
    train.main(tiny("--seed 1 --update-prompts 4", out=run, **resumed))
    # Before any update: to the first epoch's policy it would be 0.
    assert metrics(run)[0]["kl"] > 1e-4
    assert metrics(run)[0]["lr"] == learning_rate(train.Config.lr, 0.05, 1 / 4)
    last = load_file(run / "checkpoints/policy/step-000004/tensors.safetensors")
    assert {tensor.item() for name, tensor in last.items() if name.startswith("step.")} == {4}
    results = [read_json(folder / "results.json") for folder in (first_run, run)]
    assert results[0]["base"] == results[1]["base"]


def test_evaluation_swaps_the_audio(first_run, tmp_path, monkeypatch):
    heard = []
    prompts = data.Split.prompts

    def listening(self, model, indices, audio_of=None):
        heard.append((indices, audio_of))
        return prompts(self, model, indices, audio_of)

    monkeypatch.setattr(data.Split, "prompts", listening)
    rows = synthetic.rows("qa", {"train": 24, "validation": 4, "test": 6}, 0)["test"]
    train.main(["--eval-only", "--out", str(first_run), "--device", "cpu"])
    every = list(range(6))
    assert heard == [(every, None)] * 2 + [(every, data.swapped_audio(rows))]
    evaluation = read_json(first_run / "evaluation-qa.json")
    base = read_json(first_run / "base.json")
    assert base.keys() < evaluation.keys() and base["mean reward x100, ceiling"] < 100
    assert len([name for name in base if name.startswith("heard %, ")]) == len(synthetic.FIELDS)


@pytest.mark.parametrize("slots", [{}, {"slots": []}, {"slots": {}}])
def test_rows_without_slots_have_no_scores_of_them(slots, tmp_path, monkeypatch):
    rows = [{"audio": "a.wav", "prompt": AUDIO, "reference": "Anna", **slots}] * 2
    monkeypatch.setattr(train, "answer", lambda model, tokenizer, split, *_, **__: ["Anna", "Bob"])
    split = types.SimpleNamespace(rows=rows)
    scores = train.evaluate(None, None, split, train.Config(), tmp_path / "predictions.jsonl")
    assert scores["exact match %"] == 50 and all(map(math.isfinite, scores.values()))
    assert not [name for name in scores if "heard" in name or "ceiling" in name]


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


def test_a_finished_run_is_not_run_again_and_other_settings_are_refused(first_run, capsys):
    before = (first_run / "policy.jsonl").read_bytes()
    train.main(tiny(out=first_run))
    assert "is finished" in capsys.readouterr().out
    assert (first_run / "policy.jsonl").read_bytes() == before
    with pytest.raises(UserError, match=r"(?s)another configuration.*lr: 0.00\d+ there, 0.5 now"):
        train.main(tiny("--lr 0.5", out=first_run))
    with pytest.raises(UserError, match=r"(?s)base-qa-seed0.*ctc_steps: 3 there, 5 now"):
        train.main(tiny("--ctc-steps 5", out=first_run.parent / "other"))


def test_a_folder_serves_one_process_and_is_taken_by_what_trains_there(
    first_run, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    command = tiny(base=base_of(first_run), out=run)
    with lock(run, wait=False):
        with pytest.raises(UserError, match="in use by another process"):
            train.main(tiny(out=run))
    with monkeypatch.context() as broken:
        broken.setattr(data, "reward", lambda answer, row: math.nan)
        with pytest.raises(UserError, match=r"data.reward gave nan for the answer"):
            train.main([*command, "--lr", "0.1"])
    train.main(command)  # nothing had been done there yet
    (run / "results.json").write_text("{")
    with pytest.raises(DataError, match=r"results.json cannot be read"):
        train.main(command)


def run_as_script(*flags):
    """`python train.py FLAGS` in this process; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    return stop.value.code


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--algo ppo", "algo"),
        ("--no-such-flag", "no-such-flag"),
        ("--lr fast", "lr"),
        ("--top-p 0", "top_p"),
        ("--prompts 4 --update-prompts 3", "update_prompts"),
        ("--responses 0", "responses"),
        ("--base-seed 99999999999999999999", "base_seed"),
        ("--data nowhere", "train.jsonl"),
    ],
)
def test_bad_flags_get_one_line_and_exit_code_2(flags, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_as_script("--out", tmp_path / "run", *flags.split()) == 2
    error = capsys.readouterr().err
    assert word in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
    ],
)
def test_a_torchrun_that_is_none_gets_one_line_and_exit_code_2(
    environment, tmp_path, monkeypatch, capsys
):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run_as_script(*tiny(out=tmp_path / "run")) == 2
    said = capsys.readouterr()
    assert (
        said.out == ""
        and said.err.count("\n") == 1
        and "RANK, WORLD_SIZE and LOCAL_RANK" in said.err
    )
    assert not (tmp_path / "run").exists()


def test_flags_are_few_and_in_groups(capsys):
    """At most 50, each with a line of --help under the title of what it belongs to."""
    assert run_as_script("--help") == 0
    text = capsys.readouterr().out
    flags = re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE)
    wanted = {"--" + f.name.replace("_", "-") for f in fields(train.Config)} | {
        "--eval-only",
        "--best",
    }
    assert sorted(flags) == sorted(wanted) and len(flags) <= 50
    titles = [line for line in text.splitlines() if re.fullmatch(r"[A-Za-z ]+:", line)]
    assert titles == [
        "options:",  # --help itself
        "data:",
        "base model:",
        "policy optimisation:",
        "credit:",
        "LoRA:",
        "evaluation:",
        "the run:",
    ]
    of_title = {}
    for line in text[text.index("options:") :].splitlines():
        if line in titles:
            title = line
        elif line.startswith("  --"):
            of_title.setdefault(title, []).append(line.split()[0].rstrip(","))
    assert {"--kl-coef", "--lr", "--steps"} <= set(of_title["policy optimisation:"])
    assert {"--lora-r", "--lora-targets"} <= set(of_title["LoRA:"])
    assert {"--fork-budget", "--terms"} <= set(of_title["credit:"])
    assert {"--base-lr", "--init"} <= set(of_title["base model:"])


# A machine with what the default run needs and no more: not IBM's tokenizer and chat template, nor
# what Windows lacks.
PLAIN_MACHINE = """
import runpy, sys
for name in ("tokenizers", "jinja2", "torchaudio", "resource", "fcntl"):
    sys.modules[name] = None  # makes its import fail
import filelock
filelock.FileLock = filelock.SoftFileLock
import leaf, model, lora, data, train
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
print("imported:", [name for name in sys.modules if name.partition(".")[0] == "released"])
"""


def test_a_default_run_needs_no_more_than_the_five_files(tmp_path):
    command = [sys.executable, "-c", PLAIN_MACHINE, *tiny("--steps 2", out=tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("imported: []\n")
    results = read_json(tmp_path / "run" / "results.json")
    assert math.isnan(results["peak_memory_gb"]) and "BLEU greedy" in results["trained"]


def by_letters(answer, row):
    """A reward that tells answers apart: the tiny base never earns any BLEU."""
    return sum(map(ord, answer)) % 11 / 11


def load_policy(first_run, out, flags):
    """What train_policy is given, up to the folder `out`: on the base of the first run, with fresh
    LoRA."""
    cfg, _ = train.parse(tiny(flags, base=base_of(first_run), out=out))
    model, tokenizer = train.load(cfg, torch.device("cpu"), torch.float32)
    train.adapt(cfg, model)
    splits = {name: data.Split(name, rows, 1.0) for name, rows in train.load_rows(cfg).items()}
    for split in splits.values():
        split.hear(model, tokenizer)
    return cfg, model, tokenizer, splits["train"], splits["validation"], out


def test_another_credit_rule_is_used(first_run, tmp_path, monkeypatch):
    """One that turns GRPO's advantages around: the first update goes as far the other way."""
    monkeypatch.setattr(data, "reward", by_letters)
    seen = []

    def turned_around(cfg, tokens, lengths, surprisal, rewards):
        seen.append((tokens, lengths, surprisal, rewards))
        advantages, boundaries = train.credit(cfg, tokens, lengths, surprisal, rewards)
        return -advantages, boundaries

    flags = "--algo grpo --steps 1 --update-prompts 4 --micro-prompts 4 --kl-coef 0"
    moved = []
    for rule in (train.credit, turned_around):
        policy = load_policy(first_run, tmp_path / rule.__name__, flags)
        train.train_policy(*policy, credit=rule)
        parameters = lora.lora_parameters(policy[1])
        moved.append({name: p.detach() for name, p in parameters.items() if "lora_B" in name})
    for name, B in moved[0].items():
        assert B.any()
        near(moved[1][name], -B)
    assert len(seen) == 4  # prompts
    for tokens, lengths, surprisal, rewards in seen:
        assert tokens.shape == surprisal.shape and lengths.shape == (4,) and len(rewards) == 4
        assert (surprisal[token_mask(lengths, tokens.shape[1])] >= 0).all()


def test_a_run_goes_on_with_its_own_credit_rule_only(first_run, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "reward", by_letters)
    calls = []

    def own_rule(cfg, *group):
        calls.append(None)
        if len(calls) == 2 * 4 + 1:  # in the third step of 4 prompts
            raise ZeroDivisionError
        return train.credit(cfg, *group)

    def policy():
        return load_policy(first_run, tmp_path / "run", "--save-every 1")

    with pytest.raises(ZeroDivisionError):
        train.train_policy(*policy(), credit=own_rule)
    assert len(metrics(tmp_path / "run")) == 2
    with pytest.raises(UserError, match="credit rule 'own_rule', not 'credit'"):
        train.train_policy(*policy())
    train.train_policy(*policy(), credit=own_rule)
    assert len(calls) == 2 * 4 + 1 + 2 * 4
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4]


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
    monkeypatch.setattr(data, "reward", by_letters)
    for algo in ("leaf", "grpo"):
        out = tmp_path / algo
        train.main(tiny(f"--algo {algo} --steps 2", base=base_of(first_run), out=out))
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


@pytest.mark.parametrize("targets", ["decoder", SUFFIXES])
def test_micro_batches_change_memory_and_nothing_else(targets, first_run, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "reward", by_letters)
    sizes = ("1", "2", "4")
    flags = f"--steps 2 --update-prompts 4 --lora-targets {targets} --micro-prompts "
    for size in sizes:
        train.main(tiny(flags + size, base=base_of(first_run), out=tmp_path / size))
    runs = [adapter(tmp_path / size) for size in sizes]
    for other in runs[1:]:
        for name, tensor in runs[0].items():
            torch.testing.assert_close(other[name], tensor, atol=2e-4, rtol=1e-3)
    gradients = [metrics(tmp_path / size)[0]["grad_norm"] for size in sizes]
    assert gradients[0] > 1e-3 and gradients == pytest.approx([gradients[0]] * 3, rel=1e-5)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",  # by gloo
        pytest.param(  # by NCCL
            "cuda",
            marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two CUDA GPUs"),
        ),
    ],
)
def test_two_processes_are_one(device, first_run, tmp_path):
    """Prompts shared out over two processes give the update of one. Stopped in the middle, both
    save and go on; only the first writes."""
    flags = f"--steps 6 --save-every 1 --eval-every 3 --device {device} --dtype float32"
    one = tmp_path / "one"
    two = tmp_path / "two"
    train.main(tiny(flags, base=base_of(first_run), out=one))
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 train.py".split()
    command = [sys.executable, *torchrun, *tiny(flags, base=base_of(first_run), out=two)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    while not (two / "checkpoints/policy/step-000001").exists():
        assert process.poll() is None, process.stdout.read()
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode and 1 <= len(metrics(two)) < 6
    said = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert said.count("6 steps of") == 1 and said.count("took") == 1
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    alike = "loss reward kl grad_norm response_length usable_fork_fire equal_rewards lr".split()
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a.keys() == b.keys()
        for key in alike:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-6), key
    for name, tensor in adapter(one).items():
        torch.testing.assert_close(adapter(two)[name], tensor, atol=2e-4, rtol=1e-3)


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

    monkeypatch.setattr(data, "reward", reward)
    monkeypatch.setattr(leaf, "policy_loss", loss)
    for algo in ("leaf", "grpo"):
        seen.clear()
        rewarded.clear()
        flags = f"--algo {algo} --steps 3 --eval-every 0"
        train.main(tiny(flags, base=base_of(first_run), out=tmp_path / algo))
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
    monkeypatch.setattr(data, "reward", by_letters)
    flags = f"--lora-dropout 0.5 --lora-targets {targets}"
    train.main(tiny(flags, base=base_of(first_run), out=tmp_path / "run"))
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


def write_corpus(folder, transcripts=True, rows=12):
    """A corpus of short tones at 16 kHz; the reference names the tone."""
    folder.mkdir()
    for split in ("train", "validation", "test"):
        lines = []
        for i in range(rows):
            time = torch.arange(6400 + 160 * i) / 16000
            tone = 0.3 * torch.sin(2 * math.pi * 300 * (1 + i % 3) * time)
            soundfile.write(folder / f"{split}{i}.wav", tone.numpy(), 16000)
            row = {
                "audio": f"{split}{i}.wav",
                "prompt": "<|audio|>Which tone?",
                "reference": f"Tone {'abc'[i % 3]} it is.",
            }
            if transcripts:
                row |= {"transcript": "abc"[i % 3], "group": "g"}
            lines.append(json.dumps(row))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("transcripts", [True, False])
def test_a_corpus_of_ones_own(transcripts, tmp_path, capsys):
    corpus = write_corpus(tmp_path / "tones", transcripts)
    train.main(tiny("--train-rows 2", data=corpus, out=tmp_path / "run"))
    out = capsys.readouterr().out
    assert "tones: 12 train, 4 validation, 6 test rows" in out  # the first is not limited
    results = read_json(tmp_path / "run" / "results.json")
    before = results["base"]["mean reward x100"]
    after = results["trained"]["mean reward x100"]
    shown = next(line.split() for line in out.splitlines() if line.startswith("mean reward"))
    assert shown == f"mean reward x100 {before:.2f} {after:.2f} {after - before:+.2f}".split()
    assert ("CTC is skipped" in out) != transcripts and ("BLEU greedy, g" in out) == transcripts
    assert (tmp_path / "base-tones-seed0" / "ctc.jsonl").exists() == transcripts


def test_a_bad_corpus_is_refused_whole(tmp_path, capsys):
    """Every bad row is counted, no folder is made; --skip-bad-rows goes on without them and says
    how many."""
    corpus = write_corpus(tmp_path / "tones")
    with open(corpus / "train.jsonl", "a") as file:
        file.write('{"audio": "gone.wav", "prompt": "<|audio|>?", "reference": "x"}\n{')
    command = tiny(data=corpus, out=tmp_path / "run")
    words = r"(?s)2 bad rows.*train.jsonl, line 13: .*gone.wav.*line 14: not JSON"
    with pytest.raises(DataError, match=words):
        train.main(command)
    assert {p.name for p in tmp_path.iterdir()} == {"tones", "checked.json"}
    train.main([*command, "--skip-bad-rows"])
    assert "skipping 2 bad rows" in capsys.readouterr().out
    other = tiny(data=corpus, out=tmp_path / "other")
    (corpus / "validation.jsonl").write_text("\n")
    with pytest.raises(DataError, match="validation.jsonl has no rows"):
        train.main(other)
    (corpus / "validation.jsonl").unlink()
    with pytest.raises(DataError, match="validation.jsonl is missing"):
        train.main(other)


def test_text_beyond_ascii_is_escaped_where_it_must_be(first_run, tmp_path):
    corpus = write_corpus(tmp_path / "tones")
    text = (corpus / "test.jsonl").read_text().replace("Tone a", "Größe, приём, 東京")
    (corpus / "test.jsonl").write_text(text, encoding="utf-8")
    flags = tiny(
        "--steps 1 --eval-every 0", data=corpus, base=base_of(first_run), out=tmp_path / "r"
    )
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "train.py", *flags]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, env=os.environ | ascii_only)
    assert done.returncode == 0, done.stderr
    assert rb"reference  Gr\xf6\xdfe, \u043f\u0440\u0438\u0451\u043c, \u6771" in done.stdout


def test_an_encoder_with_lora_is_trained_and_never_heard_stale(first_run, tmp_path, monkeypatch):
    """Its adapters move, and after that sampler and scorer still agree: both hear with the
    encoder as it is."""
    monkeypatch.setattr(data, "reward", by_letters)
    run = tmp_path / "run"
    flags = f"--lora-targets {SUFFIXES} --lr 0.02"
    train.main(tiny(flags, base=base_of(first_run), out=run))
    of_encoder = {n: t for n, t in adapter(run).items() if "encoder" in n and "lora_B" in n}
    moved = [t.abs().max() for t in of_encoder.values()]
    assert len(moved) == 16 and min(moved) > 1e-4
    assert all(row["first_ratio_gap"] < 1e-5 for row in metrics(run))
    results = read_json(run / "results.json")
    base = read_json(first_run / "results.json")["base"]
    for name, value in base.items():  # measured with LoRA off
        assert results["base"][name] == value or "reward" in name


def test_which_model_is_meant(first_run, tmp_path, monkeypatch):
    """A run by its --out, wherever one stands; a checkpoint otherwise."""
    monkeypatch.chdir(tmp_path)
    run = ["--out", str(first_run)]
    base = ["--base", str(base_of(first_run))]
    cfg, _ = train.parse(["--eval-only", "--init", "ck", "--data", "d"])
    assert (cfg.init, cfg.resume_adapter, str(cfg.run_folder)) == ("ck", "", "runs/d-ck-evaluation")
    cfg, _ = train.parse(["--eval-only", *base])
    assert (cfg.base, cfg.resume_adapter) == (base[1], "")
    assert cfg.out == "runs/qa-base-qa-seed0-evaluation"
    for flags in (run, [*run, *base]):
        cfg, eval_only = train.parse(["--eval-only", *flags])
        assert eval_only and cfg.resume_adapter == str(first_run / "adapter")
        assert cfg.lora_r == 4 and cfg.base_folder.samefile(base_of(first_run))
    with pytest.raises(UserError, match="no finished run"):
        train.parse(["--eval-only"])
    with pytest.raises(SystemExit):
        train.parse(["--init", "a", "--base", "b"])
    config = read_json(first_run / "adapter" / "adapter_config.json")
    assert config["base_model_name_or_path"] == str(base_of(first_run))


def test_a_run_is_evaluated_with_what_it_learned(first_run, tmp_path):
    """Its own command with --eval-only, --resume-adapter included, means the run; unfinished, it
    is refused."""
    for resumed in (first_run / "adapter", "elsewhere"):
        command = tiny("--eval-only", base=base_of(first_run), resume_adapter=resumed)
        cfg, _ = train.parse([*command, "--out", str(first_run)])
        assert cfg.resume_adapter == str(first_run / "adapter")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="unfinished"):
        train.parse([*command, "--out", str(tmp_path)])
    outs = {train.parse(["--eval-only", "--init", ck, "--data", "d"])[0].out for ck in ("a", "b")}
    assert len(outs) == 2  # the second checkpoint's figures do not replace the first's


def test_a_moved_base_gets_one_line(first_run, tmp_path):
    gone = str(tmp_path / "gone")
    with pytest.raises(UserError, match=r"tokenizer.json"):
        train.main(["--eval-only", "--out", str(first_run), "--base", gone, "--device", "cpu"])


# --------------------------------------------------------------------------------------------------
# On the device: what only a GPU can show. These run wherever CUDA is; LEAF_TEST_DEVICE=cpu (or mps)
# runs the same checks there, so that they are checked themselves.

DEVICE = torch.device(os.environ.get("LEAF_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
on_device = pytest.mark.skipif(
    ON_GPU and not torch.cuda.is_available(), reason="no CUDA here; LEAF_TEST_DEVICE=cpu tries it"
)
FLOAT32_AND_BFLOAT16 = [(torch.float32, 1e-4), (torch.bfloat16, 0.25)]


@pytest.fixture
def exact_float32():
    """CUDA's convolutions round to TF32 otherwise; its matrix products do not."""
    usual = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = usual


def wait():
    if ON_GPU:
        torch.cuda.synchronize()


def spoil_freed_memory():
    """NaN into what the allocator hands out next: whoever reads what he freed will show it."""
    sizes = [2**n for n in range(6, 22, 2)]
    blocks = [torch.full((n,), math.nan, device=DEVICE) for n in sizes for _ in range(8)]
    del blocks


def on(device, prompts):
    return Prompts(prompts.x.to(device), prompts.valid.to(device))


def adapted_model(dtype, device, targets=lora.DECODER_TARGETS):
    """Equal to the last bit wherever it is put: made on the CPU, and rounded there."""
    model = make_model().to(dtype)
    lora.apply_lora(model, targets, r=3, alpha=6.0)
    with torch.no_grad():
        for seed, parameter in enumerate(lora.lora_parameters(model).values()):
            parameter.copy_(0.2 * randn(*parameter.shape, seed=seed))
    return model.to(device)


def eager_rollout(model, prompts, u, temperature, top_p):
    """As a CUDA graph steps, with the whole cache looked at, but one kernel after the other."""
    with torch.no_grad(), lora.lora_for_sampling(model):
        state = Sampling(model, prompts, u, EOS, temperature, top_p)
        state.first_token(prompts)
        for _ in range(u.shape[2] - 1):
            state.next_token(state.L + u.shape[2])
    return state.rollout


@on_device
@pytest.mark.parametrize("dtype, tolerance", FLOAT32_AND_BFLOAT16)
def test_on_device_a_graph_draws_what_eager_steps_draw(dtype, tolerance, exact_float32):
    """And the scorer agrees, in six calls of changing shapes, with a backward pass and spoilt
    memory in between."""
    model = adapted_model(dtype, DEVICE)
    shapes = [(3, 4, 12), (1, 2, 30), (4, 8, 5), (2, 3, 2), (5, 1, 17), (3, 4, 12)]
    for call, (P, K, T) in enumerate(shapes):
        prompts = on(DEVICE, make_prompts([2 + (3 * i + call) % 7 for i in range(P)]))
        prompts.x = prompts.x.to(dtype)
        u = rand(P, K, T, seed=call).to(DEVICE)
        top_p = 0.9 if call % 2 else 1.0
        rollout = model.sample(prompts, u, EOS, 1.0, top_p)
        spoil_freed_memory()
        eager = eager_rollout(model, prompts, u, 1.0, top_p)
        mask = rollout.mask
        if not ON_GPU:  # no graph, so less of the cache was looked at; a response may part in bf16
            mask = mask & (rollout.tokens == eager.tokens).cumprod(-1).bool()
            assert mask.sum() > 0.5 * rollout.mask.sum()
        assert torch.equal(rollout.tokens[mask], eager.tokens[mask])
        for name in ("logq", "logp"):
            got, want = (getattr(r, name)[mask] for r in (rollout, eager))
            near(got, want, atol=tolerance, rtol=0)
        host = rollout.to("cpu")
        logp = model.response_logp(prompts, host.tokens, host.lengths)
        near(logp[mask], rollout.logp[mask], atol=tolerance, rtol=0)
        logp[mask].sum().backward()
        assert all(p.grad.isfinite().all() for p in lora.lora_parameters(model).values())
        spoil_freed_memory()


@on_device
@pytest.mark.parametrize("dtype, tolerance", FLOAT32_AND_BFLOAT16)
@pytest.mark.parametrize("targets", [lora.DECODER_TARGETS, PLAIN], ids=["decoder", "encoder too"])
def test_on_device_gradients_are_those_of_the_cpu(dtype, tolerance, targets, exact_float32):
    """From log-mels to LoRA, through logits in parts. Those of the CPU are of the same rounded
    weights, in float32."""
    tokens = (V * rand(2, 3, 6)).long()
    lengths = torch.tensor([[6, 3, 1], [2, 6, 5]])
    mels = [randn(n, 160, seed=n) for n in (31, 44)]

    def gradients(device, compute_dtype):
        model = adapted_model(dtype, device, targets).to(compute_dtype)
        model.token_logp = partial(model.token_logp, max_logits=3 * V)
        audio = model.project(model.encode(mels))
        prompts = model.embed_prompts([[1, V, 2], [3, 4, V, 5]], audio)
        logp = model.response_logp(prompts, tokens, lengths)
        mask = torch.arange(6, device=device) < lengths[..., None].to(device)
        flat = [x.flatten(0, 1) for x in (logp, logp.detach(), logp.detach() - 0.1, mask)]
        advantages = randn(6, 6).to(device)
        leaf.policy_loss(*flat[:3], advantages, flat[3])[0].backward()
        grads = {n: p.grad.float().cpu() for n, p in lora.lora_parameters(model).items()}
        return torch.cat([grads[name].flatten() for name in sorted(grads)])

    got = gradients(DEVICE, dtype)
    want = gradients(torch.device("cpu"), torch.float32)
    assert (got - want).norm() <= tolerance * want.norm() and want.norm() > 1e-3


@on_device
@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (1.0, 0.9), (0.7, 0.5)])
def test_on_device_a_large_vocabulary_is_drawn_from_truly(temperature, top_p):
    """u lies in the drawn token's step of the distribution, which is computed in float64; as many
    tokens are kept, but for one at the edge of the nucleus."""
    logits = 3 * randn(64, 49160)
    u = rand(64, seed=1)
    drawn = [x.cpu() for x in draw_token(logits.to(DEVICE), u.to(DEVICE), temperature, top_p)]
    for row, (token, logq, logp) in enumerate(zip(*drawn)):
        p = (logits[row].double() / temperature).softmax(-1)
        likely_first, order = p.sort(descending=True)
        n_kept = int((likely_first.cumsum(0) - likely_first < top_p - 1e-12).sum())
        q = torch.zeros_like(p)
        q[order[:n_kept]] = likely_first[:n_kept]
        mass = (q / q.sum()).cumsum(0)
        edge = 1e-5 + likely_first[n_kept - 1] * (top_p < 1)
        assert q[token] > 0 or p[token] >= likely_first[n_kept] - 1e-12
        assert mass[token] - p[token] / q.sum() - edge <= u[row] <= mass[token] + edge
        near(logq.double(), (p[token] / q.sum()).log(), atol=1e-3, rtol=0)
        near(logp.double(), logits[row].double().log_softmax(-1)[token], atol=1e-4, rtol=0)


@on_device
def test_on_device_four_updates_are_two_and_a_checkpoint_and_two(tmp_path):
    def train_some(updates, folder, start=0):
        weights = {"a": randn(5, 3).to(DEVICE), "b": randn(4, seed=1).to(DEVICE)}
        named = {name: tensor.requires_grad_() for name, tensor in weights.items()}
        updater = Updater(named.values(), grad_clip=1.0)
        assert load_checkpoint(folder, named, updater.adam) == start
        for n in range(start, updates):
            for p in named.values():
                p.grad = randn(*p.shape, seed=n).to(DEVICE)
            updater.step(0.1)
        save_checkpoint(folder, updates, named, updater.adam)
        return [tensor.detach().cpu() for tensor in named.values()]

    want = train_some(4, tmp_path / "straight")
    train_some(2, tmp_path / "in two")
    same(train_some(4, tmp_path / "in two", start=2), want)


@on_device
def test_on_device_the_encoder_learns_as_on_the_cpu(exact_float32):
    """CTC's gradients and BatchNorm's statistics, ragged."""
    mels = [randn(n, 160, seed=n) for n in (40, 23, 31)]
    labels = [[1, 2, 2, 3], [4], [3, 1]]

    def learn(device):
        encoder = make_model().encoder.train().to(device)
        mel, lengths = pad_ragged(mels, device)
        _, logits = encoder(mel, lengths)
        loss = F.ctc_loss(
            logits.log_softmax(-1).transpose(0, 1),
            torch.tensor(sum(labels, [])).to(device),
            lengths.cpu(),
            torch.tensor([len(one) for one in labels]),
        )
        loss.backward()
        grads = [p.grad.cpu().flatten() for p in encoder.parameters() if p.grad is not None]
        return loss.detach().cpu(), torch.cat(grads), [b.cpu() for b in encoder.buffers()]

    loss, grads, buffers = learn(DEVICE)
    want_loss, want_grads, want_buffers = learn(torch.device("cpu"))
    near((loss, buffers), (want_loss, want_buffers), atol=1e-4, rtol=1e-4)
    assert (grads - want_grads).norm() <= 1e-3 * want_grads.norm() and want_grads.norm() > 1e-3


@on_device
def test_on_device_a_run_stops_and_goes_on(tmp_path):
    """The default run in miniature, with the dtype that fits; base and policy."""
    run = tmp_path / "run"
    command = tiny(f"--device {DEVICE.type} --lr 1e-3 --save-every 50", out=run)
    for update in (5, 5):  # in next-token training, and then in the policy's second step
        with pytest.raises(SystemExit), stopping_at(update):
            train.main(command)
    before = metrics(run)
    train.main(command)
    after = metrics(run)
    assert [row["step"] for row in after] == [1, 2, 3, 4] and after[: len(before)] == before
    assert all(math.isfinite(row["loss"]) and row["first_ratio_gap"] < 0.1 for row in after)
    assert all(tensor.isfinite().all() for tensor in adapter(run).values())


@on_device
def test_on_device_new_shapes_cost_no_more_than_old_ones():
    model = adapted_model(choose_device(DEVICE.type, "auto")[1], DEVICE)

    def score(n):  # a prompt of n tokens, responses of n
        prompts = on(DEVICE, make_prompts([n]))
        prompts.x = prompts.x.to(model.dtype)
        tokens = (V * rand(1, 2, n, seed=n)).long()
        model.response_logp(prompts, tokens, torch.tensor([[n, n]])).sum().backward()
        wait()

    score(100)
    began = time.perf_counter()
    for _ in range(20):
        score(100)
    old = time.perf_counter() - began
    began = time.perf_counter()
    for n in range(80, 100):
        score(n)
    assert time.perf_counter() - began < 3 * old


@on_device
def test_on_device_memory_stays_flat_over_thirty_captures():
    model = adapted_model(torch.float32, DEVICE)
    prompts = on(DEVICE, make_prompts([5, 9, 2]))

    def held():
        if ON_GPU:
            return torch.cuda.memory_reserved()
        return peak_memory(DEVICE)

    for n in range(30):
        model.sample(prompts, rand(3, 8, 20 + n % 3, seed=n).to(DEVICE), EOS)
        if n == 5:
            before = held()
    assert held() <= before + 32e6


@on_device
def test_on_device_the_dtype_fits_the_card():
    device, dtype = choose_device(DEVICE.type, "auto")
    has_bfloat16 = ON_GPU and torch.cuda.get_device_capability() >= (8, 0)
    assert dtype == (torch.bfloat16 if has_bfloat16 else torch.float32)
    assert device.type == DEVICE.type and (device.index is not None or not ON_GPU)


# Without a GPU: what can be seen of the same on tensors that have no contents.


class NeverWaits(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU, and float64 on it, which Apple's lack."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor)]
        on_gpu = [x for x in tensors if x.device.type == "cuda"]
        assert all(x.dtype != torch.float64 for x in on_gpu), function
        moved = "_to_copy" in str(function) and len(on_gpu) < len(tensors)
        assert not moved or kwargs.get("non_blocking"), function
        return out


def test_scoring_never_waits_for_the_gpu(monkeypatch):
    """Prompts, responses and the loss; that all is known from tokens on the host."""
    tokens = (V * rand(3, 4, 6)).long().numpy()
    lengths = np.array([[6, 3, 1, 2]] * 3)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # needs a GPU
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = SpeechLM(odd_config(2)).eval()
            lora.apply_lora(model, PLAIN, r=3, alpha=6.0)
            mels = [torch.empty(n, 160) for n in (31, 44, 20)]
            mask = torch.ones(12, 6, dtype=torch.bool)
        with NeverWaits():
            audio = model.project(model.encode(mels))
            prompts = model.embed_prompts([[1, V, 2], [3, 4, V, 5], [V]], audio)
            logp = model.response_logp(prompts, tokens, lengths).flatten(0, 1)
            loss, _ = leaf.policy_loss(logp, logp.detach(), logp.detach(), logp.detach(), mask)
            assert loss.device.type == "cuda"
            refusals = (AssertionError, DataDependentOutputException, DynamicOutputShapeException)
            for waits in (loss.item, mask.nonzero, lambda: loss.to("cpu"), logp.double):
                with pytest.raises(refusals):
                    waits()


def test_a_checkpoint_goes_to_where_its_parameters_are(tmp_path, monkeypatch):
    """AdamW's step, too: the fused kernel wants it beside them."""
    here = {"a": randn(5, 3).requires_grad_()}
    updater = Updater(here.values(), grad_clip=1.0)
    here["a"].grad = randn(5, 3, seed=1)
    updater.step(0.1)
    save_checkpoint(tmp_path, 1, here, updater.adam)
    saved = load_file(tmp_path / "step-000001" / "tensors.safetensors")  # true tensors
    monkeypatch.setattr(checkpoints, "load_file", lambda file: saved)
    monkeypatch.setattr(
        checkpoints, "refuse_unless_finite", lambda tensors, what: None
    )  # no contents
    with FakeTensorMode(allow_non_fake_inputs=True):
        there = {"a": torch.empty(5, 3, device="cuda", requires_grad=True)}
        updater = Updater(there.values(), grad_clip=1.0)
        assert load_checkpoint(tmp_path, there, updater.adam) == 1
        state = updater.adam.state[there["a"]]
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert {tensor.device.type for tensor in state.values()} == {"cuda"}


def test_cudnn_attention_is_off():
    """It plans for every new shape anew."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()


class Card:
    """torch.cuda as a machine with some cards would have it."""

    def __init__(self, monkeypatch, count=1, capability=(9, 0), runs=True):
        self.current = None
        emulates = {True: True, False: capability >= (8, 0)}
        for name, function in {
            "is_available": lambda: True,
            "device_count": lambda: count,
            "set_device": lambda device: setattr(self, "current", device),
            "get_device_name": lambda device: "Tesla V100",
            "get_device_capability": lambda device: capability,
            "is_bf16_supported": lambda including_emulation=True: emulates[including_emulation],
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)

        def ones(*shape, device):
            if not runs:
                raise torch.AcceleratorError("CUDA error: no kernel image is available\nmore")
            return torch.zeros(*shape)

        monkeypatch.setattr(torch, "ones", ones)


@pytest.mark.parametrize("number", [None, 0, 1])
def test_each_process_takes_the_card_of_its_number(number, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
        if number is not None:
            monkeypatch.setenv(name, "2" if name == "WORLD_SIZE" else str(number))
    card = Card(monkeypatch, count=2)
    device, dtype = choose_device("auto", "auto")
    assert (device, dtype) == (torch.device("cuda", number or 0), torch.bfloat16)
    assert card.current == device
    Card(monkeypatch, count=1)
    if number == 1:
        with pytest.raises(UserError, match="no GPU of its own.*--nproc_per_node=1"):
            choose_device("auto", "auto")


def test_a_card_without_bfloat16_takes_float32(monkeypatch):
    Card(monkeypatch, capability=(7, 5))
    assert choose_device("auto", "auto")[1] == torch.float32


def test_a_card_that_this_torch_cannot_run_is_refused(monkeypatch):
    Card(monkeypatch, capability=(7, 0), runs=False)
    with pytest.raises(
        UserError, match=r"V100 \(compute capability 7.0\).*no kernel image"
    ) as told:
        choose_device("auto", "auto")
    assert "\n" not in str(told.value)
