"""Rows and tokenizers of a recipe's steps before any of them has run."""

from pathlib import Path

from align.models.settings import PolicySettings
from align.stages.inputs.context import ModelSpec, StepInputs
from align.stages.training import rows
from align.stages.training.models import planned_tokenizer
from align.workflow.estimate import ModelPlans


def inputs_of(source):
    """What a step reads whose one source is called rows."""
    return StepInputs(seed=0, policy=PolicySettings(), sources={"rows": source}, folders={}, run=Path())


def tokenizer_of(recipe, name, folder):
    return planned_tokenizer(recipe.steps[name].model(ModelPlans(recipe).start(name)), folder)


def step_rows(recipe, name, tokenizer, folder, *, model_limit, **options):
    step = recipe.steps[name]
    attributes = step.attributes(ModelSpec(recipe.policy))
    request = rows.RowRequest(step, tokenizer, recipe.resolved(name), model_limit, attributes)
    return rows.step_rows(request, folder, **options)
