"""Imports point one way: a room imports rooms of the floors below its own, and none beside it."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [
    {"upkeep", "leaf"},
    {"lora", "data"},
    {"model"},
    {"corpora", "pretrain", "released"},
    {"train"},
    {"tools", "experiments"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = {}  # by the name of a module; without tests, and what a fork may have beside the rooms
for room in FLOOR:
    for file in sorted([*ROOT.glob(f"{room}.py"), *ROOT.glob(f"{room}/*.py")]):
        if not file.name.startswith("test_"):
            parts = file.relative_to(ROOT).with_suffix("").parts
            FILES[".".join(parts).removesuffix(".__init__")] = file


def imported(file) -> set[str]:
    """Modules that a file imports, at its top or later: ours by their files, others as they are."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & FILES.keys() or {node.module}
    return found


IMPORTS = {module: imported(file) for module, file in FILES.items()}


def room_of(module: str) -> str:
    return module.partition(".")[0]


def is_ours(name: str) -> bool:
    return (ROOT / name).is_dir() or (ROOT / f"{name}.py").exists()


def test_every_room_has_files():
    assert {room_of(module) for module in FILES} == FLOOR.keys()


@pytest.mark.parametrize("module", FILES)
def test_imports_point_one_way(module):
    room = room_of(module)
    ours = {name for name in map(room_of, IMPORTS[module]) if is_ours(name) and name != room}
    assert ours <= FLOOR.keys()
    assert not {name for name in ours if FLOOR[name] >= FLOOR[room]}
    if module in ("leaf", "corpora"):  # to be copied anywhere; to need no torch
        assert not ours
    if module == "model":
        assert "data" not in ours


def test_no_file_imports_itself_in_the_end():
    ours = {module: names & FILES.keys() for module, names in IMPORTS.items()}
    TopologicalSorter(ours).prepare()  # raises CycleError


def test_what_is_to_be_light_is_light():
    others = {room_of(name) for name in IMPORTS["leaf"]} - sys.stdlib_module_names
    assert others == {"torch"}
    assert "torch" not in {room_of(name) for name in IMPORTS["corpora"]}
