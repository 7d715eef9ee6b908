"""A small model trained by LEAF against a larger one trained in full: "smaller LEAF models beat
larger full-parameter baselines" (arXiv 2606.07610), in small.

    python -m experiments.large --out runs/large               one base model of each size, five
                                                               seeds of rollouts
    python -m experiments.large --out runs/large --bases 0 1   more bases: the command goes on from
                                                               what is there

Both models are made by train.py's recipe from the same rows: CTC on the encoder, freeze it, then
projector and decoder on the `target` texts. The small one is its default, the large one has three
times as many parameters, in the encoder as in the decoder. From there, on the synthetic task "qa":

    small   LEAF + LoRA as train.py has it, for fewer steps
    large   SFT of projector and decoder on the `target` texts, of which 10% have the wording that
            is rewarded; or on the `reference` texts, which LEAF and GRPO meet in the reward alone
            (as the paper's SFT baselines)
    large   GRPO (the authors' floor of 1/3) of all of the decoder's parameters, embeddings
            included. The projector stays as it is: as for LEAF, recordings are turned into
            embeddings once. The KL reference is the base.

Each of the large model's goes as long as the small model's run took ("equal time"), and over as
many rollouts or, SFT having none, answers ("equal rollouts", "equal answers"). With the same seed
LEAF and GRPO are given the same prompts in the same order and the same random numbers. Time is this
process's CPU time on one thread, whoever else keeps the processor busy, and that of training steps
alone: neither evaluation nor preparation counts. Since the schedule of the learning rate has to
know its end, an equal time is a number of steps, from the seconds of a step in the grid below; what
it took in truth is reported.

The large model's learning rates are settled on the validation split of the first base, from a grid
of short runs with a seed of their own. The small one's is the best of experiments.compare's, whose
runs are about as long. The test split is used once, at the end of each run.

Every finished run is a JSON file below --out, and the summary is experiments/results/large.json,
too.
"""

import argparse
import copy
import json
import shutil
import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from unittest import mock

import torch

import data
import train
from experiments.compare import interval as clustered_interval
from experiments.keep import RESULTS, processor
from lora import lora_disabled, lora_parameters
from model import SpeechConfig

# The rate is experiments.compare's.
CFG = train.Config(steps=150, lr=4e-3, eval_every=0, device="cpu", dtype="float32")
CPU = torch.device("cpu")
NAMES = {"sft-target": "SFT on targets", "sft-reference": "SFT on references", "grpo": "GRPO"}
GRID = {kind: (3e-4, 1e-3, 3e-3) for kind in NAMES}
GRID_SEED = 1000  # of no run that is compared
POINTS = 5  # of a run's validation curve
FIGURES = ("BLEU greedy", "BLEU sampled", "exact match %")


def is_sft(kind: str) -> bool:
    return kind.startswith("sft-")


# --------------------------------------------------------------------------------------------------
# The two models


def larger(*sizes) -> SpeechConfig:
    """SpeechConfig.compact with 5.7 instead of 1.8 million parameters, in more and wider layers."""
    c = COMPACT(*sizes)
    return replace(
        c,
        encoder_config=replace(c.encoder_config, num_layers=6, hidden_dim=144, dim_head=36),
        projector_config=replace(
            c.projector_config, hidden_size=144, intermediate_size=288, encoder_hidden_size=144
        ),
        text_config=replace(
            c.text_config,
            num_hidden_layers=6,
            hidden_size=192,
            intermediate_size=384,
            num_attention_heads=6,
            num_key_value_heads=3,
        ),
    )


COMPACT = SpeechConfig.compact
SHAPES = {"small": COMPACT, "large": larger}


@dataclass
class Side:
    """One of the two models: the configuration of its base, and the splits as that base hears
    them."""

    size: str
    cfg: train.Config

    @cached_property
    def splits(self) -> dict[str, data.Split]:
        """Made when first asked for, and the base with them: nothing is where all runs are
        finished."""
        corpus = train.load_rows(self.cfg)
        splits = {name: data.Split(name, rows, self.cfg.cache_gb) for name, rows in corpus.items()}
        with mock.patch.object(SpeechConfig, "compact", SHAPES[self.size]):
            train.make_base(self.cfg, splits["train"], self.cfg.base_folder, CPU)
        return splits

    def load(self, kind: str, *names: str):
        """The base, its tokenizer, and the splits of these names as it hears them in a run of this
        kind."""
        # Before the base is loaded: this may have to train it.
        splits = [self.splits[name] for name in names]
        model, tokenizer = train.load(self.cfg, CPU, torch.float32)
        for split in splits:
            listen(split, model, tokenizer, kind)
        return model, tokenizer, *splits


def open_side(size: str, out: Path, base_seed: int) -> Side:
    base = str(out / f"base-{size}-seed{base_seed}")
    return Side(size, replace(CFG, base_seed=base_seed, base=base))


# --------------------------------------------------------------------------------------------------
# Training further


def listen(split: data.Split, model, tokenizer, kind: str):
    """Audio embeddings are computed once in a run, unless SFT trains the projector."""
    if is_sft(kind):
        split.tokenizer = tokenizer
        frames = split.cache("encoding", lambda indices: model.encode(split.mels(indices)))
        split.audio = lambda indices: model.project(frames(indices))
    else:
        split.hear(model, tokenizer)


def held(parameters: dict):
    """A reference for train.train_policy: inside, the parameters have the values that they have
    now."""
    values = [p.detach().clone() for p in parameters.values()]
    return lambda model: train.other_values(parameters.values(), values)


def watched(validate):
    """A train.Log that also has the seconds of each step, wall-clock and CPU, and POINTS times what
    validate() returns, for which the clocks stand still."""

    class Watched(train.Log):
        def __enter__(self):
            super().__enter__()
            self.start_clocks()
            return self

        def start_clocks(self):
            self.wall = time.perf_counter()
            self.cpu = time.process_time()

        def record(self, step, metrics, own=None):
            seconds = time.perf_counter() - self.wall
            cpu_seconds = time.process_time() - self.cpu
            metrics = metrics | {"seconds": seconds, "cpu_seconds": cpu_seconds}
            if (step + 1) % max(1, self.steps // POINTS) == 0 or step + 1 == self.steps:
                metrics["validation"] = validate()
            super().record(step, metrics, own)
            self.start_clocks()

    return Watched


def read(model, tokenizer, split: data.Split, cfg) -> dict[str, float]:
    """Of greedy answers: how right they are, and how well the recording was heard, whatever the
    wording."""
    answers = train.answer(model, tokenizer, split, cfg)
    references = [row["reference"] for row in split.rows]
    bleu = data.corpus_bleu(answers, references, lowercase=True)
    return {
        "BLEU greedy": bleu,
        "slots heard %": 100 * data.slot_accuracy(answers, split.rows),
    }


def supervise(cfg, model, tokenizer, rows: data.Split, told: str, folder: Path) -> dict:
    """Full SFT on the texts that rows have as `told`. Returns what was trained, by name."""
    rows = copy.copy(rows)
    rows.rows = [row | {"target": row[told]} for row in rows.rows]
    # It keys the order of rows: not the base's.
    cfg = replace(cfg, base_seed=1000 * (cfg.seed + 1) + cfg.base_seed)
    train.train_sft(cfg, model, tokenizer, rows, folder, freeze_encoder=True)
    parts = ("projector.", "language_model.")
    return {name: p for name, p in model.named_parameters() if name.startswith(parts)}


def reinforce(cfg, model, tokenizer, rows: data.Split, folder: Path) -> dict:
    """LEAF with LoRA, or GRPO of the whole decoder. Returns what was trained, by name."""
    if cfg.algo == "leaf":
        train.adapt(cfg, model)
        trained = lora_parameters(model)
        reference = lora_disabled
    else:
        named = model.named_parameters()
        trained = {name: p for name, p in named if name.startswith("language_model.")}
        reference = held(trained)
    train.train_policy(
        cfg, model, tokenizer, rows, None, folder, parameters=trained, reference=reference
    )
    return trained


def post_train(side: Side, kind: str, steps: int, lr: float, seed: int, folder: Path):
    """Train the side's base further, in folder. Returns model, tokenizer and figures, without those
    of the test split.

    A step of SFT is a batch of answers, a step of LEAF or GRPO a batch of rollouts with its
    updates.
    """
    model, tokenizer, rows, validation = side.load(kind, "train", "validation")
    cfg = side.cfg
    size = sum(p.numel() for p in model.parameters())
    watching = watched(lambda: read(model, tokenizer, validation, cfg))
    with mock.patch.object(train, "Log", watching):
        if is_sft(kind):
            log = "sft.jsonl"
            used = {"answers": steps * cfg.base_batch}
            cfg = replace(cfg, seed=seed, sft_steps=steps, base_lr=lr)
            trained = supervise(cfg, model, tokenizer, rows, kind.removeprefix("sft-"), folder)
        else:
            log = "policy.jsonl"
            used = {"rollouts": steps * cfg.prompts * cfg.responses}
            cfg = replace(cfg, seed=seed, algo=kind, steps=steps, lr=lr)
            trained = reinforce(cfg, model, tokenizer, rows, folder)
    took = {"seconds": 0.0, "cpu_seconds": 0.0}
    curve = []
    for line in map(json.loads, (folder / log).read_text().splitlines()):
        took = {clock: past + line[clock] for clock, past in took.items()}
        if "validation" in line:
            curve.append({"step": line["step"], **took, **line["validation"]})
    figures = {
        "parameters": size,
        "trained_parameters": sum(p.numel() for p in trained.values()),
        "lr": lr,
        "steps": steps,
        **used,
        **took,
        "validation": curve,
    }
    return model, tokenizer, figures


# --------------------------------------------------------------------------------------------------
# What is run: bases, the grid, and every method with every seed


def done(path: Path, work, *args) -> dict:
    """What work(*args, folder) returns, kept as a JSON file; from there, where it is done
    already."""
    if not path.exists():
        folder = path.with_suffix("")
        train.write_json(path, work(*args, folder))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return train.read_json(path)


def base_figures(side: Side, folder: Path) -> dict:
    """Of a base as it is: whether it is as well trained as the other, and where post-training
    starts from."""
    model, tokenizer, validation, test = side.load("leaf", "validation", "test")
    cfg = side.cfg
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "validation": read(model, tokenizer, validation, cfg),
        "test": train.evaluate(model, tokenizer, test, cfg, folder / "predictions.jsonl"),
    }


def tested(side: Side, kind: str, steps: int, lr: float, seed: int, folder: Path) -> dict:
    """A run, and its one look at the test split."""
    model, tokenizer, figures = post_train(side, kind, steps, lr, seed, folder)
    test = side.splits["test"]
    listen(test, model, tokenizer, "leaf")  # trained to its end, the projector is frozen
    predictions = folder / "predictions.jsonl"
    return figures | {"test": train.evaluate(model, tokenizer, test, side.cfg, predictions)}


def tried(side: Side, kind: str, steps: int, lr: float, seed: int, folder: Path) -> dict:
    """A short run, measured on the validation split alone."""
    _, _, figures = post_train(side, kind, steps, lr, seed, folder)
    return figures


def settle(side: Side, folder: Path) -> dict[str, dict]:
    """The large model's learning rates: of each kind's short runs, the one with the best validation
    BLEU at its end."""
    chosen = {}
    for kind, rates in GRID.items():
        steps = CFG.steps // (2 if is_sft(kind) else 4)
        runs = []
        for lr in rates:
            path = folder / f"{kind}-{lr:g}.json"
            runs.append(done(path, tried, side, kind, steps, lr, GRID_SEED))
        ends = [run["validation"][-1]["BLEU greedy"] for run in runs]
        best = runs[ends.index(max(ends))]
        chosen[kind] = {
            "lr": best["lr"],
            "step_seconds": best["cpu_seconds"] / steps,
            "grid": dict(zip(rates, ends)),
        }
        print(f"{NAMES[kind]}: learning rate {best['lr']:g}, of {chosen[kind]['grid']}")
    return chosen


def compare(sides: dict[str, Side], settled: dict, seed: int, folder: Path) -> dict[str, dict]:
    """All methods from one base of each size, with one seed: figures by method."""
    path = folder / "leaf.json"
    small = done(path, tested, sides["small"], "leaf", CFG.steps, CFG.lr, seed)
    runs = {"small, LEAF + LoRA": small}
    for kind, chosen in settled.items():
        same = "answers" if is_sft(kind) else "rollouts"
        per_step = CFG.base_batch if is_sft(kind) else CFG.prompts * CFG.responses
        budgets = {
            "time": small["cpu_seconds"] / chosen["step_seconds"],
            same: small["rollouts"] / per_step,
        }
        for budget, steps in budgets.items():
            path = folder / f"{kind}-{budget}.json"
            steps = max(1, round(steps))
            found = done(path, tested, sides["large"], kind, steps, chosen["lr"], seed)
            runs[f"large, {NAMES[kind]}, equal {budget}"] = found
    return runs


# --------------------------------------------------------------------------------------------------
# What is reported


def interval(differences: dict[tuple[int, int], float]) -> dict:
    """Mean of differences by (base, seed), and its 95% confidence: over bases, or over the seeds of
    a single one."""
    several = len({base for base, _ in differences}) > 1
    clusters = {}
    for (base, seed), difference in differences.items():
        clusters.setdefault(base if several else seed, []).append(difference)
    value, half = clustered_interval(clusters)
    n = len(clusters)
    return {"mean": value, "half_width_95": half if n > 1 else None, "units": n}


def summarise(runs: dict[tuple[int, int], dict], untrained: dict[str, dict], settled: dict) -> dict:
    """Of runs[base, seed][method] and untrained[size][base]: mean, std, and what LEAF's small model
    is ahead by."""
    leaf, *others = next(iter(runs.values()))
    methods = {}
    for method in (leaf, *others):
        mine = {at: run[method] for at, run in runs.items()}
        first = next(iter(mine.values()))
        numbers = [key for key, value in first.items() if isinstance(value, (int, float))]
        methods[method] = {key: mean(run[key] for run in mine.values()) for key in numbers}
        for name in FIGURES:
            values = {at: run["test"][name] for at, run in mine.items()}
            figure = {
                "mean": mean(values.values()),
                "std": stdev(values.values()) if len(values) > 1 else None,
            }
            if method != leaf:
                ahead = {at: runs[at][leaf]["test"][name] - value for at, value in values.items()}
                figure["LEAF ahead"] = interval(ahead)
            methods[method][name] = figure
    return {
        "untrained": untrained,
        "learning rates": settled,
        "methods": methods,
        "runs": {f"base {base}, seed {seed}": run for (base, seed), run in runs.items()},
    }


def show(summary: dict):
    heads = ("", "parameters", "trained", "rollouts", "answers", "CPU s")
    columns = [*heads, *FIGURES, "LEAF ahead, BLEU greedy"]
    print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for size, untrained in summary["untrained"].items():
        scores = [mean(base["test"][name] for base in untrained.values()) for name in FIGURES]
        parameters = next(iter(untrained.values()))["parameters"]
        cells = [f"{size}, base", f"{parameters:,}", *[""] * 4]
        cells += [*(f"{score:.1f}" for score in scores), ""]
        print("| " + " | ".join(cells) + " |")
    for method, figures in summary["methods"].items():
        cells = [method]
        for key in ("parameters", "trained_parameters", "rollouts", "answers"):
            cells.append(f"{figures[key]:,.0f}" if key in figures else "")
        cells.append(f"{figures['cpu_seconds']:.0f}")
        for name in FIGURES:
            spread = figures[name]["std"]
            spread = f" ± {spread:.1f}" if spread is not None else ""
            cells.append(f"{figures[name]['mean']:.1f}{spread}")
        ahead = figures["BLEU greedy"].get("LEAF ahead", {"mean": None})
        half = f" ± {ahead['half_width_95']:.1f}" if ahead.get("half_width_95") is not None else ""
        cells.append(f"{ahead['mean']:+.1f}{half}" if ahead["mean"] is not None else "")
        print("| " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the bases and of every finished run"
    )
    parser.add_argument(
        "--bases", type=int, nargs="+", default=[0], help="seeds of the bases and of the data"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=list(range(5)), help="of rollouts and order of rows"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    grid = {kind: list(rates) for kind, rates in GRID.items()}
    settings = {"config": asdict(CFG), "shape": asdict(larger(800, 25, 1)), "grid": grid}
    with train.lock(args.out, wait=False):
        train.check_same(args.out, settings, "config.json")
        untrained = {size: {} for size in SHAPES}
        runs = {}
        settled = None
        for base in args.bases:
            sides = {size: open_side(size, args.out, base) for size in SHAPES}
            for size, side in sides.items():
                path = args.out / f"untrained-{size}-seed{base}.json"
                untrained[size][base] = done(path, base_figures, side)
            settled = settled or settle(sides["large"], args.out / "grid")  # on the first base
            for seed in args.seeds:
                folder = args.out / f"base{base}-seed{seed}"
                runs[base, seed] = compare(sides, settled, seed, folder)
        summary = summarise(runs, untrained, settled)
        summary["machine"] = {"processor": processor(), "torch": torch.__version__, "threads": 1}
        for folder, name in ((args.out, "summary.json"), (RESULTS, "large.json")):
            train.write_json(folder / name, summary)
    show(summary)


if __name__ == "__main__":
    main()
