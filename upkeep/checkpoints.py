"""Checkpoints of a stage of training, whole or not at all: tensors, the optimiser's moments, the step."""

import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from upkeep.errors import DataError, UserError, reading, writing
from upkeep.files import read_json, sync, write_json
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
    refuse_unless_finite(tensors, f"step {step} is not saved in {folder}")
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
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def load_checkpoint(folder: Path, named, optimizer, rule: str = "") -> int:
    """Restore the newest checkpoint that is whole; returns its step, 0 where there is none."""
    for leftover in folder.glob("saving-*"):  # a save that was killed
        shutil.rmtree(leftover, ignore_errors=True)  # another process may be faster
    for path in reversed(saved_steps(folder)):
        try:
            saved_rule, tensors = read_checkpoint(path, named)
        except DataError as error:
            print(f"note: a checkpoint is damaged and left out: {error}")
            shutil.rmtree(path, ignore_errors=True)  # its step will be saved again
            continue
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
        return int(path.name.removeprefix("step-"))
    return 0


def read_checkpoint(path: Path, named) -> tuple[str, dict[str, torch.Tensor]]:
    """The credit rule and the tensors; DataError where it is not whole."""
    state = read_json(path / "state.json")
    file = path / "tensors.safetensors"
    with reading(file, "safetensors"):
        tensors = load_file(file)
    missing = {f"value.{name}" for name in named} - tensors.keys()
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        if name not in named or tensor.shape != (() if kind == "step" else named[name].shape):
            missing.add(key)
    if missing:
        raise DataError(f"{file} lacks {min(missing)}, or has it in another shape")
    refuse_unless_finite(tensors, f"{file} is not used")
    if "credit" not in state:
        raise DataError(f"{path / 'state.json'} names no credit rule")
    return state["credit"], tensors


def refuse_unless_finite(tensors: dict[str, torch.Tensor], what: str):
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise DataError(f"{what}: {name} has values that are not finite")
