"""The command line. It parses before anything heavy is imported."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from align.commands.progress import TerminalProgress

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="From a base language model to an aligned one: SFT, DPO and reward-aware preference optimization (RPO).",
)

WIDE = 160  # columns of a table in a file
INTERRUPTED = 130  # the status of a command that was stopped from the keyboard
WRONG_CALL: Any = typer.BadParameter.__bases__  # click's UsageError, which newer typers have within themselves

RecipeArgument = Annotated[Path, typer.Argument(help="A recipe, as YAML.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings to change: key.sub=value …", show_default=False)]
StepOption = Annotated[str, typer.Option("--step", help="The step's name in the recipe.", show_default=False)]


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    until: Annotated[str | None, typer.Option(help="The last step to be run.", show_default=False)] = None,
    again: Annotated[
        str | None,
        typer.Option("--rerun-from", help="Run this step and what depends on it, finished or not.", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done and what it takes.")] = False,
) -> None:
    """Run a recipe's steps in order; finished ones are skipped, a stopped one goes on where it was."""
    from align.stages.checking import disk_need  # noqa: PLC0415 - imports torch: --help must not wait for it
    from align.stages.running import Command, planned, run_recipe  # noqa: PLC0415
    from align.stages.tables import plan_table, run_tables  # noqa: PLC0415

    command, console = Command(recipe, tuple(overrides or ())), wide_console()
    loaded = command.load()
    if dry_run:
        from align.stages.checking import check as estimates  # noqa: PLC0415

        _show(console, plan_table(planned(loaded, until, again), list(estimates(loaded))))
        return
    made = _on_screen(lambda screen: run_recipe(command, screen, need=disk_need(loaded), until=until, again=again))
    _show(console, run_tables(made, loaded.root))
    console.print(f"Written to {loaded.root}; report in {loaded.root / 'report.html'}", highlight=False, soft_wrap=True)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run's folder.", show_default=False)],
    compare: Annotated[Path | None, typer.Option(help="Another run, beside it.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="RUN/report.html where left out.", show_default=False)] = None,
) -> None:
    """Write a run as one page: its table, curves, rewards, costs, samples and rows."""
    from align.report import write_report  # noqa: PLC0415 - imports matplotlib

    print(write_report(run, out, compare=compare))


@app.command()
def train(recipe: RecipeArgument, step: StepOption, overrides: Overrides = None) -> None:
    """Run one step whose inputs are finished; what `accelerate launch -m align train …` calls on every process."""
    from align.stages.running import Command, run_step  # noqa: PLC0415 - imports torch

    command = Command(recipe, tuple(overrides or ()))
    _on_screen(lambda screen: run_step(command, step, screen))
    _end(0)


@app.command()
def check(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Say all that can be known without training: rows, lengths, tokens, memory, arithmetic and time."""
    from align.stages.checking import check as estimates  # noqa: PLC0415 - imports torch
    from align.stages.recipe import load_recipe  # noqa: PLC0415
    from align.stages.training import describe  # noqa: PLC0415

    console = Console()
    for each in estimates(load_recipe(recipe, overrides or ())):
        console.print(f"[bold]{each.name}[/]  {each.stage}", highlight=False)
        most, training = "at most " if each.bound else "", each.training
        lines = {"rows": f"{most}{each.rows:,}"}
        if training is not None:
            lines["rows"] = describe(training.counts, training.format)
            lines["tokens"] = (
                f"{each.tokens:,} an epoch ({training.unshared:,} without sharing), longest {training.longest:,}"
            )
            lines["optimizer steps"] = f"{training.optimizer_steps:,}"
            lines["memory"] = training.memory.told()
        elif each.tokens:
            lines["tokens"] = f"{most}{each.tokens:,}"
        if each.flops:
            lines["arithmetic"] = f"{most}{each.flops:.2e} FLOPs"
            lines["time"] = f"{most}{each.seconds / 60:.1f} minutes on this machine's CPU, estimated"
        lines["disk"] = f"{(each.disk + each.spare) / 2**30:.2f} GiB, of which {each.disk / 2**30:.2f} stay"
        if training is not None:
            lines["imbalance"] = "; ".join(
                f"{one.mean:.3f} over {one.num_ranks} ranks, at worst {one.worst:.3f}, no plan below {one.least:.3f}"
                for one in training.balances
            )
        for name, text in lines.items():
            console.print(f"  {name:<16} {text}", highlight=False, soft_wrap=True)


@app.command()
def preview(
    recipe: RecipeArgument,
    step: StepOption,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows to show.")] = 3,
) -> None:
    """Show a step's first rows as coloured tokens: what is trained, shared by responses, and cut."""
    from align.stages.previewing import preview_rows  # noqa: PLC0415 - imports torch
    from align.stages.recipe import load_recipe  # noqa: PLC0415

    loaded = load_recipe(recipe, overrides or ())
    console = Console()
    for text in preview_rows(loaded, loaded.written_as(step)[-1], number=rows):
        console.print(text)


@app.command()
def score(
    model: Annotated[str, typer.Option(help="A reward model: folder or hub id.", show_default=False)],
    data: Annotated[str, typer.Option(help="Rows with responses: file, folder or hub id.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Where the rated rows go, as .jsonl.", show_default=False)],
    limit: Annotated[int | None, typer.Option(min=1, help="Rate the first rows only.", show_default=False)] = None,
    format: Annotated[str, typer.Option(help="How the rows are read; found by their columns.")] = "auto",
    split: Annotated[str | None, typer.Option(help="Of a folder or hub id.", show_default=False)] = None,
    on_error: Annotated[str, typer.Option(help="Rows that cannot be read: error or skip.")] = "error",
) -> None:
    """Rate every response of a file by a reward model; the same command goes on where it was stopped."""
    from align.stages.scoring import score_file  # noqa: PLC0415 - imports torch
    from align.stages.tables import scored_tables  # noqa: PLC0415

    options: dict[str, Any] = {"format": format, "split": split, "limit": limit, "on_error": on_error}
    summary = _on_screen(lambda screen: score_file(model, data, out, report=screen, **options))
    _conclude(scored_tables(summary), summary)


@app.command()
def generate(
    policy: Annotated[
        list[str], typer.Option(help="Folder, hub id, gguf:FILE or a server's model.", show_default=False)
    ],
    data: Annotated[str, typer.Option(help="Prompts: file, folder, hub id or tasks:KIND.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Where the groups go, as .jsonl.", show_default=False)],
    judge: Annotated[list[str] | None, typer.Option(help="'NAME key=value …'; the first that knows judges.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first rows only.", show_default=False)] = None,
    overrides: Overrides = None,
) -> None:
    """Sample responses of policies and have them judged; the same command goes on where it was stopped."""
    from align.stages import generating  # noqa: PLC0415 - imports torch
    from align.stages.tables import generated_tables  # noqa: PLC0415

    settings = generating.settings_of(generating.GenerateSettings, judge or (), overrides or ())
    summary = _on_screen(
        lambda screen: generating.generate(policy, data, out, settings=settings, limit=limit, report=screen)
    )
    _conclude(generated_tables(summary), summary)


@app.command()
def evaluate(
    task: Annotated[str, typer.Option(help="What is graded; a wrong name is answered with all.", show_default=False)],
    data: Annotated[str | None, typer.Option(help="The task's rows: file, folder, hub id.", show_default=False)] = None,
    policy: Annotated[str | None, typer.Option(help="Folder, hub id or gguf:FILE.", show_default=False)] = None,
    responses: Annotated[list[Path] | None, typer.Option(help="Responses that are there.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="Where each verdict goes.", show_default=False)] = None,
    judge: Annotated[list[str] | None, typer.Option(help="Of a win rate: 'NAME key=value …'.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first rows only.", show_default=False)] = None,
    overrides: Overrides = None,
) -> None:
    """Grade a policy by a task, or responses that are there already; ends with one JSON line."""
    from align.stages import generating, grading  # noqa: PLC0415 - imports torch
    from align.stages.tables import evaluated_tables  # noqa: PLC0415

    settings = generating.settings_of(grading.EvaluateSettings, judge or (), overrides or ())
    asked = grading.Asked(task, data, policy, tuple(map(str, responses or ())), limit)
    summary = _on_screen(lambda screen: grading.evaluate(asked, out, settings=settings, report=screen))
    _conclude(evaluated_tables(summary), summary)


@app.command("test-loss")
def test_loss(
    loss: Annotated[str, typer.Argument(help="A loss's name, or module:name of your own.", show_default=False)],
    settings: Annotated[list[str] | None, typer.Argument(help="Its settings: key=value …", show_default=False)] = None,
) -> None:
    """Check the properties of a preference loss, for example: align test-loss mine:make beta=0.1."""
    from align.commands.test_loss import check_named_loss  # noqa: PLC0415 - imports torch

    check_named_loss(loss, settings or ())


def main() -> None:
    """Run the command; what is wrong ends in one line: status 2 for bad input, 1 for a failed run."""
    if "RANK" in os.environ:
        sys.excepthook = _unforeseen
    sys.path.append(os.getcwd())  # where a recipe's `module:name` is looked for last
    status = 0
    try:
        status = app(standalone_mode=not sys.argv[1:]) or 0  # which shows the help where nothing is given
    except WRONG_CALL as error:
        _fail(_told(error), 2)
    except (ValueError, RuntimeError) as error:
        from align.errors import InputError, RunError  # noqa: PLC0415 - pydantic takes as long to import as --help may

        if not isinstance(error, InputError | RunError):
            raise
        _fail(str(error), 2 if isinstance(error, InputError) else 1)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    if status == INTERRUPTED:  # as typer has it
        _fail("stopped; the same command goes on from the last checkpoint", status)
    if status:
        _end(status)


def _told(error: BaseException) -> str:
    """What is wrong with a call, and where to read of what would be right."""
    wrong: Any = error
    said = str(wrong.format_message()).rstrip(".")
    return said if wrong.ctx is None else f"{said}; see {wrong.ctx.command_path} --help"


def _fail(text: str, status: int) -> None:
    sys.stderr.write(f"align: {' '.join(text.split())}\n")  # at once: two processes may end together
    _end(status)


def _end(status: int) -> NoReturn:
    """End the process, and one of several at once: what tears torch down may wait for others, or abort."""
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _unforeseen(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show where an error that nobody expected came from, and end."""
    sys.__excepthook__(kind, error, trace)
    _end(1)


def _on_screen(work: Callable[[TerminalProgress], Any]) -> Any:  # noqa: ANN401 - whatever the work returns
    """Do the work under a progress bar; of several processes the first alone is seen."""
    console = Console(stderr=True, quiet=not _is_first())
    with TerminalProgress(console) as screen:
        return work(screen)


def _is_first() -> bool:
    """Whether this is the only process, or the first of a launch."""
    return os.environ.get("RANK", "0") == "0"


def _conclude(tables: Iterable[Table], summary: object) -> None:
    """End with the tables for people, and the summary as a line of JSON for programs; of several processes once."""
    if _is_first():
        _show(Console(stderr=True), tables)
        print(json.dumps(summary))


def wide_console() -> Console:
    """Where tables go: as wide as the terminal, and outside of one wide enough for each of them."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDE)


def _show(console: Console, tables: Iterable[Table]) -> None:
    for table in tables:
        if table.row_count:
            console.print(table)
