"""Model cards of a run: what a policy's README.md says follows from the run's recipe and results."""

from huggingface_hub import metadata_load
from small_runs import RECIPE, run
from test_cli import align

from align.artifacts import fingerprint

EVALUATED = RECIPE.replace("steps:\n", '  test: {{path: "tasks:general", split: test, limit: 6}}\nsteps:\n') + (
    "  table: {{stage: evaluate, policies: [dpo], tasks: {{words: {{data: test, max_new_tokens: 4}}}}}}\n"
)


def test_every_policy_of_a_run_has_a_card_with_its_stages_and_metrics(tmp_path):
    made, _ = run(tmp_path, text=EVALUATED)
    folder = tmp_path / "runs/small"
    front = {step: metadata_load(folder / step / "README.md") for step in ("base", "sft", "dpo")}
    assert {each["pipeline_tag"] for each in front.values()} == {"text-generation"}
    assert {"sft", "preference", "dpo"} <= set(front["dpo"]["tags"])
    text = (folder / "dpo/README.md").read_text()
    assert "small/dpo" in text and "1.00e-03" in text or "0.001" in text
    score = made["table-dpo"]["scores"]["dpo"]["words"]
    assert "words" in text and f"{score['n']}" in text
    before = fingerprint(folder / "sft")
    (folder / "sft/README.md").write_text("a description")
    assert fingerprint(folder / "sft") == before
    pushed = align("push", str(folder / "dpo"), "somebody/model", "--dry-run")
    assert pushed.returncode == 0, pushed.stderr
    assert "model.safetensors" in pushed.stdout and "nothing was uploaded" in pushed.stdout
    assert align("push", str(folder / "table-dpo"), "somebody/model", "--dry-run").returncode == 2
