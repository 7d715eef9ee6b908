"""The machine: the device to run on, and the memory that was used."""

import math
import shlex
import sys

import torch

from upkeep.errors import UserError
from upkeep.processes import local_rank

try:
    import resource  # memory used, on systems that have it
except ImportError:
    resource = None


def choose_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """The device of a name, or of "auto", CUDA or the CPU; and the dtype of the policy on it. Raises
    UserError where it cannot be used."""
    number = local_rank()
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind = device
    if device == "auto":
        kind = "cuda" if has["cuda"] else "cpu"
    if not has[kind]:
        raise UserError(f"--device {device}: this torch sees no such device here")
    if kind == "mps" and torch.__version__ < (2, 13):
        raise UserError(
            f"--device mps needs torch 2.13 or newer: {torch.__version__} misreads attention masks "
            "there, and answers wrongly"
        )
    chosen = torch.device(kind)
    if kind == "cuda":
        chosen = torch.device(kind, number)  # by number, or every process would take the first
        use_card(chosen)
    if dtype == "auto":
        # A card without bfloat16 emulates it, more slowly than it computes in float32.
        has_bf16 = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if has_bf16 else "float32"
    return chosen, getattr(torch, dtype)


def use_card(device: torch.device):
    """Make a GPU the current one, and see that it runs something."""
    count = torch.cuda.device_count()
    if device.index >= count:
        raise UserError(
            f"process {device.index} of this machine has no GPU of its own: there are {count}; "
            f"start torchrun with --nproc_per_node={count}, or use --device cpu"
        )
    try:
        torch.cuda.set_device(device)
        torch.ones(1, device=device).add_(1).item()
    except RuntimeError as error:
        major, minor = torch.cuda.get_device_capability(device)
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor}) cannot run "
            f"this PyTorch {torch.__version__}: {reason}. Install a build for the card from "
            "pytorch.org, choose another card with CUDA_VISIBLE_DEVICES, or use --device cpu"
        ) from None


def peak_memory(device: torch.device) -> float:
    """Bytes: of the GPU, or of this process; nan where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if resource is None:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def quote(argument: str) -> str:
    """An argument of a command as this system's shell reads it."""
    if sys.platform == "win32":
        return '"' + argument.replace('"', '\\"') + '"'
    return shlex.quote(argument)
