"""The stage that compares policies, and the table that a run ends with."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from align.artifacts import versions
from align.config import InputError
from align.evaluation import evaluate
from align.models.loading import quiet_transformers
from align.records import Prompt
from align.stages.recipe import TASKS, EvaluateStep
from align.stages.sources import records
from align.stages.training import Context


def evaluate_policies(context: Context) -> dict[str, Any]:
    """Scores of each policy on the step's prompts, `{policy: {task: {value, low, high, n}}}`."""
    step, recipe = context.recipe.steps[context.name], context.recipe
    assert isinstance(step, EvaluateStep)
    quiet_transformers()
    source = recipe.source(step.data)
    if not source.path.startswith(TASKS):
        raise InputError(f"data.{step.data}: evaluation takes prompts of {TASKS}KIND, not {source.path}")
    task = source.path.removeprefix(TASKS)
    found = records(source, kind=Prompt, seed=recipe.seed).records
    prompts = [record for record in found if isinstance(record, Prompt)]
    context.report.phase("evaluate", len(step.policies))
    scores: dict[str, dict[str, Any]] = {}
    for name in step.policies:
        folder = str(context.inputs[name])
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        result = evaluate(task, model, tokenizer, prompts, max_new_tokens=step.max_new_tokens)
        scores[name] = {task: result._asdict()}
        context.report.advance(1)
    return {"stage": step.stage, "settings": step.model_dump(mode="json"), "scores": scores, "versions": versions()}
