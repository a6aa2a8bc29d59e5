"""Policy retention: the weights of which steps are removed once nothing in the recipe reads them any more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.artifacts import FILES, REMOVED, removal_of
from align.models.adapters.files import adapter_base
from align.models.settings import is_adapter
from align.stages.base import POLICY
from align.storage.removal import Removal
from align.train.resuming import KEPT
from align.workflow.recipe.retention import KeepBest
from align.workflow.recipe.schema import Recipe
from align.workflow.results.changes import results_table
from align.workflow.search.outcomes import trial_names

WEIGHTS = ".safetensors"  # suffix of files of weights, also of shards and adapters

Manifests = Mapping[str, Mapping[str, Any]]  # of the finished steps


def unneeded_weights(recipe: Recipe, finished: Manifests, unread: Sequence[str]) -> dict[str, Removal]:
    """Return the files of weights to remove of each policy, of the steps that no unfinished step reads.

    Kept are what `keep` says, compressed copies, copies of models from outside of the run, bases under adapters that
    are kept, and folders that the recipe names by their path.
    """
    decided, trials = trial_names(recipe, decided=True), trial_names(recipe, decided=False)
    unread = [name for name in unread if name not in trials or name in decided]
    if recipe.keep == "all":
        return _checkpoints(finished, [name for name in unread if name in trials])
    policies = [name for name, step in recipe.steps.items() if step.makes == POLICY and not step.is_compressed]
    last = policies[-1] if policies else None
    kept = best_policy(recipe, finished, recipe.keep) if isinstance(recipe.keep, KeepBest) else last
    if kept is None:  # nothing is evaluated yet, or no value is a number
        return {}
    copies = {name for name in unread if recipe.steps[name].is_copy(recipe.resolved(name))}
    named = {Path(path).resolve() for step in recipe.steps.values() for path, _ in step.named_models()}
    bases = _bases(recipe.root)
    found = dict[str, Removal]()
    for name in reversed([name for name in unread if name in policies and name != kept and name not in copies]):
        folder = (recipe.root / name).resolve()
        if folder in named or folder in bases.values():
            continue
        bases.pop(folder, None)  # once its adapters are gone, nothing keeps their base
        files = tuple(file for file in finished[name].get(FILES, ()) if file.endswith(WEIGHTS))
        found[name] = Removal("weights", f"keep: {_written(recipe.keep)}", _restore(name), files)
    return found


def _checkpoints(finished: Manifests, trials: Sequence[str]) -> dict[str, Removal]:
    """Return the checkpoints of trials that are not promoted, or that the next rung has already resumed."""
    found: dict[str, Removal] = {}
    for name in trials:
        files = tuple(file for file in finished[name].get(FILES, ()) if file.startswith(f"{KEPT}/"))
        restore = f"to get them back, make the step again: align run RECIPE --rerun-from {name}"
        found[name] = Removal("checkpoints", "the search needs them no more", restore, files)
    return found


def best_policy(recipe: Recipe, finished: Manifests, keep: KeepBest) -> str | None:
    """Return the policy with the best value of the metric among those with weights, of equal ones the first.

    Trials of a search are left out. None before the first evaluation.
    """
    column = recipe.metric_columns()[keep.best]
    trials = trial_names(recipe, decided=False)
    rows = results_table(finished)
    values = {
        name: float(rows[name][column]["value"])
        for name in recipe.steps
        if name in finished
        and REMOVED not in finished[name]
        and column in rows.get(name, {})
        and not recipe.steps[name].is_compressed
        and name not in trials
    }
    sign = 1 if keep.is_greater_better else -1
    known = {name: sign * value for name, value in values.items() if not math.isnan(value)}
    return max(known, key=lambda name: known[name]) if known else None


def _bases(root: Path) -> dict[Path, Path]:
    """Return the base of each folder of adapters in a run whose weights are there."""
    folders = [path for path in root.iterdir() if path.suffix != ".partial" and not path.name.startswith(".")]
    adapters = [folder for folder in folders if is_adapter(str(folder)) and removal_of(folder) is None]
    return {folder.resolve(): Path(adapter_base(str(folder))).resolve() for folder in adapters}


def _written(keep: str | KeepBest) -> str:
    return keep if isinstance(keep, str) else f"best {keep.best}"


def _restore(name: str) -> str:
    return f"to get them back, make the step again: align run RECIPE keep=all --rerun-from {name}"
