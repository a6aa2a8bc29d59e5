"""Resumed steps and searches that run: the same weights as an uninterrupted training, and the same trials."""

import itertools
import json
import math
import shutil

import pytest
from small_runs import RATE, Told, skip_page, skip_rate

from align.artifacts import read_json
from align.errors import InputError, RunError
from align.evaluation.sampled_task import with_kl
from align.evaluation.task import StartKL
from align.report import write_report
from align.report.page import render_markdown
from align.report.run_folder import read_run
from align.report.search.section import trial_rows
from align.stages.responses import evaluation
from align.workflow.launcher import Command
from align.workflow.runner import run_recipe
from align.workflow.search import calls as module_of_calls
from align.workflow.search import settings as module_of_settings
from align.workflow.search import tpe as module_of_tpe
from align.workflow.search.calls import assumed, calls
from align.workflow.spending import allowance

TRAIN = {"learning_rate": 3e-3, "prompts_per_step": 4, "epochs": 3, "schedule": "cosine", "warmup_steps": 2}
RECIPE = {
    "run": "small",
    "policy": {
        "from_config": {
            "model_type": "llama",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.05,
        },
        "chat_template": "chatml",
    },
    "data": {
        "shown": {"path": "tasks:general", "limit": 24},
        "pairs": {"path": "tasks:general", "limit": 12, "responses": 2},
        "held": {"path": "tasks:general", "limit": 16, "responses": 2, "held_out": 0.25},
        "val": {"path": "tasks:general", "split": "validation", "limit": 4},
        "test": {"path": "tasks:general", "split": "test", "limit": 4},
    },
    "steps": {
        "base": {"stage": "import", "vocab_size": 300},
        "sft": {"stage": "sft", "data": "shown", "train": {"learning_rate": 1e-3, "prompts_per_step": 4}},
    },
}
DPO = {"stage": "preference", "policy": "sft", "data": "pairs", "loss": {"name": "dpo"}, "train": TRAIN}
VALIDATION = {"stage": "evaluate", "policies": ["sft"], "tasks": {"chat": {"task": "nll", "data": "val"}}}
TEST = {"stage": "evaluate", "policies": ["dpo"], "tasks": {"chat_test": {"task": "nll", "data": "test"}}}
SEARCH = {
    "space": {"loss.settings.beta": {"log": [0.01, 1]}, "train.learning_rate": {"log": [1e-4, 1e-2]}},
    "evaluation": "validation",
    "metric": "chat.nll",
    "budget": {"trials": 4},
    "rungs": [2, 5],
    "halving": 2,
}


def ran(folder, steps, *overrides, search=None, until=None, told=None):
    """Run a recipe with more steps below `folder`; the manifests and what was reported."""
    folder.mkdir(exist_ok=True)
    path, told, made = folder / "small.yaml", told or Told(), {}
    found = {**RECIPE, "runs": str(folder / "runs"), "steps": {**RECIPE["steps"], **steps}}
    path.write_text(json.dumps({**found, **({"search": {"dpo": search}} if search else {})}))
    with pytest.MonkeyPatch.context() as patch:
        skip_rate(patch)
        skip_page(patch)
        for call in calls(Command(path, overrides), until=until):
            made = run_recipe(call.command, told, disk=(0, 0), until=call.until)
    return made, told


def weights(folder, step):
    return (folder / "runs/small" / step / "model.safetensors").read_bytes()


def metrics(folder, step):
    lines = (folder / "runs/small" / step / "metrics.jsonl").read_text().splitlines()
    of_time = ("seconds", "peak_memory_bytes")
    return [{name: value for name, value in json.loads(line).items() if name not in of_time} for line in lines]


KINDS = {
    "sft": {"stage": "sft", "policy": "sft", "data": "shown", "train": TRAIN},
    "dpo": DPO,
    "reward": {"stage": "reward_model", "policy": "sft", "loss": "bt", "data": "pairs", "train": TRAIN},
    "best": {**DPO, "data": "held", "train": {**TRAIN, "keep": "best", "evaluate_every": 2}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_training_equals_an_uninterrupted_one_bit_for_bit(kind, tmp_path):
    step = KINDS[kind]
    steps = {
        "first": {**step, "train": {**step["train"], "until_step": 2}},  # computes all reference log-probabilities
        "half": {**step, "train": {**step["train"], "until_step": 4}},
        "more": {**step, "train": {**step["train"], "until_step": 6}, "resume": "half"},
        "rest": {**step, "resume": "more"},
        "whole": step,
    }
    made, told = ran(tmp_path, steps)
    last = made["whole"]["optimizer_steps"]
    assert last > 6
    assert [made[name]["optimizer_steps"] for name in ("half", "more", "rest")] == [4, 6, last]
    assert [note for note in told.notes if note.startswith("resumed")] == [
        f"resumed after step 4 of {last}",
        f"resumed after step 6 of {last}",
    ]
    assert weights(tmp_path, "rest") == weights(tmp_path, "whole")
    if kind != "best":
        assert weights(tmp_path, "more") != weights(tmp_path, "whole")
    assert metrics(tmp_path, "rest") == metrics(tmp_path, "whole")
    # Each ledger has its own optimizer steps
    ledgers = {name: made[name]["ledger"] for name in steps}
    parts = ("half", "more", "rest")
    assert sum(ledgers[name]["tokens_trained"] for name in parts) == ledgers["whole"]["tokens_trained"]
    assert sum(ledgers[name]["flops"] for name in parts) == ledgers["whole"]["flops"]
    assert ledgers["whole"]["flops_at_peak"] == RATE * ledgers["whole"]["seconds"]
    assert not list((tmp_path / "runs/small/rest").glob("**/checkpoint-*"))


def test_a_training_that_diverges_may_stop_with_the_weights_before_that(tmp_path):
    steep = {"learning_rate": 1e30, "prompts_per_step": 4, "epochs": 3, "on_divergence": "stop"}
    made, told = ran(tmp_path, {"steep": {**KINDS["sft"], "train": steep}})
    found = made["steep"]
    assert "the weights are unchanged" in found["diverged"]
    assert 0 < found["optimizer_steps"] < found["planned_steps"]
    assert (
        f"stopped after step {found['optimizer_steps']} of {found['planned_steps']}: {found['diverged']}" in told.notes
    )
    # The weights of a training that stopped are not those of a step that has to reach its end
    with pytest.raises(RunError, match="the weights are unchanged"):
        ran(tmp_path, {"steep": {**KINDS["sft"], "train": {**steep, "on_divergence": "error"}}})


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched")
    return folder, *ran(folder, {"dpo": DPO, "validation": VALIDATION, "evaluate": TEST}, search=SEARCH)


def test_the_chosen_trial_has_the_weights_of_an_uninterrupted_training(searched, tmp_path):
    folder, made, _ = searched
    found = read_json(folder / "runs/small/search.json")["dpo"]
    settings = found["trials"][str(found["chosen"])]["settings"]
    overrides = [f"steps.dpo.{key}={value}" for key, value in settings.items()]
    alone, _ = ran(tmp_path, {"dpo": DPO}, *overrides)
    assert alone["dpo"]["optimizer_steps"] == made["dpo"]["optimizer_steps"] == 9
    assert weights(folder, "dpo") == weights(tmp_path, "dpo")
    assert metrics(folder, "dpo") == metrics(tmp_path, "dpo")


def test_stages_before_the_search_run_once_and_the_best_trials_go_on(searched):
    folder, made, told = searched
    running = [step for step, state in told.states if state == "running"]
    assert len(running) == len(set(running))
    found = read_json(folder / "runs/small/search.json")["dpo"]
    levels = [
        {trial: each["rungs"][rung] for trial, each in found["trials"].items() if len(each["rungs"]) > rung}
        for rung in (0, 1)
    ]
    assert [len(level) for level in levels] == [4, 2]
    table = read_json(folder / "runs/small/table.json")
    for level, going_on in zip(levels, [set(levels[1]), {str(found["chosen"])}], strict=True):
        values = {trial: table[each["step"]]["chat nll"]["value"] for trial, each in level.items()}
        best = sorted(values, key=lambda trial: values[trial])[: len(going_on)]
        assert set(best) == going_on == {trial for trial, each in level.items() if each["goes_on"]}
        assert all(each["score"] == table[each["step"]]["chat nll"] for each in level.values())
    # Costs are those of the ledgers, and the estimate is of rows that no trial was compared on
    names = [name for name in made if "-trial-" in name]
    assert len(names) == 12
    assert found["cost_of_trials"]["flops"] == sum(made[name]["ledger"]["flops"] for name in names)
    assert found["cost_of_trials"]["cost"] is None
    assert found["estimate"] == {"chat_test nll": table["dpo"]["chat_test nll"]}
    assert {name for name in table if "chat_test nll" in table[name]} == {"dpo"}
    page = write_report(folder / "runs/small").read_text()
    assert "Search of dpo" in page and f"Trial {found['chosen']} was chosen" in page
    # Checkpoints of trials are removed once no step resumes them
    assert not list((folder / "runs/small").glob("*/resume/*/*.safetensors"))


def test_a_search_that_finishes_at_the_best_rung_has_that_trials_weights(searched, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(searched[0], folder)
    steps = {"dpo": DPO, "validation": VALIDATION, "test": TEST}
    made, told = ran(folder, steps, search={**SEARCH, "finish": "best_rung"})
    # The checkpoint of the chosen trial had been removed, and is the same when it is made again
    assert [note for note in told.notes if "the step runs again because" in note]
    assert not [note for note in told.notes if "differs from what was removed" in note]
    table = read_json(folder / "runs/small/table.json")
    names = {(trial, rung): f"dpo-trial-{trial}-rung-{rung}" for trial, rung in itertools.product(range(1, 5), (1, 2))}
    values = {place: table[name]["chat nll"]["value"] for place, name in names.items() if name in table}
    assert len(values) == 6
    trial, rung = min(values, key=lambda key: values[key])
    best = names[trial, rung]
    assert weights(folder, "dpo") == weights(folder, best)
    assert made["dpo"]["copy_of"] == best
    found = read_json(folder / "runs/small/search.json")["dpo"]
    assert (found["chosen"], found["chosen_rung"], found["cost_of_chosen"]) == (trial, rung, None)
    _, rows = trial_rows(found, set())
    assert [(row[0], row[3]) for row in rows if row[-1] == "chosen"] == [(str(trial), str(SEARCH["rungs"][rung - 1]))]


def test_a_finished_search_runs_nothing_again_and_is_estimated_as_it_was(searched):
    folder, made, _ = searched
    again, told = ran(folder, {"dpo": DPO, "validation": VALIDATION, "evaluate": TEST}, search=SEARCH)
    assert [step for step, state in told.states if state == "running"] == []
    assert {name: each["build_id"] for name, each in again.items()} == {
        name: each["build_id"] for name, each in made.items()
    }
    command, notes = assumed(Command(folder / "small.yaml"))
    assert notes == [] and list(command.loaded.steps) == list(made)


def test_a_trial_whose_divergence_from_the_start_is_unknown_is_never_chosen(tmp_path, monkeypatch):
    measure = evaluation.with_divergences

    def first_is_silent(results, here, path, *others):
        if "trial-1" not in path:
            return measure(results, here, path, *others)
        return {name: with_kl(result, StartKL("no answer has text")) for name, result in results.items()}

    monkeypatch.setattr(evaluation, "with_divergences", first_is_silent)
    task = {"data": "val", "max_new_tokens": 4, "metrics": ["kl_from_start"]}
    asked = {**VALIDATION, "kl_from_start": True, "tasks": {"talk": task}}
    search = {**SEARCH, "metric": "talk.kl_from_start", "budget": {"trials": 2}, "rungs": [1]}
    folder, steps = tmp_path / "searched", {"dpo": DPO, "validation": asked}
    ran(folder, steps, search=search)
    found = read_json(folder / "runs/small/search.json")["dpo"]
    (first,), (second,) = (found["trials"][trial]["rungs"] for trial in ("1", "2"))
    assert math.isnan(first["score"]["value"]) and second["score"]["value"] > 0 and found["chosen"] == 2
    assert [row[0] for row in trial_rows(found, set())[1]] == ["2", "1"]
    with pytest.raises(RunError, match=r"can be chosen: talk\.kl_from_start is unknown: no answer has text$"):
        ran(folder, steps, search={**search, "budget": {"trials": 1}})


def test_an_edit_of_the_recipe_while_it_runs_changes_nothing(searched):
    path = searched[0] / "small.yaml"
    written = path.read_text()
    try:
        steps = calls(Command(path))
        first = next(steps)
        path.write_text("run: other")
        rest = list(steps)
    finally:
        path.write_text(written)
    assert len(rest) == 2
    assert [each.command.loaded.steps["sft"] for each in rest] == [first.command.loaded.steps["sft"]] * 2
    assert rest[-1].command.loaded == list(calls(Command(path)))[-1].command.loaded


def test_an_interrupted_rerun_of_a_search_resumes_where_it_was(searched):
    def begun():
        return calls(Command(searched[0] / "small.yaml"), rerun_from="sft")

    steps = begun()
    assert [next(steps).rerun_from for _ in range(2)] == ["sft", None]
    assert [each.rerun_from for each in begun()] == [None, None, None]  # the interrupted one, to its end
    assert [each.rerun_from for each in begun()] == ["sft", None, None]


def test_trials_of_later_rungs_count_in_the_budget_from_the_first_call_on(searched):
    folder, made, _ = searched
    whole = [call.command.loaded for call in calls(Command(folder / "small.yaml"))]
    assert len(whole[0].steps) < len(whole[-1].steps) == len(made)
    used = {name: sum(each["ledger"][name] for each in made.values()) for name in ("flops", "seconds")}
    for spent in (allowance(recipe).before for recipe in whole):
        assert (spent.flops, spent.hours) == (used["flops"], pytest.approx(used["seconds"] / 3600))


def test_an_unfinished_trial_of_a_later_rung_counts_in_the_budget(searched, tmp_path):
    recipe = next(calls(Command(searched[0] / "small.yaml"))).command.loaded
    recipe = recipe.model_copy(update={"runs": str(tmp_path)})
    working = recipe.root / "validation-dpo-trial-3-rung-2.partial"
    working.mkdir(parents=True)
    spent = {"seconds": 7.0, "kwh": None, "co2_kg": None, "devices": 1, "flops": 5.0}
    (working / "spent-1.json").write_text(json.dumps(spent))
    assert allowance(recipe).before.flops == 5


def test_a_step_to_run_again_that_does_not_exist_is_named_before_anything_runs(searched):
    path = searched[0] / "small.yaml"
    with pytest.raises(InputError, match="no step is called 'dop'"):
        next(calls(Command(path), rerun_from="dop"))
    going_on = list(read_json(searched[0] / "runs/small/search.json")["dpo"]["trials"].items())
    trial = next(number for number, each in going_on if len(each["rungs"]) == 2)
    asked = [each.rerun_from for each in calls(Command(path), rerun_from=f"dpo-trial-{trial}-rung-2")]
    assert asked == [None, f"dpo-trial-{trial}-rung-2", None]


def test_estimates_before_a_search_have_the_trials_of_every_rung(tmp_path):
    ran(tmp_path, {"dpo": DPO, "validation": VALIDATION, "evaluate": TEST}, search=SEARCH, until="base")
    command, notes = assumed(Command(tmp_path / "small.yaml"))
    assert notes == ["search of dpo: 4 trial(s), of which the first ones are assumed to be the best"]
    assert sum("validation-dpo-trial" in name for name in command.loaded.steps) == 6
    assert not list((tmp_path / "runs/small").glob("dpo*"))


class Killed(Told):
    """Ends the run when a step begins."""

    def __init__(self, at):
        super().__init__()
        self._at = at

    def watch(self, step, state):
        super().watch(step, state)
        if (step, state) == (self._at, "running"):
            raise KeyboardInterrupt


def test_points_drawn_from_earlier_scores_are_the_same_after_a_kill(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    for module in (module_of_calls, module_of_settings, module_of_tpe):
        monkeypatch.setattr(module, "NUM_BEFORE_TPE", 2)
    steps = {"dpo": DPO, "validation": VALIDATION}
    search = {**SEARCH, "points": "tpe", "budget": {"trials": 4}, "rungs": [2]}
    made, told = ran(tmp_path, steps, search=search)
    command = Command(tmp_path / "small.yaml")
    whole = list(calls(command))
    assert len(whole) == 4  # two trials, then one each, then the chosen one
    assert assumed(command)[0].loaded == whole[-1].command.loaded and assumed(command)[1] == []
    assert Command(command.recipe, whole[-1].command.overrides).loaded == whole[-1].command.loaded  # as a launch reads
    found = read_json(tmp_path / "runs/small/search.json")["dpo"]
    drawn = {trial: each["settings"] for trial, each in found["trials"].items()}
    assert len({json.dumps(each) for each in drawn.values()}) == 4
    # Killed as the first drawn trial begins
    names, runs = [f"dpo-trial-{trial}-rung-1" for trial in (1, 2, 3, 4)], f"runs={tmp_path}/killed"
    with pytest.raises(KeyboardInterrupt):
        ran(tmp_path, steps, runs, search=search, told=Killed(names[2]))
    planned = assumed(Command(command.recipe, (runs,)))[0].loaded.steps
    assert [name for name in planned if name.startswith("dpo-trial")] == names
    assert planned[names[2]] == whole[-1].command.loaded.steps[names[2]]  # already drawn
    again, told = ran(tmp_path, steps, runs, search=search)
    running = [step for step, state in told.states if state == "running" and step in names]
    assert running == names[2:]
    assert [again[name]["settings"] for name in names] == [made[name]["settings"] for name in names]
    assert read_json(tmp_path / "killed/small/search.json")["dpo"]["chosen"] == found["chosen"]


@pytest.mark.slow
def test_a_trial_that_diverges_is_dropped_and_the_search_goes_on(tmp_path):
    # At 1e30 after some steps; with 1e300 the gradient norm of the first step is infinite
    space = {"train.learning_rate": {"choices": [1e-3, 1e30]}, "loss.settings.beta": {"choices": [0.1, 1e300]}}
    train = {**TRAIN, "warmup_steps": 0, "keep": "best", "evaluate_every": 4}
    steps = {"dpo": {**DPO, "data": "held", "train": train}, "validation": VALIDATION, "evaluate": TEST}
    ran(tmp_path, steps, search={**SEARCH, "space": space, "rungs": [4]})
    found = read_json(tmp_path / "runs/small/search.json")["dpo"]
    rungs = {trial: each["rungs"][0] for trial, each in found["trials"].items()}
    best = {"train.learning_rate": 1e-3, "loss.settings.beta": 0.1}
    finite = {trial for trial, each in found["trials"].items() if each["settings"] == best}
    assert {trial for trial, rung in rungs.items() if rung["diverged"]} == rungs.keys() - finite
    assert min(rung["optimizer_steps"] for rung in rungs.values()) == 0
    assert 0 < len(finite) < 4 and str(found["chosen"]) in finite
    assert "dropped: optimizer step" in render_markdown([read_run(tmp_path / "runs/small")])


@pytest.mark.slow
def test_a_budget_of_flops_decides_the_number_of_trials(searched, tmp_path):
    whole = read_json(searched[0] / "runs/small/search.json")["dpo"]
    limit = 1.1 * (whole["cost_of_trials"]["flops"] + whole["cost_of_chosen"]["flops"])
    steps = {"dpo": DPO, "validation": VALIDATION, "evaluate": TEST}
    ran(tmp_path, steps, search={**SEARCH, "budget": {"flops": limit, "trials": 9}})
    found = read_json(tmp_path / "runs/small/search.json")["dpo"]
    assert 3 <= len(found["trials"]) <= 6
    assert found["cost_of_trials"]["flops"] + found["cost_of_chosen"]["flops"] <= limit
    for trial in set(found["trials"]) & set(whole["trials"]):
        assert found["trials"][trial]["settings"] == whole["trials"][trial]["settings"]
