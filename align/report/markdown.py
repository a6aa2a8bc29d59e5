"""Write the tables of a page as Markdown, for pull requests, model cards and notes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from align.report.tables import Cell, Table


def markdown(title: str, about: Iterable[str], tables: Iterable[tuple[str, Table]]) -> str:
    """Return a document with one heading per table; the smaller lines of a cell follow its value in brackets."""
    parts = [f"# {_escaped(title)}", *map(_escaped, about)]
    for heading, table in tables:
        parts += [f"## {_escaped(heading)}", "\n".join(_lines(table))]
    return "\n\n".join(parts) + "\n"


def _lines(table: Table) -> Iterator[str]:
    columns = len(table.columns)
    yield _row(_escaped(name) for name in table.columns)
    yield _row(["---"] + ["---" if table.is_text else "---:"] * (columns - 1))
    for row in table.rows:
        yield _row(map(_cell, row))


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: Cell) -> str:
    below = ", ".join(_escaped(text) for text, _ in cell.below if text)
    return " ".join(part for part in (_escaped(cell.text), f"({below})" if below else "") if part)


def _escaped(text: str) -> str:
    """Return a text in one line, with the characters escaped that Markdown or HTML would interpret."""
    for character in "\\`*_[]<>|#$~":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())
