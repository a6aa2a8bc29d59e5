"""The stage that tells how a policy answers, and how much each policy has changed against the one before it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from align.accounting.formulas import Work, added
from align.data.chat_templates import apply_template
from align.data.token_groups import TokenGroup
from align.distributed.processes import Processes, init_processes
from align.distributed.progress import Progress
from align.distributed.work_split import split_work
from align.errors import InputError, within
from align.evaluation.statistics import Score, interval
from align.evaluation.task import Answer, NextTurn, PairedResponses, Row, Task
from align.inference.samples import Speed
from align.inference.settings import LocalSettings, SamplingSettings
from align.inference.transformers_engine import TransformersEngine
from align.models.loading.config import max_positions
from align.models.loading.pretrained import default_device, silence_transformers
from align.models.policy import Policy, load_policy
from align.models.settings import PolicySettings
from align.registry import suggest
from align.rewards.verdicts import Judge
from align.stages.answering import ask_policy, write_lines
from align.stages.checks import task_of
from align.stages.generating import opened
from align.stages.grading import likelihood_rows, task_rows
from align.stages.groups import sampling_done
from align.stages.recipe import Recipe, SourceSettings
from align.stages.steps import EvaluateStep, TaskSettings
from align.stages.training import Context, about

T = TypeVar("T")
R = TypeVar("R")


def evaluate_policy(context: Context) -> dict[str, Any]:
    """Return `{policy: {column: {value, low, high, n}}}` of the step's policy; write the lines of each task."""
    step = context.recipe.steps[context.name]
    assert isinstance(step, EvaluateStep)
    silence_transformers()
    processes = init_processes()
    (policy,) = step.policies
    engines = _Engines(str(context.inputs[policy]), policy)
    found: dict[str, dict[str, float]] = {}
    columns: dict[str, tuple[str, str]] = {}
    work = Work(0, 0, 0)
    for name, settings in step.tasks.items():
        task = task_of(settings, context.recipe.source(settings.data))
        with within("steps", context.name, "tasks", name):
            result = task.run(_Inputs(context, name, settings, engines, processes))
        lines = [{"policy": policy, **line} for line in result.lines]
        processes.run_on_main(partial(write_lines, context.working / f"{name}.jsonl", lines), f"writing {name}")
        work = added([work, result.work])
        metrics = list(result.scores) if settings.metrics is None else settings.metrics
        if unknown := [metric for metric in metrics if metric not in result.scores]:
            message = f"no metric {unknown[0]!r}; {suggest(unknown[0], result.scores)}"
            raise InputError(message, ("steps", context.name, "tasks", name, "metrics"))
        for metric in [metric for metric in result.scores if metric in metrics]:
            column = task.column(name, metric, is_only=len(metrics) == 1)
            found[column] = result.scores[metric]._asdict()
            columns[column] = (name, task.part(metric))
    speeds = [speed for part in processes.all_gather_object(engines.speeds) for speed in part]
    done = replace(sampling_done(context.inputs[policy], speeds, engines.precision, work), devices=processes.world_size)
    return {**about(context), "scores": {policy: found}, "columns": columns, "done": done}


class _Engines:
    """The engine of a policy in each precision, loaded once."""

    def __init__(self, path: str, name: str) -> None:
        self.path, self._name = path, name
        self._loaded: dict[Any, TransformersEngine] = {}

    def of(self, precision: Literal["fp32", "bf16"]) -> TransformersEngine:
        if precision not in self._loaded:
            local = LocalSettings(precision=precision)
            self._loaded[precision] = TransformersEngine.load(self.path, local, name=self._name)
        return self._loaded[precision]

    @property
    def speeds(self) -> list[Speed]:
        return [engine.speed for engine in self._loaded.values()]

    @property
    def precision(self) -> str:
        return next(iter(self._loaded), "fp32")


@dataclass
class _Inputs:
    """What a step gives one of its tasks."""

    context: Context
    name: str
    settings: TaskSettings
    engines: _Engines
    processes: Processes
    limit: None = None
    tasks_folder: None = None

    @property
    def progress(self) -> Progress:
        return self.context.report

    @property
    def precision(self) -> str:
        return self.settings.precision

    @property
    def policy_path(self) -> str:
        return self.engines.path

    @property
    def _source(self) -> SourceSettings:
        return self.context.recipe.source(self.settings.data)

    def rows(self, task: Task) -> Sequence[Row]:
        left_out = Counter[str]()
        rows = task_rows(task, self._source, seed=self.context.recipe.seed, counts=left_out)
        for what, number in left_out.items():
            self.progress.note(f"{self.name}: {number:,} {what.replace(':', ' ')}")
        return rows

    @cached_property
    def _loaded(self) -> tuple[Policy, PreTrainedTokenizerBase]:
        policy, tokenizer = load_policy(PolicySettings(path=self.policy_path))
        apply_template(tokenizer)
        return policy.to(default_device()), tokenizer

    def policy(self) -> Policy:
        return self._loaded[0]

    def token_groups(self, *, preferred_only: bool) -> Sequence[TokenGroup]:
        policy, tokenizer = self._loaded
        limit, seed = max_positions(policy.base.config), self.context.recipe.seed
        groups, row_counts = likelihood_rows(self._source, tokenizer, model_limit=limit, seed=seed, best=preferred_only)
        left_out = row_counts["left_out"] or "none"
        self.progress.note(f"{self.name}: {row_counts['rows']} rows read, {len(groups)} measured, {left_out} left out")
        return groups

    def answers(self, rows: Sequence[Row], next_turn: NextTurn) -> Sequence[Answer]:
        settings = self.settings
        sampling = SamplingSettings(temperature=settings.temperature, max_new_tokens=settings.max_new_tokens)
        path, engine = self.context.working / f".{self.name}.samples", self.engines.of(settings.precision)
        with opened(path, {"sampling": sampling.model_dump()}, self.processes) as journal:
            return ask_policy(
                rows, next_turn, engine, sampling=sampling, kept=journal, processes=self.processes, report=self.progress
            )

    def judge(self) -> Judge:
        raise InputError("this task needs a judge, which a recipe cannot give it")

    def paired_responses(self) -> PairedResponses:
        raise InputError("this task needs two files of responses, which a recipe cannot give it")

    def split(self, items: Sequence[T], work: Callable[[Sequence[T]], Iterable[R]], *, activity: str) -> list[R]:
        return split_work(items, work, processes=self.processes, activity=activity)


class _Column(NamedTuple):
    """Where the verdicts of a policy's column stand, and what was asked for them."""

    file: Path
    part: str  # of a line
    task: dict[str, Any]  # its settings with those of its rows


def changes(recipe: Recipe, made: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each policy and column the change against the evaluated policy that it comes from, over the same prompts.

    `{policy: {column: {value, low, high, n, from}}}`, with the 95 % bootstrap interval of the paired difference.
    Where the two were asked something else, or in another way, no change is told.
    """
    columns: dict[str, dict[str, _Column]] = {}
    for name, manifest in made.items():
        for column, (task, part) in manifest.get("columns", {}).items():
            policy, file = next(iter(manifest["scores"])), recipe.root / name / f"{task}.jsonl"
            columns.setdefault(policy, {})[column] = _Column(file, part, _asked_in(recipe, name, task))
    found: dict[str, dict[str, Any]] = {}
    for policy, own in columns.items():
        before = recipe.policy_of(policy)
        while before is not None and before not in columns:
            before = recipe.policy_of(before)
        if before is None:
            continue
        for column in [each for each in own if each in columns[before]]:
            then, now = columns[before][column], own[column]
            if then.task == now.task and (change := _change(_parts_in(then), _parts_in(now))):
                found.setdefault(policy, {})[column] = {**change, "from": before}
    return found


def _asked_in(recipe: Recipe, name: str, task: str) -> dict[str, Any]:
    """The task's settings, with those of its rows in place of their name, and without the choice of metrics."""
    step = recipe.steps[name]
    assert isinstance(step, EvaluateStep)
    settings = step.tasks[task]
    return settings.model_dump(exclude={"metrics"}) | {"data": recipe.source(settings.data).model_dump()}


class _Parts(NamedTuple):
    """What is known of each prompt that has the part."""

    prompts: list[Any]  # in text, or the number of the row
    passed: list[tuple[float, float]]  # and of how many


def _parts_in(column: _Column) -> _Parts:
    lines = [json.loads(line) for line in column.file.read_text("utf-8").splitlines()]
    known = [line for line in lines if column.part in line["parts"]]
    prompts = [line["row"] if "row" in line else line["prompt"] for line in known]
    return _Parts(prompts, [(line["parts"][column.part][0], line["parts"][column.part][1]) for line in known])


def _change(then: _Parts, now: _Parts) -> dict[str, Any] | None:
    """The paired difference with its interval; None where the prompts are not the same."""
    if then.prompts != now.prompts:
        return None
    pairs = list(zip(then.passed, now.passed, strict=True))
    values = np.asarray(pairs, dtype=np.float64)  # [prompts, then or now, passed or of]

    def difference(chosen: np.ndarray) -> float:
        (passed, of), (passed_now, of_now) = values[chosen].sum(axis=0)
        return float(passed_now / of_now - passed / of)

    low, high = interval(difference, len(values))
    return Score(difference(np.arange(len(values))), low, high, len(values))._asdict()
