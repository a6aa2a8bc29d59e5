"""Model cards of a run's policies and reward models, from its recipe and manifests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align.models.model_card import CardContent, MetricSummary, StageSummary, write_model_card
from align.stages.base import POLICY, REWARD_MODEL
from align.storage.disk_errors import disk_errors
from align.workflow.recipe.schema import Recipe

Manifests = Mapping[str, Mapping[str, Any]]


def write_cards(recipe: Recipe, manifests: Manifests) -> None:
    """Write the README.md of every finished policy and reward model of a run."""
    for name in manifests:
        if recipe.steps[name].makes in (POLICY, REWARD_MODEL):
            with disk_errors(recipe.root / name):
                write_model_card(recipe.root / name, card_content(recipe, name, manifests))


def card_content(recipe: Recipe, name: str, manifests: Manifests) -> CardContent:
    """Return the model card of a step: the stages that led to it, its data, and its metrics."""
    lineage = _lineage(recipe, name)
    sources = dict.fromkeys(source for step in lineage for source in _data(recipe, step))
    first = recipe.steps[lineage[0]]
    base = getattr(first, "path", None) or recipe.sections(lineage[0]).policy.path
    return CardContent(
        title=f"{recipe.run}/{name}",
        kind="reward_model" if recipe.steps[name].makes == REWARD_MODEL else "policy",
        base=base,
        datasets=list(sources),
        stages=[_summary(recipe, step, manifests[step]) for step in lineage if "train" in manifests[step]["settings"]],
        metrics=_metrics(name, manifests),
        attributes=manifests[name].get("aggregate", {}),
    )


def _lineage(recipe: Recipe, name: str) -> list[str]:
    """Return the step and those whose models it comes from, the earliest first."""
    found: list[str] = []
    step: str | None = name
    while step is not None:
        found.insert(0, step)
        step = recipe.steps[step].start
    return found


def _data(recipe: Recipe, name: str) -> list[str]:
    """Return the sources of a step's rows: paths of those that are read, names of steps that make them."""
    steps, data = recipe.steps, recipe.sections(name).data
    return [source if source in steps else data[source].path for source in steps[name].shares()]


def _summary(recipe: Recipe, name: str, manifest: Mapping[str, Any]) -> StageSummary:
    settings = manifest["settings"]
    loss = settings.get("loss")
    return StageSummary(
        name=name,
        kind=manifest["stage"],
        loss=loss.get("name") if isinstance(loss, Mapping) else loss,
        data=_data(recipe, name),
        rows=manifest["rows"]["trained"],
        settings={**(loss if isinstance(loss, Mapping) else {}), **settings["train"]},
    )


def _metrics(name: str, manifests: Manifests) -> list[MetricSummary]:
    found: list[MetricSummary] = []
    for manifest in manifests.values():
        for column, score in manifest.get("scores", {}).get(name, {}).items():
            task, metric = manifest["columns"][column]
            interval = {"low": score["low"], "high": score["high"], "rows": score["n"]}
            found.append(MetricSummary(task=task, name=metric, value=score["value"], **interval))
    return found
