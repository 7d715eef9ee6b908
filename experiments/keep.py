"""Keep what finished runs report as reference results, and print them as the README's table.

    python -m experiments.keep runs/qa-leaf-seed0 runs/qa-leaf-seed1 ...
    python -m experiments.keep                                              the table alone

A run is copied into experiments/results: RUN.json (settings, results on the test split, seconds,
memory, machine) and, with --metrics, RUN.jsonl (metrics of every step of policy optimisation). The
table has a row per task and algorithm, the mean over its runs.
"""

import argparse
import json
import shutil
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from experiments.common import RESULTS, environment, table

COLUMNS = "BLEU greedy", "BLEU sampled", "exact match %", "slots heard %", "slots, audio swapped %"


def keep(run: Path, metrics: bool):
    results = json.loads((run / "results.json").read_text())
    config = results["config"]  # without the places things lay at
    kept = {k: v for k, v in config.items() if k not in ("out", "base")}
    results["config"] = kept | {"data": Path(config["data"]).name}
    results["environment"] = environment()
    (RESULTS / f"{run.name}.json").write_text(json.dumps(results, indent=2) + "\n")
    if metrics:
        shutil.copy(run / "policy.jsonl", RESULTS / f"{run.name}.jsonl")


def show():
    groups = defaultdict(list)
    for file in sorted(RESULTS.glob("*.json")):
        result = json.loads(file.read_text())
        if "trained" not in result:  # not a run's: footprint.json
            continue
        config = result["config"]
        groups[config["data"] or config["task"], config["algo"], config["base_seed"]].append(result)
    rows = []
    for (task, algo, base), runs in sorted(groups.items()):
        rows.append([f"{task}, {algo}, base {base}", len(runs)])
        for column in COLUMNS:
            if column not in runs[0]["base"]:  # of a corpus without slots
                rows[-1].append("")
                continue
            before = mean(run["base"][column] for run in runs)
            trained = [run["trained"][column] for run in runs]
            spread = f" ± {stdev(trained):.1f}" if len(runs) > 1 else ""
            rows[-1].append(f"{before:.1f} → {mean(trained):.1f}{spread}")
    print(table(["task, algorithm, base", "runs", *COLUMNS], rows))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, help="folders of finished runs")
    parser.add_argument(
        "--metrics", action="store_true", help="keep the metrics of every step, too"
    )
    args = parser.parse_args()
    for run in args.runs:
        keep(run, args.metrics)
    show()


if __name__ == "__main__":
    main()
