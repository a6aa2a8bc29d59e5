"""The calls of the runner that a recipe with searches takes: one for each rung, each with a few more steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import NamedTuple

from align.artifacts import read_json, read_manifest, write_json
from align.config import read_recipe
from align.pipeline.planning import finished_steps
from align.workflow.launcher import Command
from align.workflow.recipe.schema import Recipe
from align.workflow.search.outcomes import advanced, num_promoted, outcomes
from align.workflow.search.settings import NUM_BEFORE_TPE, SearchSettings
from align.workflow.search.tpe import check_optuna, with_drawn
from align.workflow.search.trials import evaluation_name, trial_name

RERUN = ".rerun-search.json"  # in a run folder from the first rung after a requested rerun to its end: its step


class Call(NamedTuple):
    """A call of `run_recipe`."""

    command: Command
    until: str | None
    rerun_from: str | None


def calls(command: Command, *, until: str | None = None, rerun_from: str | None = None) -> Iterator[Call]:
    """Yield the calls that run a recipe; each has to be finished before the next one is asked for.

    The trials of a rung are ordinary steps. What is decided after each rung is a function of their manifests, so a
    search that was interrupted takes the same decisions again and resumes where it was. A recipe without a search is
    one call. Raises `InputError` for a step to run again that the recipe does not have.
    """
    note = command.loaded.root / RERUN
    if rerun_from is not None and note.is_file() and read_json(note) == rerun_from:
        rerun_from = None  # an earlier, interrupted call has begun it
    if rerun_from is not None and command.loaded.search:
        assumed(command)[0].loaded.expanded(rerun_from)
    for name in _in_order(command.loaded):
        search = command.loaded.search[name]
        names = list(command.loaded.steps)
        if until is not None:
            end = command.loaded.expanded(until)[-1]
            if names.index(end) < min(map(names.index, command.loaded.searched[name].waiting)):
                break
        search = _begun(name, search)
        while search.chosen is None:
            command = _with_state(command, name, search)
            recipe = command.loaded
            is_known = rerun_from in recipe.steps or rerun_from in {origin for origin, *_ in recipe.written.values()}
            yield Call(command, _last_trial(recipe, name), rerun_from if is_known else None)
            if is_known and rerun_from is not None:  # else a trial of a later rung
                write_json(note, rerun_from)
                rerun_from = None
            known = {step: read_manifest(recipe.root / step) for step in recipe.steps}
            manifests = {step: manifest for step, manifest in known.items() if manifest is not None}
            found = outcomes(recipe, name, manifests)
            search = with_drawn(advanced(search, found), recipe.seed, found[0])
        command = _with_state(command, name, search)
    yield Call(command, until, rerun_from)
    note.unlink(missing_ok=True)


def assumed(command: Command) -> tuple[Command, list[str]]:
    """Return the command with the trials of every rung, for estimates, and notes on what is assumed of them.

    Decisions whose trials have finished are taken; for all others, the first trials are assumed to be promoted.
    """
    notes: list[str] = []
    for name in _in_order(command.loaded):
        search = _begun(name, command.loaded.search[name])
        is_known = True
        while search.chosen is None:
            command = _with_state(command, name, search)
            recipe = command.loaded
            found = outcomes(recipe, name, finished_steps(recipe.pipeline(), recipe.root)) if is_known else []
            is_known = [len(rung) for rung in found] == [len(rung) for rung in search.levels]
            if is_known:
                search = with_drawn(advanced(search, found), recipe.seed, found[0])
            elif len(search.levels) == 1 and not _is_limited(search) and search.levels[0] != (whole := _all(search)):
                search = search.model_copy(update={"started": [whole]})
            elif search.is_at_end(number := num_promoted(len(search.levels[-1]), search)):
                rung = None if search.finish == "end" else len(search.levels)
                ended = {"started": search.levels, "chosen": search.levels[-1][0], "chosen_rung": rung}
                search = search.model_copy(update=ended)
            else:
                search = search.model_copy(update={"started": [*search.levels, search.levels[-1][:number]]})
        command = _with_state(command, name, search)
        if not is_known:
            many = f"{len(search.levels[0])} trial(s), of which the first ones are assumed to be the best"
            is_open = len(search.levels[0]) != search.budget.trials
            notes.append(f"search of {name}: {many}" + ("; there are more while the budget lasts" if is_open else ""))
    return command, notes


def _in_order(recipe: Recipe) -> list[str]:
    """Return the searched steps in the order in which they run."""
    names = list(recipe.steps)
    return sorted(recipe.search, key=lambda name: names.index(recipe.searched[name].base))


def _begun(name: str, search: SearchSettings) -> SearchSettings:
    """Return the search with its first trials: all, those before TPE draws, or one where FLOPs or money limit it.

    Raises `InputError` if optuna is needed and missing.
    """
    if search.points == "tpe":
        check_optuna(("search", name, "points"))
    if search.started is not None or (search.points != "tpe" and not _is_limited(search)):
        return search
    number = 1 if _is_limited(search) else NUM_BEFORE_TPE
    return search.model_copy(update={"started": [list(range(1, number + 1))]})


def _all(search: SearchSettings) -> list[int]:
    """Return the numbers of the trials of a search whose budget is a number of trials."""
    return search.model_copy(update={"started": None}).levels[0]


def _is_limited(search: SearchSettings) -> bool:
    """Return whether FLOPs or money decide how many trials there are."""
    return search.budget.flops is not None or search.budget.money is not None


def _last_trial(recipe: Recipe, name: str) -> str:
    """Return the evaluation of the last trial so far."""
    search = recipe.search[name]
    trained = trial_name(recipe.searched[name].base, search.levels[-1][-1], len(search.levels))
    return evaluation_name(search.evaluation, trained)


def _with_state(command: Command, name: str, search: SearchSettings) -> Command:
    """Return the command whose recipe has the trials that a search has started, also as overrides for its children.

    The recipe is not read again: who edits it while it runs changes nothing before the next command.
    """
    state = [f"search.{name}.started={json.dumps(search.levels)}", f"search.{name}.drawn={json.dumps(search.drawn)}"]
    before = tuple(each.partition("=")[0] + "=" for each in state)
    kept = [each for each in command.overrides if not each.startswith(before)]
    ended = search.model_dump(include={"chosen", "chosen_rung"}, exclude_none=True)
    state += [f"search.{name}.{key}={value}" for key, value in ended.items()]
    values = read_recipe(command.recipe, command.overrides) if command.values is None else command.values
    begun = {**values["search"][name], **ended, "drawn": search.drawn, "started": search.levels}
    return Command(command.recipe, (*kept, *state), {**values, "search": {**values["search"], name: begun}})
