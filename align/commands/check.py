"""`align check` and `align preview`: estimates and first rows of a recipe, without training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from align.commands.progress import duration_text
from align.inference.managed.kinds import KINDS
from align.inference.managed.version import engine_version
from align.stages.base import UsedEngine
from align.stages.costs.estimates import Estimate
from align.workflow.launcher import Command
from align.workflow.recipe.inputs import check_inputs
from align.workflow.recipe.schema import Recipe
from align.workflow.search.calls import assumed
from align.workflow.search.results import search_lines

if TYPE_CHECKING:
    from align.workflow.prediction import Interval, Prediction


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"  # noqa: PLR2004 - where .3g has an exponent


def _gib(value: float) -> str:
    return _number(value / 2**30)


NAMED = 3  # steps at most that a total lists by name
SHOWN_DISK = 0.1 * 2**30  # bytes
TOTALS = {  # resource -> its name, its unit, and a value as text
    "seconds": ("time", "", duration_text),
    "energy_wh": ("energy", "Wh", _number),
    "money": ("money", "", _number),
    "peak_memory_bytes": ("peak memory", "GiB in a process", _gib),
    "wire_bytes": ("network", "GiB sent by each device", _gib),
}


def check(path: Path, overrides: Sequence[str]) -> None:
    """Print test items found among the training rows, the estimate of each step, and that of the whole recipe."""
    command = Command(path, tuple(overrides))
    console = Console()
    check_inputs(command.loaded, path, overrides)
    from align.workflow.recipe.overlap import overlap_warnings  # noqa: PLC0415 - imports numpy

    with command.located():
        for line in overlap_warnings(command.loaded):
            console.print(f"[yellow]warning:[/] {escape(line)}", highlight=False, soft_wrap=True)
    from align.workflow.estimate import estimate  # noqa: PLC0415 - imports torch; errors in the recipe come first
    from align.workflow.prediction import earlier_ledgers, predict  # noqa: PLC0415 - imports torch
    from align.workflow.spending import check_budget, energy_meter  # noqa: PLC0415 - imports torch

    plan, notes = assumed(command)
    recipe = plan.loaded
    earlier = earlier_ledgers(Path(recipe.runs))
    estimates: list[Estimate] = []
    predictions: list[Prediction] = []
    with command.located():
        if recipe.budget.model_fields_set:
            with energy_meter(recipe) as energy:
                check_budget(recipe, energy)
        for each in estimate(recipe):
            estimates.append(each)
            predictions.append(predict(recipe, each, earlier.get(each.stage, [])))
            used = _lines(each, predictions[-1])
            _show(console, each.name, each.stage, [*_engine_lines(recipe.steps[each.name].engines()), *used.items()])
    for name in recipe.search:
        _show(console, f"search of {name}", "", search_lines(recipe, name))
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)
    _show(console, "whole recipe", "", total_lines(recipe, estimates, predictions))


def _show(console: Console, name: str, stage: str, lines: Iterable[tuple[str, str]]) -> None:
    console.print(f"[bold]{name}[/]  {stage}".rstrip(), highlight=False)
    for key, text in lines:
        console.print(f"  {key:<16} {text}", highlight=False, soft_wrap=True)


def preview(recipe: Path, step: str, overrides: Sequence[str], *, rows: int) -> None:
    """Print a step's first rows as colored tokens."""
    given = Command(recipe, tuple(overrides))
    console = Console()
    command, _ = assumed(given)  # trials of a search with the settings that they have had
    loaded = command.loaded
    from align.workflow.preview import preview_rows, source_lines  # noqa: PLC0415 - imports torch; errors come first

    name = loaded.expanded(step)[-1]
    with command.located():
        for line in source_lines(loaded, name):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        for text in preview_rows(loaded, name, number=rows):
            console.print(text)


def _engine_lines(used: Sequence[UsedEngine]) -> list[tuple[str, str]]:
    """Return the managed servers of a step, and whether they repeat their samples."""
    found: list[tuple[str, str]] = []
    for managed in [each.engine.managed for each in used if each.engine.managed is not None]:
        repeats = "the same samples after a resume" if managed.is_repeatable() else "other samples after a resume"
        found.append(("engine", f"{KINDS[managed.kind].title} {engine_version(managed)}, {repeats}"))
    return found


def total_lines(
    recipe: Recipe, estimates: Sequence[Estimate], predictions: Sequence[Prediction]
) -> list[tuple[str, str]]:
    """Return what the whole recipe is predicted to use: compute and time, and what else is known or was priced."""
    from align.stages.training.footprint import allocator_note  # noqa: PLC0415 - imports torch
    from align.workflow.prediction import total  # noqa: PLC0415 - imports torch

    at_most = "at most " if any(each.bound for each in estimates) else ""
    no_flops = [each.name for each in estimates if each.flops is None]
    flops = f"{at_most}{sum(each.flops or 0.0 for each in estimates):.2e} FLOPs{_without(no_flops)}"
    lines = [("compute", flops)]
    is_priced = recipe.accounting.price_per_device_hour is not None
    for resource, (name, unit, as_text) in TOTALS.items():
        value, unknown = total(predictions, resource)
        unit = recipe.accounting.currency if resource == "money" else unit
        if value is not None and value.high > 0:
            formula = _formula_share(predictions) if resource == "seconds" else ""
            lines.append((name, f"{at_most}{_range(value, unit, as_text)}{_without(unknown)}{formula}"))
        elif value is None and (resource == "seconds" or (resource == "money" and is_priced)):
            unmeasured = f"no comparable step of these stages has been measured on this machine, below {recipe.runs}"
            lines.append((name, f"unknown: {unmeasured}"))
    if num_earlier := len({id(ledger) for each in predictions for ledger in each.earlier}):
        learned = f"{num_earlier} finished step(s) of these stages on this machine, below {recipe.runs}"
        lines.append(("learned from", learned))
    memories = [each.training.memory for each in estimates if each.training is not None]
    if any(memory is not None and memory.sharding.cpu for memory in memories) and (note := allocator_note()):
        lines.append(("allocator", note))
    return lines


def _formula_share(predictions: Sequence[Prediction]) -> str:
    """Return the share of the predicted time that is computed by formula, without an earlier step."""
    by_formula = sum(
        predicted.seconds.typical
        for predicted in predictions
        if predicted.seconds is not None and not predicted.num_earlier
    )
    if not by_formula:
        return ""
    share = "" if not any(each.num_earlier for each in predictions) else f"{duration_text(by_formula)} of it "
    return f", {share}estimated from a matrix product"


def _range(value: Interval, unit: str, text: Callable[[float], str]) -> str:
    """Return the median of earlier steps, and their range where it is one."""
    low, typical, high = map(text, value)
    typical = f"{typical} {unit}".rstrip()
    return typical if low == high else f"{typical} ({low} to {high})"


def _without(names: Sequence[str]) -> str:
    if len(names) > NAMED:
        return f", without {len(names)} steps: unknown"
    return f", without {', '.join(names)}: unknown" if names else ""


def _lines(step: Estimate, predicted: Prediction) -> dict[str, str]:
    from align.stages.training.rows import describe  # noqa: PLC0415 - imports torch

    at_most = "at most " if step.bound else ""
    training = step.training
    lines = {"rows": f"{at_most}{step.rows:,}"} if step.rows else {}
    if training is not None:
        lines["rows"] = describe(training.counts, training.format)
        shared = f" ({training.unshared:,} if prefixes were not shared)" if training.unshared > step.tokens else ""
        lines["tokens"] = f"{step.tokens:,} per epoch{shared}, longest row {training.longest:,}"
        lines["optimizer steps"] = f"{training.optimizer_steps:,}"
        if training.memory is not None:
            lines["memory"] = training.memory.describe()
        elif step.flops:
            lines["memory"] = "unknown for recurrent layers"
    elif step.tokens:
        lines["tokens"] = f"{at_most}{step.tokens:,}"
    lines |= step.parts
    if step.unknown:
        lines["FLOPs"] = f"unknown, as are time and memory: {step.unknown}"
    if step.flops and step.seconds:
        lines["FLOPs"] = f"{at_most}{step.flops:.2e}"
    if time := _time(step, predicted):
        lines["time"] = f"{at_most}{time}"
    if step.disk + step.spare >= SHOWN_DISK:
        lines["disk"] = f"{(step.disk + step.spare) / 2**30:.2f} GiB while it runs, {step.disk / 2**30:.2f} GiB after"
    if training is not None and (split := training.balance) is not None:
        lines["imbalance"] = (
            f"{split.num_ranks} ranks: mean {split.mean:.3f}, worst {split.worst:.3f}, "
            f"lower bound {split.lower_bound:.3f}"
        )
    return lines


def _time(step: Estimate, predicted: Prediction) -> str:
    """Return the predicted time of a step and what it is learned from; nothing where it is unknown."""
    if predicted.seconds is not None and predicted.num_earlier:
        of_size = " of similar model size" if step.flops else ""
        source = f"{predicted.num_earlier} earlier {step.stage} step(s){of_size} on this machine"
        return f"{_range(predicted.seconds, '', duration_text)}, from {source}"
    if not step.flops or not step.seconds:
        return ""
    other = f"{predicted.num_other} earlier {step.stage} step(s) differ in model size, precision, threads or load"
    by_formula = f"{duration_text(step.seconds)} on this machine, estimated from a matrix product"
    return f"{by_formula}; {other}" if predicted.num_other else by_formula
