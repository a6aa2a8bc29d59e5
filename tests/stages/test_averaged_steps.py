"""`train.average` of a step: what it saves, what `align check` says of it, and what is refused."""

import pytest
import torch
from safetensors.torch import load_file
from small_runs import RECIPE, ROOT, run, written

from align.errors import InputError
from align.workflow.estimate import ModelPlans, disk_need
from align.workflow.estimate import estimate as check
from align.workflow.recipe.load import load_recipe

AVERAGE = "steps.sft.train.average={last: 3, every: 2}"  # of 6 steps: 2, 4 and 6


def test_a_step_saves_the_mean_of_what_it_would_save_if_it_stopped_earlier(tmp_path):
    made, told = run(tmp_path / "averaged", AVERAGE, until="sft")
    stopped = []
    for step in (2, 4, 6):
        run(tmp_path / f"{step}", f"steps.sft.train.until_step={step}", until="sft")
        stopped.append(load_file(tmp_path / f"{step}/runs/small/sft/model.safetensors"))
    for name, value in load_file(tmp_path / "averaged/runs/small/sft/model.safetensors").items():
        mean = torch.stack([each[name].double() for each in stopped]).mean(0)
        torch.testing.assert_close(value.double(), mean, rtol=3e-7, atol=1e-8)
    assert made["sft"]["averaged_steps"] == [2, 4, 6]
    assert "the weights are now the mean of those after steps 2, 4, 6" in told.notes
    assert made["sft"]["saved"]["max_difference"] < 1e-4


def test_check_counts_the_average_like_a_moment(tmp_path, monkeypatch):
    def found(*overrides):
        recipe = load_recipe(written(tmp_path), overrides)
        return next(each for each in check(recipe) if each.name == "sft"), disk_need(ModelPlans(recipe))[1]

    (plain, disk), (averaged, disk_averaged) = found(), found(AVERAGE)
    size = 4 * plain.weights
    memory, more = plain.training.memory, averaged.training.memory
    assert more.peak - memory.peak == size
    # Replicated under DDP, and sharded over the 8 processes under ZeRO
    added = [with_it - without for with_it, without in zip(more.by_stage, memory.by_stage, strict=True)]
    assert added == [size, *[-(-plain.weights // 8) * 4] * 3]
    assert averaged.parts == {**plain.parts, "average": "of the weights after steps 2, 4, 6"}
    assert "average" not in plain.parts
    assert disk_averaged - disk == averaged.spare - plain.spare == 2 * size  # in two checkpoints


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "policy.lora.rank=2",
            "steps.sft.train.average: the mean of adapter factors is not the mean of their products",
        ),
        ("steps.sft.train.keep=best", "steps.sft.train.keep: cannot be combined with train.average"),
        ("steps.sft.train.max_steps=4", "steps.sft.train.average: 3 snapshots, one every 2 steps, need 5 optimizer"),
        (
            "steps.sft.selection={score: hard}",
            "steps.sft.train.average: the baseline is also evaluated before its last",
        ),
    ],
)
def test_what_an_average_cannot_be_combined_with_is_refused_when_the_recipe_is_loaded(tmp_path, override, said):
    with pytest.raises(InputError) as caught:
        load_recipe(written(tmp_path), [AVERAGE, "data.shown.held_out=0.2", override])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_too_few_rows_are_told_by_check(tmp_path):
    with pytest.raises(
        InputError, match=r"train\.average: 3 snapshots, one every 2 steps, need 5 optimizer steps, and"
    ):
        list(check(load_recipe(written(tmp_path), [AVERAGE, "data.shown.limit=8"])))


def test_a_search_of_an_averaged_step_is_refused():
    average = "steps.dpo.train.average={last: 2, every: 2}"
    with pytest.raises(InputError, match=r"search\.dpo\.rungs: cannot be combined with train\.average"):
        load_recipe(ROOT / "recipes/quickstart-search.yaml", [average])


def test_a_selection_is_not_compared_with_averaged_weights(tmp_path):
    second = """\
  chosen:
    stage: sft
    policy: base
    data: shown
    train: {{learning_rate: 1.0e-3, prompts_per_step: 4}}
    selection: {{score: hard, compare: "step:sft"}}
"""
    recipe = written(tmp_path, RECIPE + second)
    load_recipe(recipe, ["data.shown.held_out=0.2"])
    with pytest.raises(InputError, match=r"steps\.chosen\.selection\.compare: step:sft saves averaged weights"):
        load_recipe(recipe, ["data.shown.held_out=0.2", AVERAGE])
