"""Who may import whom: the list of docs/architecture.md, held by reading the imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "melinoe"

# A module imports only from rooms of a lower number, or from its own package.
ROOMS = [
    ["errors", "stats", "shipped", "malloc", "host_memory", "lock", "whole_file", "schema"],
    ["cache"],
    ["config"],
    ["experts"],
    ["moe", "data", "checkpoint", "foreign"],
    ["stores"],
    ["losses", "predictor"],
    ["finetune", "engine"],
    ["generate", "adapters"],
    ["evaluate", "measure"],
    ["report", "plan", "outcome", "serve"],
    ["demo", "cli", "__main__"],
]
LEVEL = {name: level for level, names in enumerate(ROOMS) for name in names}


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Every module named in an import, at the top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
            if node.module == "melinoe":
                names.update(f"melinoe.{alias.name}" for alias in node.names)
    return names


MODULES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def test_modules_import_only_from_rooms_above_their_own():
    """No import points down the list, or sideways to a sibling room."""
    wrong = []
    for path in MODULES:
        own = room_of(path)
        assert own in LEVEL, f"{own} has no room: add it to the list and to docs/architecture.md"
        siblings = ROOMS[LEVEL[own]] if LEVEL[own] in (0, 4, len(ROOMS) - 1) else []
        for name in imports_of(path):
            first, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if first != "melinoe" or not rest:
                continue
            if other != own and LEVEL[other] >= LEVEL[own] and other not in siblings:
                wrong.append(f"{path.relative_to(SOURCE)} -> {name}")
    assert not wrong


def files_that_import_each_other(room: str) -> set[frozenset[str]]:
    """Groups of files of which each reaches all others by its imports, also inside functions."""
    files = {
        ".".join(["melinoe", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(
            ".__init__"
        ): path
        for path in MODULES
        if room_of(path) == room
    }
    reached: dict[str, set[str]] = {}
    for name, path in files.items():
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                # Of a package either files are named, or what the package itself holds.
                found |= {one if one in files else node.module for one in whole}
        reached[name] = (found & files.keys()) - {name}
    for through in files:
        for name in files:
            if through in reached[name]:
                reached[name] |= reached[through]
    return {
        frozenset({name} | {other for other in reached[name] if name in reached[other]})
        for name in files
        if name in reached[name]
    }


def test_no_files_of_a_room_import_each_other():
    """Neither at the top nor inside a function: whoever reads one file need not read the other."""
    found = {room: files_that_import_each_other(room) for room in LEVEL}
    assert not {room: groups for room, groups in found.items() if groups}


@pytest.mark.parametrize("package", ["cache", "errors", "config", "cli"])
def test_light_rooms_import_without_torch(package):
    """The decisions and the command line's help never pay for torch."""
    code = f"import sys, melinoe.{package}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_room_stands_on_the_architecture_page():
    """The page names each module or package of the source."""
    page = (SOURCE.parents[1] / "docs" / "architecture.md").read_text()
    for path in MODULES:
        assert room_of(path) in page, room_of(path)
