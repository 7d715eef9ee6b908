"""Keep what finished runs of train.py report as reference results.

    python -m experiments.keep runs/qa-leaf-seed0 ...

A run is copied into experiments/results: RUN.json (settings, results on the test split, seconds,
memory; machine and code as they are now) and, with --metrics, RUN.jsonl (metrics of every step of
policy optimisation).
"""

import shutil
from pathlib import Path

from experiments.common import RESULTS, command_line, environment
from upkeep.files import read_json, write_json


def keep(run: Path, metrics: bool):
    results = read_json(run / "results.json")
    config = results["config"]  # without the places things lay at
    kept = {k: v for k, v in config.items() if k not in ("out", "base")}
    results["config"] = kept | {"data": Path(config["data"]).name}
    write_json(RESULTS / f"{run.name}.json", results | {"environment": environment()})
    if metrics:
        shutil.copy(run / "policy.jsonl", RESULTS / f"{run.name}.jsonl")


def main():
    parser = command_line(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--metrics", action="store_true", help="the metrics of every step, too")
    args = parser.parse_args()
    for run in args.runs:
        keep(run, args.metrics)


if __name__ == "__main__":
    main()
