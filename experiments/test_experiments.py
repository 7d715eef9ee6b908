"""The methods that the experiments compare, and the statistics they report."""

import itertools
import json
import math
import os
import random
import shutil
import subprocess
import types
from statistics import fmean

import numpy as np
import pytest
import torch

import leaf
import train
from data import UserError
from experiments import bench, common, compare, credit, footprint, gpu, law, methods
from model import Prompts
from test_leaf import (
    EOS,
    make_model,
    make_prompts,
    pad_responses,
    read_json_lines,
    seeded,
    shake_lora,
)

__all__ = ["seeded"]  # a fixture that every test here uses


# --------------------------------------------------------------------------------------------------
# methods


@pytest.mark.parametrize("node_weight", [1.0, 0.5])
@pytest.mark.parametrize("boundaries", [[], [1], [2], [1, 2]])
def test_leave_one_out_values_leave_the_gradient_unbiased(boundaries, node_weight):
    """Every group of 3 responses of a policy with a logit per prefix, each with its probability:
    nothing is sampled."""
    T = 3
    vocab = (EOS, 1, 2)
    rng = random.Random(sum(boundaries))
    prefixes = [p for n in range(T) for p in itertools.product(vocab[1:], repeat=n)]
    logits = torch.tensor(
        [[rng.gauss(0, 1) for _ in vocab] for _ in prefixes],
        dtype=torch.float64,
        requires_grad=True,
    )
    logp = logits.log_softmax(-1)
    responses = [(*p, v) for p in prefixes for v in vocab if v == EOS or len(p) == T - 1]
    steps = [[(prefixes.index(o[:t]), o[t]) for t in range(len(o))] for o in responses]
    probability = torch.stack([sum(logp[s] for s in row).exp() for row in steps])
    rewards = [rng.random() for _ in responses]
    assert probability.sum().item() == pytest.approx(1)
    expected_reward = probability @ torch.tensor(rewards, dtype=torch.float64)
    (truth,) = torch.autograd.grad(expected_reward, logits, retain_graph=True)

    weight = {}  # of each log-probability in the expected surrogate
    for group in itertools.product(range(len(responses)), repeat=3):
        chance = math.prod(probability[o].item() for o in group)
        tokens, lengths = pad_responses([responses[o] for o in group], T)
        r = [rewards[o] for o in group]
        nodes = leaf.build_tree(tokens, lengths, r, boundaries)
        spans = leaf.leave_one_out_credits(lengths, r, nodes, node_weight)
        for i, start, end, value in spans:
            for step in steps[group[i]][start:end]:
                weight[step] = weight.get(step, 0) + chance * value / 3
    (expected,) = torch.autograd.grad(sum(w * logp[step] for step, w in weight.items()), logits)
    assert torch.allclose(expected, truth, rtol=0, atol=1e-12)


def test_leave_one_out_is_rloo_without_a_tree_and_keeps_grpos_scale():
    tokens, lengths = pad_responses([[1, 2, EOS], [2, EOS], [2, 1, 1]])
    rewards = [0.9, 0.1, 0.4]
    found = methods.leave_one_out(tokens, lengths, rewards, boundaries=[])
    # r - mean of the others is (r - mean) K / (K - 1).
    expected = leaf.grpo_advantages(rewards, lengths) * 3 / 2
    assert torch.allclose(found, expected, atol=1e-6)


def test_half_way_is_the_mean_of_leave_one_out_with_the_tree_and_without():
    tokens, lengths = pad_responses([[1, 2, EOS], [1, EOS], [2, 1, 1], [1, 2, 2]])
    group = (tokens, lengths, [0.9, 0.1, 0.4, 0.5])
    with_tree = methods.leave_one_out(*group, [1, 2])
    without = methods.leave_one_out(*group, [])
    found = methods.leave_one_out(*group, [1, 2], node_weight=0.5)
    assert torch.allclose(found, (with_tree + without) / 2, atol=1e-6)
    assert not torch.allclose(with_tree, without)


def test_even_boundaries_by_hand():
    for lengths, B, m, want in (
        ([9, 12], 2, 1, [3, 6]),
        ([12, 9], 3, 1, [2, 4, 6]),
        ([9, 12], 3, 3, [4, 6]),
        ([2, 9], 3, 0, [1]),
        ([0, 9], 3, 1, []),
        ([9], 0, 1, []),
    ):
        assert methods.even_boundaries(torch.tensor(lengths), B, min_prefix=m) == want


# --------------------------------------------------------------------------------------------------
# law


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_the_variance_of_tails_is_that_of_drawn_rewards(weight):
    """Groups of 4, 3 and 1, effects and luck drawn anew each time."""
    sizes = [4, 3, 1]
    rho = 0.6
    lengths = [2] * 8
    tokens = [[g, 0] for g, n in enumerate(sizes) for _ in range(n)]
    rng = np.random.default_rng(0)
    squares = []
    for _ in range(6000):
        effects = math.sqrt(rho) * rng.standard_normal(3)
        rewards = [effects[g] + rng.standard_normal() for g, _ in tokens]
        nodes = leaf.build_tree(tokens, lengths, rewards, [1])
        spans = leaf.leave_one_out_credits(lengths, rewards, nodes, weight)
        squares.append([s.credit**2 for s in spans if s.end == 2])
    found = np.mean(squares, 0)
    for group, members in enumerate((slice(0, 4), slice(4, 7), slice(7, 8))):
        expected = law.tail_variance(sizes, group, rho, weight)
        assert found[members].mean() == pytest.approx(expected, rel=0.05)


def test_the_law_breaks_even_where_it_says():
    for n, K, weight in ((4, 8, 1.0), (4, 8, 0.5), (2, 64, 1.0), (8, 16, 0.3)):
        rho = law.break_even(n, K, weight)
        sizes = [n] * (K // n)
        with_tree = law.tail_variance(sizes, 0, rho, weight)
        assert with_tree == pytest.approx(law.tail_variance(sizes, 0, rho, 0.0))
        assert law.tail_variance(sizes, 0, 2 * rho, weight) < law.tail_variance(
            sizes, 0, 2 * rho, 0.0
        )
    # At the node's break-even half-way is best.
    rho = law.break_even(4, 8)
    half, less, more = (law.tail_variance([4, 4], 0, rho, weight) for weight in (0.5, 0.45, 0.55))
    assert half < min(less, more)
    # The leading order is the limit of large K, and one boundary after another without an effect
    # makes it worse.
    ratio = law.tail_variance([4] * 1000, 0, 0.5) / law.tail_variance([4] * 1000, 0, 0.5, 0.0)
    assert law.chain_ratio([4], [1 / 3]) == pytest.approx(ratio, rel=1e-2)
    assert law.chain_ratio([4, 2], [1 / 3, 0.0]) > law.chain_ratio([4], [1 / 3])


@pytest.mark.parametrize("sizes", [[4], [4, 2], [6, 3, 2], [2, 2]])
def test_the_chains_ratio_is_that_of_the_credits_weights(sizes):
    """Credit is linear in the rewards, whose covariance is known: what responses share of the first
    one's path. All others go ways of their own."""
    K = 300
    explained = [0.3, 0.2, 0.1][: len(sizes)]
    depth = [sum(k < n for n in sizes) for k in range(K)]  # nodes that response k shares with 0
    tokens = [[0] * d + [1 + k] * (len(sizes) + 1 - d) for k, d in enumerate(depth)]
    tokens[0] = [0] * len(sizes) + [1]
    lengths = [len(row) for row in tokens]

    def credit(rewards):
        nodes = leaf.build_tree(tokens, lengths, rewards, list(range(1, len(sizes) + 1)))
        spans = leaf.leave_one_out_credits(lengths, rewards, nodes, 1.0)
        return [s.credit for s in spans if s.response == 0][-1]

    weights = np.array([credit(np.eye(K)[k].tolist()) for k in range(K)])
    together = np.array([[min(a, b) for b in depth] for a in depth])  # nodes that two share
    covariance = np.array([0.0, *np.cumsum(explained)])[together]
    np.fill_diagonal(covariance, 1.0)
    expected = weights @ covariance @ weights
    assert law.chain_ratio(sizes, explained) == pytest.approx(expected, rel=0.02)


def test_the_small_policys_true_gradient_is_what_unbiased_rules_find():
    rng = np.random.default_rng(1)
    model = law.Model(effects=(0.3, 0.3, 0.2), boundaries=2, peak=0.8)
    prompts = [law.Prompt(model, rng) for _ in range(1500)]

    def along_truth(rule):
        """What a rule has too much of it, in standard errors."""
        excess = np.array([((p.whole[rule] - p.truth) * p.truth).sum() for p in prompts])
        return excess.mean() / excess.std() * len(excess) ** 0.5

    assert all(abs(along_truth(rule)) < 4 for rule in law.WEIGHTS)
    assert abs(along_truth("LEAF, no z-score")) > 4  # 1 / sqrt n is a bias


def test_the_law_predicts_what_is_measured():
    for model in (law.Model(), law.Model(K=32, options=4, peak=0.9), law.Model(effects=(0.1, 0.3))):
        found = law.measure(model, batches=150)
        for rule, predicted in found["predicted tails"].items():
            assert found["tails"][rule] == pytest.approx(predicted, abs=0.06)
        # Which knows prefixes apart that this policy's places do not: the side of 1 is all they share.
        assert (found["logged"] < 1) == (found["noise"][law.TREE] < 1)
    found = law.measure(law.Model(K=16, effects=(0.3, 0.3, 0.1), boundaries=2), batches=100)
    assert found["tails"][law.TREE] == pytest.approx(found["leading order"], abs=0.1)
    assert found["between"] == pytest.approx(found["between, leading order"], abs=0.1)


def test_the_identity_departs_with_lengths_and_clipping_alone():
    assert law.departure(0, 0, 500) < 1e-12
    assert 0.01 < law.departure(0.1, 0, 500) < law.departure(0.3, 0, 500)


# --------------------------------------------------------------------------------------------------
# compare


def test_intervals_are_students_over_bases():
    """The quantiles against the density itself; ten runs of one base count as one."""
    for df, quantile in enumerate(common.T, 1):
        x = torch.linspace(0, quantile, 20001, dtype=torch.float64)
        log_scale = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
        density = math.exp(log_scale) * (1 + x**2 / df) ** (-(df + 1) / 2)
        assert 0.5 + torch.trapezoid(density, x).item() == pytest.approx(0.975, abs=3e-5)
    assert common.student(3) == common.T[2] and common.student(31) == 1.96
    mean, half = common.interval({0: [1.0] * 10, 1: [2.0], 2: [2.5, 3.5], 3: [4.0]})
    assert (mean, half) == pytest.approx((2.5, common.student(3) * math.sqrt(5 / 3) / 2))


def test_intervals_are_over_seeds_where_bases_agree_by_luck():
    """The wider of the two; of one base only seeds can tell, of one run nothing."""
    _, half = common.interval({0: [1.0, 5.0], 1: [2.0, 4.0]})
    # Squares of 2, 2, 1 and 1 about their bases' means, with 2 degrees of freedom, over 4 runs.
    assert half == pytest.approx(common.student(2) * math.sqrt(10 / 2 / 4))
    _, half = common.interval({0: [1.0, 2.0, 3.0]})
    assert half == pytest.approx(common.student(2) / math.sqrt(3))
    assert common.interval({0: [1.0]}) == (1.0, math.inf)


def test_a_difference_is_called_equal_only_within_the_margin():
    assert compare.verdict(1.5, 1.4) == "above" and compare.verdict(-0.2, 0.1) == "below"
    assert compare.verdict(0.2, 0.7) == "equal within 1"
    assert compare.verdict(0.4, 0.7) == compare.verdict(0.0, 1.0) == "open"


def a_result(method, base, seed, score, **more):
    which = {"stage": "main", "task": "qa", "method": method, "base": base, "weights": f"{base}"}
    which |= {"seed": seed, "lr": 1e-3, "test": {m: score for m in compare.METRICS}}
    return which | more


def test_differences_are_paired_by_base_and_seed():
    """By the base's weights: on another processor the same seed makes another one."""
    rng = random.Random(0)
    lines = []
    for base, seed in itertools.product(range(4), range(5)):
        luck = rng.uniform(0, 50)  # what a base and a seed bring cancels
        lines += [
            a_result(compare.LEAF, base, seed, luck + 2 + base),
            a_result(compare.FLOOR, base, seed, luck),
        ]
    lines.append(a_result(compare.LEAF, 0, 77, 1e6))  # without a partner
    lines.append(a_result(compare.LEAF, 0, 78, 1e6))
    lines.append(a_result(compare.FLOOR, 0, 78, 0.0, weights="others"))
    rng.shuffle(lines)
    half = common.student(3) * math.sqrt(5 / 3) / 2
    pair = compare.LEAF, compare.FLOOR
    pairs, *found = compare.difference(lines, "qa", *pair, compare.METRICS[0])
    assert pairs == 20 and found == pytest.approx([3.5, half])
    assert compare.difference(lines, "translation", *pair, compare.METRICS[0]) is None


def test_the_best_rate_is_the_best_mean_at_the_end():
    at_end = {1e-3: (50, 60), 2e-3: (40, 71), 4e-3: (80, 20)}
    runs = [
        {"task": "qa", "method": "LEAF", "lr": lr, "validation": {"25": 99.0, "50": float(score)}}
        for lr, scores in at_end.items()
        for score in scores
    ]
    assert compare.best_rates(runs) == {("qa", "LEAF"): 2e-3}


TINY = dict(
    train_rows=24,
    validation_rows=4,
    test_rows=6,
    ctc_steps=1,
    sft_steps=2,
    base_batch=4,
    eval_passes=1,
    steps=4,
    prompts=2,
    responses=4,
    update_prompts=1,
    eval_every=2,
    max_new_tokens=6,
    device="cpu",
)


def test_a_comparison_pairs_its_runs_and_tests_what_it_reports(tmp_path, monkeypatch):
    """In miniature: bases, rates on validation alone, then all methods from the same rollouts; a
    line for each. What was kept is not run again."""
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    monkeypatch.setattr(compare, "RUN", TINY)
    monkeypatch.setattr(compare, "RATES", (1e-3, 2e-3))
    monkeypatch.setattr(compare, "RATE_BASES", (0,))
    monkeypatch.setattr(compare, "SEEDS", (0, 3))
    monkeypatch.setattr(compare, "LARGER_GROUPS", {"LEAF, K=16": {"responses": 8, "prompts": 2}})
    args = types.SimpleNamespace(out=tmp_path / "runs", tasks=["qa"], bases=[0])
    with pytest.raises(UserError, match="run the stage rates"):
        compare.missing(args, "main")
    compare.make_base(args, "qa", 0)
    with monkeypatch.context() as m:
        touched = "the test split was touched to choose a learning rate"
        m.setattr(train, "evaluate", lambda *_: pytest.fail(touched))
        for job in compare.missing(args, "rates"):
            compare.run(args, *job)
    assert len(compare.finished(args, "rates")) == 2 * len(compare.METHODS)
    jobs = [job for job in compare.missing(args, "main") if job[4] == 3]
    assert [job[2] for job in jobs] == [*compare.METHODS, "LEAF, K=16"]
    assert (
        jobs[0][5]
        == jobs[-1][5]
        == compare.best_rates(compare.finished(args, "rates"))["qa", "LEAF"]
    )
    for job in jobs:
        compare.run(args, *job)
    runs = compare.finished(args, "main")
    assert {r["method"] for r in runs} == {job[2] for job in jobs}
    assert all("BLEU greedy" in r["test"] for r in runs)
    assert {r["environment"]["torch"] for r in runs} == {torch.__version__}
    (weights,) = {r["weights"] for r in runs}
    assert weights == compare.finished(args, "bases")[0]["weights"]
    assert [f.name for f in (tmp_path / "runs" / "main").iterdir() if f.is_dir()] == []
    compare.keep(args)
    other = a_result("LEAF", 0, 0, 1.0, task="translation", environment={"code": "old"})
    with open(tmp_path / "compare.jsonl", "a") as file:
        file.write(json.dumps(other) + "\n")
    compare.keep(args)  # what these runs do not replace stays
    lines = read_json_lines(tmp_path / "compare.jsonl")
    assert [r["task"] for r in lines].count("translation") == 1
    assert sum(r["stage"] == "main" and r["task"] == "qa" for r in lines) == len(jobs)
    shutil.rmtree(tmp_path / "runs")
    assert compare.missing(args, "rates") == []
    assert {job[4] for job in compare.missing(args, "main")} == {0}
    compare.report(lines)
    told = (tmp_path / "compare.md").read_text()
    assert "| qa | LEAF |" in told and f"| qa | LEAF − {compare.FLOOR} | 1 |" in told
    assert '1 runs: {"code": "old"}' in told


def test_the_methods_of_the_comparison_sample_as_much():
    """Each with its own credit."""
    tokens, lengths = pad_responses([[1, 2, 3, 4], [1, 2, 4], [1, 3, 3], [2, 2, 2]])
    surprisal = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(3))
    seen = set()
    for name, flags in (compare.METHODS | compare.LARGER_GROUPS).items():
        cfg = train.Config(**flags)
        assert cfg.prompts * cfg.responses == 64 and cfg.prompts == 2 * cfg.update_prompts, name
        advantages, _ = train.credit(cfg, tokens, lengths, surprisal, [0.1, 0.2, 0.4, 0.3])
        seen.add(tuple(advantages.flatten().tolist()))
    assert len(seen) == len(compare.METHODS)


# --------------------------------------------------------------------------------------------------
# credit


@pytest.fixture
def microscope(monkeypatch):
    """A policy so small that all of its responses can be written out: two prompts, two tokens."""
    model = make_model()
    shake_lora(model)
    prompts = make_prompts([3, 5])
    split = types.SimpleNamespace(
        rows=[{"least": 7}, {"least": 14}],
        tokenizer=types.SimpleNamespace(eos_id=EOS, decode=lambda ids: " ".join(map(str, ids))),
        prompts=lambda model, rows: Prompts(prompts.x[rows], prompts.valid[rows]),
    )
    rewards = [
        lambda text, row: float(int(text.split()[0]) >= row["least"]),
        lambda text, row: float(int(text.split()[-1]) >= row["least"]),
        lambda text, row: len(text.split()) / 2,
    ]
    monkeypatch.setattr(credit, "BASIS", rewards)
    monkeypatch.setattr(credit, "ROWS", 2)
    monkeypatch.setattr(credit, "RESPONSES", 8)
    monkeypatch.setattr(credit, "BATCHES", 4)
    monkeypatch.setattr(credit, "BLOCKS", 2)
    return credit.Policy(model, split, train.Config(max_new_tokens=2))


def adapters(policy):
    return [p for name, p in policy.model.named_parameters() if "lora_B" in name]


def test_the_true_gradient_is_that_of_all_responses(microscope, monkeypatch, tmp_path):
    """Each with its probability, against the mean of many rollouts, which are kept in two halves."""
    model, split = microscope.model, microscope.split
    vocab = range(model.config.text_config.vocab_size)
    responses = [[EOS]] + [[a, b] for a in vocab if a != EOS for b in vocab]
    tokens, lengths = pad_responses(responses)
    expected = 0
    for row in range(2):
        logp = model.response_logp(split.prompts(model, [row]), tokens[None], lengths[None])
        chance = logp[0].sum(1).exp()
        assert chance.sum().item() == pytest.approx(1, abs=1e-4)
        texts = [split.tokenizer.decode(o) for o in responses]
        rewards = [[reward(text, split.rows[row]) for text in texts] for reward in credit.BASIS]
        expected += torch.tensor(rewards) @ chance / 2  # (3,)
    truth = [torch.autograd.grad(x, adapters(microscope), retain_graph=True) for x in expected]
    truth = torch.stack([torch.cat([g.flatten() for g in of_reward]) for of_reward in truth])

    monkeypatch.setattr(credit, "TRUTH_PASSES", 80)
    monkeypatch.setattr(credit, "TRUTH_P", 40)
    found = credit.true_gradients(microscope, tmp_path)
    halves = [torch.load(tmp_path / f"truth-{half}.pt") for half in range(2)]
    assert torch.equal(found, torch.stack([credit.MIX @ half for half in halves]))
    assert not torch.equal(*halves)
    truth = credit.MIX @ truth
    assert ((found.mean(0) - truth).norm(dim=1) < 0.3 * truth.norm(dim=1)).all()

    rolled = []
    roll = credit.roll
    monkeypatch.setattr(credit, "roll", lambda *a, **k: rolled.append(a[3]) or roll(*a, **k))
    (tmp_path / "truth-1.pt").unlink()
    assert torch.equal(credit.true_gradients(microscope, tmp_path), found)
    assert set(rolled) == {1}  # the half that was missing


def test_batches_are_measured_for_every_rule_as_the_loss_weighs_it(microscope, monkeypatch):
    """Cosines and noise of every rule, tree and reward against the gradient of the trainer's loss
    at ratio 1, which knows neither the basis nor half-way's parts."""
    rewards = {"a quarter": (0.25, 0.75, 0.0), "third": (0.0, 0.0, 1.0)}
    monkeypatch.setattr(credit, "REWARDS", rewards)
    monkeypatch.setattr(credit, "MIX", torch.tensor(list(rewards.values())))
    truth = torch.randn(2, len(credit.REWARDS), sum(p.numel() for p in adapters(microscope)))
    measured = credit.measure(microscope, 4, truth)
    rng = np.random.default_rng([credit.SEED, 4])
    found = []
    for n in range(credit.BATCHES):
        indices = rng.integers(2, size=2).tolist()
        batch = credit.roll(microscope, indices, n, stream=4, K=4, top_p=0.9)
        rollout = batch.rollout
        logp = microscope.model.response_logp(batch.prompts, rollout.tokens, rollout.lengths)
        for rule, (where, B) in credit.COLUMNS:
            for weights in credit.REWARDS.values():
                advantages = torch.zeros(logp.shape)
                for p in range(2):
                    tokens, lengths = rollout.tokens[p], rollout.lengths[p]
                    rewards = sum(w * r for w, r in zip(weights, batch.rewards[:, p])).tolist()
                    bounds = leaf.select_boundaries(-rollout.logq[p], lengths, B)
                    if where == "even":
                        bounds = methods.even_boundaries(lengths, B)
                    group = (tokens, lengths, rewards, bounds)
                    if rule in ("LEAF", methods.NO_MULTIPLICITY):
                        multiplicity = rule == "LEAF"
                        credits = leaf.leaf_advantages(
                            tokens, lengths, None, rewards, 2, "both", multiplicity, True, bounds
                        )
                    elif rule in (methods.BASELINE, methods.PLAIN):
                        floor = 1 / 3 if rule == methods.BASELINE else 0.0
                        credits = leaf.grpo_advantages(rewards, lengths, floor)
                    else:
                        node = {credit.OTHERS: 0.0, methods.HALF_WAY: 0.5}.get(rule, 1.0)
                        credits = methods.leave_one_out(*group, normalize=False, node_weight=node)
                    advantages[p, :, : credits.shape[1]] = credits
                flat = (logp, logp.detach(), logp.detach(), advantages, rollout.mask)
                loss, _ = leaf.policy_loss(*(x.flatten(0, 1) for x in flat), kl_coef=0.0)
                g = torch.autograd.grad(-loss, adapters(microscope), retain_graph=True)
                found.append(torch.cat([x.flatten() for x in g]))
    g = torch.stack(found).unflatten(0, (credit.BATCHES, len(credit.COLUMNS), -1))
    norms = (truth[0] * truth[1]).sum(-1).clamp(min=1e-30).sqrt()
    cosines = (g * truth.mean(0)).sum(-1) / norms / g.norm(dim=-1).clamp(min=1e-12)
    scale = cosines.abs().max().item()
    assert torch.allclose(torch.tensor(measured["cosines"]) / scale, cosines / scale, atol=1e-3)
    linear = g[:, : len(credit.COMBINED)].unflatten(0, (2, 2))
    noise = (linear[:, 0] - linear[:, 1]).square().sum(-1) / 2  # of two batches
    assert torch.allclose(torch.tensor(measured["noise"]), noise, rtol=1e-3)


def test_signal_and_noise_are_those_of_the_distribution():
    """Normal gradients of a known mean; the interval of a noise ratio holds it as often as it says."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.arange(8.0) / 8
    g = mean + 0.5 * torch.randn(20_000, 8, generator=generator)
    assert credit.squared_mean(g).item() == pytest.approx(float(mean @ mean), rel=0.03)
    assert g.var(0).sum().item() == pytest.approx(8 * 0.25, rel=0.03)
    rng = np.random.default_rng(0)
    held = []
    for _ in range(400):
        bottom = rng.chisquare(30, size=20)
        found = credit.ratio(0.8 * bottom + 0.1 * rng.chisquare(30, size=20), bottom)
        held.append(abs(found["value"] - 0.9) < found["ci"])
    assert 0.92 < fmean(held) < 0.98


def test_the_dial_goes_on_where_it_was_stopped(microscope, monkeypatch, tmp_path, capsys):
    """One K at a time; then a table, a figure, and counts that the cells bear out."""
    calls = []
    shape = (len(credit.COLUMNS), len(credit.REWARDS))

    def measure(policy, K, truth):
        calls.append(K)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {
            "cosines": (0.2 + 0.1 * torch.randn(credit.BATCHES, *shape)).tolist(),
            "noise": torch.rand(credit.BLOCKS, *shape).tolist(),
            "signal": torch.rand(shape[1]).tolist(),
            "logged": (10 + torch.rand(len(credit.TREES), shape[1], 2)).tolist(),
        }

    for half in range(2):
        size = sum(p.numel() for p in adapters(microscope))
        torch.save(torch.randn(3, size), tmp_path / f"truth-{half}.pt")
    monkeypatch.setattr(credit.Policy, "load", lambda out: microscope)
    monkeypatch.setattr(credit, "measure", measure)
    monkeypatch.setattr(credit, "KS", (4, 8))
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    with pytest.raises(KeyboardInterrupt):
        credit.run(tmp_path)
    found = credit.run(tmp_path)
    assert calls == [4, 8, 8]
    assert len(found["cells"]) == 2 * 4 * len(credit.REWARDS)
    credit.show(found)
    credit.plot(found)
    at = [c for c in found["cells"] if c["boundaries"] == "even"]
    gains = [c["gain"]["LEAF"][methods.BASELINE] for c in at]
    above = sum(gain["value"] > gain["ci"] for gain in gains)
    told = f"LEAF − {methods.BASELINE}: above in {above} and"
    assert told in capsys.readouterr().out.split("Boundaries by even")[1]
    assert (tmp_path / "dial.png").stat().st_size < 250_000


# --------------------------------------------------------------------------------------------------
# bench, footprint, gpu


def test_the_three_sides_of_the_benchmark_compute_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(bench, "DTYPE", torch.float32)
    monkeypatch.setattr(bench, "ROLLOUTS", "\nabc abcde\nab ab\n")
    bench.prepare("compact", bench.Workload(2, 2, 5, 1, 4, 1, 2), True, tmp_path)
    sides = {name: bench.load_side(name, tmp_path) for name in bench.SIDES}
    proof = bench.prove(sides)
    assert max(max(gaps.values()) for gaps in proof.values()) < 1e-5
    with torch.no_grad():
        sides["tuned"].adapters[0].add_(0.1)
    with pytest.raises(SystemExit, match="tuned does not compute what ours does"):
        bench.prove(sides)
    for side in sides.values():
        seconds = side.step()
        assert seconds["step"] == pytest.approx(sum(seconds[part] for part in bench.PARTS))


def test_responses_share_what_they_share_in_the_default_run():
    """Whatever T is: of each pair, the part of the longest response that begins alike, and which
    are equal; lengths too. Or nothing."""
    lines = [line.split() for line in bench.ROLLOUTS.strip().splitlines()]
    for T in (16, 400):
        work = bench.Workload(8, 8, T, 3, 12, 4, 16)
        tokens, lengths = bench.responses(work, 800, shared=True)
        alone, same_lengths = bench.responses(work, 800, shared=False)
        assert torch.equal(lengths, same_lengths) and lengths.max() == T
        for p, k, j in itertools.product(range(8), range(8), range(8)):
            one, other = lines[p][k], lines[p][j]
            alike = len(os.path.commonprefix([one, other]))
            n = min(lengths[p, k], lengths[p, j]).item()
            shared = (tokens[p, k, :n] == tokens[p, j, :n]).int().cumprod(0).sum().item()
            assert abs(lengths[p, k] / T - len(one) / 13) <= 0.5 / T + 1e-6
            assert abs(shared / T - alike / 13) <= 1.6 / T  # one more may be equal by chance
            assert (one == other) == torch.equal(tokens[p, k], tokens[p, j])
            assert k == j or not (alone[p, k, :n] == alone[p, j, :n]).int().cumprod(0).sum() > 1
        found = bench.shares(tokens, lengths)
        assert found["distinct responses"] == 43 / 64
        assert found["distinct tokens"] == pytest.approx(0.61, abs=0.03)
        assert bench.shares(alone, lengths)["distinct responses"] == 1
        assert bench.shares(alone, lengths)["distinct tokens"] > 0.98


def test_shares_by_hand():
    """Of abc, ab, abd and, to another prompt, ab, c, c: a, ab, abc, abd, a, ab, c of 12 tokens."""
    tokens = torch.tensor([[[1, 2, 3], [1, 2, 9], [1, 2, 4]], [[1, 2, 9], [3, 9, 8], [3, 7, 7]]])
    lengths = torch.tensor([[3, 2, 3], [2, 1, 1]])
    assert bench.shares(tokens, lengths) == {"distinct tokens": 7 / 12, "distinct responses": 5 / 6}


def test_the_meter_counts_what_is_alive():
    with footprint.Meter() as meter:
        x = torch.ones(1000)
        y = x * 2
        first = y[:10]  # no memory of its own
        del x, y
        z = torch.ones(500, dtype=torch.bfloat16)
    assert (meter.peak, meter.live) == (8000, 5000)
    del first, z
    assert meter.live == 0


def test_the_footprint_grows_with_what_is_sampled():
    found = {}
    for tokens in (4, 40):
        work = bench.Workload(2, 2, tokens, 1, 4, 1, 2)
        found[tokens] = footprint.compute(bench.COMPACT, work)
        weights = 2 * found[tokens]["parameters"] / 1e9
        assert weights < found[tokens]["sampling_gb"] < weights + 0.1
    cache = 2 * 2 * 4 * 2 * 32 * (2 * 2 * 36) / 1e9  # bf16; keys, values; layers, heads, width
    growth = found[40]["sampling_gb"] - found[4]["sampling_gb"]
    assert growth == pytest.approx(cache, rel=0.5)
    assert found[40]["update_gb"] > found[4]["update_gb"]


def test_gpu_measures_what_is_missing(tmp_path):
    """Parts that are there are not measured again; what does not fit is noted."""
    calls = []

    def fits():
        calls.append("fits")
        return {"seconds": 1.0}

    def too_large():
        raise torch.OutOfMemoryError("1 GB")

    def fails():
        raise subprocess.CalledProcessError(1, "train.py")

    def stopped():
        raise KeyboardInterrupt

    file = tmp_path / "gpu.json"
    parts = {"small": fits, "large": too_large, "broken": fails, "last": stopped}
    with pytest.raises(KeyboardInterrupt):
        gpu.measure_parts(parts, file)
    gpu.measure_parts(parts | {"last": fits}, file)
    found = json.loads(file.read_text())
    assert calls == ["fits"] * 2 and found["large"] == "out of memory"
    assert found["broken"] == "exit code 1"
    assert found["small"] == found["last"] == {"seconds": 1.0}
    assert found["environment"]["torch"] == torch.__version__
