"""Files whole or not at all, and folders that belong to one process and one configuration."""

import contextlib
import errno
import json
import os
from pathlib import Path

import filelock

from upkeep.errors import UserError, errors_of_reading, errors_of_writing


def is_there(path: Path) -> bool:
    """Whether there is such a file or folder; UserError where that cannot be told now."""
    nothing = contextlib.suppress(FileNotFoundError, NotADirectoryError)
    with errors_of_reading(path, "a file or folder"), nothing:
        os.stat(path)
        return True
    return False


def read_json(file) -> dict:
    """The JSON object in a file; DataError where it holds none."""
    with errors_of_reading(file, "a JSON object"):
        return json_object(Path(file).read_text(encoding="utf-8-sig"))  # a byte order mark may lead


def read_lines(path: Path) -> list[dict]:
    """The objects in a file that has one a line."""
    with errors_of_reading(path, "text"):
        lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        with errors_of_reading(f"{path}, line {number},", "a JSON object"):
            rows.append(json_object(line))
    return rows


def json_object(text) -> dict:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise TypeError(f"it holds a {type(value).__name__}")
    return value


def write_json(path: Path, value):
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())


def write_lines(path: Path, rows: list[dict]):
    """A JSON object a line; what is no JSON is written as its text."""
    lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]
    write_file(path, "".join(lines).encode())


def write_file(path: Path, content: bytes):
    """Written and synced beside its place, then renamed into it."""
    temporary = path.with_name(path.name + ".tmp")
    with errors_of_writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        sync(temporary)
        os.replace(temporary, path)


def sync(path: Path):
    """Wait until a file or folder is on the disk; for a folder, Windows and some mounts cannot."""
    is_folder = path.is_dir()
    if os.name == "nt" and is_folder:
        return
    handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if not is_folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def lock(folder: Path, wait: bool):
    """Hold a folder for this process, as a context; wait for another process, or refuse."""
    with errors_of_writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        return filelock.FileLock(folder / "lock").acquire(timeout=-1 if wait else 0)
    except filelock.Timeout:
        raise UserError(f"{folder} is in use by another process") from None
    except OSError as error:  # some mounts know no locks
        reason = f"{folder} cannot be locked ({error.strerror or error})"
        raise UserError(f"{reason}: choose another folder, on another disk") from None


# What a run or a base leaves in its folder. A log, a scheduler's output, .DS_Store are not ours.
OURS = set(
    "config.json base.json ctc.jsonl sft.jsonl policy.jsonl samples.jsonl checkpoints "
    "predictions-base.jsonl scores-base.json results.json adapter adapter-best model.safetensors".split()
)


def check_same(folder: Path, settings: dict, file: str, defaults: dict):
    """A folder belongs to one configuration, which is in `file`: where none of our files is there
    besides, it takes the settings; any other is refused unless they are the same. A setting that
    `file` does not know has its default. Raises UserError with the difference."""
    path = folder / file
    choose = "choose another folder with " + ("--base" if file == "base.json" else "--out")
    with errors_of_reading(folder, "a folder"):
        found = OURS & {entry.name for entry in folder.iterdir()}
    if found and file not in found:
        raise UserError(f"{folder} holds {min(found)} but no {file}: restore that, or {choose}")
    there = read_json(path) if found else {}
    if found <= {file} and there.keys() <= settings.keys():
        write_json(path, settings)
        return
    there = defaults | there
    different = [
        f"  {name}: {there.get(name)!r} there, {value!r} now"
        for name, value in settings.items()
        if there.get(name) != value
    ]
    if different:
        raise UserError(
            f"{folder} belongs to another configuration:\n" + "\n".join(different) + "\n"
            f"Change the flags back, {choose}, or remove this one"
        )
