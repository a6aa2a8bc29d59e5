"""Rows with tools through a whole recipe: SFT, sampling, judging, training on the groups, and the preview."""

import json

import pytest
from small_runs import run, written
from test_cli import align

from align.data.reading import read
from align.data.writing import write
from align.records import Demonstration, Message, Prompt, ToolCall
from align.rewards.verdicts import Verdict

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ 'CALL ' + c.function | tojson }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
)
SFT = """
run: small
runs: {runs}
policy:
  from_config: {{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
          num_attention_heads: 2, max_position_embeddings: 2048, initializer_range: 0.05}}
  chat_template: TEMPLATE
data:
  calls: {{path: FOLDER/rows.jsonl, on_error: skip}}
steps:
  base: {{stage: import, vocab_size: 300}}
  sft: {{stage: sft, data: calls, train: {{learning_rate: 1.0e-3, prompts_per_step: 4}}}}
"""
ROUND = """
  rpo:
    stage: preference
    on_policy: true
    rounds: 1
    data: calls
    generate:
      sampling: {{num_responses: 3, max_new_tokens: 6}}
      judges: [{{name: "test_tool_runs:by_sum"}}]
    loss: {{name: rpo_sq}}
    train: {{learning_rate: 1.0e-3, prompts_per_step: 4}}
"""


def by_sum():
    """A judge that is shown the tools and the calls."""

    def judge(groups):
        for prompt, texts in groups:
            assert prompt.tools == (WEATHER,) and prompt.messages[1].tool_calls
            yield tuple(Verdict(float(sum(map(ord, text)))) for text in texts)

    return judge


ROWS = [
    Demonstration(
        (
            Message("user", f"How is {city}?"),
            Message("assistant", "", (ToolCall("weather", json.dumps({"city": city})),)),
            Message("tool", "blue"),
            Message("assistant", "Fine."),
        ),
        tools=(WEATHER,),
    )
    for city in ("Oslo", "Bern", "Rome", "Bonn")
]


@pytest.fixture
def text(tmp_path):
    (tmp_path / "tools.jinja").write_text(TEMPLATE)
    write(tmp_path / "rows.jsonl", ROWS)
    return SFT.replace("FOLDER", str(tmp_path))


@pytest.mark.slow
def test_tools_reach_every_step_of_a_recipe(tmp_path, text):
    text = text.replace("TEMPLATE", str(tmp_path / "tools.jinja")) + ROUND
    run(tmp_path, text=text)
    (folder,) = (tmp_path / "runs" / "small").glob("*-samples")
    groups = read(str(folder / "groups.jsonl")).records
    asked = [Prompt(row.messages[:3], tools=row.tools) for row in ROWS]
    assert groups and {group.prompt for group in groups} <= {prompt.messages for prompt in asked}
    assert all(group.tools == (WEATHER,) for group in groups)
    shown = align("preview", str(written(tmp_path, text)), "--step", "sft").stdout.replace("╎", "")
    assert '"properties"' in shown and 'CALL {"name"' in shown


def test_rows_whose_tools_the_template_ignores_are_counted(tmp_path, text):
    plain = Demonstration((Message("user", "a"), Message("assistant", "b")))
    write(tmp_path / "rows.jsonl", [*ROWS, *[plain] * 4])
    run(tmp_path, text=text.replace("TEMPLATE", "chatml"))
    manifest = json.loads((tmp_path / "runs" / "small" / "sft" / "manifest.json").read_text())
    assert "the chat template leaves out a tool of the row" in json.dumps(manifest)
