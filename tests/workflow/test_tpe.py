"""Points that optuna's TPE sampler draws: better than Sobol points, and the same ones after an interruption."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from align.config import build
from align.errors import InputError
from align.workflow.search import tpe
from align.workflow.search.outcomes import Outcome, advanced
from align.workflow.search.points import point
from align.workflow.search.settings import SearchSettings
from align.workflow.search.tpe import with_drawn

SPACE = {
    "train.learning_rate": {"log": [1e-6, 1.0]},
    "loss.name": {"choices": ["dpo", "ipo", "kto", "orpo"]},
    "train.prompts_per_step": {"linear": [1, 64], "integer": True},
}
NOTHING = {"flops": 1.0, "seconds": 1.0, "cost": None}


def search(**changes):
    given = {"space": SPACE, "evaluation": "validation", "metric": "chat.nll", "points": "tpe", "rungs": [10]}
    return build(SearchSettings, {**given, "budget": {"trials": 40}, **changes})


def loss(values):
    """Best at 1e-4 with kto; learning rates above 0.01 diverge."""
    rate = math.log10(values["train.learning_rate"]) + 4
    return rate**2 + (values["loss.name"] != "kto") + values["train.prompts_per_step"] / 640


def outcome(trial, values, sign):
    diverged = "the loss is nan" if values["train.learning_rate"] > 0.01 else None
    score = {"value": math.nan if diverged else sign * loss(values), "low": None, "high": None, "n": 4}
    return Outcome(trial, score, diverged, 0, 10, 10, NOTHING, NOTHING, NOTHING)


def points(made, seed=0, sign=1):
    """The settings of every trial of a search."""
    if made.points == "tpe" and made.started is None:
        made = made.model_copy(update={"started": [list(range(1, 11))]})
    while made.chosen is None:
        first = [outcome(trial, point(made, seed, trial), sign) for trial in made.levels[0]]
        made = with_drawn(advanced(made, [first]), seed, first)
    return [point(made, seed, trial) for trial in made.levels[0]]


@pytest.mark.parametrize("sign", [1, -1])
def test_points_gather_where_scores_are_good_and_leave_where_trials_diverge(sign):
    pytest.importorskip("optuna")
    ours, theirs = [], []
    for seed in range(3):
        found = points(search(greater_is_better=sign < 0), seed, sign)
        sobol = points(search(points="sobol"), seed)
        assert found[:10] == sobol[:10] and len(found) == 40
        assert all(1e-6 <= each["train.learning_rate"] <= 1 for each in found)
        assert all(isinstance(each["train.prompts_per_step"], int) for each in found)
        ours += found[10:]
        theirs += sobol[10:]

    def share(trials, rule):
        return sum(rule(each) for each in trials) / len(trials)

    rules = [
        (lambda each: 1e-5 < each["train.learning_rate"] < 1e-3, 1 / 3),  # two of six decades
        (lambda each: each["loss.name"] == "kto", 1 / 4),
    ]
    for rule, uniform in rules:
        assert abs(share(theirs, rule) - uniform) < 0.1 < 1.5 * uniform < share(ours, rule)
    assert share(ours, lambda each: each["train.learning_rate"] > 0.01) < 1 / 6  # uniform: 1/3


def test_an_interrupted_search_draws_the_same_points_in_another_process():
    pytest.importorskip("optuna")
    made = search(budget={"trials": 14})
    code = "import json, test_tpe; print(json.dumps(test_tpe.points(test_tpe.search(budget={'trials': 14}))))"
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": paths}
    again = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    whole = points(made)
    assert json.loads(again.stdout) == whole
    assert again.stderr == ""  # optuna logs nothing
    assert points(search(budget={"trials": 11})) == whole[:11]  # nor does a point depend on later trials
    assert points(made, seed=1)[10] != whole[10]


def test_a_budget_of_flops_starts_with_one_trial_and_draws_the_same_points():
    pytest.importorskip("optuna")
    limited = search(budget={"flops": 1e9, "trials": 13}, started=[[1]])
    assert points(limited) == points(search(budget={"trials": 13}))


def test_tpe_needs_optuna_and_more_trials_than_it_begins_with(monkeypatch):
    with pytest.raises(InputError, match="points: tpe draws no trial before number 11"):
        search(budget={"trials": 10})
    monkeypatch.setattr(tpe, "find_spec", lambda name: None)
    with pytest.raises(InputError) as error:
        tpe.check_optuna(("search", "dpo", "points"))
    assert str(error.value).endswith('is not installed: pip install -e ".[optuna]"')
