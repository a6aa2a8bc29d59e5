"""Validation of a whole recipe: names, kinds of inputs, and settings against what they read."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from align.errors import ErrorList, InputError, dotted_loc, within
from align.registry import pick, suggest
from align.stages.base import GROUPS, SOURCE, SYNTHETIC, Input
from align.stages.inputs.sources import SourceSettings, check_source
from align.train.tracking import check_trackers
from align.workflow.recipe.retention import KeepBest
from align.workflow.recipe.schema import Recipe
from align.workflow.recipe.servers import check_servers
from align.workflow.search.trials import evaluation_name, trial_name


def validate(recipe: Recipe, broken: Collection[str] = ()) -> None:
    """Raise everything that is wrong with the recipe, each error with its location.

    `broken` are the names of sources, steps and sections that have errors already and are left out of the recipe: what
    follows from them is not reported.
    """
    errors = ErrorList()
    broken = set(broken)
    wrong = set[str]()
    if "policy" not in broken:
        with errors.collect():
            _check_policy(recipe)
        broken |= {"policy"} if errors.found else set()
    with errors.collect():
        check_trackers(recipe.tracking.trackers, ("tracking", "trackers"))
    if recipe.budget.money is not None and recipe.accounting.price_per_device_hour is None:
        message = "the cost of a run is unknown without a price: set accounting.price_per_device_hour"
        errors.found.append(InputError(message, ("budget", "money")))
    for name, source in recipe.data.items():
        with errors.collect(), within("data", name):
            check_source(source)
            _check_maker(recipe, source, broken)
    for name in recipe.steps:
        origin = recipe.written[name][0]
        found = _step_errors(recipe, name, broken) if origin not in wrong else []  # rounds repeat their errors
        errors.found += found
        wrong |= {origin} if found else set()
    if not errors.found and not broken:
        for check in (check_columns, check_servers, check_keep, check_search):
            with errors.collect():
                check(recipe)
    errors.found = _merged(errors.found)
    errors.raise_found()


def _merged(errors: Iterable[InputError]) -> list[InputError]:
    """Return the errors, of those that say the same only the first, which then names the other places."""
    places: dict[str, list[InputError]] = {}
    for error in errors:
        places.setdefault(error.message, []).append(error)
    for first, *others in places.values():
        also = ", ".join(dotted_loc(error.loc) for error in others)
        first.message += f" (also {also})" if also else ""
    return [first for first, *_ in places.values()]


def _check_policy(recipe: Recipe) -> None:
    """Raise unless the recipe names its policy in one way, where a step starts from it."""
    policy = recipe.policy
    if policy.path is not None and policy.from_config is not None:
        raise InputError(
            "give either path (hub id, folder or gguf:FILE) or from_config (a configuration), not both", ("policy",)
        )
    if policy.path is not None or policy.from_config is not None:
        return
    for name, step in recipe.steps.items():
        if step.needs_policy():
            raise InputError(
                f"step {recipe.written[name][0]!r} starts from it: give path (hub id, folder or gguf:FILE) or "
                "from_config (a configuration)",
                ("policy",),
            )


def _step_errors(recipe: Recipe, name: str, broken: Collection[str]) -> list[InputError]:
    """Return what is wrong with a step: its settings and inputs, and where these are right, how they fit."""
    step = recipe.steps[name]
    errors = ErrorList()
    inputs = ErrorList()
    with errors.collect():
        step.validate_settings()
    whole = [each for each in step.inputs() if not _is_of(each.name, broken)]
    for each in whole:
        with inputs.collect(), within(*each.loc):
            _check_input(recipe, each)
    is_known = len(whole) == len(step.inputs()) and not (step.needs_policy() and "policy" in broken)
    if is_known and not inputs.found:
        with errors.collect():
            step.validate_inputs(recipe.resolved(name))
    found = [*errors.found, *inputs.found]
    for error in found:
        if error.loc[:1] != ("policy",) or len(error.loc) == 1:  # the recipe's own policy otherwise
            error.loc = recipe.location(name, error.loc)
    return found


def _check_maker(recipe: Recipe, source: SourceSettings, broken: Collection[str]) -> None:
    """Raise unless the step and the file that a source names exist."""
    if source.made_by is None or _is_of(source.made_by[0], broken):
        return
    name, file = source.made_by
    with within("path"):
        step = pick(recipe.steps, name, "step")
        if file not in step.files():
            raise InputError(f"step {name!r} makes no file {file!r}; {suggest(file, step.files())}")


def _is_of(name: str, broken: Collection[str]) -> bool:
    """Return whether a name is that of a broken source or step, or of one of its rounds."""
    return any(name == each or name.startswith(f"{each}-") for each in broken)


def _check_input(recipe: Recipe, wanted: Input) -> None:
    """Raise unless the input is a source or a step of one of its kinds."""
    name, kinds = wanted.name, wanted.kinds
    if name in recipe.steps and name in recipe.data:
        raise InputError(f"{name!r} is both a step and a source of data; rename one of them")
    if name in recipe.data and SOURCE in kinds:
        return
    made = recipe.steps[name].makes if name in recipe.steps else None
    if made in kinds:
        return
    if made == SYNTHETIC and SOURCE in kinds:
        files = ", ".join(recipe.steps[name].files())
        raise InputError(f"step {name!r} makes {made}: name a source with the path step:{name}/FILE; files: {files}")
    if SOURCE in kinds and (made is None or GROUPS not in kinds):
        raise InputError(f"no source of data is called {name!r}; {suggest(name, [*wanted.also, *recipe.data])}")
    if made is None:
        raise InputError(f"no step is called {name!r}; {suggest(name, recipe.steps)}")
    steps = " or ".join(kind for kind in kinds if kind != SOURCE)
    raise InputError(f"step {name!r} makes {made}, not {steps}")


def check_columns(recipe: Recipe) -> None:
    """Raise if two evaluations would write different things into one column of the table."""
    seen: dict[str, tuple[str, object]] = {}
    for name, step in recipe.steps.items():
        for column, loc, asked, _ in step.columns(recipe.resolved(name)):
            at = recipe.location(name, loc)
            place = ".".join(map(str, at))
            other, same = seen.setdefault(column, (place, asked))
            if same != asked:
                raise InputError(
                    f"results column {column!r} is also used by {other} with different settings; rename one of the "
                    "two tasks",
                    at,
                )


def check_keep(recipe: Recipe) -> None:
    """Raise unless policies of the recipe are evaluated by the metric that `keep` names."""
    known = recipe.metric_columns(only_policies=True)
    if isinstance(recipe.keep, KeepBest) and recipe.keep.best not in known:
        nearest = suggest(recipe.keep.best, known) if known else "no step of the stage evaluate has a known metric"
        raise InputError(f"no policy is evaluated by {recipe.keep.best!r}; {nearest}", ("keep", "best"))


def check_search(recipe: Recipe) -> None:
    """Raise unless each search ranks trials by a metric of its evaluation, and can know the cost that it limits."""
    for name, searched in recipe.searched.items():
        search = recipe.search[name]
        first = trial_name(searched.base, search.levels[0][0], rung=1)
        step = evaluation_name(search.evaluation, first)  # other policies may have other metrics
        known = [f"{column.loc[-1]}.{column.metric}" for column in recipe.steps[step].columns(recipe.resolved(step))]
        with within("search", name, "metric"):
            pick(dict.fromkeys(known), search.metric, f"metric of step {search.evaluation!r}")
        if search.budget.money is not None and recipe.accounting.price_per_device_hour is None:
            message = "the cost of trials is unknown: set accounting.price_per_device_hour"
            raise InputError(message, ("search", name, "budget", "money"))
