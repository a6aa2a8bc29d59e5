"""Rows after the first ones, which are opened before a run, are reported with the place of their source, too."""

import json
import re

import pytest

import align
from align.commands import check as commands
from align.commands import run
from align.errors import InputError
from align.stages.inputs import rendering
from align.stages.inputs.opening import FIRST_ROWS, SEARCHED_ROWS
from align.workflow import launcher
from align.workflow.recipe.load import load_recipe

RECIPE = """\
run: late
runs: {folder}/runs
policy:
  from_config: {{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
    num_attention_heads: 2, max_position_embeddings: 128}}
  chat_template: chatml
data:
  rows:
    path: {folder}/rows.jsonl
steps:
  base: {{stage: import, vocab_size: 300}}
  late: {step}
"""
LINE = 9  # of data.rows.path
TRAIN = "train: {learning_rate: 1.0e-3, prompts_per_step: 8}"
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
ANSWER = {"prompt": "a", "completion": "b"}
SCORED = {"prompt": "a", "responses": [{"content": "b", "reward": 1.0}, {"content": "c", "reward": 0.0}]}
BAD_ANSWER = {**ANSWER, "completion": " "}
CASES = {  # step, good rows, a bad one, what is said of it
    "sft": (f"{{stage: sft, data: rows, {TRAIN}}}", ANSWER, BAD_ANSWER, "an assistant message is empty"),
    "dpo": (f"{{stage: preference, data: rows, loss: {{name: dpo}}, {TRAIN}}}", PAIR, {"prompt": "a"}, "needs"),
    "generate": ("{stage: generate, data: rows, judges: []}", {"prompt": "a"}, {"prompt": 3}, "prompt"),
    "score": ("{stage: score, data: rows, judges: [{name: verifier}]}", PAIR, {"prompt": "a"}, "needs"),
    "nll": (
        "{stage: evaluate, policies: [base], tasks: {t: {task: nll, data: rows}}}",
        ANSWER,
        BAD_ANSWER,
        "an assistant message is empty",
    ),
    "gsm8k": (
        "{stage: evaluate, policies: [base], tasks: {t: {task: gsm8k, data: rows}}}",
        {"question": "a", "answer": "#### 3"},
        {"question": "a"},
        "answer",
    ),
    "a step's own encoder": (
        f"{{stage: sft, data: rows, {TRAIN}}}",
        ANSWER,
        {"messages": None, "prompt": "a", "completion": "b" * 1000, "x": 1},
        "tokens",
    ),
}


def written(folder, name):
    """A recipe in a folder whose 30th row is bad: the path of the recipe."""
    step, good, bad, _ = CASES[name]
    overlong = "    overlong: error\n" if name == "a step's own encoder" else ""
    text = RECIPE.format(folder=folder, step=step)
    path = folder / "r.yaml"
    path.write_text(text.replace("rows.jsonl\n", f"rows.jsonl\n{overlong}"))
    rows = [*[good] * 29, bad, *[good] * 10]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", CASES)
def test_a_late_bad_row_is_an_error_at_the_path_of_its_source_with_file_and_row(tmp_path, name, monkeypatch):
    monkeypatch.setattr(rendering, "SEARCHED_ROWS", FIRST_ROWS)  # in place of 1,000
    path = written(tmp_path, name)
    with pytest.raises(InputError) as caught:
        align.run(path)
    place = f"{path}:{LINE}: data.rows.path: {tmp_path / 'rows.jsonl'}: "
    message = str(caught.value)
    assert message.startswith(place), message
    assert re.search(r"\brow 30\b|\b30\b", message), message
    assert CASES[name][3] in message
    assert (tmp_path / "runs/late/base/manifest.json").exists()  # the row was not among those that are opened before


@pytest.mark.parametrize("name", ["sft", "nll"])
def test_check_and_preview_name_the_source_of_a_late_bad_row(tmp_path, name):
    path = written(tmp_path, name)
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))}:{LINE}: data\.rows\.path: .*row 30: "):
        commands.check(path, ())
    if name == "sft":
        with pytest.raises(InputError, match=rf"^{re.escape(str(path))}:{LINE}: data\.rows\.path: .*row 30: "):
            commands.preview(path, "late", (), rows=2)


def test_a_recipe_is_read_once_in_a_run(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(launcher, "load_recipe", lambda *given: read.append(given) or load_recipe(*given))
    path = written(tmp_path, "sft")
    run.run(path, (), until="base", rerun_from=None, dry_run=False)
    assert len(read) == 1
    run.train(path, "base", ())
    assert len(read) == 2


def test_an_override_of_the_path_is_named_in_place_of_the_line(tmp_path):
    path = written(tmp_path, "sft")
    (tmp_path / "other.jsonl").write_text((tmp_path / "rows.jsonl").read_text())
    override = f"data.rows.path={tmp_path / 'other.jsonl'}"
    with pytest.raises(
        InputError, match=rf"^override '{re.escape(override)}': data\.rows\.path: .*other\.jsonl: row 30"
    ):
        align.run(path, [override])


def test_a_skip_beyond_the_end_names_that_key(tmp_path):
    path = written(tmp_path, "nll")
    (tmp_path / "rows.jsonl").write_text(json.dumps(ANSWER))
    with pytest.raises(InputError, match=rf"data\.rows\.skip: .*skip is {SEARCHED_ROWS}"):
        align.run(path, [f"data.rows.skip={SEARCHED_ROWS}"])
