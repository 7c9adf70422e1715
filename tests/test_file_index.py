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


def anchors(page):
    """The names that GitHub gives a page's headings."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    titles = (line.lstrip("# ").strip().lower() for line in lines if line.startswith("#"))
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


def test_every_link_leads_to_a_file_and_a_heading():
    """In README and docs, and where the code says which table decided a default."""
    found = set()
    for page in (ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in link:
                file, _, anchor = link.partition("#")
                place = (page.parent / file).resolve() if file else page
                found.add((page.name, str(place.relative_to(ROOT)), anchor))
    for file in (ROOT / "src").rglob("*.py"):
        for link in re.findall(r"docs/[\w-]+\.md[#\w-]*", file.read_text(encoding="utf-8")):
            found.add((file.name, *link.partition("#")[::2]))
    wrong = [
        one
        for one in sorted(found)
        if not (ROOT / one[1]).exists() or (one[2] and one[2] not in anchors(one[1]))
    ]
    assert not wrong and len(found) > 50
