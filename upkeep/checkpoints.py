"""Checkpoints of a stage of training, whole or not at all: tensors, the optimiser's moments, the step."""

import contextlib
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from upkeep.errors import UserError, errors_of_reading, errors_of_writing
from upkeep.files import sync
from upkeep.processes import rank, world
from upkeep.tensors import is_finite


def save_checkpoint(folder: Path, step: int, named, optimizer):
    """One folder, step-NNNNNN, of tensors and moments: everything is written and synced under
    another name, then renamed once. The newest two are kept."""
    tensors = {f"value.{name}": tensor for name, tensor in named.items()}
    for name, tensor in named.items():
        for key, moment in optimizer.state.get(tensor, {}).items():
            tensors[f"{key}.{name}"] = moment
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    final = folder / f"step-{step:06d}"
    temporary = folder / f"saving-{os.getpid()}"
    for key, tensor in tensors.items():
        if not is_finite(tensor):
            reason = f"{key} has values that are not finite"
            raise UserError(f"step {step} is not saved in {folder}: {reason}")
    with errors_of_writing(temporary):
        temporary.mkdir(parents=True, exist_ok=True)  # Rescue may try a failed save again
        save_file(tensors, temporary / "tensors.safetensors")
        sync(temporary / "tensors.safetensors")
        sync(temporary)
        os.rename(temporary, final)
        for old in saved_steps(folder)[:-2]:
            shutil.rmtree(old)


def saved_steps(folder: Path) -> list[Path]:
    """The checkpoints below a folder, the newest last; what has another name is not ours."""
    found = []
    with errors_of_reading(folder, "a folder"), contextlib.suppress(FileNotFoundError):
        found = [path for path in folder.iterdir() if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def load_checkpoint(folder: Path, named, optimizer) -> int:
    """Restore the newest checkpoint; returns its step, 0 where there is none. One that cannot be
    read stops the run: nobody but the user gives up what was saved."""
    with errors_of_reading(folder, "a folder"):
        for leftover in folder.glob("saving-*"):  # a save that was killed
            shutil.rmtree(leftover, ignore_errors=True)  # another process may be faster
    saved = saved_steps(folder)
    if not saved:
        return 0
    tensors = read_checkpoint(saved[-1], named)
    with torch.no_grad():
        for name, tensor in named.items():
            tensor.copy_(tensors.pop(f"value.{name}"))
    for key, moment in tensors.items():
        kind, _, name = key.partition(".")
        # Fused AdamW keeps all of it with the parameter, the step count included.
        optimizer.state[named[name]][kind] = moment.to(named[name].device)
    return step_of(saved[-1])


def read_checkpoint(path: Path, named) -> dict[str, torch.Tensor]:
    """The tensors, which are those of `named` and no others."""
    with errors_of_reading(
        path, "a checkpoint of this run", f"to go on from the one before, remove {path}"
    ):
        tensors = load_file(path / "tensors.safetensors")
        unfit = {f"value.{name}" for name in named} - tensors.keys()
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            if name not in named or tensor.shape != (() if kind == "step" else named[name].shape):
                unfit.add(key)
            elif not is_finite(tensor):
                raise ValueError(f"{key} has values that are not finite")
        if unfit:
            raise ValueError(f"it lacks {min(unfit)}, or has it in another shape")
    return tensors


class Rescue:
    """A context around the loop of a stage, which tells where the same command goes on if the loop
    is left before its end. Where a step fails (by an exception in somebody's reward or rule, in a
    recording, for lack of memory) while the weights are still those of `done` whole steps, these
    are saved, as after a request to stop. Nothing is caught."""

    def __init__(self, folder: Path, named, optimizer, done: int):
        self.folder, self.named, self.optimizer = folder, named, optimizer
        self.done = done  # steps whose lines are written
        self.updating = False  # whether the next one may have changed the weights already

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is None or rank() > 0:
            return
        saved = max((step_of(path) for path in saved_steps(self.folder)), default=0)
        if self.done > saved and not self.updating and world() == 1:
            save_checkpoint(self.folder, self.done, self.named, self.optimizer)
            saved = self.done
        if saved:
            print(f"saved step {saved} in {self.folder}; the same command goes on from there")
