"""A step's first rows as a person can read them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.text import Text

from align.data.preview import preview
from align.errors import InputError
from align.models.loading.config import max_positions
from align.models.loading.pretrained import silence_transformers
from align.stages.checking import model_config
from align.stages.recipe import Recipe
from align.stages.rewards import rating_of
from align.stages.sources import step_rows
from align.stages.steps import PreferenceStep, RewardStep, TrainStep
from align.stages.training import tokenizer_of


def preview_rows(recipe: Recipe, name: str, *, number: int) -> Iterator[Text]:
    """The first rows of a step as coloured tokens."""
    silence_transformers()
    step = recipe.steps[name]
    if not isinstance(step, TrainStep | PreferenceStep | RewardStep):
        raise InputError(f"step {name!r} trains on no rows; preview shows those of a training step")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tokenizer_of(recipe, name, Path(folder))
        names = rating_of(recipe, name).names if isinstance(step, RewardStep) else ()
        limit = max_positions(model_config(recipe, name, len(tokenizer)))
        cut = step_rows(recipe, name, tokenizer, Path(folder) / "cut", model_limit=limit, attributes=names)
        free = Path(folder) / "whole"
        whole = step_rows(recipe, name, tokenizer, free, model_limit=None, attributes=names, free=True)
        shown = cut.train[:number]
        rows = {group.row for group in shown}
        uncut = {group.row: group for part in (whole.train, whole.held_out) for group in part if group.row in rows}
    for group in shown:
        yield preview(group, tokenizer, uncut=uncut[group.row])
