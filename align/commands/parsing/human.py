"""The commands of a human evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from align.commands.parsing.arguments import LimitOption, example

human = typer.Typer(
    name="human",
    no_args_is_help=True,
    help="Compare models by human ratings: export blinded forms, import the filled ones.",
)


@human.command(
    epilog=example(
        "align human export --data prompts.jsonl --responses ours=a.jsonl --responses baseline=b.jsonl "
        "--responses old=c.jsonl --out sheet"
    )
)
def export(
    data: Annotated[str, typer.Option(help="Prompts, with `category`: a file, folder or id.", show_default=False)],
    responses: Annotated[
        list[str],
        typer.Option(help="A model's responses, as FILE or NAME=FILE. Repeat it.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="New folder for form.html, form.csv and key.json.", show_default=False)],
    limit: LimitOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of responses.")] = 0,
) -> None:
    """Write a blinded form, as a page that works offline and as CSV, and the key that names the models."""
    from align.commands.human import sheets as implementation  # noqa: PLC0415 - imports pydantic
    from align.commands.run import conclude  # noqa: PLC0415

    conclude([], implementation.export(data, responses, out, limit=limit, seed=seed))


@human.command(
    "import",
    epilog=example("align human import --key sheet/key.json --baseline baseline ratings-ann.json ratings-bob.json"),
)
def import_(
    files: Annotated[list[str], typer.Argument(help="Saved answers: .json or .csv.", show_default=False)],
    key: Annotated[Path, typer.Option(help="The key.json of the sheet.", show_default=False)],
    baseline: Annotated[str, typer.Option(help="Model that the others are compared with.", show_default=False)],
) -> None:
    """Show wins against a baseline, perceived lengths, and the agreement of annotators. The last line is JSON."""
    from align.commands.human import sheets as implementation  # noqa: PLC0415 - imports pydantic
    from align.commands.run import conclude  # noqa: PLC0415
    from align.workflow.results.human import human_tables  # noqa: PLC0415

    summary = implementation.import_ratings(key, files, baseline)
    conclude(human_tables(summary), summary)
