"""Searches of keys of earlier steps, of sources and of the policy, and of reward models' settings."""

import json

import pytest
from small_runs import Told
from test_search_runs import DPO, RECIPE, SEARCH, TEST, TRAIN, VALIDATION, Killed, metrics, ran, weights

from align.artifacts import read_json, read_manifest
from align.report.run_folder import read_run
from align.report.search.section import searches
from align.workflow.launcher import Command
from align.workflow.runner import planned
from align.workflow.search.calls import assumed, calls

GROUPS = {
    "stage": "generate",
    "policies": ["sft"],
    "data": "asked",
    "prompts": {"asked": 8},
    "sampling": {"num_responses": 3, "max_new_tokens": 6},
    "engine": {"local": {"precision": "fp32", "batch_size": 8}},
    "judges": [{"name": "reward_model", "settings": {"path": "step:rate"}}],
}
RATE = {"stage": "reward_model", "policy": "base", "loss": "bt", "data": "pairs", "train": {**TRAIN, "epochs": 1}}
STEPS = {
    "rate": RATE,
    "groups": GROUPS,
    "dpo": {**DPO, "data": "groups", "train": {**TRAIN, "epochs": 2}},
    "validation": VALIDATION,
    "evaluate": {**TEST, "policies": ["sft", "dpo"]},
}
SPACE = {
    "steps.sft.train.learning_rate": {"choices": [1e-3, 3e-2]},
    "steps.groups.sampling.temperature": {"choices": [0.5, 1.5]},
    "train.learning_rate": {"log": [1e-3, 1e-2]},
}
EARLIER = {**SEARCH, "space": SPACE, "budget": {"trials": 3}, "rungs": [1, 2], "halving": 1.5}
KILLED = ("sft-trial-", "groups-trial-", "validation-dpo-trial-3-rung-1", "dpo-trial-", "groups", "dpo")  # the last of


@pytest.fixture(scope="module", autouse=True)
def prompts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPE, "data", {**RECIPE["data"], "asked": {"path": "tasks:general", "split": "train"}})
        yield


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("earlier")
    return folder, *ran(folder, STEPS, search=EARLIER)


def found_in(folder):
    return read_json(folder / "runs/small/search.json")["dpo"]


def test_trials_share_what_does_not_depend_on_a_key_or_has_equal_values(searched):
    folder, made, told = searched
    running = [step for step, state in told.states if state == "running"]
    assert len(running) == len(set(running)), running
    settings = [each["settings"] for each in found_in(folder)["trials"].values()]
    rates = {each["steps.sft.train.learning_rate"] for each in settings}
    pairs = {(each["steps.sft.train.learning_rate"], each["steps.groups.sampling.temperature"]) for each in settings}
    counts = {step: sum(name.startswith(f"{step}-trial-") for name in running) for step in ("base", "rate", "sft")}
    assert counts == {"base": 0, "rate": 0, "sft": len(rates)} and len(rates) == 2
    assert sum(name.startswith("groups-trial-") for name in running) == len(pairs)
    assert len(rates) < len(settings)  # two trials share a step
    # What waits for the search runs after the last trial, with the chosen values
    last = max(place for place, name in enumerate(running) if "-trial-" in name)
    assert {"sft", "groups", "dpo", "evaluate-sft"} == set(running[last + 1 :]) - {"evaluate-dpo", "validation-sft"}
    chosen = found_in(folder)["trials"][str(found_in(folder)["chosen"])]["settings"]
    assert made["sft"]["settings"]["train"]["learning_rate"] == chosen["steps.sft.train.learning_rate"]


def test_the_chosen_steps_are_those_of_a_recipe_with_the_chosen_values(searched, tmp_path):
    folder, made, _ = searched
    settings = found_in(folder)["trials"][str(found_in(folder)["chosen"])]["settings"]
    keys = {key if key.startswith("steps.") else f"steps.dpo.{key}": value for key, value in settings.items()}
    ran(tmp_path, STEPS, *(f"{key}={value}" for key, value in keys.items()))
    for step in ("sft", "dpo"):
        assert weights(folder, step) == weights(tmp_path, step)
        assert metrics(folder, step) == metrics(tmp_path, step)
    rows = [
        [json.loads(line) for line in (where / "runs/small/groups/groups.jsonl").read_text().splitlines()]
        for where in (folder, tmp_path)
    ]
    assert len(rows[0]) > 4 and rows[0] == rows[1]
    # Steps that wait are links to the files of the trial, and cost nothing
    assert {step: made[step]["ledger"]["flops"] for step in ("sft", "groups")} == {"sft": 0, "groups": 0}
    of = made["sft"]["copy_of"]
    files = [folder / "runs/small" / step / "model.safetensors" for step in ("sft", of)]
    assert files[0].samefile(files[1]) and read_manifest(files[0].parent)["step"] == "sft"


def test_costs_include_the_steps_made_for_trials_and_the_page_names_the_ranges(searched):
    folder, made, _ = searched
    found = found_in(folder)
    names = [name for name in made if "-trial-" in name]
    assert found["cost_of_trials"]["flops"] == sum(made[name]["ledger"]["flops"] for name in names)
    assert sorted(step for steps in found["earlier"].values() for step in steps) == sorted(
        name for name in names if "rung" not in name
    )
    (shown,) = searches({"": read_run(folder / "runs/small")})
    assert shown.about.startswith("Searched: steps.groups.sampling.temperature (one of 0.5, 1.5), ")
    assert "train.learning_rate (log 0.001 to 0.01). Made for trials, and shared" in shown.about
    assert found["estimate"] == {"chat_test nll": read_json(folder / "runs/small/table.json")["dpo"]["chat_test nll"]}
    command, notes = assumed(Command(folder / "small.yaml"))
    assert notes == [] and set(command.loaded.steps) == set(made)


def test_a_step_that_waits_runs_after_the_search_and_again_in_every_trial(searched):
    folder, made, _ = searched
    command = Command(folder / "small.yaml")
    assert [call.until for call in calls(command, until="rate")] == ["rate"]
    assert len(list(calls(command, until="groups"))) == 3  # both rungs, and the chosen steps
    recipe = assumed(command)[0].loaded
    again = {each.step.name for each in planned(recipe, None, "groups") if each.reason == "reruns as requested"}
    assert again == {name for name in made if name.startswith(("groups", "dpo", "evaluate-dpo", "validation-dpo"))}


@pytest.mark.slow
def test_a_killed_search_has_the_same_trials(searched, tmp_path):
    folder, made, whole = searched
    running, reached = [step for step, state in whole.states if state == "running"], []
    for kill in [[step for step in running if step.startswith(each)][-1] for each in KILLED[:4]] + [*KILLED[4:]]:
        told = Killed(kill)
        with pytest.raises(KeyboardInterrupt):
            ran(tmp_path, STEPS, search=EARLIER, told=told)
        reached += [step for step, state in told.states if state == "running" and step != kill]
    again, told = ran(tmp_path, STEPS, search=EARLIER)
    reached += [step for step, state in told.states if state == "running"]
    assert sorted(reached) == sorted(made)  # each step ran to its end once
    for name in ("settings", "score", "goes_on"):
        trials = [
            {
                trial: each["settings"] if name == "settings" else [rung[name] for rung in each["rungs"]]
                for trial, each in found_in(where)["trials"].items()
            }
            for where in (folder, tmp_path)
        ]
        assert trials[0] == trials[1]
    assert found_in(folder)["chosen"] == found_in(tmp_path)["chosen"]
    for step in [name for name in made if "files" in made[name] and "model.safetensors" in made[name]["files"]]:
        assert weights(folder, step) == weights(tmp_path, step), step
    assert {name: each["fingerprint"] for name, each in again.items()} == {
        name: each["fingerprint"] for name, each in made.items()
    }


def test_settings_of_a_reward_model_are_searched_by_its_pair_accuracy(tmp_path):
    judged = {"stage": "evaluate", "policies": ["dpo"], "tasks": {"held": {"task": "pair_accuracy", "data": "held"}}}
    test = {"stage": "evaluate", "policies": ["dpo"], "tasks": {"other": {"task": "pair_accuracy", "data": "unseen"}}}
    unseen = {"path": "tasks:general", "split": "test", "limit": 8, "responses": 3}
    reward = {**RATE, "data": "held", "train": {**TRAIN, "epochs": 2}}
    space = {"train.learning_rate": {"log": [1e-3, 1e-1]}, "policy": {"choices": ["base", "sft"]}}
    search = {**SEARCH, "space": space, "metric": "held.accuracy", "budget": {"trials": 3}, "rungs": [2]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPE, "data", {**RECIPE["data"], "unseen": unseen})
        made, told = ran(tmp_path, {"dpo": reward, "validation": judged, "evaluate": test}, search=search, told=Told())
    found = found_in(tmp_path)
    # The held-out rows are those of the reward model's own report
    values = {}
    for trial, each in found["trials"].items():
        report = made[f"dpo-trial-{trial}-rung-1"]["report"]["pairs"]["all"]
        (rung,) = each["rungs"]
        values[trial] = rung["score"]["value"]
        assert values[trial] == pytest.approx(report["value"]) and rung["score"]["n"] == report["n"] > 0
    assert values[str(found["chosen"])] == max(values.values()) and len(values) == 3
    assert found["estimate"] == {"other accuracy": made["evaluate-dpo"]["scores"]["dpo"]["other accuracy"]}
    assert made["dpo"]["optimizer_steps"] == 6
    assert [step for step, state in told.states if state == "running"].count("sft") == 1
