"""Searches of settings without a model: points, halving, budgets, and the steps that trials become."""

import itertools
import json
import math
import random
from dataclasses import replace

import pytest

from align.config import build
from align.errors import InputError, RunError
from align.records import Demonstration
from align.report.search.section import trial_rows
from align.stages.inputs.sources import SourceSettings, streamed
from align.workflow.recipe.load import validated_recipe
from align.workflow.retention import best_policy
from align.workflow.search.outcomes import Outcome, advanced, ranked
from align.workflow.search.points import point, value_at, with_point
from align.workflow.search.results import _share_rows
from align.workflow.search.settings import Range, SearchSettings

SPACE = {
    "loss.settings.beta": {"log": [3e-4, 3e-3]},
    "loss.sft_weight": {"linear": [0, 2]},
    "loss.name": {"choices": ["dpo", "ipo", "rpo_bwd_kl"]},
    "train.prompts_per_step": {"log": [2, 64], "integer": True},
}
SEARCH = {
    "space": SPACE,
    "evaluation": "validation",
    "metric": "general.correct",
    "budget": {"trials": 9},
    "rungs": [10, 30],
}


def search(**changes):
    return build(SearchSettings, {**SEARCH, **changes})


@pytest.mark.parametrize("points", ["sobol", "random"])
def test_a_point_depends_on_the_seed_and_the_number_of_its_trial_only(points):
    made = search(points=points)
    found = {trial: point(made, 3, trial) for trial in range(1, 33)}
    order = list(range(1, 33))
    random.Random(0).shuffle(order)
    more = search(points=points, budget={"trials": 500, "flops": 1e9}, rungs=[7], halving=2, started=[[4, 9]])
    assert {trial: point(more, 3, trial) for trial in order} == found
    assert all(point(made, 4, trial) != found[trial] for trial in found)
    assert len({json.dumps(each) for each in found.values()}) == len(found)


def test_values_of_random_points_do_not_depend_on_the_other_keys():
    whole = search(points="random")
    for key, values in SPACE.items():
        alone = search(points="random", space={key: values})
        assert [point(alone, 0, trial)[key] for trial in range(1, 9)] == [
            point(whole, 0, trial)[key] for trial in range(1, 9)
        ]


def test_sobol_points_are_those_of_scipy_shifted_modulo_one():
    qmc = pytest.importorskip("scipy.stats").qmc
    space = {f"key{number}": {"linear": [0.0, 1.0]} for number in range(4)}
    made = search(space=space)
    found = [list(point(made, 0, trial).values()) for trial in range(1, 17)]
    peer = qmc.Sobol(4, scramble=False).random(16)
    for dimension in range(4):
        shifts = {round((row[dimension] - own[dimension]) % 1, 3) for row, own in zip(found, peer, strict=True)}
        spread = max(shifts) - min(shifts)
        assert min(spread, 1 - spread) <= 0.001 + 1e-9  # rounded to four digits
    # A balanced sequence: every quarter of every range has a quarter of the points
    for dimension in range(4):
        counts = [sum(int(row[dimension] * 4) == quarter for row in found) for quarter in range(4)]
        assert min(counts) >= 3, counts


@pytest.mark.parametrize("points", ["sobol", "random"])
def test_values_fill_their_ranges_evenly(points):
    made = search(points=points)
    found = [point(made, 0, trial) for trial in range(1, 601)]
    betas = [each["loss.settings.beta"] for each in found]
    assert min(betas) >= 3e-4 and max(betas) <= 3e-3
    below = sum(beta < math.sqrt(3e-4 * 3e-3) for beta in betas) / len(betas)
    assert abs(below - 0.5) < 0.07  # uniform in the logarithm
    weights = [each["loss.sft_weight"] for each in found]
    assert abs(sum(weights) / len(weights) - 1) < 0.1
    counts = [sum(each["loss.name"] == name for each in found) for name in SPACE["loss.name"]["choices"]]
    assert min(counts) > 150
    sizes = [each["train.prompts_per_step"] for each in found]
    assert all(isinstance(size, int) and 2 <= size <= 64 for size in sizes)


def test_the_ends_of_a_range_are_within_it():
    last = 1 - 2**-53
    assert value_at(Range(choices=[1, 2]), last) == 2
    assert value_at(Range(linear=(0.0, 0.123456)), last) <= 0.123456
    assert value_at(Range(log=(0.123456, 1.0)), 0.0) >= 0.123456
    assert value_at(Range(linear=(2, 5), integer=True), last) == 5


@pytest.mark.parametrize("kind", ["log", "linear"])
def test_a_drawn_integer_is_a_whole_number_within_its_bounds(kind):
    draw = random.Random(0)
    for _ in range(3000):
        size = 10 ** draw.uniform(0, 18)  # above 2**53, not every whole number is a float
        low = float(draw.randrange(1, int(size) + 2)) * (1 if kind == "log" else draw.choice([-1, 1]))
        high = low + draw.randrange(1, int(size) + 2)
        if low < high:
            values = Range(**{kind: (low, high)}, integer=True)
            found = [value_at(values, share) for share in (0.0, draw.random(), 1 - 2**-53)]
            assert all(type(each) is int for each in found) and found == sorted(found)
            assert low == found[0] and found[-1] <= high


def test_a_point_changes_nothing_but_its_keys():
    step = {"stage": "preference", "loss": {"name": "dpo", "settings": {"beta": 1}}, "train": {"epochs": 2}}
    before = json.dumps(step)
    changed = with_point(step, {"loss.settings.beta": 5, "train.learning_rate": 0.1, "min_chosen": 2})
    assert json.dumps(step) == before
    expected = {"name": "dpo", "settings": {"beta": 5}}
    train = {"epochs": 2, "learning_rate": 0.1}
    assert changed == {"stage": "preference", "loss": expected, "train": train, "min_chosen": 2}


def outcome(trial, value, *, first=0, last=10, flops=0.0, diverged=None):
    costs = {"flops": flops, "seconds": 1.0, "cost": None}
    nothing = {"flops": 0.0, "seconds": 0.0, "cost": None}
    score = {"value": value, "low": value, "high": value, "n": 4}
    return Outcome(trial, score, diverged, first, last, 100, nothing, costs, nothing)


def halve(made, values):
    """Run a search on a table of values by (trial, rung); the levels, the chosen trial, and where it stops."""
    while made.chosen is None:
        found = [[outcome(trial, values[trial, rung]) for trial in level] for rung, level in enumerate(made.levels)]
        made = advanced(made, found)
    return made.levels, made.chosen, made.chosen_rung


def brute_force(number, rungs, halving, values, *, greater, finish):
    """Successive halving as a count: who is beaten by fewer others than places are left goes on."""
    level, levels = list(range(1, number + 1)), []
    for rung in range(rungs):
        levels.append(level)
        places = 1 if rung == rungs - 1 else max(1, math.floor(len(level) / halving))
        signed = {trial: values[trial, rung] if greater else -values[trial, rung] for trial in level}
        beaten = {
            trial: sum(signed[other] > own or (signed[other] == own and other < trial) for other in level)
            for trial, own in signed.items()
        }
        level = [trial for trial in level if beaten[trial] < places]
        if places == 1 and finish == "end":
            return levels, level[0], None
    seen = [(values[trial, rung], trial, rung) for rung, level in enumerate(levels) for trial in level]
    top = (max if greater else min)(seen)[0]
    trial, rung = min((trial, rung) for value, trial, rung in seen if value == top)
    return levels, trial, rung + 1


@pytest.mark.parametrize("finish", ["end", "best_rung"])
@pytest.mark.parametrize("greater", [True, False])
def test_halving_promotes_whom_a_brute_force_count_promotes(greater, finish):
    draw, covered = random.Random(5), set()
    for number, rungs, halving in itertools.product((1, 2, 3, 7, 9, 27), (1, 2, 3), (2, 2.5, 3)):
        values = {(trial, rung): draw.randrange(6) / 5 for trial in range(1, number + 1) for rung in range(rungs)}
        made = search(
            budget={"trials": number},
            rungs=[10 * 2**rung for rung in range(rungs)],
            halving=halving,
            finish=finish,
            greater_is_better=greater,
        )
        found = halve(made, values)
        assert found == brute_force(number, rungs, halving, values, greater=greater, finish=finish)
        covered.add(len(found[0]))
    assert covered == {1, 2, 3}


def test_the_direction_of_a_metric_is_known_by_its_name():
    assert search().is_greater_better
    assert not search(metric="chat.nll").is_greater_better
    assert search(metric="chat.nll", greater_is_better=True).is_greater_better


def test_a_trial_that_diverged_or_has_no_value_is_never_chosen():
    found = [outcome(1, math.nan), outcome(2, 0.9, diverged="the loss is nan"), outcome(3, 0.1), outcome(4, 0.2)]
    assert [each.trial for each in ranked(found, search())][:2] == [4, 3]
    assert advanced(search(budget={"trials": 4}, halving=1.1), [found]).started[-1] == [3, 4]
    with pytest.raises(RunError, match="no trial of the last rung can be chosen: the loss is nan"):
        advanced(search(budget={"trials": 1}), [[found[1]]])


def spent(number, *, rungs, halving, end, per_step):
    """FLOPs of a search whose trials cost the same, counted optimizer step by optimizer step."""
    total, level = 0, number
    for step in range(1, end + 1):
        total += level * per_step
        if step in rungs:
            level = 1 if step == rungs[-1] else max(1, math.floor(level / halving))
    return total


@pytest.mark.parametrize("limit", [1, 400, 1000, 1700, 5000, 40_000])
def test_a_budget_of_flops_starts_as_many_trials_as_it_pays_to_the_end(limit):
    made = search(budget={"flops": limit, "trials": 40}, started=[[1]])
    while made.chosen is None and len(made.levels) == 1:
        made = advanced(made, [[outcome(trial, -trial, flops=30.0) for trial in made.levels[0]]])
    number = len(made.levels[0])
    costs = [spent(many, rungs=[10, 30], halving=3, end=100, per_step=3) for many in range(1, 42)]
    affordable = sum(cost <= limit for cost in costs)
    assert number == min(40, max(1, affordable))


def test_a_cost_that_is_unknown_cannot_be_limited():
    with pytest.raises(RunError, match="the cost of a trial is unknown"):
        advanced(search(budget={"money": 1.0}), [[outcome(1, 0.5)]])
    unknown = replace(outcome(1, 0.5), training={"flops": None, "seconds": 1.0, "cost": None})
    with pytest.raises(RunError, match="the flops of a trial is unknown"):
        advanced(search(budget={"flops": 1.0}), [[unknown]])


RECIPE = {
    "run": "small",
    "policy": {"path": "model"},
    "data": {
        "shown": {"path": "tasks:general", "limit": 8},
        "prompts": {"path": "tasks:general", "split": "train"},
        "pairs": {"path": "tasks:general", "limit": 8, "responses": 2},
        "val": {"path": "tasks:general", "split": "validation", "limit": 4},
        "test": {"path": "tasks:general", "split": "test", "limit": 4},
    },
    "steps": {
        "base": {"stage": "import"},
        "sft": {"stage": "sft", "data": "shown", "train": {"learning_rate": 1e-3}},
        "dpo": {"stage": "preference", "data": "pairs", "loss": {"name": "dpo"}, "train": {"learning_rate": 1e-3}},
        "validation": {"stage": "evaluate", "policies": ["sft"], "tasks": {"general": {"data": "val"}}},
        "evaluate": {"stage": "evaluate", "policies": "all", "tasks": {"general_test": {"data": "test"}}},
    },
}
DPO = RECIPE["steps"]["dpo"]
SMALL = {
    "space": {"loss.settings.beta": {"log": [0.01, 1]}, "train.learning_rate": {"log": [1e-4, 1e-2]}},
    "evaluation": "validation",
    "metric": "general.correct",
    "budget": {"trials": 4},
    "rungs": [1, 2],
    "halving": 2,
}


def recipe(*, steps=None, name="dpo", **changes):
    return validated_recipe(
        {**RECIPE, "steps": {**RECIPE["steps"], **(steps or {})}, "search": {name: {**SMALL, **changes}}}
    )


def test_trials_are_steps_before_the_searched_one_and_are_evaluated_on_validation_rows_only():
    made = recipe(started=[[1, 2, 3, 4], [2, 4]], chosen=4)
    names = list(made.steps)
    trials = [f"dpo-trial-{trial}-rung-{rung}" for rung, level in ((1, [1, 2, 3, 4]), (2, [2, 4])) for trial in level]
    between = names[names.index("sft") + 1 : names.index("dpo")]
    assert [name for name in between if name in trials] == trials
    for name in trials:
        step = made.steps[name]
        trial, rung = int(name.split("-")[2]), int(name.split("-")[4])
        values = point(made.search["dpo"], 0, trial)
        assert step.policy == "sft" and step.train.until_step == rung and step.train.on_divergence == "stop"
        assert (step.loss.settings["beta"], step.train.learning_rate) == tuple(values.values())
        assert step.resume == (f"dpo-trial-{trial}-rung-1" if rung == 2 else None)
        assert made.steps[f"validation-{name}"].policies == [name]
        assert f"evaluate-{name}" not in names
    chosen = made.steps["dpo"]
    assert chosen.resume == "dpo-trial-4-rung-2" and chosen.train.until_step is None
    assert chosen.loss.settings["beta"] == point(made.search["dpo"], 0, 4)["loss.settings.beta"]
    assert "evaluate-dpo" in names


def test_a_trial_is_never_kept_as_the_best_policy():
    made = validated_recipe({**RECIPE, "keep": {"best": "general.correct"}, "search": {"dpo": SMALL}})
    column = made.metric_columns()["general.correct"]
    values = {"sft": 0.2, "dpo-trial-1-rung-1": 0.9}
    finished = {name: {"scores": {name: {column: {"value": value}}}} for name, value in values.items()}
    assert best_policy(made, finished, made.keep) == "sft"


def test_a_step_in_rounds_is_searched_in_its_first_round():
    generate = {
        "prompts": {"prompts": 4},
        "judges": [{"name": "verifier"}],
        "sampling": {"max_new_tokens": 4},
        "engine": {"local": {}},
    }
    rounds = {**RECIPE["steps"]["dpo"], "data": "prompts", "rounds": 2, "on_policy": True, "generate": generate}
    made = recipe(steps={"dpo": rounds}, chosen=3)
    trial = made.steps["dpo-1-trial-3-rung-1"]
    assert trial.data == "dpo-1-samples" and trial.policy == "sft"
    assert made.steps["dpo-1"].resume == "dpo-1-trial-3-rung-1" and made.steps["dpo-2"].resume is None
    rates = {made.steps[name].train.learning_rate for name in ("dpo-1-trial-3-rung-1", "dpo-1", "dpo-2")}
    assert rates == {point(made.search["dpo"], 0, 3)["train.learning_rate"]}
    # Where the search ends at a rung, every round stops there, and the first is the trial itself
    ended = recipe(steps={"dpo": rounds}, chosen=3, chosen_rung=1, finish="best_rung")
    assert ended.copies["dpo-1"] == "dpo-1-trial-3-rung-1" and "dpo-2" not in ended.copies
    assert {ended.steps[name].train.until_step for name in ("dpo-1", "dpo-2")} == {ended.search["dpo"].rungs[0]}


WRONG = [
    ({"name": "dpa"}, "search.dpa: no step is called 'dpa'"),
    ({"name": "evaluate"}, "search.evaluate: a search is for a step that trains a policy"),
    ({"evaluation": "sft"}, "search.dpo.evaluation: no step with stage: evaluate is called 'sft'"),
    ({"metric": "general.nll"}, "search.dpo.metric: no metric of step 'validation' is called 'general.nll'"),
    ({"rungs": [3, 3]}, "search.dpo.rungs: [3, 3] are not increasing numbers of optimizer steps"),
    ({"budget": {}}, "search.dpo.budget: give at least one of trials, flops and money"),
    ({"budget": {"money": 1.0}}, "search.dpo.budget.money: the cost of trials is unknown"),
    ({"space": {"train.learning_rat": {"log": [1, 2]}}}, "search.dpo.space.train.learning_rat"),
    ({"space": {"train.learning_rate": {"linear": [-1, 0]}}}, "search.dpo.space.train.learning_rate"),
    ({"space": {"loss.name": {"choices": ["dpo", "ipo"], "log": [1, 2]}}}, "give one of log, linear, choices"),
    ({"space": {"train.learning_rate": {"log": [0, 1]}}}, "a logarithmic range is above 0"),
    ({"space": {"train.learning_rate": {"log": [2, 1]}}}, "[2.0, 1.0] are not a lowest and a highest value"),
    (
        {"space": {"train.warmup_steps": {"linear": [1.2, 1.4], "integer": True}}},
        "search.dpo.space.train.warmup_steps.integer: needs bounds that are whole numbers, not [1.2, 1.4]",
    ),
    (
        {"steps": {"dpo": {**RECIPE["steps"]["dpo"], "train": {"learning_rate": 1e-3, "until_step": 1}}}},
        "search.dpo.rungs: the last rung is 2, and the step stops after 1",
    ),
    ({"chosen": 7}, "search.dpo.chosen: 7 is none of the trials"),
    ({"steps": {"dpo-trial-1-rung-1": RECIPE["steps"]["dpo"]}}, "has the name of a trial"),
]


@pytest.mark.parametrize(("changes", "said"), WRONG)
def test_a_wrong_search_is_named_with_its_key(changes, said):
    with pytest.raises(InputError) as error:
        recipe(**changes)
    assert said in str(error.value)
    assert len(error.value.parts) == 1, error.value


HALF = {**DPO, "train": {"learning_rate": 1e-3, "until_step": 3}}
RESUMED = [
    ({"resume": "halve"}, "resume: no earlier step is called 'halve'"),
    ({"resume": "sft"}, "resume: step 'sft' has another stage"),
    ({"resume": "half", "min_chosen": 1.0}, "resume: step 'half' has another min_chosen"),
    ({"resume": "half", "train": {"learning_rate": 1e-2}}, "resume: step 'half' has another train.learning_rate"),
    ({"resume": "dpo", "policy": "sft"}, "resume: step 'dpo' keeps no checkpoint: set its train.until_step"),
    ({"resume": "half", "train": {**HALF["train"], "until_step": 2}}, "step 'half' has a later train.until_step, 3"),
    ({"resume": "half", "rounds": 2}, "resume: a step of several rounds"),
    ({"resume": "half", "selection": {"score": "hard"}}, "selection"),
]


@pytest.mark.parametrize(("changes", "said"), RESUMED)
def test_a_step_that_cannot_be_resumed_is_named(changes, said):
    steps = {**RECIPE["steps"], "half": {**HALF, "policy": "sft"}, "rest": {**DPO, **changes}}
    with pytest.raises(InputError) as error:
        validated_recipe({**RECIPE, "steps": steps})
    assert said in str(error.value)


def test_a_resumed_step_starts_from_the_policy_of_the_one_that_it_resumes():
    steps = {**RECIPE["steps"], "half": {**HALF, "policy": "sft"}, "rest": {**DPO, "resume": "half"}}
    assert validated_recipe({**RECIPE, "steps": steps}).steps["rest"].policy == "sft"


def test_trials_without_a_value_are_shown_after_the_others_of_their_rung():
    def rung(value, steps=10, diverged=None):
        score = {"value": value, "low": None, "high": None, "n": 4}
        costs = {"flops": 1.0, "seconds": 1.0, "cost": None}
        return {"optimizer_steps": steps, "score": score, "diverged": diverged, "goes_on": None, **costs}

    rungs = {"1": [rung(math.nan)], "2": [rung(0.95, steps=3, diverged="the loss is nan")], "3": [rung(0.4)]}
    rungs["4"] = [rung(0.9), rung(0.2, steps=20)]
    trials = {number: {"settings": {"beta": 1.0}, "rungs": each} for number, each in rungs.items()}
    found = {"space": {"beta": {}}, "column": "general correct", "greater_is_better": True, "chosen": None}
    _, rows = trial_rows({**found, "trials": trials}, set())
    assert [row[0] for row in rows] == ["4", "3", "1", "2", "4"]


SOURCES = {
    "first": {"limit": 3},
    "second": {"skip": 3, "limit": 3},
    "filtered": {"where": {"odd": True}, "limit": 3},
    "after filtered": {"where": {"odd": True}, "skip": 3},
    "lenient": {"on_error": "skip", "skip": 3},
    "renamed": {"columns": {"prompt": "other"}, "limit": 3},
    "random": {"order": "random", "limit": 6},
    "after random": {"order": "random", "skip": 6},
    "another random": {"order": "random", "seed": 1, "skip": 6},
}


def test_sources_that_yield_a_row_of_one_file_share_rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"Q{at}", "other": f"Q{at + 3}", "response": "R", "odd": at % 2 == 1} for at in range(12)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "link.jsonl").symlink_to(file)
    paths = [str(file), f"{tmp_path}/./rows.jsonl", str(tmp_path / "link.jsonl")]
    found = {name: build(SourceSettings, {"path": paths[0], **settings}) for name, settings in SOURCES.items()}
    rows = {
        name: {located.record.messages[0].content for located in streamed(source, kind=Demonstration, seed=0).records}
        for name, source in found.items()
    }
    assert rows["second"] & rows["filtered"]
    for one, other in itertools.product(found, repeat=2):
        for path in paths:
            if rows[one] & rows[other]:
                assert _share_rows(found[one], found[other].model_copy(update={"path": path})), (one, other)
    assert rows["random"] & rows["another random"]
    for one, other in (("first", "second"), ("filtered", "after filtered"), ("random", "after random")):
        assert not rows[one] & rows[other] and not _share_rows(found[other], found[one])
