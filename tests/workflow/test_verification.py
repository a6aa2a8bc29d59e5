"""Damaged files of a run: each is found before it is used, and the message blames the file that is damaged."""

import hashlib
import json
import re
import shutil

import pytest
from small_runs import RECIPE, EndsInDpo, run, written
from typer.testing import CliRunner

from align.cli import app
from align.content_hash import content_of
from align.errors import RunError
from align.models.hub import push_folder

CHECKPOINTS = ("steps.dpo.train.checkpoint_steps=1", "steps.sft.train.checkpoint_steps=1")
SCORED = (
    RECIPE
    + """
  rate: {{stage: reward_model, policy: base, loss: bt, data: pairs,
         train: {{learning_rate: 1.0e-3, prompts_per_step: 4}}}}
  scored: {{stage: score, data: pairs, judges: [{{name: reward_model, settings: {{path: "step:rate"}}}}]}}
  again: {{stage: preference, policy: sft, data: scored, loss: {{name: dpo}},
          train: {{learning_rate: 1.0e-3, prompts_per_step: 4}}}}
"""
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("finished")
    run(folder, text=SCORED)
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run whose step dpo was stopped after its second step."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(KeyboardInterrupt):
        run(folder, *CHECKPOINTS, told=EndsInDpo())
    return folder


def copied(folder, tmp_path):
    """A copy of the run, and its folder of steps."""
    shutil.copytree(folder / "runs", tmp_path / "runs")
    return tmp_path / "runs/small"


def flip(file):
    """Change one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file):
    """Keep the first half of a file."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_manifest_records_every_file_of_a_step_with_its_size_and_sha256(made):
    for step in ("base", "sft", "dpo", "rate", "scored"):
        folder = made / "runs/small" / step
        recorded = json.loads((folder / "manifest.json").read_text())["files"]
        assert recorded.keys() == files_below(folder) - {"manifest.json", "README.md"}
        for name, record in recorded.items():
            content = (folder / name).read_bytes()
            assert record == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


SKIPPED = {
    "weights are deleted": ("sft/model.safetensors", lambda file: file.unlink()),
    "weights are cut": ("sft/model.safetensors", cut),
    "rows are cut": ("scored/groups.jsonl", cut),
    "a tokenizer is deleted": ("base/tokenizer.json", lambda file: file.unlink()),
    "a reward model is deleted": ("rate/model.safetensors", lambda file: file.unlink()),
    "the last step is damaged": ("again/config.json", cut),
}


@pytest.mark.parametrize("what", SKIPPED)
def test_a_finished_step_is_not_skipped_where(made, tmp_path, what):
    name, damage = SKIPPED[what]
    root = copied(made, tmp_path)
    damage(root / name)
    with pytest.raises(RunError, match=re.escape(f"{root / name}: ")) as error:
        run(tmp_path, text=SCORED)
    step = name.partition("/")[0]
    assert f"--rerun-from {step}" in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_step_that_is_made_again_is_whole(made, tmp_path):
    root = copied(made, tmp_path)
    (root / "again/model.safetensors").unlink()
    ended = CliRunner().invoke(app, ["run", str(written(tmp_path, SCORED)), "--rerun-from", "again"])
    assert ended.exit_code == 0, ended.output
    assert (root / "again/model.safetensors").read_bytes() == (made / "runs/small/again/model.safetensors").read_bytes()


INPUTS = {
    "a policy": ("sft/model.safetensors", "again"),
    "rows": ("scored/groups.jsonl", "again"),
    "a reward model": ("rate/model.safetensors", "scored"),
    "a configuration": ("base/config.json", "sft"),
}


@pytest.mark.parametrize("what", INPUTS)
def test_a_flipped_bit_in_an_input_is_found_before_a_step_reads_it(made, tmp_path, what):
    name, reader = INPUTS[what]
    root = copied(made, tmp_path)
    flip(root / name)
    shutil.rmtree(root / reader)
    with pytest.raises(RunError, match=re.escape(f"{root / name}: damaged")) as error:
        run(tmp_path, text=SCORED)
    assert f"step {reader!r} reads it" in str(error.value)
    assert not (root / reader).exists() and not (root / f"{reader}.partial").exists()


def test_a_damaged_input_of_a_stopped_step_is_blamed_and_the_checkpoint_is_kept(stopped, tmp_path):
    root = copied(stopped, tmp_path)
    whole = (root / "sft/model.safetensors").read_bytes()
    flip(root / "sft/model.safetensors")
    with pytest.raises(RunError, match=r"sft/model\.safetensors: damaged") as error:
        run(tmp_path, *CHECKPOINTS)
    assert "checkpoint" not in str(error.value)
    (root / "sft/model.safetensors").write_bytes(whole)
    made, told = run(tmp_path, *CHECKPOINTS)
    assert any("resumed after step 1" in note for note in told.notes)
    assert made["dpo"]["optimizer_steps"] == 3


def changed_digit(file):
    """Change a digit of the first line's loss."""
    text = file.read_text()
    at = text.index('"loss": 0.') + len('"loss": 0.')
    file.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])


RESUMED = {
    "a shard": ("dpo.partial/checkpoint-1/shard-00000.safetensors", flip),
    "a cut shard": ("dpo.partial/checkpoint-1/shard-00000.safetensors", cut),
    "metrics": ("dpo.partial/metrics.jsonl", changed_digit),
}


@pytest.mark.parametrize("what", RESUMED)
def test_a_damaged_checkpoint_is_found_before_it_is_resumed(stopped, tmp_path, what):
    name, damage = RESUMED[what]
    root = copied(stopped, tmp_path)
    damage(root / name)
    with pytest.raises(RunError, match=re.escape(f"{root / name}: damaged")) as error:
        run(tmp_path, *CHECKPOINTS)
    assert "remove" in str(error.value)


def test_a_damaged_reference_is_found_on_a_resume(stopped, tmp_path):
    root = copied(stopped, tmp_path)
    (file,) = root.glob("references/*/*.json")
    values = json.loads(file.read_text())
    file.write_text(json.dumps({key: [total - 1.0, length] for key, (total, length) in values.items()}))
    with pytest.raises(RunError, match=re.escape(f"{file}: damaged")):
        run(tmp_path, *CHECKPOINTS)


def test_wrong_references_without_a_checksum_are_found_on_a_resume(stopped, tmp_path):
    root = copied(stopped, tmp_path)
    (file,) = root.glob("references/*/*.json")
    values = json.loads(file.read_text())
    file.unlink()
    older = file.with_name("0" * 32 + ".json")  # as older versions named their files
    older.write_text(json.dumps({key: [total - 1.0, length] for key, (total, length) in values.items()}))
    with pytest.raises(RunError, match=r"step 2: policy and reference differ by .* nats per token before the first"):
        run(tmp_path, *CHECKPOINTS)


def test_a_run_of_an_older_version_is_accepted_and_said_to_be_not_verified(made, tmp_path):
    root = copied(made, tmp_path)
    for manifest in root.glob("*/manifest.json"):
        content = json.loads(manifest.read_text())
        del content["files"]
        manifest.write_text(json.dumps(content))
    shutil.rmtree(root / "again")
    _, told = run(tmp_path, text=SCORED)
    assert [note for note in told.notes if note.startswith("sft: finished before, skipped; its files are not verified")]
    assert [note for note in told.notes if note.startswith("scored: its files are not verified")]
    ended = CliRunner().invoke(app, ["verify", str(root)])
    assert ended.exit_code == 0
    assert "not verified: written by a version without checksums" in ended.output


def test_verify_reads_every_file_of_a_run_and_of_a_step(made, stopped, tmp_path):
    for target in (made / "runs/small", made / "runs/small/dpo", stopped / "runs/small"):
        ended = CliRunner().invoke(app, ["verify", str(target)])
        assert ended.exit_code == 0, ended.output
    assert "dpo.partial/checkpoint-1" in ended.output
    assert "references/" in ended.output
    root = copied(stopped, tmp_path)
    damaged = [
        "base/tokenizer.json",
        "sft/model.safetensors",
        "sft/metrics.jsonl",
        "dpo.partial/checkpoint-1/shard-00000.safetensors",
        *(path.relative_to(root).as_posix() for path in root.glob("references/*/*.json")),
    ]
    for name in damaged:
        flip(root / name)
    ended = CliRunner().invoke(app, ["verify", str(root)])
    assert isinstance(ended.exception, RunError)
    assert f"{len(damaged)} of " in str(ended.exception) and "missing or damaged" in str(ended.exception)
    for name in damaged:
        assert f"{root / name}: damaged" in ended.output


def test_a_step_that_a_command_reads_is_verified(made, tmp_path):
    root = copied(made, tmp_path)
    before = {name: content_of(str(root / name)) for name in ("sft", "scored/groups.jsonl")}
    flip(root / "sft/model.safetensors")
    flip(root / "scored/groups.jsonl")
    for name in before:
        with pytest.raises(RunError, match="damaged: its content has changed since it was written"):
            content_of(str(root / name))
    with pytest.raises(RunError, match=r"model\.safetensors: damaged"):
        push_folder(root / "sft", "owner/name", dry_run=True)
    (root / "sft/manifest.json").unlink()  # an edited folder is used by copying it without its manifest
    assert content_of(str(root / "sft")) != before["sft"]
    assert len(push_folder(root / "sft", "owner/name", dry_run=True).files) > 1
