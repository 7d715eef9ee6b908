"""All that only a GPU can tell, in one file: nothing here ever ran on one, so please send yours.

    python -m experiments.gpu       about half an hour; experiments/results/gpu-NAME-OF-THE-CARD.json

    tests       tests/test_device.py
    default     `python train.py`, with a CUDA graph and without: seconds, memory, BLEU, tokens/s
    bench       experiments.bench at two sizes, the last that of the 2B in the paper's setting: what
                it takes is to be held against experiments.footprint

Each part is written when it is done; the same command goes on with what is missing. What fails or
does not fit into the card's memory is noted as such.
"""

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from experiments import bench
from experiments.common import RESULTS, command_line, environment
from upkeep.files import read_json, write_json

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "gpu"


def tests() -> dict:
    command = [sys.executable, "-m", "pytest", "-q", "-rfs", "tests/test_device.py"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return {"exit code": done.returncode, "said": done.stdout.splitlines()[-30:]}


def default(*flags: str) -> dict:
    """Results of a run of train.py, and means over its steps."""
    run = RUNS / "-".join(["run", *flags])
    command = [sys.executable, "train.py", "--device", "cuda", "--out", str(run), *flags]
    subprocess.run(command, cwd=ROOT, check=True)
    results = read_json(run / "results.json")
    steps = [json.loads(line) for line in (run / "policy.jsonl").read_text().splitlines()]
    for name in ("seconds", "sampling_share", "tokens_per_second"):
        results[f"{name} of a step"] = sum(step[name] for step in steps) / len(steps)
    return results


PARTS = {
    "tests": tests,
    "default": default,
    "default without graph": partial(default, "--no-cuda-graph"),
    "bench compact": partial(bench.bench, "compact-16", "as the default run"),
    "bench 2b": partial(bench.bench, "2b", "nothing"),
}


def measure_parts(parts: dict, path: Path):
    """Add to the JSON file what it lacks of the parts."""
    result = {"environment": environment() | bench.VERSIONS}
    if path.exists():
        result = read_json(path)
    for name, measure in parts.items():
        if name in result:
            continue
        print(f"\n== {name}")
        try:
            result[name] = measure()
        except torch.OutOfMemoryError:
            result[name] = "out of memory"
        except subprocess.CalledProcessError as error:  # which has told why
            result[name] = f"exit code {error.returncode}"
        torch.cuda.empty_cache()
        write_json(path, result)


def main():
    command_line(__doc__).parse_args()
    if not torch.cuda.is_available():
        print("error: experiments.gpu measures a CUDA GPU, and PyTorch sees none", file=sys.stderr)
        sys.exit(2)
    card = re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower()
    measure_parts(PARTS, RESULTS / f"gpu-{card}.json")


if __name__ == "__main__":
    main()
