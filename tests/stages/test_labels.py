"""Rows with one labelled response in a recipe: trained by kto, refused by losses on pairs, and the reverse."""

import json

import pytest
from small_runs import RECIPE, metrics, run, written

from align.commands.check import check
from align.errors import InputError
from align.workflow.estimate import estimate
from align.workflow.recipe.load import load_recipe

LABELLED = [
    {"prompt": f"What is {number}?", "completion": f"It is {number % 3}.", "label": number % 3 > 0}
    for number in range(12)
]
PAIRS = [{"prompt": f"What is {number}?", "chosen": "A number.", "rejected": "No."} for number in range(12)]
SCORED = [{**row, "score_chosen": 7.5, "score_rejected": 2.0} for row in PAIRS]
GROUPS = [  # all right, none right, and both
    {
        "prompt": f"Is it {number}?",
        "responses": [{"content": f"{kind}{number}", "reward": reward} for kind, reward in rs],
    }
    for number, rs in enumerate([(("a", 1), ("b", 1)), (("a", 0), ("b", 0)), (("a", 1), ("b", 0), ("c", 0))] * 4)
]
KTO = RECIPE.replace("{{name: dpo}}", "{{name: kto}}").replace("limit: 12, responses: 2", "held_out: 0.3")


def recipe(folder, rows, text=KTO):
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return text.replace('"tasks:general", held_out: 0.3', f"{folder / 'rows.jsonl'}")


@pytest.mark.parametrize(
    ("rows", "desirable", "undesirable"), [(LABELLED, 8, 4), (GROUPS, 12, 16), (PAIRS, 12, 12)], ids=str
)
def test_labelled_rows_are_trained_and_counted_by_their_label(tmp_path, rows, desirable, undesirable):
    made, _ = run(tmp_path, text=recipe(tmp_path, rows))
    counts = json.loads((tmp_path / "runs/small/dpo/manifest.json").read_text())["rows"]
    assert (counts["desirable"], counts["undesirable"], counts["trained"]) == (desirable, undesirable, 12)
    lines = metrics(tmp_path, "dpo")
    assert len(lines) == 3
    assert all(line["kl"] >= 0 and line["kl/tokens_computed"] > 0 for line in lines)
    assert not [file for file in (tmp_path / "runs/small/dpo").iterdir() if file.name.endswith(".computed")]


@pytest.mark.parametrize(
    ("rows", "loss", "message"),
    [
        (LABELLED, "dpo", "the row is one response with a label, and a comparison needs two; the loss kto takes"),
        (LABELLED, "rpo_bwd_kl", "the loss kto takes such rows"),
        (SCORED, "kto", "a reward is 7.5, and kto needs labels: 1 for a desirable response, 0 for an undesirable one"),
        (SCORED, "kto", "rpo_bwd_kl and dpo are losses on rewards and on pairs"),
    ],
)
def test_rows_of_the_other_kind_are_refused_before_anything_runs(tmp_path, rows, loss, message):
    text = recipe(tmp_path, rows, KTO.replace("name: kto", f"name: {loss}"))
    with pytest.raises(InputError) as error:
        check(written(tmp_path, text), ())
    assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(InputError) as error:  # a step that is run without the check stops at its first row
        run(tmp_path, text=text)
    assert message in str(error.value)


def test_a_labelled_row_among_pairs_is_an_error_with_its_place(tmp_path):
    text = recipe(tmp_path, [*PAIRS, LABELLED[0]], KTO.replace("name: kto", "name: dpo"))
    with pytest.raises(InputError, match=r"rows\.jsonl: row 13: .*label"):
        run(tmp_path, text=text)


def test_settings_without_effect_are_refused_together(tmp_path):
    text = recipe(tmp_path, LABELLED).replace(
        "loss: {{name: kto}}", "min_chosen: 1.0, loss: {{name: kto, sft_weight: 1.0}}"
    )
    text = text.replace(
        "learning_rate: 1.0e-3, prompts_per_step: 4}}}}\n", "learning_rate: 1.0e-3, prompts_per_step: 1}}}}\n"
    )
    with pytest.raises(InputError) as error:
        run(tmp_path, text=text)
    told = str(error.value)
    assert "a loss on labels has no SFT term" in told
    assert "min_chosen" in told and "is for losses that compare responses, and kto does not" in told
    assert "kto estimates its reference point from the other prompts of a step: use at least 2" in told


def test_the_estimate_of_a_step_counts_the_passes_over_mismatched_pairs(tmp_path):
    flops = {}
    for loss in ("kto", "apo_zero_unpaired"):
        path = written(tmp_path, recipe(tmp_path, LABELLED, KTO.replace("name: kto", f"name: {loss}")))
        *_, step = estimate(load_recipe(path))
        flops[loss] = step.flops
    # In forward passes: 3 of training and 1 of the reference; and 2 of policy and reference over mismatched pairs
    assert flops["kto"] / flops["apo_zero_unpaired"] == pytest.approx(6 / 4, rel=0.01)
