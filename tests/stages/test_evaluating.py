"""Changes between evaluated policies: told where both were asked the same, in the same way, and nowhere else."""

import json

import pytest

from align.stages.evaluate import Evaluate as EvaluateStep
from align.stages.inputs.sources import SourceSettings
from align.workflow.recipe.load import load_recipe
from align.workflow.results.changes import changes

RECIPE = """
run: small
runs: {runs}
policy:
  from_config: {{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
           num_attention_heads: 2}}
  chat_template: chatml
data:
  shown: {{path: "tasks:general", limit: 24}}
steps:
  base: {{stage: import, vocab_size: 300}}
  sft: {{stage: sft, data: shown, train: {{learning_rate: 1.0e-3}}}}
"""
PASSED = {"base": [1, 0, 0, 0], "sft": [1, 1, 0, 1]}  # of four prompts
FIRST = {"data": "one", "task": "gsm8k", "max_new_tokens": 9}


def told(folder, task, prompts=("a", "b", "c", "d"), passed=PASSED["sft"], kind="prompt", before=("a", "b", "c", "d")):
    """The change of `sft` against `base`, when `sft` was asked `task` and `base` the first."""
    (folder / "small.yaml").write_text(RECIPE.format(runs=folder))
    recipe = load_recipe(folder / "small.yaml")
    files = {name: SourceSettings(path=f"{name}.jsonl") for name in ("one", "two", "as_one")}
    files["as_one"] = files["one"]
    steps = dict(recipe.steps)
    made = {}
    asked = {"base": (FIRST, before, PASSED["base"]), "sft": (task, prompts, passed)}
    for policy, (settings, of, values) in asked.items():
        steps[f"asked-{policy}"] = EvaluateStep(stage="evaluate", policies=[policy], tasks={"sums": settings})
        made[f"asked-{policy}"] = {"scores": {policy: {"sums": {}}}, "columns": {"sums": ("sums", "correct")}}
        lines = [{kind: one, "parts": {"correct": [value, 1]}} for one, value in zip(of, values, strict=True)]
        target = recipe.root / f"asked-{policy}" / "sums.jsonl"
        target.parent.mkdir(parents=True)
        target.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = recipe.model_copy(update={"steps": steps, "data": recipe.data | files})
    return changes(recipe, made)


@pytest.mark.parametrize("kind", ["prompt", "row"])
@pytest.mark.parametrize("more", [{}, {"data": "as_one"}, {"metrics": ["correct"]}])
def test_a_change_is_told_where_the_same_was_asked(tmp_path, more, kind):
    (change,) = told(tmp_path, FIRST | more, kind=kind)["sft"].values()
    assert (change["value"], change["n"], change["from"]) == (3 / 4 - 1 / 4, 4, "base")
    assert change["low"] <= change["value"] <= change["high"]


def test_several_responses_to_a_prompt_are_one_observation_of_a_change(tmp_path):
    """Each response was resampled as a prompt of its own."""
    twice = ("a", "a", "b", "b")
    (change,) = told(tmp_path, FIRST, twice, before=twice)["sft"].values()
    # From 1/2 to 2/2 and from 0/2 to 1/2: the same change of both prompts, so that no draw has another one
    assert [change[name] for name in ("value", "low", "high", "n")] == [0.5, 0.5, 0.5, 2]


@pytest.mark.parametrize(
    ("more", "prompts"),
    [
        ({"data": "two"}, ("a", "b", "c", "d")),
        ({"task": "general"}, ("a", "b", "c", "d")),
        ({"max_new_tokens": 10}, ("a", "b", "c", "d")),
        ({"temperature": 0.5}, ("a", "b", "c", "d")),
        ({}, ("a", "b", "c", "e")),
        ({}, ("b", "a", "c", "d")),
        ({}, ("a", "b", "c")),
    ],
)
def test_no_change_is_told_where_something_else_was_asked(tmp_path, more, prompts):
    assert told(tmp_path, FIRST | more, prompts, PASSED["sft"][: len(prompts)]) == {}
