"""Arguments and options that several commands have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from align.errors import InputError

RecipeArgument = Annotated[Path, typer.Argument(help="A recipe: a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings that replace those of the recipe.", metavar="[KEY.SUB=VALUE]...")
]
Settings = Annotated[list[str] | None, typer.Argument(help="Further settings.", metavar="[KEY.SUB=VALUE]...")]
StepOption = Annotated[str, typer.Option("--step", help="Name of a step of the recipe.", show_default=False)]
DataOption = Annotated[
    str, typer.Option(help="Rows: a file, a folder or a Hugging Face dataset id.", show_default=False)
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Read this many rows only.", show_default=False)]
SplitOption = Annotated[str | None, typer.Option("--split", help="Split of a folder or dataset.", show_default=False)]
OnErrorOption = Annotated[str, typer.Option("--on-error", help="Rows that cannot be read: error or skip.")]
ColumnOption = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        help="A column with another name than the format's, as prompt=question or prompt=chat.0.content. Repeat it.",
        metavar="NAME=COLUMN",
    ),
]
JudgeOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Judge, as 'NAME key=value ...'; may be repeated. The first that does not abstain scores a prompt."
    ),
]


def parse_columns(options: Sequence[str]) -> dict[str, str]:
    """Return the columns that options `NAME=COLUMN` rename: name of the format -> column of the file."""
    found: dict[str, str] = {}
    for option in options:
        name, _, column = option.partition("=")
        if not name or not column:
            raise InputError(f"--column {option!r} is not of the form NAME=COLUMN, as in --column prompt=question")
        if name in found:
            raise InputError(f"--column {option!r}: {name} is {found[name]!r} already; name one column")
        found[name] = column
    return found


def example(*lines: str) -> str:
    """Return the epilog of a command's help."""
    return "\n\n".join(["[bold]Example[/]", *(f"[cyan]{line}[/]" for line in lines)])


def show_version(is_asked: bool) -> None:
    """Print the version of the package and exit, where that is asked for."""
    if is_asked:
        from align import __version__  # noqa: PLC0415 - looks up the installed package

        print(f"align {__version__}")
        raise typer.Exit
