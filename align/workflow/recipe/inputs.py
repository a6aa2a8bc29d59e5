"""Opening of everything that a recipe reads, before its first step runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from align.config import located
from align.data.rows import hub_dataset
from align.errors import ErrorList, within
from align.stages.inputs.opening import open_file, open_model
from align.stages.inputs.sources import rows_of
from align.workflow.recipe.schema import Recipe
from align.workflow.recipe.servers import check_commands


def check_inputs(recipe: Recipe, path: Path, overrides: Sequence[str] = (), *, until: str | None = None) -> None:
    """Open what the steps of a recipe read; raise all errors together, each with the line of the recipe at `path`.

    `until` is the last step whose inputs are opened.
    """
    with located(path, overrides):
        open_inputs(recipe, until)


def open_inputs(recipe: Recipe, until: str | None = None) -> None:
    """Raise for every source whose first rows a step cannot use, and every model, file and folder that is not there.

    What is on this machine comes first: data sets of the Hub are opened only if all of that is right.
    """
    names = list(recipe.steps)
    last = recipe.expanded(until)[-1] if until is not None else names[-1]
    opened = names[: names.index(last) + 1]
    here, hub = ErrorList(), ErrorList()
    if any(recipe.steps[name].needs_policy() for name in opened):
        _open_policy(recipe, here)
    for name in opened:
        _open_named(recipe, name, here)
        _open_sources(recipe, name, here, from_hub=False)
    check_commands(recipe, opened, here)
    here.raise_found()
    for name in opened:
        _open_sources(recipe, name, hub, from_hub=True)
    hub.raise_found()


def _open_policy(recipe: Recipe, errors: ErrorList) -> None:
    policies = [recipe.policy, *(sections.policy for sections in recipe.own.values())]
    for path in dict.fromkeys(policy.path for policy in policies if policy.path is not None):
        with errors.collect(), within("policy", "path"):
            open_model(path)
    templates = [policy.chat_template or "" for policy in policies]
    for template in dict.fromkeys(each for each in templates if each.endswith(".jinja")):
        with errors.collect(), within("policy", "chat_template"):
            open_file(template)


def _open_named(recipe: Recipe, name: str, errors: ErrorList) -> None:
    step = recipe.steps[name]
    for open_it, named in ((open_model, step.named_models()), (open_file, step.named_files())):
        for path, loc in named:
            with errors.collect(), within(*recipe.location(name, loc)):
                open_it(path)


def _open_sources(recipe: Recipe, name: str, errors: ErrorList, *, from_hub: bool) -> None:
    """Read the first rows of a step's sources; what an earlier step makes is not there yet."""
    step = recipe.steps[name]
    for source in step.shares():
        settings = recipe.sections(name).data.get(source)
        if settings is None or settings.made_by is not None:
            continue
        if (hub_dataset(settings.path) is not None) == from_hub:
            with errors.collect(), rows_of(source):
                step.open_rows(source, settings)
