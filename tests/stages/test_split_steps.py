"""Steps whose processes split sequences: what they leave, and what a check refuses."""

import pytest
from safetensors.torch import load_file
from small_runs import ROOT, metrics, run, written

from align.errors import InputError
from align.workflow.estimate import estimate as check
from align.workflow.recipe.load import load_recipe

LAUNCH = "steps.sft.launch=launch/ddp-cpu-2.yaml"
SPLIT = "steps.sft.train.sequence_parallel=2"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.usefixtures("forked_launches")
def test_a_step_that_splits_sequences_leaves_what_one_process_leaves(tmp_path):
    made, _ = run(tmp_path / "alone", until="sft")
    split, _ = run(tmp_path / "split", LAUNCH, SPLIT, until="sft")
    lines, of_split = (metrics(tmp_path / name, "sft") for name in ("alone", "split"))
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in of_split], abs=2e-6)
    files = (tmp_path / name / "runs/small/sft/model.safetensors" for name in ("alone", "split"))
    trained, of_split = map(load_file, files)
    assert max((trained[name] - of_split[name]).abs().max().item() for name in trained) <= 5e-5
    assert split["sft"]["fingerprint"] == made["sft"]["fingerprint"]  # how it runs is no part of what it is
    ledger, of_one = split["sft"]["ledger"], made["sft"]["ledger"]
    assert ledger["devices"] == 2
    for name in ("tokens_computed", "flops", "tokens_trained"):  # each token counts once, although two processes ran it
        assert ledger[name] == of_one[name] > 0
    # In six steps half of the gradient goes out and comes in. Of the tokens each process has half, whose queries, keys,
    # values and outputs it sends for one of the two heads, of width 8, in both passes
    exchanged = ledger["tokens_computed"] // 2 * 4 * 8 * 2
    assert ledger["wire_bytes"] == pytest.approx(4 * (6 * made["base"]["weights"] + exchanged), abs=4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([SPLIT], "2 needs a launch with a multiple of 2 processes, not 1"),
        ([LAUNCH, "steps.sft.train.sequence_parallel=3"], "3 needs a launch with a multiple of 3 processes, not 2"),
        ([LAUNCH, SPLIT, "policy.forward=plain"], "a padded forward cannot be split; use policy.forward: tree"),
        (
            [LAUNCH, SPLIT, "policy.from_config.num_attention_heads=1"],
            "the model's 1 query heads cannot be split over 2",
        ),
        ([LAUNCH, SPLIT, "policy.from_config.num_key_value_heads=1"], "the model's 1 key/value heads cannot be split"),
        ([LAUNCH, SPLIT, "steps.sft.selection={score: hard}"], "is for sft and preference without selection"),
    ],
)
def test_a_check_refuses_what_cannot_be_split(tmp_path, monkeypatch, overrides, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match=f"steps.sft.train.sequence_parallel: {message}") as error:
        list(check(load_recipe(written(tmp_path), overrides)))
    assert "\n" not in str(error.value)


def test_a_reward_model_cannot_be_split(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    step = "{stage: reward_model, data: pairs, loss: bt, train: {learning_rate: 1.0, sequence_parallel: 2}}"
    with pytest.raises(InputError, match=r"sequence_parallel: is for sft and preference without selection"):
        load_recipe(written(tmp_path), [f"steps.dpo={step}", "steps.dpo.launch=launch/ddp-cpu-2.yaml"])
