"""The command line: `run`, `train`, `check`, `preview`. It parses before anything heavy is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="From a base language model to an aligned one: SFT, DPO and reward-aware preference optimization (RPO).",
)

RecipeArgument = Annotated[Path, typer.Argument(help="A recipe, as YAML.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings to change: key.sub=value …", show_default=False)]
StepOption = Annotated[str, typer.Option("--step", help="The step's name in the recipe.", show_default=False)]


class Screen:
    """Progress for people: lines for what is worth saying, a bar with speed and time left for what takes long."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Progress(
            TextColumn("{task.description:>9}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[said]}"),
            console=console,
            transient=True,
        )
        self.task: TaskID | None = None

    def note(self, text: str) -> None:
        """One line above the bar."""
        self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """A new bar in place of the last."""
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task = self.bar.add_task(name, total=total, completed=done, said="")

    def advance(self, units: int, metrics: dict[str, float] | None = None) -> None:
        """Move the bar on."""
        if self.task is not None:
            self.bar.update(self.task, advance=units)
            if metrics:
                self.bar.update(self.task, said=_said(metrics))


@app.command()
def run(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Run a recipe's steps in order; finished ones are skipped, a stopped one goes on where it was."""
    from align.stages.recipe import load_recipe  # noqa: PLC0415 - imports torch: --help must not wait for it
    from align.stages.running import run_recipe  # noqa: PLC0415

    loaded = load_recipe(recipe, overrides or ())
    made = _on_screen(lambda screen: run_recipe(loaded, screen))
    console = Console()
    for table in (_training_table(made), _score_table(made)):
        if table.row_count:
            console.print(table)
    console.print(f"Written to {loaded.root}", highlight=False, soft_wrap=True)


@app.command()
def train(recipe: RecipeArgument, step: StepOption, overrides: Overrides = None) -> None:
    """Run one step whose inputs are finished; what `accelerate launch -m align train …` calls on every process."""
    from align.stages.recipe import load_recipe  # noqa: PLC0415 - imports torch
    from align.stages.running import run_step  # noqa: PLC0415

    loaded = load_recipe(recipe, overrides or ())
    _on_screen(lambda screen: run_step(loaded, step, screen))


@app.command()
def check(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Say all that can be known without training: rows, lengths, tokens, memory, arithmetic and time."""
    from align.stages.checking import check as estimates  # noqa: PLC0415 - imports torch
    from align.stages.recipe import load_recipe  # noqa: PLC0415
    from align.stages.training import describe  # noqa: PLC0415

    console = Console()
    for each in estimates(load_recipe(recipe, overrides or ())):
        console.print(f"[bold]{each.name}[/]")
        lines = {
            "rows": describe(each.counts),
            "tokens": f"{each.tokens:,} an epoch ({each.unshared:,} without sharing), longest {each.longest:,}",
            "optimizer steps": f"{each.optimizer_steps:,}",
            "memory": f"{each.memory / 2**30:.1f} GiB at the peak, estimated",
            "arithmetic": f"{each.flops:.2e} FLOPs",
            "time": f"{each.seconds / 60:.1f} minutes on this machine's CPU, estimated",
            "imbalance": f"{each.imbalance:.3f} over 8 ranks",
        }
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
    from align.config import pick  # noqa: PLC0415 - beside the imports that it follows
    from align.stages.checking import preview_rows  # noqa: PLC0415 - imports torch
    from align.stages.recipe import load_recipe  # noqa: PLC0415

    loaded = load_recipe(recipe, overrides or ())
    pick(loaded.steps, step, "step")
    console = Console()
    for text in preview_rows(loaded, step, number=rows):
        console.print(text)


def main() -> None:
    """Run the command; what is wrong ends in one line: status 2 for bad input, 1 for a failed run."""
    sys.path.append(os.getcwd())  # where a recipe's `module:name` is looked for last
    try:
        app(standalone_mode=True)
    except (ValueError, RuntimeError) as error:
        from align.config import InputError, RunError  # noqa: PLC0415 - pydantic takes as long to import as --help may

        if not isinstance(error, InputError | RunError):
            raise
        _fail(str(error), 2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        _fail("stopped; the same command goes on from the last checkpoint", 130)


def _fail(text: str, status: int) -> None:
    print(f"align: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(status)


def _on_screen(work: Callable[[Screen], Any]) -> Any:  # noqa: ANN401 - whatever the work returns
    """Do the work under a progress bar; of several processes the first alone is seen."""
    console = Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")
    screen = Screen(console)
    with screen.bar:
        return work(screen)


def _said(metrics: Mapping[str, float]) -> str:
    """A training step in a few words."""
    said = [f"loss {metrics['loss']:.4f}"]
    if "rewards/margins" in metrics:
        said += [f"margin {metrics['rewards/margins']:+.3f}", f"accuracy {metrics['rewards/accuracies']:.2f}"]
    return "  ".join([*said, f"{metrics['tokens_computed'] / metrics['seconds']:,.0f} tokens/s"])


def _training_table(made: Mapping[str, Mapping[str, Any]]) -> Table:
    title = "Training: loss of the first and the last optimizer step, then of the held-out rows"
    table = Table(title=title, box=SIMPLE)
    for name in ("step", "rows", "steps", "loss", "held-out loss", "margin", "accuracy"):
        table.add_column(name, justify="left" if name == "step" else "right", no_wrap=True)
    for step, manifest in made.items():
        if "last" in manifest:
            last = manifest["last"]
            known = ("held_out/loss", "held_out/rewards/margins", "held_out/rewards/accuracies")
            held_out = [f"{last[name]:.3f}" if name in last else "" for name in known]
            losses = f"{manifest['first']['loss']:.3f} → {last['loss']:.3f}"
            table.add_row(step, f"{manifest['rows']['trained']:,}", str(manifest["optimizer_steps"]), losses, *held_out)
    return table


def _score_table(made: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title="Held-out prompts whose greedy response passes every check", box=SIMPLE)
    for name in ("policy", "task", "pass rate", "95 % interval", "prompts"):
        table.add_column(name, justify="left" if name in ("policy", "task") else "right")
    for manifest in made.values():
        scores: Mapping[str, Any] = manifest.get("scores", {})
        for step in manifest["settings"]["policies"] if scores else ():
            for task, found in scores[step].items():
                interval = f"{found['low']:.1%} to {found['high']:.1%}"
                table.add_row(step, task, f"{found['value']:.1%}", interval, str(found["n"]))
    return table
