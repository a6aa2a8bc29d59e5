"""A step of a recipe that selects its rows: the uniform run beside it, its cost, and settings that cannot work."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from small_runs import SMALL_POLICY, run, written

from align.accounting.flops import Decoder, Work
from align.data.writing import write
from align.errors import InputError
from align.models.policy import save_policy
from align.models.reward_model import load_reward_model, save_reward_model, set_pad_token
from align.models.settings import HeadSettings, LoraSettings, PolicySettings
from align.records import Demonstration, Message
from align.report import write_report
from align.report.selection.section import comparisons
from align.stages.costs.measured import Done
from align.stages.training.selecting import fixed_models
from align.testing import tiny_policy
from align.train.selection.settings import SelectionSettings
from align.workflow.estimate import estimate
from align.workflow.recipe.load import load_recipe

RECIPE = (
    SMALL_POLICY
    + """\
data:
  pool: {{path: "tasks:general", limit: 60, held_out: 0.1}}
  other: {{path: "tasks:code", limit: 60}}
  curated: {{path: "tasks:general", limit: 16, seed: 5}}
  pairs: {{path: "tasks:general", limit: 60, responses: 2, held_out: 0.1}}
steps:
  base: {{stage: import, vocab_size: 300}}
  reference: {{stage: sft, policy: base, data: curated, train: {{learning_rate: 1.0e-3, prompts_per_step: 4}}}}
  chosen:
    stage: sft
    policy: base
    data: {{pool: 1, other: 1}}
    train: {{learning_rate: 1.0e-3, prompts_per_step: 4}}
    selection: {{reference: "step:reference", chunks: 2}}
"""
)
PREFERENCE = """  dpo:
    stage: preference
    policy: base
    data: pairs
    loss: {{name: dpo}}
    train: {{learning_rate: 1.0e-3, prompts_per_step: 4, schedule: cosine}}
    selection: {{score: hard, chunks: 2}}
"""


def manifest(folder, step):
    return json.loads((folder / "runs/small" / step / "manifest.json").read_text())


@pytest.mark.slow
def test_a_selected_step_is_shown_beside_uniform_training_of_equal_flops(tmp_path):
    run(tmp_path, text=RECIPE)
    chosen, uniform = (manifest(tmp_path, name) for name in ("chosen", "chosen-uniform"))
    selected, beside = chosen["selection"], uniform["selection"]
    assert selected["compare"] == "step:chosen-uniform" and beside["score"] == "uniform"
    steps, factor = chosen["optimizer_steps"], 1 + 1 / (3 * 0.5)
    # The policy scores the rows of an epoch and the reference all rows; they have the same dimensions
    assert uniform["optimizer_steps"] == pytest.approx(steps * factor + chosen["rows"]["trained"] / 3 / 4, abs=1)
    compared, longest = round(steps * (1 + 1 / (3 * 0.5))), uniform["optimizer_steps"]
    assert [step for step, *_ in beside["curve"]] == pytest.approx([0, steps, compared, longest], abs=1)
    assert beside["scoring_flops"] == 0 < selected["scoring_flops"] < selected["training_flops"]
    flops = [each["training_flops"] + each["scoring_flops"] + each["reference_flops"] for each in (selected, beside)]
    assert flops[0] == pytest.approx(flops[1], rel=0.2)  # a whole step of few rows, and rows of unequal lengths
    # The held-out rows cost something, too; the reference's pass, 29 %, is estimated row by row
    assert chosen["ledger"]["flops"] == pytest.approx(flops[0], rel=0.1)
    assert selected["curve"][-1][1] == flops[0] and selected["curve"][0][1] == selected["reference_flops"]
    assert beside["reference_flops"] == 0
    assert selected["share/pool"] + selected["share/other"] == pytest.approx(1)
    page = write_report(tmp_path / "runs/small").read_text()
    assert 'id="selection"' in page and "Held-out loss over training FLOPs" in page


@pytest.mark.slow
def test_cross_fitted_references_are_trained_on_two_halves_of_the_rows(tmp_path):
    text = RECIPE.replace('reference: "step:reference"', "reference: cross_fit")
    run(tmp_path, text=text)
    names = ("chosen-uniform", "chosen", "chosen-fold-1", "chosen-fold-2")
    uniform, chosen, *halves = (manifest(tmp_path, name) for name in names)
    sizes = [half["rows"]["in_fold"] for half in halves]
    assert sum(sizes) == chosen["rows"]["trained"] == halves[0]["rows"]["trained"] and min(sizes) > 30
    work = [json.loads(path.read_text()) for path in (tmp_path / "runs/small").glob("references/*/*.json")]
    keys = [set(each) for each in work]  # of the rows that each reference scored
    assert sorted(map(len, keys)) == sorted(sizes) and not keys[0] & keys[1]
    # Uniform training of equal FLOPs also pays for the references: a pass over every row, and the training of both
    steps, fitted = chosen["optimizer_steps"], sum(half["rows"]["epoch"] for half in halves)
    expected = steps * (1 + 1 / (3 * 0.5)) + sum(sizes) / 3 / 4 + fitted / 4
    assert uniform["optimizer_steps"] == pytest.approx(expected, abs=1)
    planned = {each.name: each for each in estimate(load_recipe(tmp_path / "small.yaml"))}["chosen-uniform"]
    assert planned.training.optimizer_steps == uniform["optimizer_steps"]
    assert "a pass of the reference and its training" in planned.parts["selection"]
    selected = chosen["selection"]
    assert selected["reference_training_flops"] == sum(half["selection"]["training_flops"] for half in halves) > 0
    assert selected["curve"][0][1] == selected["reference_flops"] + selected["reference_training_flops"]
    (compared,) = comparisons({"chosen": selected, "chosen-uniform": uniform["selection"]})
    assert compared.verdict in ("won", "lost") and "training of the references" in compared.once


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.usefixtures("forked_launches")
def test_processes_that_share_out_a_model_choose_the_rows_of_one(tmp_path, monkeypatch):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install align[deepspeed]")
    for name, value in {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}.items():
        monkeypatch.setenv(name, value)
    text = RECIPE.replace("  chosen:", "  fitted:")
    text = text.replace('reference: "step:reference", chunks: 2', "reference: cross_fit, compare: null, until: 0.1")
    text += """  chosen:
    stage: sft
    policy: base
    data: {{pool: 1, other: 1}}
    train: {{learning_rate: 1.0e-3, prompts_per_step: 4}}
    selection: {{reference: "cross_fit:fitted", compare: null, coupling: gradient, score_tokens: 9}}
"""
    alone, launched = (tmp_path / name / "runs/small" for name in ("alone", "launched"))
    run(tmp_path / "alone", text=text)
    shutil.copytree(alone, launched)
    shutil.rmtree(launched / "chosen")
    run(tmp_path / "launched", "steps.chosen.launch=launch/zero3-cpu-2.yaml", text=text)
    rows = [[step[1] for step in map(json.loads, lines[1:])] for lines in map(journal, (alone, launched))]
    groups, groups_of_two = ([groups for ((groups, _),) in each] for each in rows)
    made, made_by_two = (manifest(tmp_path / name, "chosen") for name in ("alone", "launched"))
    assert groups == groups_of_two and len(groups) == made["optimizer_steps"] > 10
    assert made_by_two["ledger"]["devices"] == 2 and made_by_two["fingerprint"] == made["fingerprint"]
    trained, trained_by_two = (load_file(each / "chosen/model.safetensors") for each in (alone, launched))
    assert max((trained[name] - trained_by_two[name]).abs().max().item() for name in trained) <= 5e-5


def journal(folder):
    return (folder / "chosen/selection.jsonl").read_text().splitlines()


def test_a_step_that_chooses_tokens_is_shown_beside_uniform_training_of_equal_flops(tmp_path):
    text = RECIPE.replace('{{reference: "step:reference", chunks: 2}}', '{{reference: "step:reference", tokens: 0.4}}')
    path = written(tmp_path, text.replace("{{pool: 1, other: 1}}", "pool"))
    run(tmp_path, text=text.replace("{{pool: 1, other: 1}}", "pool"))
    chosen, uniform = (manifest(tmp_path, name) for name in ("chosen", "chosen-uniform"))
    steps = chosen["optimizer_steps"]
    assert steps == -(-chosen["rows"]["trained"] // 4)  # every row once
    # The reference's pass over every row costs a third of training on it
    assert uniform["optimizer_steps"] == pytest.approx(steps * (1 + 1 / 3), abs=1)
    selected = chosen["selection"]
    assert (selected["score"], selected["filter"]) == ("tokens", pytest.approx(0.6))
    assert 0.4 <= selected["token_share"] < 0.5
    assert selected["scoring_flops"] == 0 < selected["reference_flops"] == selected["curve"][0][1]
    assert "loss" in uniform["last"] and "selection/token_share" not in uniform["last"]
    planned = {each.name: each for each in estimate(load_recipe(path))}["chosen"]
    evaluated = chosen["ledger"]["flops"] - selected["training_flops"] - selected["reference_flops"]
    assert planned.flops == pytest.approx(selected["training_flops"] + selected["reference_flops"], rel=0.1)
    assert 0 < evaluated < 0.2 * planned.flops  # of the few held-out rows
    assert "40% of the trained tokens of each row" in planned.parts["selection"]
    page = write_report(tmp_path / "runs/small").read_text()
    assert "of tokens" in page


def test_the_bound_of_a_step_whose_rows_are_not_made_yet_counts_its_selection(tmp_path):
    rows = [Demonstration((Message("user", f"Say {row}."), Message("assistant", "Gladly."))) for row in range(64)]
    write(tmp_path / "rows.jsonl", rows)
    text = RECIPE.replace("data:\n", f'data:\n  written: {{{{path: "{tmp_path}/rows.jsonl"}}}}\n', 1)
    curate = "  cleaned: {{stage: curate, data: written, held_out: 0.1}}\n  chosen:"
    text = text.replace("  chosen:", curate).replace("{{pool: 1, other: 1}}", "cleaned")
    text = text.replace("chunks: 2", "chunks: 2, compare: null")

    def flops(name, *changes, text=text):
        found = {each.name: each for each in estimate(load_recipe(written(tmp_path / name, text), changes))}["chosen"]
        assert found.bound
        return found.flops, found.parts.get("selection", "")

    every, none = flops("all", "steps.chosen.selection=null")
    assert none == ""
    # Half of the rows are trained on; all are scored once by the policy and once by the reference, of equal sizes
    found, told = flops("rows")
    assert found == pytest.approx(every * (0.5 + 1 / 3 + 1 / 3), rel=0.02) and "4 of 8 rows" in told
    found, told = flops("tokens", text=text.replace("chunks: 2", "tokens: 0.4"))
    assert found == pytest.approx(every * (1 + 1 / 3), rel=0.02) and "40% of the trained tokens" in told
    # One of four layers scores all rows and trains a quarter of them; all layers train another quarter
    deep = text.replace("num_hidden_layers: 1", "num_hidden_layers: 4")
    deep_every, _ = flops("deep", "steps.chosen.selection=null", text=deep)
    by_layers = deep.replace('reference: "step:reference", chunks: 2', "score: hard, score_layers: 1")
    found, _ = flops("layers", text=by_layers)
    assert found == pytest.approx(deep_every / 4 + every / 4 + every / 3, rel=0.02) and every < 0.6 * deep_every


def test_only_sft_chooses_tokens(tmp_path):
    text = RECIPE + PREFERENCE.replace("{{score: hard, chunks: 2}}", '{{tokens: 0.5, reference: "step:base"}}')
    with pytest.raises(InputError, match="selection.tokens: is for sft; preference can choose rows"):
        load_recipe(written(tmp_path, text))


def test_references_and_scorers_are_steps_that_other_steps_can_use(tmp_path):
    text = RECIPE.replace('reference: "step:reference"', "reference: cross_fit")
    other = """  easy:
    stage: sft
    policy: base
    data: {{pool: 1, other: 1}}
    train: {{learning_rate: 1.0e-3, prompts_per_step: 4}}
    selection: {{score: easy, reference: "cross_fit:chosen", compare: null}}
"""
    recipe = load_recipe(written(tmp_path, text + other))
    folds = ["chosen-fold-1", "chosen-fold-2"]
    assert list(recipe.steps)[-5:] == [*folds, "chosen-uniform", "chosen", "easy"]
    assert [recipe.steps[name].selection.fold for name in folds] == [1, 2]
    scored = load_recipe(written(tmp_path / "scorer", RECIPE), ("steps.chosen.selection.scorer=step:base",))
    assert {"base", "reference"} <= set(scored.inputs("chosen")) & set(scored.inputs("chosen-uniform"))
    for name in ("chosen", "chosen-uniform", "easy"):
        assert set(folds) <= set(recipe.inputs(name))


def test_under_a_decaying_schedule_a_second_uniform_run_has_as_many_steps(tmp_path):
    recipe = load_recipe(written(tmp_path, RECIPE + PREFERENCE))
    assert list(recipe.steps)[-3:] == ["dpo-uniform", "dpo-uniform-steps", "dpo"]
    equal = [recipe.steps[name].selection.equal for name in ("dpo-uniform", "dpo-uniform-steps")]
    assert equal == ["flops", "steps"]
    assert recipe.steps["dpo-uniform"].start == recipe.steps["dpo"].start == "base"


def test_a_reward_model_is_compared_with_one_of_the_same_attributes(tmp_path):
    save_policy(*tiny_policy(), tmp_path / "policy")
    for names in (("a", "b"), ("b", "a")):
        model, tokenizer = load_reward_model(
            PolicySettings(path=str(tmp_path / "policy")), HeadSettings(attributes=names, weights=(1.0, 1.0))
        )
        set_pad_token(model, tokenizer, ())
        save_reward_model(model, tokenizer, tmp_path / "".join(names))
    step = SimpleNamespace(selection=SelectionSettings(score="easy", reference="step:curated"), has_lm_head=False)
    quantized = PolicySettings(path="base", quantize="nf4", lora=LoraSettings(adapters="continued"))

    def load(name):
        inputs = SimpleNamespace(policy=quantized, folders={"curated": tmp_path / name})
        (load,) = fixed_models(step, inputs, tokenizer, ("a", "b"))["reference"].loads
        return load()

    assert load("ab").rating.names == ("a", "b")
    with pytest.raises(InputError, match="the reference predicts b, a, and the step a, b"):
        load("ba")


def test_the_ledger_counts_the_reference_by_its_own_size():
    own = Decoder(hidden=8, layers=1, query_width=8, kv_width=8, intermediate=16, vocab=10)
    reference = replace(own, layers=3)
    layer = 4 * 8 * 8 + 3 * 8 * 16  # weights; 2 FLOPs of each per token, and 4 of the width per attended pair
    work, scored = Work(100, 0, 0), Work(50, 7, 20)
    done = Done(dimensions=own, trained=work, others=((reference, scored),))
    assert done.flops[0] == 3 * 2 * layer * 100 + 3 * (2 * layer * 50 + 4 * 8 * 7) + 2 * 8 * 10 * 20
    assert replace(done, others=(("no known layers", scored),)).flops == (None, "no known layers")


def test_fewer_rows_per_step_than_the_default_chunks_are_accepted(tmp_path):
    load_recipe(written(tmp_path, RECIPE.replace(", chunks: 2", "")))


WRONG = {
    "kto": ("steps.dpo.loss.name=kto", "kto estimates"),
    "chunks": ("steps.dpo.selection.chunks=5", "more than the 4 rows"),
    "one draw": ("steps.dpo.selection={score: hard, chunks: 1, coupling: gradient}", "needs chunks and prompts"),
    "held out": ("data.pairs.held_out=0", "needs held-out rows"),
    "compare": ("steps.dpo.selection.compare=step:nowhere", "no earlier step is called 'nowhere'"),
    "reference": ("steps.chosen.selection.reference=step:nowhere", "no step is called 'nowhere'"),
    "cross-fitting": ("steps.chosen.selection.reference=cross_fit:reference", "no step is called 'reference-fold-1'"),
    "score": ("steps.dpo.selection.score=tests:nothing", "nothing"),
    "layers": ("steps.dpo.selection.score_layers=1", "score_layers: is for losses without reference"),
    "layers of the reference": (
        "steps.chosen.selection.score_layers=1",
        "'reference' was not trained through its first 1",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_cannot_work_are_refused_where_they_are_written(tmp_path, name):
    override, message = WRONG[name]
    with pytest.raises(InputError, match=message):
        load_recipe(written(tmp_path, RECIPE + PREFERENCE), (override,))


def test_a_step_without_selection_has_the_content_hash_that_it_had_before(tmp_path):
    recipe = load_recipe(written(tmp_path, RECIPE))
    assert "selection" not in recipe.steps["reference"].decisive()
    assert recipe.steps["chosen"].decisive()["selection"].keys() >= {"score", "filter"}
    assert "compare" not in recipe.steps["chosen"].decisive()["selection"]
