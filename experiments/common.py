"""What the experiments share: where results lie, what made them, intervals, tables."""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def command_line(doc: str) -> argparse.ArgumentParser:
    """A parser whose --help begins with a script's docstring."""
    name = Path(sys.argv[0]).stem
    layout = argparse.RawDescriptionHelpFormatter
    prog = f"python -m experiments.{name}"
    return argparse.ArgumentParser(prog=prog, description=doc, formatter_class=layout)


def processor() -> str:
    """The processor's name, as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.processor()


def environment() -> dict:
    """What computed here: machine, threads and versions, that of this repository too."""
    git = ["git", "-C", str(RESULTS), "describe", "--always", "--dirty", "--exclude=*"]
    code = None
    if shutil.which("git"):
        code = subprocess.run(git, stdout=subprocess.PIPE, text=True).stdout.strip()
    return {
        "processor": processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "code": code,
    }


# 97.5% quantiles of Student's t, from 1 degree of freedom
T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def student(freedom: int) -> float:
    return T[freedom - 1] if freedom <= len(T) else 1.96


def interval(clusters: dict[int, list[float]]) -> tuple[float, float]:
    """Mean of the clusters' means and half the width of its 95% interval.

    Runs of one base are not independent of each other, so the interval is over the means of the
    bases; or over seeds within bases where that is wider, for few means can agree by luck.
    """
    values = [x for of_base in clusters.values() for x in of_base]
    means = [statistics.fmean(of_base) for of_base in clusters.values()]
    n = len(means)
    halves = []
    if n > 1:
        halves.append(student(n - 1) * statistics.stdev(means) / n**0.5)
    freedom = len(values) - n
    if freedom:
        square = sum((x - mean) ** 2 for mean, of in zip(means, clusters.values()) for x in of)
        halves.append(student(freedom) * (square / freedom / len(values)) ** 0.5)
    return statistics.fmean(means), max(halves, default=float("inf"))


def rounded(found):
    """What is to be kept as JSON, its numbers to five decimals."""
    return json.loads(json.dumps(found), parse_float=lambda x: round(float(x), 5))


def table(header: list[str], rows: list[list]) -> str:
    rows = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(str, row)) + " |\n" for row in rows)
