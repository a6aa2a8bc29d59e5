"""Trials as steps of a recipe: from the search of a step to a step for each trial and rung, and its evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from align.errors import ErrorList, InputError, within
from align.pipeline import dependents
from align.registry import pick
from align.stages.base import POLICY, REWARD_MODEL, Stage
from align.stages.evaluate import Evaluate
from align.stages.training.stage import TrainingStage
from align.workflow.recipe.expansion import with_names
from align.workflow.recipe.schema import Recipe, Sections
from align.workflow.search.keys import check_keys, dependent, keys_by_step, place, values_of
from align.workflow.search.points import with_point
from align.workflow.search.settings import SearchedSteps, SearchSettings


def trial_name(step: str, trial: int, rung: int | None = None) -> str:
    """Return the name of the step that trains a trial up to a rung, or of one before it; both are counted from 1."""
    return f"{step}-trial-{trial}" if rung is None else f"{step}-trial-{trial}-rung-{rung}"


def evaluation_name(evaluation: str, trained: str) -> str:
    """Return the name of the step that evaluates a trial, as the stage `evaluate` names its steps."""
    return f"{evaluation}-{trained}"


def with_trials(values: Mapping[str, Any], recipe: Recipe, build: Callable[[Mapping[str, Any]], Recipe]) -> Recipe:
    """Return a recipe with the trials of each search before the steps that wait for it.

    `values` are the plain values of the recipe, and `build` makes a recipe of such values. The searched step and all
    others that depend on a searched key have the values of the chosen trial once the search has ended.
    """
    values = {**values, "search": {}}
    searches = recipe.search
    for name, search in searches.items():
        chosen = {} if search.chosen is None else values_of(search, name, recipe.seed, search.chosen)
        if search.chosen_rung is not None:  # of every round, where the step has rounds
            chosen[f"steps.{name}.train.until_step"] = search.rungs[search.chosen_rung - 1]
        values = with_point(values, chosen)
    plain = build(values).model_copy(update={"search": searches})
    found = plain
    errors = ErrorList()
    for name in searches:
        with errors.collect():
            found = _Trials(plain, name, values, build).added_to(found)
    errors.raise_found()
    return found


@dataclass
class _Trials:
    """The trials of one search, and the steps that they add to a recipe."""

    recipe: Recipe  # without trials, with the chosen values of the searches that have ended
    name: str
    values: Mapping[str, Any]  # of that recipe
    build: Callable[[Mapping[str, Any]], Recipe]
    steps: dict[str, Stage] = field(default_factory=dict[str, Stage])  # that are added
    written: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    own: dict[str, Sections] = field(default_factory=dict[str, Sections])
    points: dict[int, dict[str, Any]] = field(default_factory=dict[int, dict[str, Any]])  # by trial

    @property
    def search(self) -> SearchSettings:
        """The settings of the search."""
        return self.recipe.search[self.name]

    @cached_property
    def base(self) -> str:
        """The searched step: of a step in rounds, the first round."""
        loc = ("search", self.name)
        if "." in self.name:
            raise InputError("a searched step has no '.' in its name; rename it", loc)
        with within(*loc):
            pick({origin: origin for origin, *_ in self.recipe.written.values()}, self.name, "step")
        for step in self.recipe.expanded(self.name) if self.name not in self.recipe.steps else [self.name]:
            settings = self.recipe.steps[step]
            if isinstance(settings, TrainingStage) and settings.makes in (POLICY, REWARD_MODEL):
                return step
        raise InputError("a search is for a step that trains a policy or a reward model", loc)

    @cached_property
    def evaluation(self) -> str:
        """A step of the evaluation that compares the trials."""
        steps, written = self.recipe.steps, self.recipe.written
        found = {written[name][0]: name for name, step in steps.items() if isinstance(step, Evaluate)}
        with within("search", self.name, "evaluation"):
            return pick(found, self.search.evaluation, "step with stage: evaluate")

    @cached_property
    def dependent(self) -> dict[str, set[str]]:
        """The steps that depend on each searched key by themselves."""
        return dependent(self.recipe, self.name, self.base, self.variant)

    @cached_property
    def waiting(self) -> dict[str, set[str]]:
        """The searched keys that the steps which wait for the search depend on."""
        return {step: keys for step, keys in keys_by_step(self.recipe, self.dependent).items() if keys}

    def added_to(self, recipe: Recipe) -> Recipe:
        """Return a recipe, which may have trials of other searches, with those of this one."""
        check_keys(self.recipe, self.name, self.base)
        self._check_end()
        self._check_others()
        earlier: dict[int, dict[str, str]] = {}
        for rung, trials in enumerate(self.search.levels, start=1):
            for trial in trials:
                if new := self._add_trial(trial, rung):
                    earlier[trial] = new  # all of them at the first rung
        if twice := recipe.steps.keys() & self.steps.keys():
            raise InputError(f"the step {min(twice)!r} has the name of a trial; rename it", ("search", self.name))
        copies = {} if self.search.chosen is None else self._add_chosen(self.search.chosen)
        changed = {name: self.steps.pop(name) for name in recipe.steps.keys() & self.steps.keys()}
        found = recipe.model_copy(
            update={
                "steps": {**recipe.steps, **changed, **self.steps},
                "written": {**recipe.written, **self.written},
                "own": {**recipe.own, **self.own},
            }
        )
        for step in self.steps:
            if wrong := [name for name in found.inputs(step) if name in self.waiting]:
                what = f"step {self.written[step][0]!r} reads {wrong[0]!r} by a key in which a search cannot replace it"
                raise InputError(what, ("search", self.name, "space"))
        known = SearchedSteps(base=self.base, earlier=earlier, copies=copies, waiting=list(self.waiting))
        steps = {name: found.steps[name] for name in self._ordered(found)}
        return found.model_copy(update={"steps": steps, "searched": {**recipe.searched, self.name: known}})

    def variant(self, point: Mapping[str, Any]) -> Recipe:
        """Return the recipe without trials, with other values at dotted keys."""
        try:
            found = self.build(with_point(self.values, point))
        except InputError as error:
            for part in error.parts:
                part.loc = place(part.loc, self.name, self.search)
            raise
        if self.base not in found.steps:
            raise InputError(f"a trial has no step {self.base!r}; leave {self.name}.rounds out", ("search", self.name))
        return found

    def _point(self, trial: int) -> dict[str, Any]:
        if trial not in self.points:
            self.points[trial] = values_of(self.search, self.name, self.recipe.seed, trial)
        return self.points[trial]

    def _check_end(self) -> None:
        """Raise if the searched step stops before the last rung, whose checkpoint it would resume."""
        step = self.recipe.steps[self.base]
        rungs = self.search.rungs
        assert isinstance(step, TrainingStage)
        until = step.train.until_step
        loc = ("search", self.name, "rungs")
        if until is not None and until < rungs[-1] and self.search.chosen_rung is None:  # else it is that of the rung
            raise InputError(f"the last rung is {rungs[-1]}, and the step stops after {until}: train.until_step", loc)
        if len(self.search.levels) > len(rungs):
            message = f"names {len(self.search.levels)} rungs of {len(rungs)}"
            raise InputError(message, ("search", self.name, "started"))
        chosen = self.search.chosen
        if chosen is not None and not any(chosen in trials for trials in self.search.levels):
            message = f"{chosen} is none of the trials {self.search.levels}"
            raise InputError(message, ("search", self.name, "chosen"))

    def _check_others(self) -> None:
        """Raise if what compares the trials, or another search before the trials, depends on a searched key."""
        recipe, name = self.recipe, self.evaluation
        asked = recipe.steps[name].model_copy(update={"policies": [], "kl_from_start": False})
        asking = recipe.model_copy(update={"steps": {**recipe.steps, name: asked}})
        for step in [each for each in asking.ancestors(name) if each in self.waiting]:
            what = f"reads step {step!r}, which depends on {min(self.waiting[step])}; it is the same for all trials"
            raise InputError(what, ("search", self.name, "evaluation"))
        for step in self.waiting:
            other = recipe.written[step][0]
            if other != self.name and other in recipe.search and self.base not in recipe.ancestors(step):
                what = f"step {other!r}, which has a search of its own, depends on {min(self.waiting[step])}"
                raise InputError(f"{what}; search these keys in one of the two", ("search", self.name, "space"))

    def _names(self, trial: int, variant: Recipe) -> dict[str, str]:
        """Return the steps that are made for trials, by those of the recipe that they stand for.

        A trial shares them with the first one that has the same values of the keys that they depend on.
        """
        keys = keys_by_step(variant, self.dependent)
        before = variant.ancestors(self.base)
        own = self._point(trial)
        found: dict[str, str] = {}
        for step in [each for each in variant.steps if each in before and keys[each]]:
            same = (other for other in range(1, trial + 1) if all(self._point(other)[k] == own[k] for k in keys[step]))
            found[step] = trial_name(step, next(same))
        return found

    def _add(self, name: str, of: str, variant: Recipe, names: Mapping[str, str], **changes: Any) -> None:  # noqa: ANN401
        """Add a step of a trial: the step `of` of the recipe of the trial, which reads other steps of the trial."""
        self.steps[name] = with_names(variant.steps[of], names).model_copy(update=changes)
        self.written[name] = variant.written[of]
        sections = Sections(policy=variant.policy, data=with_names(variant.data, names))
        if sections != Sections(policy=self.recipe.policy, data=self.recipe.data):
            self.own[name] = sections

    def _add_trial(self, trial: int, rung: int) -> dict[str, str]:
        """Add a trial up to a rung, with its evaluation; return the new steps before it, and what they stand for."""
        train = f"steps.{self.name}.train"
        base = self.base
        stops = {f"{train}.until_step": self.search.rungs[rung - 1], f"{train}.on_divergence": "stop"}
        variant = self.variant({**self._point(trial), **stops})
        names = self._names(trial, variant)
        new = {step: name for step, name in names.items() if name not in self.steps}
        for step, name in new.items():
            self._add(name, step, variant, names)
        trained = trial_name(base, trial, rung)
        self._add(trained, base, variant, names, resume=trial_name(base, trial, rung - 1) if rung > 1 else None)
        evaluated = evaluation_name(self.search.evaluation, trained)
        self._add(evaluated, self.evaluation, variant, {}, policies=[trained], models=[])
        return {name: step for step, name in new.items()}

    def _add_chosen(self, trial: int) -> dict[str, str]:
        """Add the searched step, which resumes the chosen trial; return the steps that are copies of the trial's.

        The searched step is a copy itself where the search ends at a rung.
        """
        last = max(rung for rung, trials in enumerate(self.search.levels, start=1) if trial in trials)
        trained = trial_name(self.base, trial, self.search.chosen_rung or last)
        names = self._names(trial, self.recipe)
        self._add(self.base, self.base, self.recipe, names, resume=trained)
        return names if self.search.chosen_rung is None else {**names, self.base: trained}

    def _ordered(self, recipe: Recipe) -> list[str]:
        """Return the steps in their order: the trials follow what they read and come before the steps that wait."""
        names = list(recipe.steps)
        waiting = dependents(recipe.graph(), list(self.waiting)) - self.steps.keys()
        needed = set[str]().union(*(recipe.ancestors(step) for step in self.steps))
        before = {*names[: names.index(self.base)], *needed} - waiting - self.steps.keys()
        first = [name for name in names if name in before]
        return [*first, *self.steps, *(name for name in names if name not in before and name not in self.steps)]
