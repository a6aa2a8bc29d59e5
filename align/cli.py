"""The command line: argument parsing only. Nothing heavy is imported before a command is known."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from align.commands.console.exit_status import Commands, end, exit_with
from align.commands.parsing.arguments import (
    ColumnOption,
    OnErrorOption,
    Overrides,
    RecipeArgument,
    SplitOption,
    StepOption,
    example,
    parse_columns,
    show_version,
)
from align.commands.parsing.human import human
from align.commands.parsing.models import models

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="From a base language model to an aligned one: SFT, reward model, DPO and reward-aware preference "
    "optimization (RPO).",
)


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Accept the options of every command."""


@app.command(
    epilog=example(
        "align init pairs.jsonl --policy HuggingFaceTB/SmolLM2-135M-Instruct",
        "align init chats.jsonl pairs.jsonl scored.jsonl --policy models/base --out my-recipe.yaml",
    )
)
def init(
    data: Annotated[list[str], typer.Argument(help="Rows: files, folders or dataset ids.", show_default=False)],
    policy: Annotated[str, typer.Option(help="The model to train: folder, hub id, gguf:FILE.", show_default=False)],
    out: Annotated[Path, typer.Option(help="File for the recipe.")] = Path("my-recipe.yaml"),
    lora: Annotated[bool, typer.Option("--lora/--full", help="Train adapters, or all weights.")] = True,
    column: ColumnOption = None,
    split: SplitOption = None,
    on_error: OnErrorOption = "error",
) -> None:
    """Write a commented recipe for your rows and model. The columns decide the steps: SFT, reward model, DPO, RPO."""
    from align.commands.interactive.init import init as command  # noqa: PLC0415 - imports pydantic

    given = {"split": split, "on_error": on_error, "columns": parse_columns(column or ())}
    reading = {name: value for name, value in given.items() if value not in (None, "error", {})}  # the defaults
    command(data, policy, out, lora=lora, reading=reading)


@app.command(
    epilog=example(
        "align run recipes/quickstart.yaml",
        "align run recipes/quickstart.yaml --rerun-from dpo steps.dpo.train.learning_rate=5e-5",
    )
)
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    until: Annotated[str | None, typer.Option(help="Stop after this step.", show_default=False)] = None,
    rerun_from: Annotated[
        str | None,
        typer.Option(help="Run this step and all that depend on it again, finished or not.", show_default=False),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show which steps would run, with rows, tokens, FLOPs, time and disk.")
    ] = False,
) -> None:
    """Run a recipe's steps in order. Finished steps are skipped; an interrupted step resumes."""
    from align.commands import run as command  # noqa: PLC0415 - imports torch

    command.run(recipe, overrides or (), until=until, rerun_from=rerun_from, dry_run=dry_run)


@app.command(
    epilog=example("align report runs/quickstart", "align report runs/one --compare runs/two --compare runs/three")
)
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)],
    compare: Annotated[
        list[Path] | None, typer.Option(help="Another run to show beside it; may be repeated.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File; RUN/report.html by default.", show_default=False)] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Write the tables as Markdown: RUN/report.md.")] = False,
) -> None:
    """Write a run as one HTML page: results, curves, rewards, costs, samples and rows."""
    from align.report import write_report  # noqa: PLC0415 - imports matplotlib

    print(write_report(run, out, compare=compare or (), as_markdown=markdown))


@app.command(epilog=example("align verify runs/quickstart", "align verify runs/quickstart/dpo"))
def verify(
    run: Annotated[Path, typer.Argument(help="Folder of a run or of a step.", metavar="RUN", show_default=False)],
) -> None:
    """Compare every file of a run's steps and checkpoints with its size and SHA-256 from when it was written."""
    from align.commands.verify import verify as command  # noqa: PLC0415 - imports torch

    command(run)


@app.command(
    epilog=example("accelerate launch --config_file launch/ddp-8gpu.yaml -m align train RECIPE.yaml --step sft")
)
def train(recipe: RecipeArgument, step: StepOption, overrides: Overrides = None) -> None:
    """Run one step whose inputs are finished, alone or in every process of an `accelerate launch`."""
    from align.commands import run as command  # noqa: PLC0415 - imports torch

    command.train(recipe, step, overrides or ())
    end(0)


@app.command(epilog=example("align check recipes/smollm2-135m/pipeline.yaml"))
def check(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Validate a recipe and show rows, lengths, tokens, memory, FLOPs and time of each step, without training."""
    from align.commands.check import check as command  # noqa: PLC0415 - imports torch

    command(recipe, overrides or ())


@app.command(epilog=example("align preview recipes/smollm2-135m/pairs.yaml --step dpo --rows 5"))
def preview(
    recipe: RecipeArgument,
    step: StepOption,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Number of rows to show.")] = 3,
) -> None:
    """Show how a step's sources are read, and its first rows as colored tokens: trained, shared by responses, cut."""
    from align.commands.check import preview as command  # noqa: PLC0415 - imports torch

    command(recipe, step, overrides or (), rows=rows)


app.add_typer(models)
app.add_typer(human)


@app.command(
    "test-loss", epilog=example("align test-loss my_losses:squared beta=0.1", "align test-loss rpo_bwd_kl eta=2")
)
def test_loss(
    loss: Annotated[str, typer.Argument(help="Name of a loss, or module:name of your own.", show_default=False)],
    settings: Annotated[
        list[str] | None, typer.Argument(help="Settings of the loss.", metavar="[KEY=VALUE]...")
    ] = None,
) -> None:
    """Check the properties that every preference loss needs, and that it learns on a tiny model."""
    from align.commands.test_loss import check_named_loss  # noqa: PLC0415 - imports torch

    check_named_loss(loss, settings or ())


@app.command(epilog=example("align keys", "align keys sft", "align keys learning_rate"))
def keys(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A section (recipe, policy, data, train, sampling, engine, judges, …), a stage, or a part "
            "of a key's name; default: all."
        ),
    ] = None,
) -> None:
    """List every recipe key with its type, default and meaning."""
    from align.commands.keys import show_keys  # noqa: PLC0415 - imports pydantic

    show_keys(name)


@app.command(epilog=example("align schema --json > recipe.schema.json"))
def schema(
    json: Annotated[bool, typer.Option("--json", help="Print the JSON Schema itself.")] = False,
) -> None:
    """Print the JSON Schema of a recipe, for completion and checks in an editor."""
    from align.commands.keys import show_schema  # noqa: PLC0415 - imports pydantic

    show_schema(as_json=json)


def main() -> None:
    """Run the command line."""
    # torchao, where it is installed, registers enums in a way that torch warns of on every import
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    exit_with(app)
