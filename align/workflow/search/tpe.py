"""Points of trials drawn by optuna's TPE sampler (Bergstra et al. 2011) from the scores of earlier trials."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from align.errors import InputError, Location
from align.workflow.search.outcomes import Outcome
from align.workflow.search.points import shares, uniform
from align.workflow.search.settings import NUM_BEFORE_TPE, SearchSettings


def check_optuna(loc: Location) -> None:
    """Raise `InputError` if optuna is missing."""
    if find_spec("optuna") is None:
        raise InputError('optuna, which draws points by TPE, is not installed: pip install -e ".[optuna]"', loc)


def with_drawn(search: SearchSettings, seed: int, first: Sequence[Outcome]) -> SearchSettings:
    """Return a search with the point of its newest trial, where `points` is tpe and the trial has no outcome yet.

    `first` are the outcomes of all earlier trials at the first rung. The point depends on these and the seed only, so a
    search that was interrupted draws it again.
    """
    trial = len(search.levels[0])
    if search.points != "tpe" or trial == len(first):
        return search
    drawn = [shares(search, seed, each) for each in range(1, trial)]
    new = _suggested(search, seed, drawn, first) if trial > NUM_BEFORE_TPE else shares(search, seed, trial)
    return search.model_copy(update={"drawn": [*drawn, new]})


def _suggested(
    search: SearchSettings, seed: int, drawn: Sequence[Sequence[float]], first: Sequence[Outcome]
) -> list[float]:
    """Return the point that TPE suggests after trials at points in [0, 1]; one without a value is the worst."""
    optuna: Any = import_module("optuna")  # optional
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    counts = {key: None if each.choices is None else len(each.choices) for key, each in search.space.items()}
    kinds = {
        key: optuna.distributions.FloatDistribution(0.0, 1.0)
        if count is None
        else optuna.distributions.CategoricalDistribution(range(count))
        for key, count in counts.items()
    }
    own = int(uniform(seed, "tpe", len(drawn)) * 2**32)
    sampler = optuna.samplers.TPESampler(seed=own, n_startup_trials=NUM_BEFORE_TPE)
    study = optuna.create_study(direction="maximize" if search.is_greater_better else "minimize", sampler=sampler)
    for point, outcome in zip(drawn, first, strict=True):
        params = {
            key: share if count is None else int(share * count)
            for (key, count), share in zip(counts.items(), point, strict=True)
        }
        known = {"value": outcome.score["value"]} if outcome.has_value else {"state": optuna.trial.TrialState.PRUNED}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=kinds, **known))
    asked = study.ask(kinds).params
    return [asked[key] if count is None else (asked[key] + 0.5) / count for key, count in counts.items()]
