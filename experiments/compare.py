"""LEAF against GRPO: methods x bases x seeds, paired, resumable.

    python -m experiments.compare bases rates main    # the work, below --out
    python -m experiments.compare keep report         # copy what is finished; tables

Paired runs share everything but the method: the base, the data order, the noise of the rollouts,
LoRA's first weights and the number of sampled responses. A stage leaves a JSON per finished run;
the same command goes on with the rest, and makes no run again that was kept.

    bases      a base per task and base seed
    rates      learning rates of the methods with K = 8, on the validation split of two bases alone,
               with a seed that no other stage uses
    main       tasks x methods x bases x seeds, each at its method's best rate of the task; on qa
               also with K = 16, at the rate of K = 8

    keep       the finished runs, a line each, in experiments/results/compare.jsonl
    report     from that file alone: compare.md

Run processes as many as there are cores: each computes with one thread, so a result does not depend
on how many run. Other processors round otherwise and make other bases: a run names its base's
weights, and only runs of the same are paired.
"""

import itertools
import json
import multiprocessing
import os
import re
import shutil
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

import data
import pretrain
import train
from corpora.load import ends, fingerprint
from experiments.common import RESULTS, command_line, environment, interval, rounded, table
from upkeep.errors import UserError, command
from upkeep.files import check_same, lock, read_json, write_file, write_json
from upkeep.machine import choose_device

TASKS = ("qa", "translation")
BASES = range(4)
SEEDS = range(5)
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
RATE_BASES = (0, 1)
RATE_SEED = 100
RUN = {"steps": 100, "eval_every": 25, "save_every": 50}
LEAF, FLOOR, PLAIN = "LEAF", "GRPO, floor 1/3", "GRPO, plain std"
METHODS = {LEAF: {}, FLOOR: {"algo": "grpo"}, PLAIN: {"algo": "grpo", "std_floor": 0.0}}
K16 = {"responses": 16, "prompts": 4, "update_prompts": 2}  # as many responses in all
LARGER_GROUPS = {f"{name}, K=16": flags | K16 for name, flags in METHODS.items()}  # on qa
PAIRS = [(LEAF, FLOOR), (LEAF, PLAIN), (PLAIN, FLOOR)]
PAIRS += [(f"{one}, K=16", f"{other}, K=16") for one, other in PAIRS]
METRICS = "BLEU greedy", "BLEU sampled", "exact match sampled %", "mean reward x100"
JUDGED = "BLEU sampled"
MARGIN = 1.0  # point, within which we call two methods equal
STAGES = ("bases", "rates", "main")


# --------------------------------------------------------------------------------------------------
# One run


def config(args, task: str, base: int, **overrides) -> train.Config:
    of_base = {"base": f"{args.out}/base-{task}-seed{base}", "base_seed": base}
    return train.Config(**(RUN | {"task": task} | of_base | overrides))


HEARD = {}  # by base, the splits whose audio this process has embedded


def splits_of(cfg: train.Config, model, tokenizer) -> dict[str, data.Split]:
    if cfg.base not in HEARD:
        rows = train.load_rows(cfg)
        HEARD[cfg.base] = {name: data.Split(name, rows[name], cfg.cache_gb) for name in rows}
        for split in HEARD[cfg.base].values():
            split.hear(model, tokenizer)
    return HEARD[cfg.base]


def described(cfg: train.Config, **more) -> dict:
    """What a result says besides its scores."""
    _, weights = ends(cfg.base_folder / "model.safetensors")
    about = {"task": cfg.task, "base": cfg.base_seed, "weights": weights[:16]}
    return about | more | {"environment": environment()}


def make_base(args, task: str, base: int):
    """Train a base, and measure it."""
    cfg = config(args, task, base)
    device, dtype = choose_device(cfg.device, cfg.dtype)
    rows = train.load_rows(cfg)["train"]
    split = data.Split("train", rows, cfg.cache_gb)
    pretrain.make_base(cfg, split, fingerprint(rows, cfg.data), cfg.base_folder, device)
    model, tokenizer = train.load(cfg, device, dtype)
    splits = splits_of(cfg, model, tokenizer)
    predictions = cfg.base_folder / "predictions.jsonl"
    scores = train.evaluate(model, tokenizer, splits["test"], cfg, predictions)
    write_json(args.out / "bases" / f"{task}-base{base}.json", described(cfg, test=scores))


def run(args, stage: str, task: str, method: str, base: int, seed: int, lr: float):
    """Train and measure one policy; only the stage main touches the test split."""
    file = run_file(args, stage, task, method, base, seed, lr)
    folder = file.with_suffix("")
    flags = (METHODS | LARGER_GROUPS)[method]
    cfg = config(args, task, base, seed=seed, lr=lr, out=str(folder), **flags)
    # Of a run that was stopped: it is short, and starts again.
    shutil.rmtree(folder, ignore_errors=True)
    device, dtype = choose_device(cfg.device, cfg.dtype)
    model, tokenizer = train.load(cfg, device, dtype)
    splits = splits_of(cfg, model, tokenizer)
    targets = train.adapt(cfg, model)
    train.train_policy(cfg, model, tokenizer, splits, folder, targets)
    lines = [json.loads(line) for line in (folder / "policy.jsonl").read_text().splitlines()]
    validation = {x["step"]: x["validation_bleu"] for x in lines if "validation_bleu" in x}
    result = described(cfg, method=method, seed=seed, lr=lr, validation=validation)
    if stage == "main":
        predictions = folder / "predictions.jsonl"
        result["test"] = train.evaluate(model, tokenizer, splits["test"], cfg, predictions)
    write_json(file, result)
    shutil.rmtree(folder)


# --------------------------------------------------------------------------------------------------
# Stages


def run_file(args, stage, task, method, base, seed, lr) -> Path:
    slug = re.sub(r"\W+", "-", method.lower())
    return args.out / stage / f"{task}-{slug}-lr{lr:g}-base{base}-seed{seed}.json"


def finished(args, stage: str) -> list[dict]:
    """Results of a stage below --out."""
    files = sorted((args.out / stage).glob("*.json"))
    return [read_json(file) | {"stage": stage} for file in files]


def job_of(result: dict) -> tuple:
    """What identifies a run, as in plan(); of a base None stands for what it does not have."""
    return tuple(result.get(name) for name in ("stage", "task", "method", "base", "seed", "lr"))


def best_rates(runs: list[dict]) -> dict[tuple[str, str], float]:
    """By (task, method), the rate with the best mean validation score after the last step."""
    ends = {}
    for r in runs:
        of_method = ends.setdefault((r["task"], r["method"]), {})
        of_method.setdefault(r["lr"], []).append(list(r["validation"].values())[-1])
    mean = statistics.fmean
    return {cell: max(by_rate, key=lambda lr: mean(by_rate[lr])) for cell, by_rate in ends.items()}


def plan(args, stage: str) -> list[tuple]:
    """(stage, task, method, base, seed, lr) of a stage's runs: pairs side by side, every base
    before any twice."""
    if stage == "rates":
        cells = itertools.product(args.tasks, METHODS, RATE_BASES, RATES)
        return [(stage, task, method, base, RATE_SEED, lr) for task, method, base, lr in cells]
    best = best_rates(finished(args, "rates") + kept("rates"))
    jobs = []
    for task in args.tasks:
        methods = METHODS | LARGER_GROUPS if task == "qa" else METHODS
        for seed, base, method in itertools.product(SEEDS, args.bases, methods):
            lr = best[task, method.removesuffix(", K=16")]
            jobs.append((stage, task, method, base, seed, lr))
    return jobs


def missing(args, stage: str) -> list[tuple]:
    """What is left to run of a stage."""
    if stage == "main" and missing(args, "rates"):
        untried = f"not all learning rates have been tried for {', '.join(args.tasks)}"
        raise UserError(f"{untried}: run the stage rates")
    done = {job_of(result) for result in finished(args, stage) + kept(stage)}
    return [job for job in plan(args, stage) if job not in done]


def work(args, stage: str):
    """All runs of a stage that are not finished, several at a time."""
    if stage == "bases":
        jobs = [
            (make_base, args, task, base)
            for task, base in itertools.product(args.tasks, args.bases)
            if not (args.out / "bases" / f"{task}-base{base}.json").exists()
        ]
    else:
        jobs = [(run, args, *job) for job in missing(args, stage)]
    os.environ["TQDM_DISABLE"] = "1"  # in the workers; read where tqdm is imported
    context = multiprocessing.get_context("spawn")  # a child that is forked inherits threads' locks
    with (
        lock(args.out, wait=False),
        ProcessPoolExecutor(args.processes, context, initializer=quiet) as pool,
    ):
        check_same(args.out, {"run": RUN}, "config.json", {}, {"config.json", *STAGES})
        futures = [pool.submit(*job) for job in jobs]
        try:
            for future in tqdm(as_completed(futures), stage, len(futures), disable=None):
                future.result()
        finally:
            # After an error or Ctrl-C: what has not begun need not.
            pool.shutdown(cancel_futures=True)


def quiet():
    """A worker computes with one thread and says nothing; its errors come through."""
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")


# --------------------------------------------------------------------------------------------------
# What came out


def keep(args):
    """All finished runs as lines of one small file; nothing that can be computed from them."""
    new = [result for stage in STAGES for result in finished(args, stage)]
    for r in new:
        if r["stage"] == "main":
            r["test"] = {name: r["test"][name] for name in METRICS}
    replaced = {job_of(r) for r in new}
    old = [r for r in kept() if job_of(r) not in replaced]
    lines = [json.dumps(r) + "\n" for r in [*old, *map(rounded, new)]]
    write_file(RESULTS / "compare.jsonl", "".join(lines).encode())
    print(f"{len(new)} runs are new in {RESULTS / 'compare.jsonl'}, {len(old)} stay")


def kept(stage: str = "") -> list[dict]:
    """The lines of compare.jsonl, or those of one stage."""
    file = RESULTS / "compare.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [r for r in map(json.loads, lines) if stage in ("", r["stage"])]


def difference(runs: list[dict], task: str, one: str, other: str, metric: str):
    """Of two methods over the bases and seeds that both have: the number of pairs, mean and half
    width; None where there is no pair."""
    scores = {}
    for r in runs:
        scores[r["task"], r["method"], r["weights"], r["seed"]] = r["test"][metric]
    clusters = {}
    for (of_task, method, weights, seed), score in scores.items():
        partner = scores.get((task, other, weights, seed))
        if (of_task, method) == (task, one) and partner is not None:
            clusters.setdefault(weights, []).append(score - partner)
    if not clusters:
        return None
    return sum(map(len, clusters.values())), *interval(clusters)


def verdict(mean: float, half: float) -> str:
    if abs(mean) > half:
        return "above" if mean > 0 else "below"
    return f"equal within {MARGIN:g}" if abs(mean) + half < MARGIN else "open"


def column(runs: list[dict], metric: str) -> str:
    values = [r["test"][metric] for r in runs]
    spread = statistics.stdev(values) if len(values) > 1 else 0
    return f"{statistics.fmean(values):.1f} ± {spread:.1f}"


def report(lines: list[dict]):
    """Tables to the terminal and to compare.md."""
    of_stage = {stage: [r for r in lines if r["stage"] == stage] for stage in STAGES}
    bases = [r | {"method": "base"} for r in of_stage["bases"]]
    tables = [
        rate_table(of_stage["rates"]),
        score_table(bases + of_stage["main"]),
        difference_table(of_stage["main"]),
    ]
    text = "\n".join([*tables, *made_by(lines)])
    write_file(RESULTS / "compare.md", text.encode())
    print(text)


def rate_table(runs: list[dict]) -> str:
    best = best_rates(runs)
    rows = []
    for task, method in best:
        row = [task, method]
        for lr in RATES:
            own = [r for r in runs if (r["task"], r["method"], r["lr"]) == (task, method, lr)]
            ends = [list(r["validation"].values())[-1] for r in own]
            cell = f"{statistics.fmean(ends):.1f} ({len(ends)})" if ends else ""
            row.append(f"**{cell}**" if lr == best[task, method] else cell)
        rows.append(row)
    header = ["task", "method", *(f"{lr:g}" for lr in RATES)]
    return table(header, rows) + "\nGreedy BLEU on the validation split (runs).\n"


def score_table(runs: list[dict]) -> str:
    """Mean and standard deviation of the test split's scores."""
    rows = []
    for task, method in dict.fromkeys((r["task"], r["method"]) for r in runs):
        own = [r for r in runs if (r["task"], r["method"]) == (task, method)]
        rate = f"{own[0]['lr']:g}" if "lr" in own[0] else ""
        rows.append([task, method, rate, len(own), *(column(own, metric) for metric in METRICS)])
    return table(["task", "method", "lr", "runs", *METRICS], rows)


def difference_table(runs: list[dict]) -> str:
    """Paired differences in every metric, and the verdict on each."""
    rows = []
    for task, (one, other) in itertools.product(TASKS, PAIRS):
        found = {metric: difference(runs, task, one, other, metric) for metric in METRICS}
        if found[JUDGED]:
            pairs, *_ = found[JUDGED]
            cells = [
                f"{mean:+.2f} ± {half:.2f} {verdict(mean, half)}"
                for _, mean, half in found.values()
            ]
            rows.append([task, f"{one} − {other}", pairs, *cells])
    note = f"The metric chosen beforehand is {JUDGED}.\n"
    return table(["task", "difference", "pairs", *METRICS], rows) + "\n" + note


def made_by(lines: list[dict]) -> list[str]:
    """What the runs were made with, and how many."""
    environments = [json.dumps(r["environment"]) for r in lines]
    return [f"{environments.count(made)} runs: {made}\n" for made in dict.fromkeys(environments)]


def main():
    parser = command_line(__doc__)
    parser.add_argument("stages", nargs="+", choices=(*STAGES, "keep", "report"))
    parser.add_argument(
        "--out", type=Path, default=Path("runs/compare"), help="runs (default: %(default)s)"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--bases", nargs="+", type=int, default=BASES, help="seeds of the bases")
    parser.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count(),
        help="runs at a time (default: %(default)s)",
    )
    args = parser.parse_args()
    for stage in args.stages:
        if stage == "keep":
            keep(args)
        elif stage == "report":
            report(kept())
        else:
            work(args, stage)


if __name__ == "__main__":
    command(main)
