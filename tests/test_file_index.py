"""The architecture page lists every file once, by the first line of its docstring."""

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]
INDEX = runpy.run_path(str(ROOT / "recipes" / "file_index.py"))
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_the_index_is_what_the_files_say_now():
    """After a file was added, renamed or described anew: python recipes/file_index.py."""
    assert INDEX["with_index"](PAGE) == PAGE


def test_every_file_is_entered_once():
    """Counted apart from the script: one line for each module, one for each room."""
    source = ROOT / "src" / "melinoe"
    modules = [one for one in source.rglob("*.py")]
    rooms = [one for one in modules if one.name == "__init__.py" and one.parent != source]
    listed = PAGE[PAGE.index(INDEX["BEGIN"]) : PAGE.index(INDEX["END"])]
    assert len(re.findall(r"^- `", listed, re.MULTILINE)) == len(modules) - len(rooms)
    assert len(re.findall(r"^\*\*", listed, re.MULTILINE)) == len(rooms)
