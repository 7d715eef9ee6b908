"""The methods that the experiments compare, and the statistics they report."""

import contextlib
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import torch

import lora
import train
from experiments import bench, common, compare, footprint, gpu, hearing
from experiments.common import RESULTS
from model import SpeechLM
from tests.helpers import ROOT, first_run, pad_responses, rand, read_json_lines, same, seeded
from upkeep.errors import UserError
from upkeep.files import read_json

__all__ = ["first_run", "seeded"]  # fixtures


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
        advantages = train.credit(cfg, tokens, lengths, surprisal, [0.1, 0.2, 0.4, 0.3])
        seen.add(tuple(advantages.flatten().tolist()))
    assert len(seen) == len(compare.METHODS)


# --------------------------------------------------------------------------------------------------
# hearing


def test_hearing_is_measured_on_rows_of_its_own(first_run, monkeypatch):
    """A base and a finished run, by field, against answers by hand; rows and audio of no other
    split."""
    monkeypatch.setattr(hearing, "ROWS", 9)
    seen = []

    def answer(model, tokenizer, split, cfg):
        seen.append((split.rows, len(lora.lora_layers(model))))
        texts = [row["reference"] for row in split.rows]
        texts[0] = texts[0].replace(split.rows[0]["slots"]["name"], "Nobody")
        return texts

    monkeypatch.setattr(train, "answer", answer)
    base = first_run.parent / "base-qa-seed0"
    with pytest.raises(UserError, match="trained on other rows"):  # than a base is by default
        hearing.measure(base, "heard")
    cfg = train.finished(first_run, {})
    for folder, adapter in ((base, ""), (first_run, cfg.resume_adapter)):
        monkeypatch.setattr(
            hearing, "configuration", lambda _, a=adapter: replace(cfg, resume_adapter=a)
        )
        found = hearing.measure(folder, "heard")
        assert (seen[-1][1] > 0) == bool(adapter)
        names = sum("name" in row["slots"] for row in seen[-1][0])
        assert found.pop("name") == pytest.approx(100 * (names - 1) / names)
        assert set(found.values()) == {100.0} and len(found) == 6
    hearing.measure(first_run, "tune")
    assert seen[0][0] == seen[1][0]
    others = [seen[0][0], seen[2][0], *train.load_rows(cfg).values()]
    spoken = [row["audio"].phones for rows in others for row in rows]
    assert len(spoken) == len(set(spoken)) == 18 + sum(map(len, others[2:]))


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
    where_answers_are_long = {name: sides[name] for name in ("ours", "tuned")}
    assert bench.prove(where_answers_are_long).keys() == {"tuned"}
    with torch.no_grad():
        sides["tuned"].adapters[0].add_(0.1)
    with pytest.raises(UserError, match="tuned does not compute what ours does"):
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
        found[tokens] = footprint.compute(bench.COMPACT, torch.bfloat16, work)
        weights = 2 * found[tokens]["parameters"] / 1e9
        assert weights < found[tokens]["sampling_gb"] < weights + 0.1
    cache = 2 * 2 * 4 * 2 * 32 * (2 * 2 * 36) / 1e9  # bf16; keys, values; layers, heads, width
    growth = found[40]["sampling_gb"] - found[4]["sampling_gb"]
    assert growth == pytest.approx(cache, rel=0.5)
    assert found[40]["update_gb"] > found[4]["update_gb"]


def test_the_footprint_counts_merged_weights_in_float32(monkeypatch):
    """And attends as CUDA does, without a copy of a mask."""
    attended = []
    attention = footprint.attention

    def noting(q, k, v, attn_mask, scale):
        attended.append(all(stride % 8 == 0 for stride in attn_mask.stride()[:-1]))
        return attention(q, k, v, attn_mask, scale)

    monkeypatch.setattr(footprint, "attention", noting)
    work = bench.Workload(2, 2, 4, 1, 4, 1, 2)
    found = footprint.compute(bench.COMPACT, torch.float32, work)
    decoder = SpeechLM(bench.COMPACT).language_model.model.layers
    merged = sum(p.numel() for p in decoder.parameters() if p.dim() == 2)
    weights = 4 * (found["parameters"] + merged) / 1e9
    assert weights < found["sampling_gb"] < weights + 0.01
    assert attended and all(attended)


@pytest.mark.parametrize("length, copied", [(16, False), (13, True)])
def test_the_footprint_counts_what_cuda_would_copy(length, copied):
    """A mask whose rows do not begin at multiples of 8, for as long as there may be a backward pass."""
    q, k, v = (rand(1, 2, n, 8).requires_grad_() for n in (4, length, length))
    mask = rand(1, 1, 4, length)
    live = []
    for attend in (footprint.attend, footprint.attention):
        with footprint.Meter() as meter:
            out = attend(q, k, v, attn_mask=mask, scale=0.3)
        live.append(meter.live)
        same(out, footprint.attend(q, k, v, attn_mask=mask, scale=0.3))
    assert live[1] - live[0] == copied * 4 * 16 * mask.element_size()


def test_gpu_needs_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="PyTorch sees none"):
        gpu.main([])


def test_gpu_measures_what_is_missing(tmp_path, monkeypatch):
    """In a process for each part. What is there is not measured again; what fails is noted."""
    calls = []

    def fits():
        calls.append("fits")
        return {"seconds": 1.0}

    def too_large():  # within a graph's capture
        try:
            raise torch.OutOfMemoryError("1 GB")
        finally:
            raise torch.AcceleratorError("capture was invalidated")

    def fails():
        raise subprocess.CalledProcessError(1, "train.py")

    def breaks():
        raise RuntimeError("CUDA error: an illegal address\nmore of it")

    def in_a_process(words, cwd):
        if words[-1] == "killed":
            return types.SimpleNamespace(returncode=-9)
        assert words[:3] == [sys.executable, "-m", "experiments.gpu"]
        gpu.main(words[3:])
        return types.SimpleNamespace(returncode=0)

    parts = {"small": fits, "large": too_large, "failed": fails, "broken": breaks, "killed": fits}
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A Card 9")
    monkeypatch.setattr(subprocess, "run", in_a_process)
    monkeypatch.setenv("PATH", "")  # no git
    gpu.main([])
    gpu.main([])
    assert calls == ["fits"]
    gpu.main(["--part", "small"])
    assert calls == ["fits"] * 2
    found = json.loads((tmp_path / "gpu-a-card-9.json").read_text())
    environment = found.pop("environment")
    assert environment["torch"] == torch.__version__ and environment["code"] is None
    assert found == {
        "small": {"seconds": 1.0},
        "large": "out of memory",
        "failed": "exit code 1",
        "broken": "RuntimeError: CUDA error: an illegal address",
        "killed": "exit code -9",
    }


def test_gpu_measures_sides_alone(tmp_path, monkeypatch, capsys):
    """Of a small model, on the CPU; the card's meters and graphs stand still."""
    monkeypatch.setattr(gpu, "RUNS", tmp_path)
    monkeypatch.setattr(bench, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(bench, "DTYPE", torch.float32)
    monkeypatch.setattr(bench, "ROLLOUTS", "\nabc abcde\nab ab\n")
    monkeypatch.setitem(bench.WORKLOADS, "compact", bench.Workload(2, 2, 8, 1, 4, 1, 2))
    for name, value in {
        "CUDAGraph": types.SimpleNamespace(replay=lambda: None),
        "graph": contextlib.nullcontext(),
        "max_memory_allocated": 3e9,
        "max_memory_reserved": 4e9,
        "reset_peak_memory_stats": None,
        "set_sync_debug_mode": None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    ours = gpu.ours("compact")
    tuned = gpu.peer("tuned", "compact")
    monkeypatch.setitem(
        footprint.MODELS, "granite-speech-3.3-2b, float32", (bench.COMPACT, torch.float32)
    )
    memory = gpu.memory(bench.WORKLOADS["compact"])
    assert memory["measured"] == {"sampling_gb": 3, "update_gb": 3}
    assert memory["computed"]["sampling_gb"] > 20
    json.dumps([ours, tuned, memory])
    for result in (ours["with graph"], ours["without"], tuned):
        assert result["steps"] == 5 and result["allocated_gb"] == 3
        assert 0 < result["seconds"]["sampling"] < result["seconds"]["step"]
    assert ours["capture"] > 0 and ours["kernels"] > 100 and ours["waits"] == []
    assert tuned["from ours"].keys() == {
        *("greedy tokens", "log-probs", "reference log-probs", "gradient")
    }
    assert max(tuned["from ours"].values()) < 1e-4
    assert "| kernels a token |" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compact", "compact-ours.pt"]


# --------------------------------------------------------------------------------------------------
# The README's table


def test_the_readmes_table_is_of_the_kept_runs():
    runs = [read_json(file) for file in sorted(RESULTS.glob("default-base*.json"))]
    made_with = [(run["config"]["base_seed"], run["environment"]["threads"]) for run in runs]
    assert made_with == [(base, threads) for base in range(3) for threads in (1, 2)]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.search(r"\ntest split, 300 rows +base +trained\n(.*?)```", text, re.DOTALL)[1]
    number = r"([\d.]+)"
    for line in table.splitlines():
        row = rf"(.*?)  +{number}–{number}  +{number}–{number}"
        name, *shown = re.fullmatch(row, line).groups()
        for column in ("base", "trained"):
            values = [
                min(value for field, value in run[column].items() if field.startswith("heard %, "))
                if name == "worst heard %"
                else run[column][name]
                for run in runs
            ]
            assert [f"{min(values):.1f}", f"{max(values):.1f}"] == shown[:2], name
            del shown[:2]
