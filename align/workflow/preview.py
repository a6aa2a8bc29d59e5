"""Preview of a training step's rows as colored tokens."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from align.data.preview import preview
from align.errors import InputError
from align.models.loading.pretrained import silence_transformers
from align.workflow.estimate import ModelPlans
from align.workflow.recipe.schema import Recipe


def preview_rows(recipe: Recipe, name: str, *, number: int) -> Iterator[Text]:
    """Yield the first rows of a training step as colored tokens: trained, shared by responses, and cut."""
    silence_transformers()
    step, planning = recipe.steps[name], ModelPlans(recipe).planning(name)
    rows = step.preview(planning, number)
    if rows is None:
        raise InputError(f"step {name!r} trains on no rows; preview shows the rows of a training step")
    for group, uncut in rows:
        yield preview(group, planning.tokenizer, uncut=uncut)
