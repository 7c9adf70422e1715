"""
Write the index of files in docs/architecture.md: each file once, by its docstring's first line.

    python recipes/file_index.py            # write it
    python recipes/file_index.py --check    # write nothing, fail if it is out of date
"""

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "melinoe"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- files -->", "<!-- /files -->"


def first_line(path: Path) -> str:
    """Give the first paragraph of a file's docstring, in one line."""
    said = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
    if not said:
        raise SystemExit(f"{path} has no docstring; say in its first line what the file does")
    return " ".join(said.split())


def index() -> str:
    """List the files at the top, then those of each room and of the rooms within it."""
    lines = _listed(SOURCE, [one for one in sorted(SOURCE.glob("*.py"))])
    for room in sorted({one.parent for one in SOURCE.rglob("__init__.py")} - {SOURCE}):
        name = room.relative_to(SOURCE).as_posix()
        files = [one for one in sorted(room.glob("*.py")) if one.name != "__init__.py"]
        lines += ["", f"**{name}/** {first_line(room / '__init__.py')}", "", *_listed(room, files)]
    return "\n".join(lines)


def _listed(room: Path, files: list[Path]) -> list[str]:
    return [f"- `{one.relative_to(room).as_posix()}`: {first_line(one)}" for one in files]


def with_index(page: str) -> str:
    """Give the page with its index written anew."""
    before, _, rest = page.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{PAGE} has no {BEGIN} ... {END}; put the two marks where the index goes")
    return f"{before}{BEGIN}\n{index()}\n{END}{after}"


def main() -> None:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    page = PAGE.read_text(encoding="utf-8")
    new = with_index(page)
    if check and new != page:
        sys.exit("docs/architecture.md is out of date; run python recipes/file_index.py")
    if not check:
        PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
