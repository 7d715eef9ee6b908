"""Checkpoints of a stage of training, whole or not at all: tensors, the optimiser's moments, the step."""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from upkeep.errors import UserError, reading, writing
from upkeep.files import sync, write_json
from upkeep.tensors import is_finite


def save_checkpoint(folder: Path, step: int, named, optimizer, rule: str = ""):
    """One folder, step-NNNNNN, of tensors, moments and the step number: everything is written and
    synced under another name, then renamed once. The newest two are kept."""
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
    with writing(temporary):
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / "tensors.safetensors")
        write_json(temporary / "state.json", {"step": step, "credit": rule})
        sync(temporary / "tensors.safetensors")
        sync(temporary)
        os.rename(temporary, final)
        for old in saved_steps(folder)[:-2]:
            shutil.rmtree(old)


def saved_steps(folder: Path) -> list[Path]:
    """The checkpoints below a folder, the newest last; what has another name is not ours."""
    found = []
    with reading(folder, "a folder"), contextlib.suppress(FileNotFoundError):
        found = [path for path in folder.iterdir() if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def load_checkpoint(folder: Path, named, optimizer, rule: str = "") -> int:
    """Restore the newest checkpoint; returns its step, 0 where there is none. One that cannot be
    read stops the run: nobody but the user gives up what was saved."""
    with reading(folder, "a folder"):
        for leftover in folder.glob("saving-*"):  # a save that was killed
            shutil.rmtree(leftover, ignore_errors=True)  # another process may be faster
    saved = saved_steps(folder)
    if not saved:
        return 0
    saved_rule, tensors = read_checkpoint(saved[-1], named)
    if saved_rule != rule:
        raise UserError(
            f"{folder} was trained with the credit rule {saved_rule!r}, not {rule!r}: "
            "go on with that one, or choose another folder with --out"
        )
    with torch.no_grad():
        for name, tensor in named.items():
            tensor.copy_(tensors.pop(f"value.{name}"))
    for key, moment in tensors.items():
        kind, _, name = key.partition(".")
        # Fused AdamW keeps all of it with the parameter, the step count included.
        optimizer.state[named[name]][kind] = moment.to(named[name].device)
    return int(saved[-1].name.removeprefix("step-"))


def read_checkpoint(path: Path, named) -> tuple[str, dict[str, torch.Tensor]]:
    """The credit rule and the tensors, which are those of `named` and no others."""
    with reading(path, "a checkpoint of this run", f"to go on from the one before, remove {path}"):
        rule = json.loads((path / "state.json").read_bytes())["credit"]
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
    return rule, tensors
