"""All that only a GPU can tell, in one file: nothing here ever ran on one, so please send yours.

    python -m experiments.gpu             all parts, in experiments/results/gpu-NAME-OF-THE-CARD.json
    python -m experiments.gpu --part 2b   only this part, again

    tests                  tests/test_device.py
    default                `python train.py`: seconds, memory, BLEU, tokens/s
    default without graph  the same without a CUDA graph
    compact                experiments.bench at the size of the default run: three sides, proved
    2b                     ours at the size of the 2B in the paper's setting: steps with a CUDA graph
                           and without, what a graph costs and gains, kernels, waits, memory
    2b tuned, 2b official  the other sides of experiments.bench there, each alone
    footprint              a step as experiments.footprint computed it: its memory, measured

Each part is a process of its own, should take less than ten minutes on an H200, and is written as it
ends; the same command goes on with what is missing. What fails or does not fit into the card's
memory is noted as such. runs/gpu holds what parts share, 7 GB for the 2B; then it may go.
"""

import json
import re
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from functools import partial
from pathlib import Path
from statistics import median

import torch

from experiments import bench, footprint
from experiments.common import RESULTS, command_line, environment, table
from lora import lora_for_sampling
from model import Sampling
from upkeep.errors import UserError, command
from upkeep.files import read_json, write_json

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "gpu"


def tests() -> dict:
    pytest = [sys.executable, "-m", "pytest", "-q", "-rfs", "tests/test_device.py"]
    done = subprocess.run(pytest, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    return {"exit code": done.returncode, "said": done.stdout.splitlines()[-30:]}


def default(*flags: str) -> dict:
    """Results of a run of train.py, and means over its steps."""
    run = RUNS / "-".join(["run", *flags])
    training = [sys.executable, "train.py", "--device", "cuda", "--out", str(run), *flags]
    subprocess.run(training, cwd=ROOT, check=True)
    results = read_json(run / "results.json")
    steps = [json.loads(line) for line in (run / "policy.jsonl").read_text().splitlines()]
    for name in ("seconds", "sampling_share", "tokens_per_second"):
        results[f"{name} of a step"] = sum(step[name] for step in steps) / len(steps)
    return results


def load(shape: str, name: str) -> bench.Side:
    """One side alone, of a base that all sides share, and that the first who asks makes."""
    folder = RUNS / shape
    if not folder.exists():
        unfinished = RUNS / f"{shape}-unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        bench.prepare(shape, bench.WORKLOADS[shape], bench.SHARING["nothing"], unfinished)
        torch.cuda.empty_cache()
        unfinished.rename(folder)
    return bench.load_side(name, folder)


def steps(side: bench.Side, limit=120) -> dict:
    """Medians of what five steps took, or as many as began within the limit of seconds, after one
    to warm up; and GB at most."""
    torch.cuda.reset_peak_memory_stats()
    side.step()
    began = time.monotonic()
    done = [side.step()]
    while len(done) < 5 and time.monotonic() - began < limit:
        done.append(side.step())
    return {
        "steps": len(done),
        "seconds": {part: median(step[part] for step in done) for part in done[0]},
        "allocated_gb": torch.cuda.max_memory_allocated() / 1e9,
        "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
    }


def ours(shape: str) -> dict:
    side = load(shape, "ours")
    found = {what: x.float().cpu() for what, x in bench.outputs(side).items()}
    torch.save(found, RUNS / f"{shape}-ours.pt")
    result = {}
    for graph in (True, False):
        side.model.cuda_graph = graph
        result["with graph" if graph else "without"] = steps(side)
    result |= a_token(side)
    show_beside_expected(result, side)
    return result


def a_token(side: bench.Side, replays=20) -> dict:
    """One more token for all responses, by itself, in a cache of full length."""
    noise = torch.rand(side.case.tokens.shape, device=side.device)
    with torch.no_grad(), lora_for_sampling(side.model):
        state = Sampling(side.model, side.prompts, noise, -1, 1.0, 0.9)
        state.first_token(side.prompts)
        end = state.L + side.T
        state.next_token(end)  # warms up
        clock = [side.now()]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            state.next_token(end)
        clock.append(side.now())
        for _ in range(replays):
            graph.replay()
        clock.append(side.now())
        torch.cuda.set_sync_debug_mode("warn")  # which warns of itself
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            state.next_token(end)
        torch.cuda.set_sync_debug_mode("default")
        with torch.profiler.profile() as profile:
            state.next_token(end)
            side.now()
    kinds = [x for x in profile.key_averages() if x.device_type.name.lower() == side.device.type]
    kinds.sort(key=lambda kind: -kind.self_device_time_total)
    return {
        "capture": clock[1] - clock[0],
        "replay": (clock[2] - clock[1]) / replays,
        "waits": [str(wait.message) for wait in waits],
        "kernels": sum(kind.count for kind in kinds),
        "microseconds of kernels": {x.key: x.self_device_time_total for x in kinds[:15]},
    }


def show_beside_expected(found: dict, side: bench.Side):
    """Expected: reckoned for the 2B on an H200, from its bandwidth, 2 microseconds a kernel and
    half of its arithmetic, before anything ran on one."""
    sampled = side.P * side.K * side.T
    graph, eager = (found[name]["seconds"] for name in ("with graph", "without"))
    rows = [
        ["ms a token, with a CUDA graph", 1e3 * graph["sampling"] / side.T, "5-7"],
        ["ms a token, without", 1e3 * eager["sampling"] / side.T, "12-18"],
        ["tokens/s sampled, with a CUDA graph", sampled / graph["sampling"], "7,000-9,500"],
        ["s a step, with a CUDA graph", graph["step"], "1.6-2.2"],
        ["ms of a capture", 1e3 * found["capture"], "50-100"],
        ["ms of a replay", 1e3 * found["replay"], "5-7"],
        ["kernels a token", found["kernels"], "2,100"],
        ["waits for the device a token", len(found["waits"]), "0"],
        ["GB allocated", found["with graph"]["allocated_gb"], "see experiments.footprint"],
    ]
    rows = [[name, f"{value:.4g}", expected] for name, value, expected in rows]
    print(table(["ours", "measured", "expected of the 2B on an H200"], rows))
    kernels = found["microseconds of kernels"].items()
    print(table(["kernels of a token", "µs"], [[name[:60], f"{us:.0f}"] for name, us in kernels]))


def peer(name: str, shape: str) -> dict:
    """Another side, and how far it is from ours, if that was measured."""
    side = load(shape, name)
    result = {}
    kept = RUNS / f"{shape}-ours.pt"
    if kept.exists():
        found = {what: x.float().cpu() for what, x in bench.outputs(side).items()}
        result["from ours"] = bench.gaps(found, torch.load(kept))
    result |= steps(side)
    print(f"{name}: {result}")
    return result


def memory(work=bench.WORKLOADS["2b"]) -> dict:
    """Measured on this card, beside what was computed without one."""
    name = "granite-speech-3.3-2b" + ", float32" * (bench.DTYPE == torch.float32)
    computed = read_json(RESULTS / "footprint.json")["models"][name]
    with bench.DEVICE:
        model = footprint.make_model(*footprint.MODELS[name])
        measured = footprint.a_step(model, footprint.Card(), work)
    rows = [[what, f"{gb:.1f}", f"{computed[what]:.1f}"] for what, gb in measured.items()]
    print(table([name, "measured", "computed"], rows))
    return {"measured": measured, "computed": computed}


PARTS = {
    "tests": tests,
    "default": default,
    "default without graph": partial(default, "--no-cuda-graph"),
    "compact": partial(bench.bench, "compact-16", "as the default run"),
    "2b": partial(ours, "2b"),
    "2b tuned": partial(peer, "tuned", "2b"),
    "2b official": partial(peer, "official", "2b"),
    "footprint": memory,
}


def attempt(measure):
    """What it finds, or in a line why it finds nothing."""
    try:
        return measure()
    except subprocess.CalledProcessError as error:  # which has told why
        return f"exit code {error.returncode}"
    except (RuntimeError, UserError) as error:
        traceback.print_exc()
        cause = error
        while cause:  # the capture of a graph ends with an error of its own on top
            if isinstance(cause, torch.OutOfMemoryError):
                return "out of memory"
            cause = cause.__context__
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def keep(path: Path, name: str, found):
    result = {"environment": environment() | bench.VERSIONS}
    if path.exists():
        result = read_json(path)
    write_json(path, result | {name: found})


def main(argv=None):
    parser = command_line(__doc__)
    parser.add_argument("--part", choices=PARTS, help="only this one, again")
    part = parser.parse_args(argv).part
    if not torch.cuda.is_available():
        raise UserError("experiments.gpu measures a CUDA GPU, and PyTorch sees none")
    card = re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower()
    path = RESULTS / f"gpu-{card}.json"
    if part:
        keep(path, part, attempt(PARTS[part]))
        return
    for name in PARTS:
        if path.exists() and name in read_json(path):
            continue
        print(f"\n== {name}", flush=True)
        this_part = [sys.executable, "-m", "experiments.gpu", "--part", name]
        code = subprocess.run(this_part, cwd=ROOT).returncode
        if code:  # killed, for one
            keep(path, name, f"exit code {code}")


if __name__ == "__main__":
    command(main)
