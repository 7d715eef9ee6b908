"""Tensors in safetensors files, and their names.

Our modules, like released Granite Speech files, say language_model.model.layers; transformers 5 says
model.language_model.layers, and PEFT's files put base_model.model. before it.
"""

import re
from pathlib import Path

import torch
from safetensors import safe_open

from upkeep.errors import DataError, errors_of_reading


def our_name(name: str) -> str:
    """The name of a tensor or module, in any of these ways, as our modules have it.

    base_model.model.model.language_model.layers.0.x -> language_model.model.layers.0.x
    lm_head.weight                                   -> language_model.lm_head.weight
    """
    name = name.removeprefix("base_model.model.").removeprefix("model.")
    if name.removeprefix("language_model.").startswith("lm_head"):
        return "language_model." + name.removeprefix("language_model.")
    return re.sub(r"^language_model\.(model\.)*", "language_model.model.", name)


def transformers_name(name: str) -> str:
    """The name of one of our modules in transformers 5."""
    name = "model." + name.replace("language_model.model.", "language_model.")
    return name.replace("model.language_model.lm_head", "lm_head")


def read_tensors(
    files: list[Path], shapes: dict[str, tuple], device="cpu", dtype=None
) -> dict[str, torch.Tensor]:
    """The tensors of safetensors files under our names, one by one to the device and in dtype.

    shapes: every name that is wanted, and its shape; dtype None: as stored. Raises DataError with
    a list of what is unknown, missing, of another shape, no plain floating point, or not finite.
    """
    found = {}
    problems = []
    for file in files:
        with errors_of_reading(file, "safetensors"):
            tensors = safe_open(file, framework="pt", device=str(device))
            for key in tensors.keys():
                name = our_name(key)
                shape = tuple(tensors.get_slice(key).get_shape())
                if name not in shapes:
                    problems.append(f"unknown {key}")
                    continue
                found[name] = None  # listed once, and not as missing, too
                if shape != tuple(shapes[name]):
                    problems.append(f"{key} is {shape}, not {tuple(shapes[name])}")
                    continue
                tensor = tensors.get_tensor(key)
                if name.endswith("num_batches_tracked"):
                    found[name] = tensor.clone()  # or it would keep the whole file mapped
                elif tensor.dtype not in WEIGHTS:
                    problems.append(f"{key} is {tensor.dtype}, no plain float")
                elif not is_finite(tensor):
                    problems.append(f"{key} is not finite")
                else:
                    found[name] = tensor.to(dtype or tensor.dtype)
            del tensors
    for name in shapes.keys() - found.keys():
        if name.endswith("num_batches_tracked"):  # no weight, and some files lack it
            found[name] = torch.zeros(shapes[name], dtype=torch.int64, device=device)
        else:
            problems.append(f"missing {name}")
    if problems:
        listed = "".join(f"\n  {problem}" for problem in sorted(problems)[:10])
        if len(problems) > 10:
            listed += "\n  ..."
        unfit = f"does not fit the model or its config.json, {len(problems)} problems"
        raise DataError(f"{files[0]} {unfit}:{listed}")
    return found


# Integers and 8-bit floats are somebody's quantisation.
WEIGHTS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def is_finite(tensor) -> bool:
    """Without a copy of it: nan and infinity show in the least or the greatest value."""
    return bool(torch.stack(tensor.aminmax()).isfinite().all())
