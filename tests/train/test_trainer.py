"""`Trainer` trains as a recipe does, resumes, takes any kind of loss, and saves a plain Hugging Face folder."""

import json
import math
from dataclasses import asdict
from functools import partial

import pytest
import torch
from datasets import Dataset
from small_runs import RECIPE
from small_runs import metrics as recipe_metrics
from small_runs import run as run_recipe
from tiny_rewards import NAMES, rated
from tiny_rewards import model as reward_model
from tiny_training import NOT_NUMBERS, Killed, Recorder, comparisons, numbers, policy, same, weights
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from align import Trainer
from align.data.reading import read
from align.data.token_groups import TokenGroup
from align.errors import InputError, RunError
from align.losses.table import preference_loss
from align.models.policy import load_policy
from align.models.settings import PolicySettings
from align.records import Comparison, Message, Response
from align.testing.tiny import tiny_demonstrations, tiny_policy, tiny_preferences
from align.train.objectives.reward import RegressionObjective
from align.train.objectives.settings import PreferenceSettings
from align.train.settings import TrainSettings

SETTINGS = TrainSettings(learning_rate=5e-3, prompts_per_step=8, epochs=2, checkpoint_minutes=None)
ROWS = tiny_preferences(24)


def trainer(folder, rows=ROWS, loss="dpo", *, stop_after=None, **changes):
    model, tokenizer = tiny_policy()
    settings = SETTINGS.model_copy(update=changes)
    return Trainer(model, tokenizer, rows, loss=loss, settings=settings, folder=folder, progress=Recorder(stop_after))


def losses(result):
    return [line["loss"] for line in result.metrics]


def write_rows(folder):
    """Write 24 demonstrations and 24 comparisons, and return the paths of both files."""
    shown = [{"messages": [asdict(message) for message in row.messages]} for row in tiny_demonstrations(24)]
    pairs = [
        {"prompt": row.prompt[0].content, "responses": [asdict(response) for response in row.responses]} for row in ROWS
    ]
    paths = folder / "shown.jsonl", folder / "pairs.jsonl"
    for path, rows in zip(paths, (shown, pairs), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def test_a_trainer_has_the_same_numbers_as_a_recipe_on_the_same_rows(tmp_path):
    shown, pairs = write_rows(tmp_path)
    text = RECIPE.replace('{{path: "tasks:general", limit: 24}}', f"{{{{path: {shown}}}}}")
    text = text.replace('{{path: "tasks:general", limit: 12, responses: 2}}', f"{{{{path: {pairs}}}}}")
    run_recipe(tmp_path, text=text)
    settings = TrainSettings(learning_rate=1e-3, prompts_per_step=4)  # as in the recipe
    for step, start, path in (("sft", "base", shown), ("dpo", "sft", pairs)):
        model, tokenizer = load_policy(PolicySettings(path=str(tmp_path / f"runs/small/{start}")))
        rows = list(read(str(path)).records)
        made = Trainer(model, tokenizer, rows, loss=step, settings=settings, folder=tmp_path / step)
        result = made.train()
        expected = recipe_metrics(tmp_path, step)
        assert len(expected) == 6
        for name in expected[0].keys() - NOT_NUMBERS:
            assert [line[name] for line in result.metrics] == [line[name] for line in expected], (step, name)
        made.save(tmp_path / f"saved-{step}")
        folders = tmp_path / f"saved-{step}", tmp_path / f"runs/small/{step}"
        saved, trained = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
        assert same(saved.state_dict(), trained.state_dict())
        assert saved.generation_config.eos_token_id == trained.generation_config.eos_token_id


@pytest.mark.parametrize("killed_after", [2, 4])
def test_a_killed_trainer_resumes_with_the_same_arguments(tmp_path, killed_after):
    whole = trainer(tmp_path / "whole")
    whole.train()
    killed = trainer(tmp_path / "killed", stop_after=killed_after, checkpoint_steps=1)
    with pytest.raises(Killed):
        killed.train()
    with pytest.raises(RunError, match="load the policy again and make a new Trainer"):
        killed.train()
    again = trainer(tmp_path / "killed", checkpoint_steps=1)
    result = again.train()
    assert any("resumed after step" in note for note in again.loop.progress.notes)
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    assert same(weights(again.policy), weights(whole.policy))
    assert len(result.metrics) == 6


def own_dpo(policy_BK, reference_BK, rewards_BK, lengths_BK, mask_BK, *, beta=0.1):
    """DPO of two responses, written without the library."""
    ratio_BK = policy_BK - reference_BK
    sign_B = (rewards_BK[:, 0] - rewards_BK[:, 1]).sign()
    return -logsigmoid(beta * sign_B * (ratio_BK[:, 0] - ratio_BK[:, 1]))


def test_a_loss_may_be_a_name_settings_an_object_or_a_function(tmp_path):
    kinds = ["dpo", PreferenceSettings(name="dpo"), preference_loss("dpo"), own_dpo]
    found = [losses(trainer(tmp_path / str(at), loss=loss).train()) for at, loss in enumerate(kinds)]
    assert found[0] == found[1] == found[2]
    assert found[3] == pytest.approx(found[0], abs=1e-9)
    assert found[0][0] == pytest.approx(math.log(2), abs=1e-6)
    assert found[0][-1] < 0.9 * found[0][0]


def test_another_loss_does_not_resume_a_checkpoint(tmp_path):
    with pytest.raises(Killed):
        trainer(tmp_path, loss=preference_loss("dpo"), stop_after=2, checkpoint_steps=1).train()
    for other in (preference_loss("dpo", beta=0.2), preference_loss("ipo"), own_dpo):
        with pytest.raises(RuntimeError, match="the checkpoint has other settings or data"):
            trainer(tmp_path, loss=other).train()


def dpo_with(beta):
    """Return a loss of one's own, made with a setting."""
    return partial(own_dpo, beta=beta)


@pytest.mark.parametrize("make", [dpo_with, lambda beta: preference_loss(f"{__name__}:dpo_with", beta=beta)])
def test_another_setting_of_a_loss_of_ones_own_does_not_resume_a_checkpoint(tmp_path, make):
    with pytest.raises(Killed):
        trainer(tmp_path, loss=make(0.1), stop_after=2, checkpoint_steps=1).train()
    with pytest.raises(RuntimeError, match="the checkpoint has other settings or data"):
        trainer(tmp_path, loss=make(0.2)).train()
    assert len(trainer(tmp_path, loss=make(0.1)).train().metrics) == 6


def test_a_policy_that_was_trained_is_trained_further_as_one_that_was_loaded(tmp_path):
    model, tokenizer = tiny_policy()
    first = SETTINGS.model_copy(update={"precision": "bf16", "tokens_per_micro_batch": 20, "max_steps": 1})
    made = Trainer(model, tokenizer, ROWS, loss="dpo", settings=first, folder=tmp_path / "first")
    assert model.max_rows == 20
    made.train()
    made.save(tmp_path / "saved")
    second, found = SETTINGS.model_copy(update={"max_steps": 2}), list[list[float]]()
    for number, each in enumerate([model, load_policy(PolicySettings(path=str(tmp_path / "saved")))[0]]):
        further = Trainer(each, tokenizer, ROWS, loss="dpo", settings=second, folder=tmp_path / f"second-{number}")
        found.append(losses(further.train()))
        assert further.loop.forward.name == "tree" and each.max_rows is None
    assert found[0] == found[1]


def test_demonstrations_and_the_best_of_comparisons_are_imitated(tmp_path):
    made = trainer(tmp_path, [*tiny_demonstrations(10), *ROWS], loss="sft")
    result = made.train()
    assert len(made.training_run.train) == 34
    assert made.counts["best of a comparison"] == 24
    assert result.last_metrics["loss"] < 0.7 * result.first_metrics["loss"]


@pytest.mark.parametrize("form", [list, Dataset.from_list])
def test_dicts_in_memory_are_the_same_rows_as_records(tmp_path, form):
    animals = ("wolf", "fish", "bird")
    texts = [
        (f"What color is the {each}?", f"Yes, the {each} is green.", f"No, the {each} is green.") for each in animals
    ]
    dicts = [dict(zip(("prompt", "chosen", "rejected"), text, strict=True)) for text in texts]
    records = [
        Comparison((Message("user", asked),), (Response(good), Response(bad)), chosen=0) for asked, good, bad in texts
    ]
    given, wanted = trainer(tmp_path / "a", form(dicts)), trainer(tmp_path / "b", records)
    ids = [
        [[part.ids.tolist() for part in group.sequences] for group in made.training_run.train]
        for made in (given, wanted)
    ]
    assert ids[0] == ids[1] and len(ids[0]) == 3


def test_token_groups_are_trained_on_as_they_are(tmp_path):
    groups = comparisons(16)
    settings = SETTINGS.model_copy(update={"keep": "best", "evaluate_every": 1})
    made = Trainer(policy(), None, groups, loss="dpo", settings=settings, folder=tmp_path, held_out=groups[:4])
    result = made.train()
    assert all(isinstance(each, TokenGroup) for each in made.training_run.train)
    held_out = [line["held_out/loss"] for line in result.metrics]
    assert result.kept_metrics["held_out/loss"] == min(held_out) < held_out[0]


def test_a_reward_model_is_trained_by_its_objective(tmp_path):
    groups = rated(16)
    made = Trainer(reward_model(), None, groups, loss=RegressionObjective(NAMES), settings=SETTINGS, folder=tmp_path)
    result = made.train()
    assert result.last_metrics["loss"] < result.first_metrics["loss"]


def test_a_saved_folder_is_whole_and_never_replaces_another(tmp_path):
    made = trainer(tmp_path / "run", max_steps=1)
    made.train()
    made.save(tmp_path / "policy")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded(ids).logits, made.policy.hf(ids).logits)
    with pytest.raises(InputError, match="already exists; choose a new folder"):
        made.save(tmp_path / "policy")


TIED = Comparison((Message("user", "Hi"),), (Response("Yes", 1.0), Response("No", 1.0)))


@pytest.mark.parametrize(
    ("rows", "loss", "message"),
    [
        ([], "dpo", r"no row is left to train on \(no rows\)"),
        ([TIED, TIED], "dpo", r"no row is left to train on \(dropped:no response is preferred 2, records 2, rows 2\)"),
        (ROWS, "dpoo", "did you mean 'dpo'"),
        (tiny_demonstrations(2), "dpo", "rows: row 1: the row is a demonstration, but training needs comparisons"),
        ([{"prompt": "q", "chosen": "a"}], "dpo", "rows: row 1: the row has chosen without its counterpart"),
        ([{"prompt": "q", "chosen": "a", "rejected": "b"}, 3], "dpo", "rows: row 2: the row is of type int"),
        (None, "dpo", "rows is of type NoneType; records are needed"),
        ("pairs.jsonl", "dpo", "rows: row 1: is of type str; records are needed"),
        ([*comparisons(1), ROWS[0]], "dpo", "rows: token groups and records are mixed"),
    ],
)
def test_what_cannot_be_trained_on_is_one_clear_line(tmp_path, rows, loss, message):
    with pytest.raises(InputError, match=message):
        trainer(tmp_path, rows, loss)
