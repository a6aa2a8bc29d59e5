"""What can be wrong with a step and is known before anything runs: its settings against its rows, and among themselves.

Each error begins with the key, below the step's own, that is to be changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from align.errors import InputError
from align.evaluation.task import Task
from align.evaluation.tasks import IN_RECIPES, TASKS, pick_task
from align.losses.table import preference_loss
from align.models.settings import PolicySettings, check_adapters, resolve_rating
from align.procedural import tasks
from align.registry import pick, suggest
from align.stages.steps import (
    PROCEDURAL,
    AnyStep,
    EvaluateStep,
    GenerateStep,
    ImportStep,
    PreferenceStep,
    RewardStep,
    ScoreStep,
    SourceSettings,
    TaskSettings,
    TrainStep,
    key_of,
)
from align.train.accelerator import check_trackers

TRAINING = (TrainStep, PreferenceStep, RewardStep)


@dataclass(frozen=True, slots=True)
class Given:
    """A step with what the recipe gives it."""

    step: Any  # of the kinds that a check of CHECKS is for
    policy: PolicySettings  # the recipe's own
    sources: Mapping[str, SourceSettings]  # the rows that it reads, by name
    policies: Sequence[str] = ()  # of a step that samples, the steps that make them


@contextmanager
def within(key: str) -> Generator[None]:
    """A block whose errors are about the key, or about a key below it."""
    try:
        yield
    except InputError as error:
        place_in_message(error)
        error.loc = (*key.split("."), *error.loc)
        raise


PLACE = re.compile(r"([A-Za-z_][\w-]*(?:\.[^.:'\"]+)*): ")


def place_in_message(error: InputError) -> None:
    """Move a location at the start of the message into the error's own."""
    if (found := PLACE.match(error.message)) is not None:
        error.message = error.message[found.end() :]
        error.loc = (*error.loc, *found.group(1).split("."))


@contextmanager
def placed() -> Generator[None]:
    """A block whose errors have their location as data."""
    try:
        yield
    except InputError as error:
        place_in_message(error)
        raise


def check_settings(given: Given) -> None:
    """Raise for the first thing that is wrong."""
    for kinds, check in CHECKS:
        if isinstance(given.step, kinds):
            check(given)


def check_source(source: SourceSettings) -> None:
    """Raise for a setting of the source that could have no effect."""
    made = source.path.startswith(PROCEDURAL)
    if made:
        with within("path"):
            pick(tasks.KINDS, source.path.removeprefix(PROCEDURAL), "kind of task")
        if source.split is not None:
            with within("split"):
                pick(tasks.SPLITS, source.split, "split")
    idle = {
        "format": made and "rows that the project makes have none of a file's formats",
        "responses": not made and f"rows that are read have the responses they have; it is for {PROCEDURAL}KIND",
        "seed": not made
        and source.constraints is None
        and f"nothing is drawn; it is for {PROCEDURAL}KIND or constraints",
    }
    for key, why in idle.items():
        value, default = getattr(source, key), SourceSettings.model_fields[key].default
        if why and value != default:
            raise InputError(f"{key}: {value!r} has no effect on {source.path}: {why}; leave it at {default!r}")


def task_of(settings: TaskSettings, source: SourceSettings) -> Task:
    """Return the task of an evaluation; without a name it follows from the rows."""
    own = source.path.removeprefix(PROCEDURAL) if source.path.startswith(PROCEDURAL) else None
    name = settings.task or own or ("ifeval" if source.constraints is not None else None)
    if name is None:
        known = ", ".join(IN_RECIPES)
        raise InputError(f"task: {settings.data} does not say which task its rows are of; name one of {known}")
    if name not in IN_RECIPES and ":" not in name:
        raise InputError(f"task: no task is called {name!r}; {suggest(name, IN_RECIPES)}")
    with within("task"):
        task = pick_task(name)
        if not {"data", "policy"} <= task.options:
            raise InputError(f"{name} is for the command line: it takes no data or no policy")
    if own is not None and task.columns and name in TASKS and name != own:
        raise InputError(f"task: {source.path} makes no rows of {name!r}; leave it out, or name a source of such rows")
    return task


def check_columns(evaluations: Mapping[str, EvaluateStep], sources: Mapping[str, SourceSettings]) -> None:
    """Raise where evaluations, by the names they are written under, would tell different things in one column."""
    seen: dict[str, tuple[str, object]] = {}
    for step_name, step in evaluations.items():
        for name, task in step.tasks.items():
            place, source = f"steps.{step_name}.tasks.{name}", sources[task.data]
            asked = name, task.model_copy(update={"data": "", "metrics": None}), source
            for column in _columns(name, task_of(task, source), task.metrics):
                other, same = seen.setdefault(column, (place, asked))
                if same != asked:
                    raise InputError(
                        f"{place}: its column {column!r} of the table is that of {other} too, which asks something "
                        "else; call one of them something else"
                    )


def _columns(name: str, task: Task, asked: Sequence[str] | None) -> Iterator[str]:
    metrics = [metric for metric in task.metrics if asked is None or metric in asked]
    return (task.column(name, metric, is_only=len(metrics) == 1) for metric in metrics)


def _vocabulary(given: Given) -> None:
    step: ImportStep = given.step
    if step.vocab_size is None:
        return
    if (path := step.path or given.policy.path) is not None:
        raise InputError(
            f"vocab_size: {path} has a tokenizer, which its weights were trained with; a new one is for "
            "policy.from_config"
        )
    if given.policy.tokenizer is not None:
        raise InputError(
            f"vocab_size: a new tokenizer would take the place of {given.policy.tokenizer!r}; leave it or "
            "policy.tokenizer out"
        )


def _exhausted(given: Given) -> None:
    step: TrainStep = given.step
    if "stopping_strategy" in step.model_fields_set and len(given.sources) == 1:
        (only,) = given.sources
        raise InputError(
            f"stopping_strategy: {step.stopping_strategy!r} is for several sources, and {only!r} is one; leave it out"
        )


def _loss(given: Given) -> None:
    with within("loss"):
        preference_loss(given.step.loss.name, **given.step.loss.settings)


def _head(given: Given) -> None:
    step: RewardStep = given.step
    check_adapters(given.policy, step.head)
    if step.head.attributes is not None:
        resolve_rating(step.head, None, default=())


def _held_out_rows(given: Given) -> None:
    """What is told of held-out rows needs some."""
    step: TrainStep | PreferenceStep | RewardStep = given.step
    if any(source.held_out for source in given.sources.values()):
        return
    asks = {
        "train.keep": step.train.keep == "best",
        "train.evaluate_every": step.train.evaluate_every is not None,
        "subset": isinstance(step, RewardStep) and step.subset is not None,
    }
    for key, is_asked in asks.items():
        if is_asked:
            raise InputError(
                f"{key}: is told of held-out rows, and no row is held out: set held_out of {' or '.join(given.sources)}"
            )


def _prompts(given: Given) -> None:
    step: GenerateStep = given.step
    sources = [step.data] if isinstance(step.data, str) else step.data
    if not given.policies and not step.models:
        raise InputError("policies: no step before it makes one: name one here, or a model under models")
    with within("prompts"):
        for source in step.prompts or {}:
            pick({each: each for each in sources}, source, "source of its prompts")
    if step.round and (step.prompts is None or set(step.prompts) != set(sources)):
        raise InputError("prompts: how many prompts of each source a round takes must be said")
    for name, source in given.sources.items():
        if source.limit is None and source.path.startswith(PROCEDURAL) and not step.prompts:
            raise InputError(f"data: {name} has no end; give its limit, or prompts: {{{name}: NUMBER}}")
        with within("data"):
            _all_are_asked(name, source)


def _all_are_asked(name: str, source: SourceSettings) -> None:
    if source.held_out:
        raise InputError(
            f"{name} is split by held_out, {source.held_out}, for training alone, and all of its prompts would be "
            "asked: give the prompts a source of their own, by split, skip or limit"
        )


def _evaluated(given: Given) -> None:
    step: EvaluateStep = given.step
    for name, task in step.tasks.items():
        source = given.sources[task.data]
        with within(f"tasks.{name}"):
            if "/" in name or name.startswith("."):
                raise InputError(f"its name becomes a file's: no '/' in it and no '.' at its start, not {name!r}")
            chosen = task_of(task, source)
            with within("metrics"):
                _metrics(task, chosen)
            with within("data"):
                if "rows.constraints" not in chosen.options:
                    _not_constrained(task.data, source)
                if "held_out" not in chosen.options:
                    _all_are_asked(task.data, source)


def _metrics(settings: TaskSettings, task: Task) -> None:
    if settings.metrics is not None and not settings.metrics:
        raise InputError("name at least one, or leave it out for all")
    for metric in settings.metrics or ():
        if metric not in task.metrics:
            raise InputError(f"{task.name} has no metric {metric!r}; {suggest(metric, task.metrics)}")


def _given_rows(given: Given) -> None:
    """Rows whose responses are there are taken as they are."""
    for name, source in given.sources.items():
        with within(key_of(given.step, name)):
            _not_constrained(name, source)


def _not_constrained(name: str, source: SourceSettings) -> None:
    if source.constraints is not None:
        raise InputError(
            f"{name} has constraints, which are put behind prompts that a policy is asked; its responses here know "
            "nothing of them: use a source without"
        )


# In the order in which they are made; a check sees steps of its own kinds alone.
CHECKS: tuple[tuple[tuple[type[AnyStep], ...], Callable[[Given], None]], ...] = (
    ((ImportStep,), _vocabulary),
    ((PreferenceStep,), _loss),
    ((RewardStep,), _head),
    ((GenerateStep,), _prompts),
    ((EvaluateStep,), _evaluated),
    ((TrainStep,), _exhausted),
    (TRAINING, _held_out_rows),
    (TRAINING, lambda given: check_trackers(given.step.train)),
    ((*TRAINING, ScoreStep), _given_rows),
)
