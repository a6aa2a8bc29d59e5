"""Values of environment variables, which a recipe names, are in no file of a run and secrets in no message."""

import json

import pytest
from chat_server import serving
from small_runs import run, written
from test_cli import align

from align.config import read_overrides
from align.distributed.journal import Journal
from align.errors import InputError
from align.redaction import as_written, printable, redact
from align.report import write_report

TOKEN = "tok-4711-0815-secret-value"
RECIPE = """
run: small
runs: {runs}
policy:
  from_config: {{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
          num_attention_heads: 2, max_position_embeddings: 256}}
  chat_template: chatml
data:
  rows: {{path: "${{oc.env:ROWS_OF_A_TEST}}/rows.jsonl"}}
steps:
  base: {{stage: import, vocab_size: 300}}
  samples:
    stage: generate
    models: [served]
    data: rows
    judges: []
    sampling: {{num_responses: 2, max_new_tokens: 6}}
    engine:
      server:
        base_url: URL
        retries: 0
        body: {{access: "${{oc.env:TOKEN_OF_A_TEST}}", note: ["Bearer ${{oc.env:TOKEN_OF_A_TEST}}"],
                again: "${{steps.samples.engine.server.body.access}}"}}
"""


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """A folder of rows and a token in the environment."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"say {row}"}) + "\n" for row in range(3)))
    monkeypatch.setenv("ROWS_OF_A_TEST", str(tmp_path))
    monkeypatch.setenv("TOKEN_OF_A_TEST", TOKEN)
    return tmp_path


def test_values_from_the_environment_are_in_no_file_of_a_run(rows):
    with serving() as server:
        made, _ = run(rows, text=RECIPE.replace("URL", server.url))
        sent = server.requests[0]
    assert (sent["access"], sent["note"], sent["again"]) == (TOKEN, [f"Bearer {TOKEN}"], TOKEN)
    root = rows / "runs/small"
    write_report(root)
    files = [path for path in root.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"manifest.json", "recipe.json", "groups.jsonl", "report.html"}
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []
    variable = "${oc.env:TOKEN_OF_A_TEST}"
    for settings in (
        made["samples"]["settings"],
        json.loads((root / "recipe.json").read_text())["steps"]["samples"],
        json.loads((root / "samples/manifest.json").read_text())["settings"],
    ):
        body = settings["engine"]["server"]["body"]
        reference = "${steps.samples.engine.server.body.access}"
        assert body == {"access": variable, "note": [f"Bearer {variable}"], "again": reference}
    recipe = json.loads((root / "recipe.json").read_text())
    assert recipe["data"]["rows"]["path"] == "${oc.env:ROWS_OF_A_TEST}/rows.jsonl"


def test_a_journal_holds_no_secret_and_is_resumed(tmp_path, rows):
    settings = read_overrides(["body.access=${oc.env:TOKEN_OF_A_TEST}", "body.top_k=5"])
    assert settings["body"] == {"access": TOKEN, "top_k": 5}
    path = tmp_path / "samples"
    for key in ("a", "b"):
        with Journal(path, settings) as journal:
            journal.add(key, 1)
    assert TOKEN not in path.read_text()
    assert path.read_text().splitlines()[0] == json.dumps(
        {"made_with": {"body": {"access": "${oc.env:TOKEN_OF_A_TEST}", "top_k": 5}}}
    )
    older = path.read_text().replace("${oc.env:TOKEN_OF_A_TEST}", TOKEN)  # as older versions wrote it
    path.write_text(older)
    with Journal(path, settings) as journal:
        assert journal.done == {"a": 1, "b": 1}
    with pytest.raises(InputError, match="body.top_k 5, but this call has 6"):
        Journal(path, {"body": {**settings["body"], "top_k": 6}})


def test_only_the_setting_that_names_a_variable_is_replaced(monkeypatch):
    monkeypatch.setenv("NAME_OF_A_TEST", "dpo")
    read_overrides(["loss.label=${oc.env:NAME_OF_A_TEST}"])
    settings = {"loss": {"name": "dpo", "label": "dpo"}, "kind": "dpo", "count": 1, "none": None}
    assert as_written(settings) == settings | {"loss": {"name": "dpo", "label": "${oc.env:NAME_OF_A_TEST}"}}
    assert redact("the loss is dpo") == "the loss is dpo"  # its variable's name is not that of a secret


def test_a_secret_in_an_error_is_not_shown(rows):
    recipe = written(rows, RECIPE.replace("URL", "http://127.0.0.1:9/v1"))
    for override in (
        "steps.samples.sampling.num_responses=${oc.env:TOKEN_OF_A_TEST}",
        "steps.samples.data=${oc.env:TOKEN_OF_A_TEST}",
    ):
        ended = align("check", str(recipe), override)
        assert ended.returncode == 2
        assert TOKEN not in ended.stderr and "${oc.env:TOKEN_OF_A_TEST}" in ended.stderr


ESCAPES = {
    "colors": ("\x1b[1;31mred\x1b[0m", "red"),
    "a title": ("\x1b]0;owned\x07text", "text"),
    "a title of another end": ("\x1b]0;owned\x1b\\text", "text"),
    "a link": ("\x1b]8;;http://evil\x1b\\text\x1b]8;;\x1b\\", "text"),
    "8-bit sequences": ("\x9b31mred\x9d0;owned\x9c!", "red!"),
    "a device string": ("\x1bPq#0\x1b\\text", "text"),
    "a reset": ("\x1bctext", "text"),
    "a character set": ("\x1b(0text", "text"),
    "carriage returns and bells": ("good\rbad\x07\x08", "goodbad"),
    "an unfinished sequence": ("text\x1b[", "text"),
    "plain text": ("naïve 🙂\n\tδ", "naïve 🙂\n\tδ"),
}


@pytest.mark.parametrize("what", ESCAPES)
def test_terminal_escapes_are_stripped_from_foreign_text(what):
    text, shown = ESCAPES[what]
    assert printable(text) == shown


def test_the_name_of_a_file_cannot_control_the_terminal(tmp_path):
    ended = align("check", str(tmp_path / "\x1b[2Jrecipe.yaml"))
    assert ended.returncode == 2
    assert "recipe.yaml: no such recipe" in ended.stderr and "\x1b" not in ended.stderr
