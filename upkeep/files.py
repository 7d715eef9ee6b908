"""Files whole or not at all, and folders that belong to one process and one configuration."""

import json
import os
from pathlib import Path

import filelock

from upkeep.errors import UserError, reading, writing


def read_json(file) -> dict:
    """The JSON object in a file; DataError where there is none."""
    with reading(file, "a JSON object"):
        value = json.loads(Path(file).read_text(encoding="utf-8-sig"))  # a byte order mark may lead
        if not isinstance(value, dict):
            raise TypeError(f"it holds a {type(value).__name__}")
        return value


def read_lines(path: Path) -> list[dict]:
    """The objects in a file that has one a line."""
    with reading(path, "JSON, a line a row"):
        return [json.loads(line) for line in path.read_bytes().splitlines()]


def write_json(path: Path, value):
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())


def write_file(path: Path, content: bytes):
    """Written and synced beside its place, then renamed into it."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        sync(temporary)
        os.replace(temporary, path)


def sync(path: Path):
    """Wait until a file or folder is on the disk; Windows has no such call for a folder."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    os.fsync(handle)
    os.close(handle)


def lock(folder: Path, wait: bool):
    """Hold a folder for this process, as a context; wait for another process, or refuse."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return filelock.FileLock(folder / "lock").acquire(timeout=-1 if wait else 0)
        except filelock.Timeout:
            raise UserError(f"{folder} is in use by another process") from None


def check_same(folder: Path, settings: dict, file: str):
    """A folder belongs to one configuration, which is in `file`: a new folder takes the settings,
    any other is refused unless they are the same. Raises UserError with the difference."""
    path = folder / file
    before_training = {file, "lock", "tokenizer.model"}
    before_training |= {name + ".tmp" for name in before_training}  # of a write that was killed
    if {entry.name for entry in folder.iterdir()} <= before_training:
        write_json(path, settings)
        return
    there = read_json(path)
    different = [
        f"  {name}: {there.get(name)!r} there, {value!r} now"
        for name, value in settings.items()
        if there.get(name) != value
    ]
    if different:
        choose = "--base" if file == "base.json" else "--out"
        raise UserError(
            f"{folder} belongs to another configuration:\n" + "\n".join(different) + "\n"
            f"Change the flags back, choose another folder with {choose}, or remove this one"
        )
