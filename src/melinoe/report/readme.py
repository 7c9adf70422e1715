"""Write the tables of a README or a page of the docs from the records, or check them."""

import re
from collections.abc import Iterable
from pathlib import Path

from melinoe.errors import DataError
from melinoe.report.records import Sources, read_records
from melinoe.report.table import Table, markdown, render
from melinoe.report.tables import benchmark_tables, main_table, model_tables, servings
from melinoe.whole_file import write_whole

OPENING = re.compile(r"<!-- report:([\w-]+) -->")


def update_readme(
    readme: Path | str, sources: Sources, check: bool = False, more: Iterable[Table] = ()
) -> list[str]:
    """
    Replace the text between ``<!-- report:NAME -->`` and ``<!-- /report:NAME -->``.

    Args:
        readme: The file that has the markers. It is written only if something changes.
        check: Return the names that are out of date, and write nothing.
        more: Tables that `melinoe report` does not make, by their own names.

    Returns:
        The names whose text was out of date, in the order of the file.

    Raises:
        DataError: the file cannot be read or written, has no marker, one that nothing closes, or a
            name that no record fills; nothing has been written.
    """
    path, found = Path(readme), read_records(sources)
    try:
        before = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise DataError(f"cannot read {path} ({reason}); name a Markdown file") from error
    tables = (*model_tables(found), *benchmark_tables(found), *more)
    texts = {table.name.replace("_", "-"): markdown(table) for table in tables}
    if configurations := servings(found):
        texts["demo"] = render([main_table(found, one) for one in configurations], "markdown")
    pieces, stale, position = [], [], 0
    while opening := OPENING.search(before, position):
        name = opening.group(1)
        line = before.count("\n", 0, opening.start()) + 1
        if name not in texts:
            known = ", ".join(sorted(texts)) or "none"
            raise DataError(
                f"{path}, line {line}: no record fills report:{name}; "
                f"give its records too, or use one of: {known}"
            )
        closing = f"<!-- /report:{name} -->"
        end = before.find(closing, opening.end())
        if end < 0:
            raise DataError(f"{path}, line {line}: report:{name} is not closed; add {closing}")
        text = f"\n{texts[name]}\n"
        if before[opening.end() : end] != text and name not in stale:
            stale.append(name)
        pieces += [before[position : opening.end()], text, closing]
        position = end + len(closing)
    if not pieces:
        raise DataError(f"{path} has no <!-- report:NAME --> marker; add one where a table belongs")
    if stale and not check:
        try:
            write_whole(path, "".join(pieces) + before[position:])
        except OSError as error:
            raise DataError(
                f"cannot write {path} ({error.strerror}); make it and its directory writable"
            ) from None
    return stale
