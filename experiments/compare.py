"""LEAF against GRPO and other rules: methods x bases x seeds, paired, resumable.

    python -m experiments.compare bases rates finals main    # the work, below --out
    python -m experiments.compare bases rates finals main --tasks early early-K32 late
    python -m experiments.compare confounds --tasks qa       # K, and the weight of the KL
    python -m experiments.compare keep report                # copy what is finished; tables

Paired runs share everything but the method: the base, the data order, the noise of the rollouts,
LoRA's first weights and the number of sampled responses. A stage leaves a JSON per finished run;
the same command goes on with the rest.

    bases      a base per task and base seed
    rates      learning rates of all methods, on the validation split alone, with a seed that no
               other stage uses
    finals     the two best rates of each once more, on other bases or with another such seed; both
               stages' runs together choose
    main       tasks x methods x bases x seeds, each method at its own best rate of its task, or all
               at --lr
    confounds  LEAF and GRPO with the KL weighed against the gradient as the other has it, and with
               other K, each at the rate of the method that it varies

    keep       the finished runs, a line each, in experiments/results/compare.jsonl, in the place of
               those that it had of the same stage and task
    report     from that file alone: compare.md

early and late are qa under another reward: the share of the reference's first, or last, three words
in place; what is chosen and judged by is then the mean reward. Run processes as many as there are
cores: each computes with one thread, so a result does not depend on how many run.
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

import numpy as np
import torch
from tqdm import tqdm

import data
import leaf
import train
from experiments.common import RESULTS, command_line, environment, interval, rounded, table
from experiments.methods import (
    BASELINE,
    CONFOUNDS,
    HALF_WAY,
    METHODS,
    NO_MULTIPLICITY,
    OURS,
    PAPERS,
    PLAIN,
    first_words,
    last_words,
    with_responses,
)

TASKS = ("qa", "translation", "asterisk")
# The task qa under another reward, and K.
SETTINGS = {"early": (first_words, 8), "early-K32": (first_words, 32), "late": (last_words, 8)}
# Three words are soon as good as they get, and the rest of an answer, which earns nothing, may grow;
# right answers have 9 to 13 tokens.
SHORT = {"steps": 50, "max_new_tokens": 20}
BLEU = data.reward
BASES = range(4)
SEEDS = 5
RATE_SEEDS = {"rates": 100, "finals": 101}
GRID = (1e-3, 2e-3, 4e-3, 8e-3)
# asterisk has one more: 1e-3, the lowest of the grid, was the best of some methods.
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
OF_K = {f"{name}, K={K}": with_responses(PAPERS[name], K) for K in KS for name in PAPERS}
BESIDE = CONFOUNDS | OF_K
NOISE_STEPS = 20  # the first, whose noise ratio is kept
METRICS = "BLEU greedy", "BLEU sampled", "exact match sampled %", "mean reward x100"
JUDGED = dict.fromkeys(TASKS, "BLEU sampled") | dict.fromkeys(SETTINGS, "mean reward x100")
MARGIN = 1.0  # point, within which we call two methods equal
STAGES = ("bases", "rates", "finals", "main", "confounds")


# --------------------------------------------------------------------------------------------------
# One run


def config(args, task: str, base: int, **overrides) -> train.Config:
    """Train.py's configuration of a run; the default corpus is the synthetic one."""
    short = SHORT if task in SETTINGS else {}
    task = corpus_of(task)
    corpus = {"data": str(args.corpus)} if task == "asterisk" else {"task": task}
    of_base = {"base": f"{args.out}/base-{task}-seed{base}", "base_seed": base}
    return train.Config(**(RUN | short | OWN[task] | corpus | of_base | overrides))


def corpus_of(task: str) -> str:
    return "qa" if task in SETTINGS else task


HEARD = {}  # by base, the splits whose audio this process has embedded


def splits_of(cfg: train.Config, model, tokenizer) -> dict[str, data.Split]:
    if cfg.base not in HEARD:
        rows = train.load_rows(cfg)
        HEARD[cfg.base] = {name: data.Split(name, rows[name], cfg.cache_gb) for name in rows}
        for split in HEARD[cfg.base].values():
            split.hear(model, tokenizer)
    return HEARD[cfg.base]


def make_base(args, task: str, base: int):
    """Train a base, and measure it."""
    cfg = config(args, task, base)
    device, dtype = train.pick(cfg)
    rows = data.Split("train", train.load_rows(cfg)["train"], cfg.cache_gb)
    train.make_base(cfg, rows, cfg.base_folder, device)
    model, tokenizer = train.load(cfg, device, dtype)
    splits = splits_of(cfg, model, tokenizer)
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
    trained = (METHODS | BESIDE)[method]
    data.reward = BLEU  # also where this process had another before
    if task in SETTINGS:
        data.reward, K = SETTINGS[task]
        trained = with_responses(trained, K)
    cfg = config(args, task, base, seed=seed, lr=lr, out=str(folder), **trained.flags)
    # Of a run that was stopped: it is short, and starts again.
    shutil.rmtree(folder, ignore_errors=True)
    device, dtype = train.pick(cfg)
    model, tokenizer = train.load(cfg, device, dtype)
    splits = splits_of(cfg, model, tokenizer)
    train.adapt(cfg, model)
    train.train_policy(
        cfg,
        model,
        tokenizer,
        splits["train"],
        splits["validation"] if task in TASKS else None,
        folder,
        credit=trained.credit,
    )
    lines = [json.loads(line) for line in (folder / "policy.jsonl").read_text().splitlines()]
    noise = [[line[name] for name in train.NOISE] for line in lines[:NOISE_STEPS]]
    predictions = folder / "predictions.jsonl"
    if task in SETTINGS:  # chosen by its own reward
        scores = train.evaluate(model, tokenizer, splits["validation"], cfg, predictions)
        validation = {cfg.steps: scores["mean reward x100"]}
    else:
        validation = {x["step"]: x["validation_bleu"] for x in lines if "validation_bleu" in x}
    result = {
        "task": task,
        "method": method,
        "base": base,
        "seed": seed,
        "lr": lr,
        "validation": validation,
        "noise": (cfg.prompts * np.sum(noise, 0)).tolist(),  # with the tree, without
        "environment": environment(),
    }
    if stage not in RATE_SEEDS:
        result["test"] = train.evaluate(model, tokenizer, splits["test"], cfg, predictions)
    train.write_json(file, result)
    shutil.rmtree(folder)


# --------------------------------------------------------------------------------------------------
# Stages


def slug(text: str) -> str:
    return re.sub(r"\W+", "-", text.lower().replace("=", "")).strip("-")


def run_file(args, stage, task, method, base, seed, lr) -> Path:
    return args.out / stage / f"{task}-{slug(method)}-lr{lr:g}-base{base}-seed{seed}.json"


def finished(args, stage: str) -> list[dict]:
    return [train.read_json(file) for file in sorted((args.out / stage).glob("*.json"))]


def at_end(result: dict) -> float:
    """The validation score after the last step: greedy BLEU, or a setting's mean reward."""
    return list(result["validation"].values())[-1]


def best_rates(runs: list[dict], count: int) -> dict[tuple[str, str], list[float]]:
    """By (task, method), the rates with the best mean validation score at the end, of those with
    the most runs."""
    scores = {}
    for r in runs:
        of_method = scores.setdefault((r["task"], r["method"]), {})
        of_method.setdefault(r["lr"], []).append(at_end(r))

    def best_first(by_rate):
        key = {lr: (len(ends), statistics.fmean(ends)) for lr, ends in by_rate.items()}
        return sorted(by_rate, key=key.get, reverse=True)

    return {cell: best_first(by_rate)[:count] for cell, by_rate in scores.items()}


def rate_of(method: str) -> str:
    """The method whose learning rate a method takes."""
    if method in METHODS:
        return method
    return next(name for name in PAPERS if name in method)


def bases_of(stage: str, task: str) -> range:
    """Rates are tried on all bases of the first task; for others on two, the two best on the other
    two."""
    halves = {"rates": BASES[:2], "finals": BASES[2:]}
    return BASES if task == TASKS[0] else halves.get(stage, BASES)


def plan(args, stage: str) -> list[tuple]:
    """(stage, task, method, base, seed, lr) of a stage's runs: pairs side by side, every base
    before any twice."""
    tasks = args.tasks
    methods = BESIDE if stage == "confounds" else METHODS
    seeds = [RATE_SEEDS[stage]] if stage in RATE_SEEDS else range(args.seeds)
    if stage == "rates":
        rates = {(task, method): RATES[task] for task in tasks for method in METHODS}
    elif stage == "finals":
        rates = best_rates(finished(args, "rates"), 2)
    elif args.lr:
        rates = {(task, method): [args.lr] for task in tasks for method in METHODS}
    else:
        rates = best_rates(finished(args, "rates") + finished(args, "finals"), 1)
    cells = []
    for task in tasks:
        cells += itertools.product([task], seeds, bases_of(stage, task), methods)
    return [
        (stage, task, method, base, seed, lr)
        for task, seed, base, method in cells
        for lr in rates[task, rate_of(method)]
    ]


def missing(args, stage: str) -> list[tuple]:
    """What is left to run of a stage, for which those before it must be finished; the finals may be
    left out."""
    rates_needed = stage == "finals" or not (args.lr or stage == "rates")
    if rates_needed and missing(args, "rates"):
        untried = f"not all learning rates have been tried for {', '.join(args.tasks)}"
        raise data.UserError(f"{untried}: run the stage rates")
    if stage in ("main", "confounds") and rates_needed:
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
        train.check_same(args.out, {"run": RUN, "own": OWN, "short": SHORT}, "config.json")
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


# What is compared, in the order of the tables; "at" marks a rate that is not the method's own.
PAIRS = [
    *(("LEAF", other) for other in (BASELINE, PLAIN)),
    (PLAIN, BASELINE),
    *(
        (method, other)
        for method in (NO_MULTIPLICITY, OURS, HALF_WAY)
        for other in (BASELINE, PLAIN)
    ),
    *((method, "LEAF") for method in (NO_MULTIPLICITY, OURS, HALF_WAY)),
    ("LEAF at 0.001", BASELINE),
    ("LEAF at 0.001", PLAIN),
    *(("LEAF", method) for method in CONFOUNDS),
    ("LEAF, scaled", BASELINE),
    *(
        (f"{one}, K={K}", f"{other}, K={K}")
        for K in KS
        for one, other in (("LEAF", BASELINE), ("LEAF", PLAIN), (PLAIN, BASELINE))
    ),
]


def keep(args):
    """All finished runs as lines of one small file; nothing that can be computed from them."""
    new = [r | {"stage": stage} for stage in STAGES for r in finished(args, stage)]
    for r in new:
        r["test"] = {name: r["test"][name] for name in METRICS if name in r.get("test", {})}
    replaced = {(r["stage"], r["task"]) for r in new}
    kept = [r for r in read_kept() if (r["stage"], r["task"]) not in replaced]
    lines = [*kept, *map(rounded, new)]
    (RESULTS / "compare.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    print(f"{len(new)} runs are new in {RESULTS / 'compare.jsonl'}, {len(kept)} stay")


def read_kept() -> list[dict]:
    file = RESULTS / "compare.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def difference(runs: dict[tuple, dict], one: tuple, other: tuple, metric: str):
    """Of two (task, method) over the (base, seed) that both have: the number of pairs, mean and
    half width; None where there is no pair."""
    clusters = {}
    for (task, method, base, seed), r in runs.items():
        partner = runs.get((*other, base, seed))
        if (task, method) == one and partner:
            clusters.setdefault(base, []).append(r["test"][metric] - partner["test"][metric])
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
    tried = [r for r in lines if r["stage"] in RATE_SEEDS]
    best = best_rates(tried, 1)
    bases = [r | {"method": "base"} for r in lines if r["stage"] == "bases"]
    trained = [r for r in lines if r["stage"] in ("main", "confounds")]
    for r in trained:
        # Another than the best: the finals did not confirm it, or --lr asked for it.
        if best.get((r["task"], rate_of(r["method"])), [r["lr"]]) != [r["lr"]]:
            r["method"] += f" at {r['lr']:g}"
    tables = [rate_table(tried, best), score_table(bases + trained), difference_table(trained)]
    text = "\n".join([*tables, *made_by(lines)])
    (RESULTS / "compare.md").write_text(text)
    print(text)


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
    header = ["task", "method", *(f"{lr:g}" for lr in rates)]
    return table(header, rows) + "\nValidation of rates, finals (runs).\n"


def score_table(runs: list[dict]) -> str:
    """Mean and standard deviation of the test split's scores, and the noise ratio of the first steps."""
    rows = []
    cells = dict.fromkeys((r["task"], r["method"]) for r in runs)
    for task, method in sorted(cells, key=lambda cell: (*TASKS, *SETTINGS).index(cell[0])):
        own = [r for r in runs if (r["task"], r["method"]) == (task, method)]
        noise = [r["noise"] for r in own if "noise" in r]
        ratio = f"{leaf.noise_ratio(*np.sum(noise, 0)):.2f}" if noise else ""
        rate = f"{own[0]['lr']:g}" if "lr" in own[0] else ""
        scores = [column(own, metric) for metric in METRICS]
        rows.append([task, method, rate, len(own), *scores, ratio])
    header = ["task", "method", "lr", "runs", *METRICS, "noise ratio"]
    return table(header, rows)


def difference_table(runs: list[dict]) -> str:
    """Paired differences in every metric, and what the one that the task is judged by says."""
    by_key = {(r["task"], r["method"], r["base"], r["seed"]): r for r in runs}
    rows = []
    for task in (*TASKS, *SETTINGS):
        for one, other in PAIRS:
            found = {m: difference(by_key, (task, one), (task, other), m) for m in METRICS}
            if found[JUDGED[task]]:
                pairs, *said = found[JUDGED[task]]
                cells = [f"{mean:+.2f} ± {half:.2f}" for _, mean, half in found.values()]
                rows.append([task, f"{one} − {other}", pairs, *cells, verdict(*said)])
    note = f"{len(rows)} differences in {len(METRICS)} metrics; the verdict is on {JUDGED['qa']}"
    note += f", or {JUDGED['early']} for {', '.join(SETTINGS)}\n"
    return table(["task", "difference", "pairs", *METRICS, "verdict"], rows) + "\n" + note


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
    parser.add_argument("--tasks", nargs="+", choices=(*TASKS, *SETTINGS), default=TASKS)
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
        "--lr", type=float, help="main or confounds at this rate instead of each method's best"
    )
    parser.add_argument(
        "--seeds", type=int, default=SEEDS, help="of each base (default: %(default)s)"
    )
    args = parser.parse_args()
    for stage in args.stages:
        if stage == "keep":
            keep(args)
        elif stage == "report":
            report(read_kept())
        else:
            work(args, stage)


if __name__ == "__main__":
    try:
        main()
    except (data.UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
