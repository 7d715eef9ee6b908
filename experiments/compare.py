"""LEAF against GRPO, and LEAF against parts of itself: methods x bases x seeds, paired, resumable.

    python -m experiments.compare bases rates finals main ablations    # the work, below --out
    python -m experiments.compare rates main --tasks early early-K32 late    # other rewards on qa
    python -m experiments.compare keep report       # copy what is finished; tables, figures

Paired runs share everything but the method: the base, the data order, the noise of the rollouts,
LoRA's first weights and the number of sampled responses. A stage leaves a JSON per finished run;
the same command goes on with the rest.

    bases      a base per task and base seed; its audio embeddings are kept in files, so that a run
               starts at once
    rates      learning rates of the main methods, on the validation split alone, with a seed that
               no other stage uses
    finals     the two best rates of each once more, with another such seed: what differs by less
               than the noise
    main       tasks x main methods x bases x seeds, each method at its own best rate of its task,
               or all at --lr
    ablations  on the first of --tasks, at LEAF's rate; those of GRPO at GRPO's

    keep       the finished runs, a line each, in experiments/results/compare.jsonl
    report     from that file alone: compare.md, and the figures compare and forks as PNG and SVG

Run processes as many as there are cores: each computes with one thread, so a result does not depend
on how many run.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import re
import shutil
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import leaf
import train
from experiments.keep import RESULTS, environment
from experiments.methods import (
    ABLATIONS,
    BASELINE,
    HALF_WAY,
    MAIN,
    METHODS,
    NO_ROOT,
    PLAIN,
    SCALED,
    VARIANT,
    first_words,
    last_words,
    token_noise,
    with_responses,
)

TASKS = ("qa", "translation", "asterisk")

# The task qa under another reward, and K.
SETTINGS = {"early": (first_words, 8), "early-K32": (first_words, 32), "late": (last_words, 8)}
BLEU = data.reward
BASES = range(4)
SEEDS = range(5)
RATE_SEEDS = {"rates": 100, "finals": 101}
GRID = (1e-3, 2e-3, 4e-3, 8e-3)
# Longer where 1e-3, its end, was the best of some.
RATES = {"qa": GRID, "translation": GRID, "asterisk": (5e-4, *GRID)}
RATES |= dict.fromkeys(SETTINGS, GRID[1:])
RUN = {"steps": 100, "eval_every": 25, "save_every": 50}
# Bases get more steps where the default's do not suffice, or only with luck, to hear well.
OWN = {
    "qa": {},
    "translation": {"ctc_steps": 240},
    "asterisk": {"ctc_steps": 1000, "sft_steps": 1000},
}
KS = (4, 16)  # beside the default's 8
OF_K = {f"{name}, K={K}": with_responses(MAIN[name], K) for K in KS for name in MAIN}
COMPARED = MAIN | VARIANT
ALSO = ABLATIONS | {HALF_WAY: METHODS[HALF_WAY]} | SCALED | OF_K
ALL = METHODS | SCALED | OF_K
NOISE_STEPS = 20  # the first, whose noise ratio is kept
STAGES = ("bases", "rates", "finals", "main", "ablations")


# --------------------------------------------------------------------------------------------------
# One run


def config(args, task: str, base: int, **overrides) -> train.Config:
    """Train.py's configuration of a run; the default corpus is the synthetic one."""
    task = corpus_of(task)
    corpus = {"data": str(args.corpus)} if task == "asterisk" else {"task": task}
    of_base = {"base": f"{args.out}/base-{task}-seed{base}", "base_seed": base}
    return train.Config(**(RUN | OWN[task] | corpus | of_base | overrides))


def corpus_of(task: str) -> str:
    return "qa" if task in SETTINGS else task


def compared(task: str) -> dict:
    """The methods of the main comparison on a task."""
    if task in SETTINGS:
        return COMPARED | {name: METHODS[name] for name in (HALF_WAY, NO_ROOT)}
    return COMPARED


class Heard(data.Split):
    """Rows and their audio embeddings, which are known."""

    def __init__(self, rows: list[dict], tokenizer, sounds: list[torch.Tensor]):
        self.rows = rows
        self.tokenizer = tokenizer
        self.audio = lambda indices: [sounds[i] for i in indices]


def hear(cfg: train.Config, model, tokenizer, device) -> dict[str, Heard]:
    """The splits, with audio embeddings from files beside the base, made when they are missing."""
    splits = {}
    for name, rows in train.load_rows(cfg).items():
        file = cfg.base_folder / f"{name}.pt"
        if not file.exists():
            split = data.Split(name, rows, cfg.cache_gb)
            split.hear(model, tokenizer)
            sounds = [sound.clone() for sound in split.audio(list(range(len(rows))))]
            torch.save(sounds, file.with_suffix(".part"))
            os.replace(file.with_suffix(".part"), file)
        splits[name] = Heard(rows, tokenizer, torch.load(file, map_location=device))
    return splits


def make_base(args, task: str, base: int):
    """Train a base, and measure it."""
    cfg = config(args, task, base)
    device, dtype = train.pick(cfg)
    rows = data.Split("train", train.load_rows(cfg)["train"], cfg.cache_gb)
    train.make_base(cfg, rows, cfg.base_folder, device)
    model, tokenizer = train.load(cfg, device, dtype)
    splits = hear(cfg, model, tokenizer, device)
    predictions = cfg.base_folder / "predictions.jsonl"
    result = {
        "task": task,
        "base": base,
        "validation": train.greedy_bleu(model, tokenizer, splits["validation"], cfg),
        "test": train.evaluate(model, tokenizer, splits["test"], cfg, predictions),
        "environment": environment(),
    }
    train.write_json(args.out / "bases" / f"{task}-base{base}.json", result)


def run(args, stage: str, task: str, method: str, base: int, seed: int, lr: float):
    """Train and measure one policy; the test split is only touched where the result is reported."""
    file = run_file(args, stage, task, method, base, seed, lr)
    folder = file.with_suffix("")
    trained = ALL[method]
    data.reward = BLEU  # also where this process had another before
    if task in SETTINGS:
        data.reward, K = SETTINGS[task]
        trained = with_responses(trained, K)
    cfg = config(args, task, base, seed=seed, lr=lr, out=str(folder), **trained.flags)
    # Of a run that was stopped: it is short, and starts again.
    shutil.rmtree(folder, ignore_errors=True)
    device, dtype = train.pick(cfg)
    began = time.perf_counter()
    cpu = time.process_time()
    model, tokenizer = train.load(cfg, device, dtype)
    splits = hear(cfg, model, tokenizer, device)
    train.adapt(cfg, model)
    prepared = time.perf_counter()
    noise = []
    train.train_policy(
        cfg,
        model,
        tokenizer,
        splits["train"],
        splits["validation"] if task in TASKS else None,
        folder,
        credit=recording(trained.credit, noise),
    )
    done = time.perf_counter()
    lines = [json.loads(line) for line in (folder / "policy.jsonl").read_text().splitlines()]
    result = {
        "stage": stage,
        "task": task,
        "method": method,
        "base": base,
        "seed": seed,
        "lr": lr,
        "config": asdict(cfg) | {"out": "", "base": cfg.base_folder.name, "data": bool(cfg.data)},
        "validation": {
            line["step"]: line["validation_bleu"] for line in lines if "validation_bleu" in line
        },
        "curves": {
            name: thin([line[name] for line in lines]) for name in ("reward", "kl", "noise_ratio")
        },
        # By leaf.tail_noise and token_noise: with the tree, without.
        "noise": np.sum(noise[: NOISE_STEPS * cfg.prompts], 0).tolist(),
        "seconds": {"preparation": prepared - began, "training": done - prepared},
        "cpu_seconds": time.process_time() - cpu,
        "environment": environment(),
    }
    predictions = folder / "predictions.jsonl"
    if task in SETTINGS:
        scores = train.evaluate(model, tokenizer, splits["validation"], cfg, predictions)
        result["validation"] = {cfg.steps: scores["mean reward x100"]}
    if stage not in RATE_SEEDS:
        result["test"] = train.evaluate(model, tokenizer, splits["test"], cfg, predictions)
    train.write_json(file, result)
    shutil.rmtree(folder)


def recording(rule, noise: list):
    """The credit rule, which then appends both measures of a prompt's noise to a list, as sums with
    the tree and without."""

    @functools.wraps(rule)
    def recorded(cfg, tokens, lengths, surprisal, rewards):
        advantages, boundaries = rule(cfg, tokens, lengths, surprisal, rewards)
        group = (tokens, lengths, surprisal, rewards, boundaries)
        noise.append([leaf.tail_noise(*group), token_noise(*group)])
        return advantages, boundaries

    return recorded


def thin(values: list[float], points: int = 20) -> list[float]:
    """Means of about so many equal parts of a curve."""
    size = max(1, len(values) // points)
    return [round(statistics.fmean(values[i : i + size]), 4) for i in range(0, len(values), size)]


# --------------------------------------------------------------------------------------------------
# Stages


def slug(text: str) -> str:
    return re.sub(r"\W+", "-", text.lower().replace("=", "")).strip("-")


def run_file(args, stage, task, method, base, seed, lr) -> Path:
    return args.out / stage / f"{task}-{slug(method)}-lr{lr:g}-base{base}-seed{seed}.json"


def finished(args, stage: str) -> list[dict]:
    return [train.read_json(file) for file in sorted((args.out / stage).glob("*.json"))]


def at_end(result: dict) -> float:
    """Validation BLEU after the last step."""
    return list(result["validation"].values())[-1]


def best_rates(runs: list[dict], count: int) -> dict[tuple[str, str], list[float]]:
    """By (task, method), the rates with the best mean validation BLEU at the end, of those with the
    most runs."""
    scores = {}
    for r in runs:
        of_method = scores.setdefault((r["task"], r["method"]), {})
        of_method.setdefault(r["lr"], []).append(at_end(r))

    def best_first(by_rate):
        key = {lr: (len(ends), statistics.fmean(ends)) for lr, ends in by_rate.items()}
        return sorted(by_rate, key=key.get, reverse=True)

    return {cell: best_first(by_rate)[:count] for cell, by_rate in scores.items()}


def rate_of(task: str, method: str) -> str:
    """The method whose learning rate a method takes."""
    if method in compared(task):
        return method
    if PLAIN in method:
        return PLAIN
    return BASELINE if BASELINE in method or method == "mean baseline" else "LEAF"


def bases_of(stage: str, task: str) -> range:
    """Rates are tried on all bases of the first task; for the dearer others on two, the two best on
    the other two."""
    halves = {"rates": BASES[:2], "finals": BASES[2:]}
    return BASES if task == TASKS[0] else halves.get(stage, BASES)


def plan(args, stage: str) -> list[tuple]:
    """(stage, task, method, base, seed, lr) of a stage's runs: pairs side by side, every base
    before any twice."""
    if stage == "rates":
        rates = {(task, method): RATES[task] for task in args.tasks for method in compared(task)}
    elif stage == "finals":
        rates = best_rates(finished(args, "rates"), 2)
    else:
        rates = best_rates(finished(args, "rates") + finished(args, "finals"), 1)
    if args.lr and stage not in RATE_SEEDS:
        rates = {(task, method): [args.lr] for task in args.tasks for method in compared(task)}
    if stage == "ablations":
        seeds = SEEDS[: args.ablation_seeds]
        cells = list(itertools.product(args.tasks[:1], seeds, BASES, ALSO))
    else:
        seeds = SEEDS if stage == "main" else [RATE_SEEDS[stage]]
        cells = []
        for task in args.tasks:
            cells += itertools.product([task], seeds, bases_of(stage, task), compared(task))
    return [
        (stage, task, method, base, seed, lr)
        for task, seed, base, method in cells
        if not args.methods or method in args.methods
        for lr in rates[task, rate_of(task, method)]
    ]


def missing(args, stage: str) -> list[tuple]:
    """What is left to run of a stage, for which those before it must be finished; the finals may be
    left out."""
    rates_needed = stage == "finals" or not (args.lr or stage == "rates")
    if rates_needed and missing(args, "rates"):
        untried = f"not all learning rates have been tried for {', '.join(args.tasks)}"
        raise data.UserError(f"{untried}: run the stage rates")
    if stage in ("main", "ablations") and rates_needed:
        if 0 < len(missing(args, "finals")) < len(plan(args, "finals")):
            begun = "the finals have begun, but are not finished"
            raise data.UserError(f"{begun}: run the stage finals")
    return [job for job in plan(args, stage) if not run_file(args, *job).exists()]


def work(args, stage: str):
    """All runs of a stage that are not finished, several at a time."""
    if stage == "bases":
        jobs = [
            (make_base, args, task, base)
            for task in dict.fromkeys(map(corpus_of, args.tasks))
            for base in BASES
            if not (args.out / "bases" / f"{task}-base{base}.json").exists()
        ]
    else:
        jobs = [(run, args, *job) for job in missing(args, stage)]
    os.environ["TQDM_DISABLE"] = "1"  # in the workers; read where tqdm is imported
    context = multiprocessing.get_context("spawn")  # a child that is forked inherits threads' locks
    with (
        train.lock(args.out, wait=False),
        ProcessPoolExecutor(args.processes, context, initializer=quiet) as pool,
    ):
        train.check_same(args.out, {"run": RUN, "own": OWN}, "config.json")
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
    runs = [r | {"stage": stage} for stage in STAGES for r in finished(args, stage)]
    for r in runs:
        r.pop("config", None)
        for name in ("ROUGE-L sampled", "slots, chance %", "exact match %"):
            r.get("test", {}).pop(name, None)
    rounded = json.loads(json.dumps(runs), parse_float=lambda x: round(float(x), 5))
    (RESULTS / "compare.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rounded))
    print(f"{len(runs)} runs in {RESULTS / 'compare.jsonl'}")


# 97.5% quantiles of Student's t, from 1 degree of freedom
T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def student(freedom: int) -> float:
    return T[freedom - 1] if freedom <= len(T) else 1.96


def interval(clusters: dict[int, list[float]]) -> tuple[float, float]:
    """Mean of the clusters' means and half the width of its 95% interval: runs of one base are not
    independent."""
    means = [statistics.fmean(values) for values in clusters.values()]
    n = len(means)
    if n < 2:
        return statistics.fmean(means), float("inf")
    return statistics.fmean(means), student(n - 1) * statistics.stdev(means) / n**0.5


def paired(runs: dict[tuple, dict], task: str, one: str, other: str, metric: str) -> str:
    """The difference of two methods over the (base, seed) that both have, as text."""
    clusters = {}
    for (run_task, method, base, seed), r in runs.items():
        partner = runs.get((task, other, base, seed))
        if (run_task, method) == (task, one) and partner:
            clusters.setdefault(base, []).append(r["test"][metric] - partner["test"][metric])
    if one == other or not clusters:
        return ""
    mean, half = interval(clusters)
    return f"{mean:+.2f} ± {half:.2f}"


def tasks_of(runs: list[dict]) -> list[str]:
    return [task for task in TASKS if any(r["task"] == task for r in runs)]


def column(runs: list[dict], metric: str) -> str:
    values = [r["test"][metric] for r in runs]
    spread = statistics.stdev(values) if len(values) > 1 else 0
    return f"{statistics.fmean(values):.1f} ± {spread:.1f}"


def table(header: list[str], rows: list[list]) -> str:
    rows = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(str, row)) + " |\n" for row in rows)


def report(lines: list[dict]):
    """Tables to the terminal and to compare.md; figures."""
    stages = {stage: [r for r in lines if r["stage"] == stage] for stage in STAGES}
    tried = stages["rates"] + stages["finals"]
    best = best_rates(tried, 1)
    for r in stages["main"] + stages["ablations"]:
        # Another than the best: the finals did not confirm it, or --lr asked for it.
        chosen = best.get((r["task"], rate_of(r["task"], r["method"])), [r["lr"]])
        if [r["lr"]] != chosen:
            r["method"] += f" at {r['lr']:g}"
    trained = stages["main"] + stages["ablations"]
    runs = {(r["task"], r["method"], r["base"], r["seed"]): r for r in trained}
    tables = [
        rate_table(tried, best),
        main_table(stages, runs, TASKS, METRICS),
        main_table(stages, runs, SETTINGS, REWARD_METRICS),
        ablation_table(runs),
    ]
    text = "\n".join(tables)
    (RESULTS / "compare.md").write_text(text)
    print(text)
    plot_curves(stages)


def rate_table(runs: list[dict], best: dict) -> str:
    rates = sorted({r["lr"] for r in runs})
    rows = []
    for task, method in best:
        row = [task, method]
        for lr in rates:
            own = [r for r in runs if (r["task"], r["method"], r["lr"]) == (task, method, lr)]
            scores = [[at_end(r) for r in own if r["stage"] == stage] for stage in RATE_SEEDS]
            cell = ", ".join(f"{statistics.fmean(of):.1f} ({len(of)})" for of in scores if of)
            row.append(f"**{cell}**" if [lr] == best[task, method] else cell)
        rows.append(row)
    header = ["validation (runs), of finals", "method", *(f"{lr:g}" for lr in rates)]
    return table(header, rows)


def main_table(stages: dict, runs: dict, tasks, metrics: tuple) -> str:
    """Scores, differences, and the noise ratios, of tails and of all tokens, of the first steps."""
    rows = []
    for task in tasks:
        bases = [r for r in stages["bases"] if r["task"] == task]
        if bases:
            measured = [column(bases, m) for m in metrics]
            rows.append([task, "base", "", len(bases), *measured, *[""] * 8])
        others = [r["method"] for r in stages["main"] if r["task"] == task]
        for method in dict.fromkeys([*compared(task), *others]):
            own = [r for r in stages["main"] if (r["task"], r["method"]) == (task, method)]
            if own:
                differences = [paired(runs, task, method, BASELINE, m) for m in metrics]
                differences += [paired(runs, task, method, PLAIN, m) for m in metrics[1:]]
                noise = [r["noise"] for r in own if "noise" in r]
                sums = np.sum(noise, 0) if noise else []
                ratios = [f"{leaf.noise_ratio(*pair):.2f}" for pair in sums] or ["", ""]
                seconds = f"{statistics.fmean(r['cpu_seconds'] for r in own):.0f}"
                measured = [column(own, m) for m in metrics]
                rate = f"{own[0]['lr']:g}"
                rows.append(
                    [task, method, rate, len(own), *measured, *differences, *ratios, seconds]
                )
    header = ["task", "method", "lr", "runs", *metrics, *(f"{m} − GRPO" for m in metrics)]
    header += [*(f"{m} − plain" for m in metrics[1:]), "noise, tails", "all", "CPU s"]
    notes = [
        f"{task}: LEAF − {method}, sampled: {paired(runs, task, 'LEAF', method, metrics[1])}\n"
        for task, method, *_ in rows
        if " at " in method
    ]
    return table(header, rows) + "\n" * bool(notes) + "".join(notes)


METRICS = "BLEU greedy", "BLEU sampled", "exact match sampled %"
REWARD_METRICS = "BLEU sampled", "mean reward x100"


def ablation_table(runs: dict) -> str:
    task = TASKS[0]
    rows = []
    shared = {key[2:] for key in runs if key[0] == task and key[1] in ALSO}  # bases and seeds
    runs = {key: r for key, r in runs.items() if key[0] == task and key[2:] in shared}
    for method in ("LEAF", BASELINE, *ALSO):
        own = [r for key, r in runs.items() if key[:2] == (task, method)]
        if own:
            measured = [column(own, m) for m in METRICS[:2]]
            others = ("LEAF", BASELINE)
            against = [paired(runs, task, method, other, METRICS[1]) for other in others]
            rows.append([method, f"{own[0]['lr']:g}", len(own), *measured, *against])
    names = ("LEAF", BASELINE), ("LEAF", PLAIN), (PLAIN, BASELINE)
    same_k = [(f"{one}, K={K}", f"{other}, K={K}") for K in KS for one, other in names]
    same_k.append(("LEAF, scaled", BASELINE))
    same_k.append(("LEAF", f"{BASELINE}, KL 0.008"))
    notes = [
        f"{one} − {other}, {metric}: {paired(runs, task, one, other, metric)}\n"
        for one, other in same_k
        for metric in METRICS[1:]
    ]
    header = [task, "lr", "runs", *METRICS[:2], "sampled − LEAF", "sampled − GRPO"]
    return table(header, rows) + "\n" + "".join(notes)


def save(figure, name: str):
    figure.tight_layout()
    for kind in ("png", "svg"):
        figure.savefig(RESULTS / f"{name}.{kind}", dpi=130)


def plot_curves(stages: dict):
    import matplotlib.pyplot as plt  # nothing but figures needs it

    tasks = tasks_of(stages["main"])
    figure, axes = plt.subplots(1, len(tasks), figsize=(3.6 * len(tasks), 3.2), squeeze=False)
    for axis, task in zip(axes[0], tasks):
        at_start = {r["base"]: r["validation"] for r in stages["bases"] if r["task"] == task}
        known = {r["method"] for r in stages["main"] if r["task"] == task}
        for method in (method for method in COMPARED if method in known):
            own = [r for r in stages["main"] if (r["task"], r["method"]) == (task, method)]
            steps = [0, *map(int, own[0]["validation"])]
            curves = [[at_start[r["base"]], *r["validation"].values()] for r in own]
            values = torch.tensor(curves)  # (runs, steps)
            mean = values.mean(0)
            std = values.std(0, correction=min(1, len(own) - 1))
            (line,) = axis.plot(steps, mean, marker="o", markersize=3, label=method)
            axis.fill_between(
                steps, mean - std, mean + std, alpha=0.15, color=line.get_color(), linewidth=0
            )
        axis.set_title(f"{task}, {len(own)} runs each", fontsize=10)
        axis.set_xlabel("steps of 64 responses")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("validation BLEU, greedy")
    axes[0, 0].legend(fontsize=8, loc="lower right")
    save(figure, "compare")


def main():
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m experiments.compare",
        None,
        summary,
        details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stages", nargs="+", choices=(*STAGES, "keep", "report"))
    parser.add_argument(
        "--out", type=Path, default=Path("runs/compare"), help="runs (default: %(default)s)"
    )
    parser.add_argument("--tasks", nargs="+", choices=(*TASKS, *SETTINGS), default=TASKS)
    parser.add_argument("--methods", nargs="+", choices=ALL, metavar="NAME", help="only these")
    parser.add_argument(
        "--corpus", type=Path, default=Path("data/asterisk"), help="what corpora.asterisk made"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count(),
        help="runs at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--lr", type=float, help="main or ablations at this rate instead of each method's best"
    )
    parser.add_argument(
        "--ablation-seeds", type=int, default=2, help="seeds per base for each ablation"
    )
    args = parser.parse_args()
    for stage in args.stages:
        if stage == "keep":
            keep(args)
        elif stage == "report":
            lines = (RESULTS / "compare.jsonl").read_text().splitlines()
            report([json.loads(line) for line in lines])
        else:
            work(args, stage)


if __name__ == "__main__":
    try:
        main()
    except (data.UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
