"""What a fork hands in, a reward or a credit rule: named, so that a run remembers whose it is, and
checked where it comes in."""

import ast
import hashlib
import inspect
import math
import textwrap
from pathlib import Path

import numpy as np
import torch

from upkeep.errors import UserError
from upkeep.files import read_json


def identity(function) -> str:
    """A function's name and a digest of its source, in which comments, layout and docstring do not
    count; the helpers and globals that it uses are not seen. Raises UserError where it is no
    function that was made by def in a file."""
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        source = ""
    if not inspect.isfunction(function) or not source.startswith(("def ", "@")):
        raise UserError(f"{function!r} must be a function, made by def in a file")
    tree = ast.parse(source).body[0]
    if ast.get_docstring(tree) is not None:
        del tree.body[0]
    digest = hashlib.sha256(ast.dump(tree).encode()).hexdigest()
    return f"{function.__qualname__} {digest[:12]}"


def those_of_the_run(folder: Path, **functions) -> dict:
    """credit=..., reward=... as given, or None where the run in a folder was trained with another:
    then a note says so, for what this one would show is not what the run saw."""
    saved = read_json(folder / "config.json")
    found = {}
    for kind, function in functions.items():
        here = identity(function)
        there = saved.get(kind, here)
        found[kind] = function if there == here else None
        if there != here:
            print(f"note: {folder} has the {kind} {there}, and here is {here}: it is left out")
    return found


def checked_reward(value, reward, answer: str, row: dict) -> float:
    """What a reward gave for an answer to a row. Raises UserError where it is no finite number."""
    try:
        is_text = isinstance(value, (str, bytes))
        number = math.nan if is_text or np.ndim(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        told = f"the reward {reward.__qualname__} gave {value!r}, no finite number"
        raise UserError(f"{told}, for the answer {answer!r} to {row['prompt']!r}")
    return number


def checked_credit(advantages, rule, tokens) -> torch.Tensor:
    """What a rule gave for responses of tokens (K, T), in float32. Raises UserError where it is no
    finite tensor (K, T): a number per response, for one, would be spread along tokens."""
    is_tensor = isinstance(advantages, torch.Tensor)
    if not is_tensor or advantages.shape != tokens.shape or not advantages.isfinite().all():
        shape = tuple(tokens.shape)
        gave = f"a tensor {tuple(advantages.shape)}" if is_tensor else f"{advantages!r:.100}"
        raise UserError(
            f"the credit rule {rule.__qualname__} must return a tensor (K, T) = {shape} of finite "
            f"numbers, and gave {gave}"
        )
    return advantages.float()
