"""Searched keys of earlier steps, of sources and of the policy: which steps become those of trials, and refusals."""

import pytest
from test_search import DPO, RECIPE, SMALL, recipe

from align.errors import InputError
from align.workflow.recipe.load import validated_recipe
from align.workflow.search.points import point

VALIDATION = RECIPE["steps"]["validation"]
DRIFT = {"reference": "step:sft", "max_new_tokens": 4}
WRONG = [
    (
        {"space": {"seed": {"choices": [1, 2]}}},
        "search.dpo.space.seed: a search draws no 'seed'; give a key of step 'dpo', steps.NAME.KEY of a step that it "
        "depends on, data.NAME.KEY or policy.KEY",
    ),
    ({"space": {"run": {"choices": ["a", "b"]}}}, "search.dpo.space.run: a search draws no 'run'"),
    ({"space": {"budget.flops": {"log": [1, 2]}}}, "search.dpo.space.budget.flops: a search draws no 'budget'"),
    ({"space": {"accounting.currency": {"choices": ["USD", "EUR"]}}}, "a search draws no 'accounting'"),
    ({"space": {"search.dpo.halving": {"linear": [2, 4]}}}, "a search draws no 'search'"),
    ({"space": {"steps.sft": {"choices": [{}, {}]}}}, "search.dpo.space.steps.sft: a search draws no 'steps'"),
    (
        {"space": {"steps.validation.tasks.general.max_new_tokens": {"choices": [8, 16]}}},
        "step 'validation' evaluates, which is the same for all trials; give steps.NAME.KEY",
    ),
    ({"space": {"steps.sfd.train.learning_rate": {"log": [1, 2]}}}, "no step is called 'sfd'; did you mean 'sft'"),
    ({"space": {"data.shwn.limit": {"choices": [4, 8]}}}, "no source of data is called 'shwn'"),
    ({"space": {"data.val.limit": {"choices": [4, 8]}}}, "step 'validation' evaluates on 'val', which is the same"),
    ({"space": {"train.until_step": {"choices": [4, 8]}}}, "train.until_step: the search sets it itself; remove it"),
    (
        {"space": {"steps.sft.train.checkpoint_steps": {"choices": [4, 8]}}},
        "checkpoint_steps: changes nothing of step 'dpo', nor of a step that it depends on",
    ),
    (
        {
            "space": {"steps.other.train.learning_rate": {"log": [1e-3, 1e-2]}},
            "steps": {
                "other": {**RECIPE["steps"]["sft"], "policy": "base"},
                "dpo": {**RECIPE["steps"]["dpo"], "policy": "sft"},
            },
        },
        "search.dpo.space.steps.other.train.learning_rate: changes nothing of step 'dpo'",
    ),
    (
        {"space": {"min_chosen": {"linear": [0, 1]}, "steps.dpo.min_chosen": {"linear": [0, 2]}}},
        "is steps.dpo.min_chosen, which has another range already",
    ),
    ({"space": {"steps.sft.train.learning_rat": {"log": [1, 2]}}}, "search.dpo.space.steps.sft.train.learning_rat"),
    (
        {
            "space": {"steps.sft.train.learning_rate": {"log": [1e-4, 1e-3]}},
            "steps": {"validation": {**VALIDATION, "tasks": {"general": {"data": "val", "task": "drift", **DRIFT}}}},
            "metric": "general.kl",
        },
        "search.dpo.evaluation: reads step 'sft', which depends on steps.sft.train.learning_rate",
    ),
]


@pytest.mark.parametrize(("changes", "said"), WRONG)
def test_a_key_that_no_trial_can_have_is_refused_in_one_line(changes, said):
    with pytest.raises(InputError) as error:
        recipe(**changes)
    assert said in str(error.value)
    assert len(error.value.parts) == 1 and "\n" not in str(error.value)


def test_a_step_with_a_search_of_its_own_cannot_depend_on_another_searchs_key():
    spaces = {
        "sft": {"train.learning_rate": {"log": [1e-4, 1e-2]}},
        "dpo": {"data.shown.limit": {"choices": [4, 8]}},
    }
    given = {**RECIPE, "search": {name: {**SMALL, "space": space} for name, space in spaces.items()}}
    with pytest.raises(InputError, match=r"search\.dpo\.space: step 'sft', which has a search of its own, depends on"):
        validated_recipe(given)


def order_of(made, *names):
    return [name for name in made.steps if name in names]


def test_trials_with_equal_values_of_an_earlier_steps_key_share_its_step():
    steps = {"cheap": {**RECIPE["steps"]["sft"], "policy": "base"}, "dpo": {**DPO, "policy": "sft"}}
    space = {"steps.sft.train.epochs": {"choices": [1, 2]}, "train.learning_rate": {"log": [1e-4, 1e-2]}}
    made = recipe(steps=steps, space=space, started=[[1, 2, 3, 4], [3]], chosen=3)
    values = {trial: point(made.search["dpo"], 0, trial)["steps.sft.train.epochs"] for trial in (1, 2, 3, 4)}
    first = {trial: min(other for other in values if values[other] == values[trial]) for trial in values}
    assert len(set(first.values())) == 2
    for trial in values:
        trained, sft = made.steps[f"dpo-trial-{trial}-rung-1"], f"sft-trial-{first[trial]}"
        assert trained.policy == sft and made.steps[sft].train.epochs == values[trial]
        assert made.inputs(f"dpo-trial-{trial}-rung-1") == (sft,)
    assert {name for name in made.steps if name.startswith(("sft-trial", "base-trial", "cheap-trial"))} == {
        f"sft-trial-{trial}" for trial in first.values()
    }
    # What waits follows the trials, and the chosen step resumes what the trial was made from
    assert order_of(made, "base", "sft-trial-1", "dpo-trial-3-rung-2", "sft", "validation-sft", "dpo") == [
        *("base", "sft-trial-1", "dpo-trial-3-rung-2", "sft", "validation-sft", "dpo")
    ]
    assert made.copies == {"sft": f"sft-trial-{first[3]}"} and made.inputs("sft") == (f"sft-trial-{first[3]}",)
    assert made.steps["dpo"].policy == f"sft-trial-{first[3]}" and made.steps["dpo"].resume == "dpo-trial-3-rung-2"
    assert made.steps["sft"].train.epochs == values[3] and made.inputs("evaluate-sft") == ("sft",)


def test_a_source_and_the_policy_differ_only_for_the_steps_that_read_them():
    steps = {"dpo": {**DPO, "policy": "sft"}}
    limit = {"data.pairs.limit": {"choices": [4, 6]}}
    space = {**limit, "policy.lora.rank": {"choices": [2, 4]}}
    given = {**RECIPE, "policy": {"path": "model", "lora": {"rank": 8}}, "steps": {**RECIPE["steps"], **steps}}
    made = validated_recipe(
        {**given, "search": {"dpo": {**SMALL, "space": {"data.pairs.limit": space["data.pairs.limit"]}}}}
    )
    trials = [f"dpo-trial-{trial}-rung-1" for trial in (1, 2, 3, 4)]
    limits = [made.resolved(name).sources["pairs"].limit for name in trials]
    assert limits == [point(made.search["dpo"], 0, trial)["data.pairs.limit"] for trial in (1, 2, 3, 4)]
    assert set(limits) == {4, 6} and made.resolved("dpo").sources["pairs"].limit == 8
    assert not any("-trial-" in name for name in made.steps if not name.startswith(("dpo-", "validation-dpo-")))
    made = validated_recipe(
        {**given, "search": {"dpo": {**SMALL, "space": space, "started": [[1, 2, 3, 4]], "chosen": 2}}}
    )
    for trial in (1, 2, 3, 4):
        values, name = point(made.search["dpo"], 0, trial), f"dpo-trial-{trial}-rung-1"
        inputs = made.resolved(name)
        assert (inputs.sources["pairs"].limit, inputs.policy.lora.rank) == tuple(values.values())
        assert made.resolved(f"validation-{name}").policy.lora.rank == values["policy.lora.rank"]
        assert made.resolved(made.steps[name].policy).policy.lora.rank == values["policy.lora.rank"]
    chosen = point(made.search["dpo"], 0, 2)
    assert (made.data["pairs"].limit, made.policy.lora.rank) == tuple(chosen.values())


def test_samples_of_rounds_with_a_searched_temperature_are_made_for_trials():
    generate = {
        "prompts": {"prompts": 4},
        "judges": [{"name": "verifier"}],
        "sampling": {"max_new_tokens": 4},
        "engine": {"local": {}},
    }
    rounds = {**DPO, "data": "prompts", "rounds": 2, "on_policy": True, "generate": generate}
    space = {"generate.sampling.temperature": {"linear": [0.5, 1]}, "train.learning_rate": {"log": [1e-4, 1e-2]}}
    made = recipe(steps={"dpo": rounds}, space=space, chosen=3)
    for trial in (1, 2, 3, 4):
        samples = f"dpo-1-samples-trial-{trial}"
        assert made.steps[f"dpo-1-trial-{trial}-rung-1"].data == samples
        value = point(made.search["dpo"], 0, trial)["generate.sampling.temperature"]
        assert made.steps[samples].sampling.temperature == value
    assert made.copies == {"dpo-1-samples": "dpo-1-samples-trial-3"}
    assert {made.steps[f"dpo-{number}-samples"].sampling.temperature for number in (1, 2)} == {
        point(made.search["dpo"], 0, 3)["generate.sampling.temperature"]
    }
