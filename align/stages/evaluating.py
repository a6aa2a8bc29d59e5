"""The stage that compares policies on the prompts of a task."""

from __future__ import annotations

from typing import Any

from align.artifacts import versions
from align.evaluation.tasks import grade_all, scores
from align.models.loading import quiet_transformers
from align.stages.generating import RowSettings
from align.stages.grading import ask_policy, task_rows
from align.stages.recipe import TASKS, EvaluateStep
from align.stages.training import Context
from align.synth.engine import LocalSettings, TransformersEngine
from align.synth.samples import SamplingSettings


def evaluate_policies(context: Context) -> dict[str, Any]:
    """Scores of each policy on the step's prompts, `{policy: {task: {value, low, high, n}}}`."""
    step, recipe = context.recipe.steps[context.name], context.recipe
    assert isinstance(step, EvaluateStep)
    quiet_transformers()
    source = recipe.source(step.data)
    how = RowSettings(format=source.format, split=source.split, invalid=source.invalid, seed=recipe.seed + source.seed)
    task = step.task or source.path.removeprefix(TASKS)
    rows = task_rows(task, source.path, how, limit=source.limit)
    sampling = SamplingSettings(temperature=0.0, max_new_tokens=step.max_new_tokens)
    found: dict[str, dict[str, Any]] = {}
    for name in step.policies:
        local = LocalSettings(path=str(context.inputs[name]), precision="fp32")
        engine = TransformersEngine.load(local, name=name)
        answers = ask_policy(task, rows, engine, sampling=sampling, kept=None, report=context.report)
        grades = [grade for _, grade in grade_all(task, rows, answers)]
        rates = scores(task, answers, grades).items()
        found[name] = {task if len(rates) == 1 else f"{task} {rate}": value._asdict() for rate, value in rates}
    return {"stage": step.stage, "settings": step.model_dump(mode="json"), "scores": found, "versions": versions()}
