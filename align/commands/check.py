"""`align check` and `align preview`: what is known of a recipe without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from align.stages.costs.estimates import Estimate
from align.workflow.recipe.inputs import check_inputs
from align.workflow.recipe.load import load_recipe


def check(recipe: Path, overrides: Sequence[str]) -> None:
    """Print the estimate of each step."""
    loaded, console = load_recipe(recipe, overrides), Console()
    check_inputs(loaded, recipe, overrides)
    from align.workflow.estimate import estimate  # noqa: PLC0415 - imports torch; errors in the recipe come first

    for each in estimate(loaded):
        console.print(f"[bold]{each.name}[/]  {each.stage}", highlight=False)
        for name, text in _lines(each).items():
            console.print(f"  {name:<16} {text}", highlight=False, soft_wrap=True)


def preview(recipe: Path, step: str, overrides: Sequence[str], *, rows: int) -> None:
    """Print a step's first rows as colored tokens."""
    loaded, console = load_recipe(recipe, overrides), Console()
    from align.workflow.preview import preview_rows  # noqa: PLC0415 - imports torch; errors in the recipe come first

    for text in preview_rows(loaded, loaded.expanded(step)[-1], number=rows):
        console.print(text)


def _lines(step: Estimate) -> dict[str, str]:
    from align.stages.training.rows import describe  # noqa: PLC0415 - imports torch

    at_most, training = "at most " if step.bound else "", step.training
    lines = {"rows": f"{at_most}{step.rows:,}"}
    if training is not None:
        lines["rows"] = describe(training.counts, training.format)
        lines["tokens"] = (
            f"{step.tokens:,} an epoch ({training.unshared:,} without sharing), longest row {training.longest:,}"
        )
        lines["optimizer steps"] = f"{training.optimizer_steps:,}"
        if training.memory is not None:
            lines["memory"] = training.memory.describe()
    elif step.tokens:
        lines["tokens"] = f"{at_most}{step.tokens:,}"
    if step.unknown:
        lines["FLOPs"] = f"unknown, as are time and memory: {step.unknown}"
    if step.flops and step.seconds:
        lines["FLOPs"] = f"{at_most}{step.flops:.2e}"
        lines["time"] = f"{at_most}{step.seconds / 60:.1f} minutes on this machine's CPU, estimated"
    lines["disk"] = f"{(step.disk + step.spare) / 2**30:.2f} GiB while it runs, {step.disk / 2**30:.2f} GiB after"
    if training is not None:
        lines["imbalance"] = "; ".join(
            f"{one.num_ranks} ranks: mean {one.mean:.3f}, worst {one.worst:.3f}, lower bound {one.lower_bound:.3f}"
            for one in training.balances
        )
    return lines
