"""Preview of a training step's rows as colored tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.text import Text

from align.data.preview import preview
from align.errors import InputError
from align.models.loading.pretrained import silence_transformers
from align.records import Prompt
from align.stages.inputs.sources import SourceSettings, rows_of, streamed
from align.workflow.estimate import ModelPlans
from align.workflow.recipe.schema import Recipe


def preview_rows(recipe: Recipe, name: str, *, number: int) -> Iterator[Text]:
    """Yield the first rows of a training step as colored tokens: trained, shared by responses, and cut."""
    silence_transformers()
    step = recipe.steps[name]
    planning = ModelPlans(recipe).planning(name)
    with recipe.locating(name):
        rows = step.preview(planning, number)
    if rows is None:
        raise InputError(f"step {name!r} trains on no rows; preview shows the rows of a training step")
    for group, uncut in rows:
        yield preview(group, planning.tokenizer, uncut=uncut)


def source_lines(recipe: Recipe, name: str) -> Iterator[str]:
    """Yield a line for each source of a step: how its rows are read."""
    for source, settings in recipe.resolved(name).sources.items():
        with recipe.locating(name), rows_of(source):
            yield f"{source}: {_reading(settings)}"


def _reading(source: SourceSettings) -> str:
    """Return how the rows of a source are read: the format, and the columns by which it was chosen."""
    if source.is_procedural:
        return f"rows that {source.path} generates"
    found = streamed(source, kind=Prompt, seed=0)
    columns = ", ".join(_with_origin(name, source.columns) for name in found.found_columns)
    reason = "detected by the columns" if source.format == "auto" else "as its format says, from the columns"
    return f"{source.path} read as {found.format}, {reason} {columns}"


def _with_origin(name: str, columns: Mapping[str, str]) -> str:
    return f"{name} ({columns[name]})" if name in columns else name
