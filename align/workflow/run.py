"""Run a recipe from Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.distributed.progress import SilentProgress
from align.workflow.estimate import ModelPlans, check_templates, disk_need
from align.workflow.launcher import Command
from align.workflow.recipe.inputs import check_inputs
from align.workflow.runner import RunProgress, run_recipe
from align.workflow.search.calls import assumed, calls


class SilentRunProgress(SilentProgress):
    """Discards all progress of a run."""

    def watch(self, step: str, state: str) -> None:
        """Do nothing."""


def run(
    recipe: Path | str,
    overrides: Sequence[str] = (),
    *,
    until: str | None = None,
    rerun_from: str | None = None,
    progress: RunProgress | None = None,
) -> dict[str, dict[str, Any]]:
    """Run the unfinished steps of a recipe, as `align run` does, and return the manifest of every step.

    `overrides` are `key.sub=value` settings, `until` is the last step to run, and `rerun_from` a step to run again
    together with the steps that depend on it. A manifest holds, among others, the step's settings, row counts and
    metrics. Progress is discarded unless a `progress` display is given. An invalid recipe raises `InputError` with the
    location of the setting; a failed step raises `RunError`, and running the same recipe again resumes it::

        manifests = align.run("recipes/quickstart.yaml", ["run=mine", "seed=1"], until="dpo")
    """
    command = Command(Path(recipe), tuple(overrides))
    check_inputs(command.loaded, command.recipe, overrides, until=until)
    found = dict[str, dict[str, Any]]()
    progress = progress or SilentRunProgress()
    with command.located():
        plans = ModelPlans(assumed(command)[0].loaded)
        check_templates(plans, until=until)
        disk = disk_need(plans)
        for call in calls(command, until=until, rerun_from=rerun_from):
            found = run_recipe(call.command, progress, disk=disk, until=call.until, rerun_from=call.rerun_from)
    return found
