"""A stage of the user's own: one module, named by its dotted path in a recipe."""

import json
import sys

import pytest
from small_runs import Told

from align.errors import InputError
from align.pipeline import fingerprints
from align.workflow.launcher import Command
from align.workflow.recipe.load import load_recipe
from align.workflow.runner import run_recipe

MODULE = '''
import json
from typing import ClassVar

from pydantic import Field

from align.stages.base import GROUPS, SOURCE, Input, Stage
from align.stages.costs.measured import Done
from align.stages.responses.settings import GROUPS_FILE, groups_source
from align.stages.inputs.sources import streamed
from align.records import Comparison


class Shortest(Stage):
    """Reward short responses of procedural comparisons."""

    stage: str
    data: str = Field(description="Name under `data`.")
    scale: float = Field(default=1.0, gt=0, description="Reward per character saved.")

    makes: ClassVar[str] = GROUPS

    def inputs(self):
        return [Input(self.data, (SOURCE,), ("data",))]

    def shares(self):
        return {self.data: 1.0}

    def rows(self, folder):
        return groups_source(folder, held_out=0.0, max_length=None)

    def run(self, context):
        lines = []
        for located in streamed(context.inputs.sources[self.data], kind=Comparison, seed=context.inputs.seed).records:
            record = located.record
            prompt = [{"role": message.role, "content": message.content} for message in record.prompt]
            texts = sorted({response.content for response in record.responses}, key=len)
            responses = [{"content": text, "reward": -self.scale * len(text)} for text in texts]
            lines.append(json.dumps({"prompt": prompt, "responses": responses}))
        (context.folder / GROUPS_FILE).write_text("\\n".join(lines) + "\\n")
        return {"groups": len(lines), "done": Done()}
'''

RECIPE = """
run: own
runs: {runs}
policy:
  from_config: {{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
          num_attention_heads: 2, max_position_embeddings: 256}}
  chat_template: chatml
data:
  answers: {{path: "tasks:general", limit: 8, responses: 3}}
steps:
  base: {{stage: import, vocab_size: 300}}
  short: {{stage: "own_stage:Shortest", data: answers, scale: 0.5}}
  rpo: {{stage: preference, data: short, train: {{learning_rate: 1.0e-3, prompts_per_step: 4}}}}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    (tmp_path / "own_stage.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_stage", raising=False)
    path = tmp_path / "own.yaml"
    path.write_text(RECIPE.format(runs=tmp_path / "runs"))
    return path


def test_a_stage_in_a_module_of_the_users_own_runs_and_feeds_a_built_in_stage(recipe, tmp_path):
    made = run_recipe(Command(recipe), Told(), disk=(0, 0))
    assert made["short"]["groups"] == 8
    assert made["short"]["settings"]["scale"] == 0.5
    rows = [json.loads(line) for line in (tmp_path / "runs/own/short/groups.jsonl").read_text().splitlines()]
    assert all(response["reward"] == -0.5 * len(response["content"]) for row in rows for response in row["responses"])
    assert made["rpo"]["rows"]["trained"] == 8
    told = Told()
    run_recipe(Command(recipe), told, disk=(0, 0))
    assert [note for note in told.notes if note.startswith("short")] == ["short: finished before, skipped"]
    again = run_recipe(Command(recipe, ("steps.short.scale=2.0",)), Told(), disk=(0, 0))
    assert again["short"]["build_id"] != made["short"]["build_id"]


def test_an_edited_module_of_a_stage_runs_the_step_and_its_dependents_again(recipe, tmp_path):
    before = fingerprints(load_recipe(recipe).pipeline())
    (tmp_path / "own_stage.py").write_text(MODULE + "# edited\n")
    after = fingerprints(load_recipe(recipe).pipeline())
    assert [name for name in before if before[name] != after[name]] == ["short", "rpo"]


def test_settings_of_a_users_own_stage_are_checked_with_their_line(recipe):
    with pytest.raises(InputError, match=r"own.yaml:12: steps.short.scale: Input should be greater than 0"):
        load_recipe(recipe, ("seed=1",)) if recipe.write_text(recipe.read_text().replace("0.5", "-1.0")) else None
    with pytest.raises(InputError, match="no source of data is called 'nobody'"):
        load_recipe(recipe, ("steps.short.scale=1.0", "steps.short.data=nobody"))


@pytest.mark.parametrize(
    ("stage", "message"),
    [("own_stage:Missing", "has no attribute 'Missing'"), ("json:dumps", "not a subclass of align.stages.base.Stage")],
)
def test_a_dotted_path_that_is_no_stage_is_named(recipe, stage, message):
    with pytest.raises(InputError, match=message):
        load_recipe(recipe, (f"steps.short.stage={stage}",))
