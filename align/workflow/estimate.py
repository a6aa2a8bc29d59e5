"""Estimates of a recipe's steps: rows, tokens, memory, FLOPs, time and disk, without training."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from align.accounting.communication import FP32
from align.errors import ErrorList
from align.evaluation.task import TaskSize
from align.models.loading.config import dimensions
from align.models.loading.gguf import read_once
from align.models.loading.pretrained import count_weights, silence_transformers
from align.pipeline.steps import order
from align.stages.costs.estimates import Estimate, PlannedModel, Planning
from align.stages.inputs.context import ModelSpec
from align.stages.training.models import planned_config, planned_tokenizer
from align.workflow.recipe.schema import Recipe


class ModelPlans:
    """The model of each step before any step has run; each tokenizer and configuration is made once."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._loaded: dict[str, tuple[PreTrainedTokenizerBase, PretrainedConfig]] = {}
        self._task_sizes: dict[str, TaskSize] = {}

    def start(self, name: str) -> ModelSpec:
        """Return the model that a step starts from or asks."""
        start = self.recipe.steps[name].start
        if start is None:
            return ModelSpec(self.recipe.sections(name).policy)
        return self.recipe.steps[start].model(self.start(start))

    def loaded(self, name: str) -> tuple[PreTrainedTokenizerBase, PretrainedConfig]:
        """Return tokenizer and configuration of the model that a step makes, trains or asks."""
        spec = self.recipe.steps[name].model(self.start(name))
        key = repr((spec.settings, spec.vocab_size))
        if key not in self._loaded:
            with tempfile.TemporaryDirectory() as folder, read_once():
                tokenizer = planned_tokenizer(spec, Path(folder))
                self._loaded[key] = tokenizer, planned_config(spec, len(tokenizer))
        return self._loaded[key]

    def planning(self, name: str) -> Planning:
        """Return what the estimate of a step is made from."""

        def load() -> PlannedModel:
            tokenizer, config = self.loaded(name)
            return PlannedModel(tokenizer, config, dimensions(config), self.num_weights(name))

        return Planning(
            name=name,
            inputs=self.recipe.resolved(name),
            spec=self.start(name),
            load=load,
            dimensions_of=lambda other: dimensions(self.loaded(other)[1]),
            task_sizes=self._task_sizes,
        )

    def num_weights(self, name: str) -> int:
        """Return the number of weights of the model that a step makes, trains or asks."""
        config = self.loaded(name)[1]
        size = dimensions(config)
        return count_weights(config) if isinstance(size, str) else size.num_weights


def estimate(recipe: Recipe) -> Iterator[Estimate]:
    """Yield the estimate of each step in the order in which they run; raise for the first thing that is wrong."""
    silence_transformers()
    plans = ModelPlans(recipe)
    made = dict[str, Estimate]()
    for name in (each.name for each in order(recipe.graph())):
        with recipe.locating(name):
            recipe.steps[name].check_machine()
            if (copied := recipe.copies.get(name)) is not None:
                nothing = {"flops": 0.0, "seconds": 0.0, "disk": 0, "spare": 0, "parts": {}}
                made[name] = replace(made[copied], name=name, **nothing)
            else:
                known = {**made, **_sources(recipe, name, made)}
                made[name] = recipe.steps[name].estimate(replace(plans.planning(name), made=known))
        yield made[name]


def _sources(recipe: Recipe, name: str, made: Mapping[str, Estimate]) -> dict[str, Estimate]:
    """Return the estimates of the sources of a step that earlier steps make."""
    found: dict[str, Estimate] = {}
    for source, each in recipe.sections(name).data.items():
        if each.made_by is not None and each.made_by[0] in made:
            maker = made[each.made_by[0]]
            found[source] = replace(maker, rows=maker.rows if each.limit is None else min(maker.rows, each.limit))
    return found


def check_templates(plans: ModelPlans, *, until: str | None = None) -> None:
    """Raise for first rows that the chat template of a step cannot render; rows that a step makes are not there yet.

    `until` is the last step that is checked.
    """
    silence_transformers()
    recipe = plans.recipe
    names = list(recipe.steps)
    last = recipe.expanded(until)[-1] if until is not None else names[-1]
    errors = ErrorList()
    checked = set[tuple[str, ...]]()
    for name in names[: names.index(last) + 1]:
        step = recipe.steps[name]
        sources = recipe.sections(name).data
        for source in step.shares() if name not in recipe.copies else ():
            if source not in sources or sources[source].made_by is not None:
                continue
            key = (step.stage, repr(plans.start(name)), sources[source].model_dump_json())
            if key not in checked:  # trials have the sources of others
                checked.add(key)
                with errors.collect():
                    step.check_template(source, sources[source], lambda name=name: plans.loaded(name)[0])
    errors.raise_found()


def disk_need(plans: ModelPlans) -> tuple[int, int]:
    """Return the bytes of the run's models, and of the largest step's checkpoints while it runs."""
    silence_transformers()
    recipe = plans.recipe
    models = 0
    checkpoints = 0
    for name, step in recipe.steps.items():
        if step.disk(1) == (0, 0) or name in recipe.copies:  # a copy has links to files
            continue
        size = plans.num_weights(name) * FP32
        stays, spare = step.disk(size)
        models += stays
        checkpoints = max(checkpoints, spare)
    return models, checkpoints
