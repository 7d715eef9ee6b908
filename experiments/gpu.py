"""All that only a GPU can tell, in one file: nothing here ever ran on one, so please send yours.

    python -m experiments.gpu       about half an hour; experiments/results/gpu-NAME-OF-THE-CARD.json

    tests       test_leaf.py, its section for the device included
    default     `python train.py`, with a CUDA graph and without: seconds, memory, BLEU, tokens/s
    bench       experiments.bench at three sizes, the last of 2 billion random parameters (bfloat16,
                24 GB): against transformers + PEFT, the update against a matrix product, decoding
                against copying memory
    graph       what one capture costs and each replayed token saves, at two of them
    footprint   measured memory and seconds of a paper's step at the size of the released models

Each part is written when it is done; the same command goes on with what is missing. What does not
fit into the card's memory is noted as such.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

from experiments import bench, footprint
from experiments.keep import RESULTS

ROOT = Path(__file__).parent.parent


def tests(device: str, folder: Path) -> dict:
    command = [sys.executable, "-m", "pytest", "-q", "-rfs", "test_leaf.py"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return {"exit code": done.returncode, "said": done.stdout.splitlines()[-30:]}


def default(device: str, folder: Path, *flags: str) -> dict:
    run = folder / "-".join(["run", *flags])
    command = [sys.executable, "train.py", "--device", device, "--out", str(run), *flags]
    subprocess.run(command, cwd=ROOT, check=True)
    results = json.loads((run / "results.json").read_text())
    steps = [json.loads(line) for line in (run / "policy.jsonl").read_text().splitlines()]
    for name in ("seconds", "sampling_share", "credit_share", "tokens_per_second"):
        results[f"{name} of a step"] = sum(step[name] for step in steps) / len(steps)
    results["first_ratio_gap"] = max(step["first_ratio_gap"] for step in steps)
    return results


def without_graph(device: str, folder: Path) -> dict:
    return default(device, folder, "--no-cuda-graph")


def against_peers(shape: str):
    def measure(device: str, folder: Path) -> dict:
        dtype = "bfloat16" if device == "cuda" else "float32"
        base = folder / "base-qa-seed0"  # the default run's
        args = SimpleNamespace(base=base, device=device, dtype=dtype, repeats=5, threads=1)
        return bench.bench(shape, args)

    return measure


def graph(shape: str):
    def measure(device: str, folder: Path) -> dict:
        work = bench.WORKLOADS[shape]
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        with tempfile.TemporaryDirectory() as case:
            bench.prepare(shape, work, Path(case), None, device, dtype)
            ours = bench.Ours(Path(case), device, dtype)
        ours.hear()
        seconds = {}
        for tokens in (8, work.tokens):
            noise = torch.rand(ours.P, ours.K, tokens, device=device)
            for ours.model.cuda_graph in (True, False):
                name = "graph" if ours.model.cuda_graph else "eager"
                took = bench.clocked(lambda u=noise: ours.model.sample(ours.prompts, u, -1), device)
                seconds[f"{tokens} tokens, {name}"] = took
        return seconds

    return measure


def measured_footprint(shape: str):
    def measure(device: str, folder: Path) -> dict:
        config = footprint.SHAPES[shape]
        return footprint.measure(config, device, footprint.AUDIO, footprint.TOKENS)

    return measure


PARTS = {"tests": tests, "default": default, "default without graph": without_graph}
PARTS |= {f"bench {shape}": against_peers(shape) for shape in ("compact", "default", "2b")}
PARTS |= {f"graph {shape}": graph(shape) for shape in ("compact", "2b")}
PARTS |= {f"footprint {shape}": measured_footprint(shape) for shape in footprint.SHAPES}


def measure_parts(parts: dict, device: str, runs: Path, path: Path):
    """Add to the JSON file what it lacks of the parts; runs: a folder for what is trained."""
    result = json.loads(path.read_text()) if path.exists() else {"machine": machine(device)}
    for name, measure in parts.items():
        if name in result:
            continue
        print(f"\n== {name}")
        try:
            result[name] = measure(device, runs)
        except torch.OutOfMemoryError:
            result[name] = "out of memory"
        if device == "cuda":
            torch.cuda.empty_cache()
        path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{path}")


def machine(device: str) -> dict:
    told = {"python": platform.python_version(), "torch": torch.__version__}
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        told |= {
            "gpu": card.name,
            "capability": f"{card.major}.{card.minor}",
            "memory_gb": card.total_memory / 1e9,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return told


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: experiments.gpu measures a CUDA GPU, and PyTorch sees none here")
    card = re.sub(r"\W+", "-", torch.cuda.get_device_name(0)).lower()
    measure_parts(PARTS, "cuda", ROOT / "runs" / "gpu", RESULTS / f"gpu-{card}.json")


if __name__ == "__main__":
    main()
