"""Processes, as torchrun starts them: rank r of N takes prompts r, r + N, ... of each update.

LoRA's gradients, whose mean is all that travels, are small.
"""

import contextlib
import datetime
import os

import torch
import torch.distributed as dist

from upkeep.errors import UserError


def local_rank() -> int:
    """Which of this machine's processes this is, and so which GPU is its own; alone: 0."""
    given = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    if given[:2] == ["", ""]:
        return 0
    if not all(value.isdecimal() for value in given):
        raise UserError("torchrun sets RANK, WORLD_SIZE and LOCAL_RANK: use it, or unset them")
    return int(given[2])


@contextlib.contextmanager
def joined_processes(device: torch.device):
    """A context in which this process works with those that torchrun started beside it, if it did;
    only the first one prints."""
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        yield
        return
    on_gpus = device.type == "cuda"
    # No early time-out: the others wait while the first trains a base, or evaluates.
    dist.init_process_group(
        "nccl" if on_gpus else "gloo",
        timeout=datetime.timedelta(days=1),
        device_id=device if on_gpus else None,
    )
    if rank() == 0:
        yield
    else:
        with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence):
            yield
    dist.destroy_process_group()


def wait_for_all():
    """Until every process is here."""
    if world() > 1:
        dist.barrier()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def average(tensors: list[torch.Tensor]):
    """In place, the mean over the processes. All travel as one: each journey takes its time, however
    small the tensor."""
    if world() > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= world()
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(mean.view_as(tensor))


def average_numbers(numbers: dict[str, float], device: torch.device) -> dict[str, float]:
    """The mean of each over the processes."""
    if world() == 1:
        return numbers
    values = torch.tensor(list(numbers.values()), device=device)
    average([values])
    return dict(zip(numbers, values.tolist()))
