"""Stage `evaluate`: tasks whose answers a program can check, and likelihoods of given rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from align.content_hash import STEP
from align.distributed.launch import check_launch
from align.errors import ErrorList, InputError, Location, within
from align.evaluation.measures.response_measures import KL_FROM_START
from align.evaluation.task import Task, TaskSize
from align.evaluation.tasks.embeddings import EMBEDDING_TASKS
from align.evaluation.tasks.lm_eval import HarnessTask
from align.evaluation.tasks.pair_accuracy import REWARD_TASKS
from align.registry import suggest
from align.stages.base import EMBEDDER, POLICY, REWARD_MODEL, SCORES, SOURCE, Column, Input, Placed, Stage, UsedEngine
from align.stages.costs.estimates import Estimate, Planning, estimate_answers
from align.stages.inputs.context import RunContext, StepInputs
from align.stages.inputs.sources import SourceSettings, check_unsplit, check_without_constraints
from align.stages.responses.settings import judge_engines, judge_inputs, judge_key, judge_models
from align.stages.responses.tasks import TaskSettings, open_task_rows

NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._-]+")


class Evaluate(Stage):
    """Scores of policies on tasks. A step for several policies is expanded into one step per policy."""

    stage: Literal["evaluate"] = Field(default="evaluate", description="Score policies on tasks.")
    policies: list[str] | Literal["all"] = Field(
        default_factory=list[str],
        description="Steps whose policies (task pair_accuracy: reward models) are evaluated; 'all' for every policy.",
    )
    models: list[str] = Field(
        default_factory=list[str], description="Additional models to evaluate: Hub ids, folders or gguf:FILE."
    )
    tasks: dict[str, TaskSettings] = Field(
        min_length=1, description="Evaluations; each name becomes a column of the results table."
    )
    kl_from_start: bool = Field(
        default=False,
        description=(
            "Also measure KL(policy || the policy that its training started from), in nats per token, along the "
            "answers that tasks sample. Takes two scoring passes over them, with both policies in memory."
        ),
    )

    makes: ClassVar[str] = SCORES

    def expand(self, name: str, before: Mapping[str, Stage], policies: Sequence[str]) -> list[Placed]:
        """Return one step for each policy, directly after the step that makes it."""
        asked = list(policies) if self.policies == "all" else list(self.policies)
        if self.policies == "all" and not asked:
            raise InputError("'all', but no step makes a policy; add a step with stage: import", ("policies",))
        if not asked and not self.models and not all(task.responses for task in self.tasks.values()):
            raise InputError("name at least one step, or 'all'", ("policies",))
        steps = [
            Placed(f"{name}-{policy}", self.model_copy(update={"policies": [policy], "models": []}), after=policy)
            for policy in asked
        ]
        for model in self.models:
            slug = NOT_IN_A_NAME.sub("-", model).strip("-.")
            steps.append(Placed(f"{name}-{slug}", self.model_copy(update={"policies": [], "models": [model]})))
        return steps or [Placed(name, self)]

    @property
    def start(self) -> str | None:
        """The step whose policy is evaluated."""
        return self.policies[0] if self.policies else None

    @property
    def compares_with_start(self) -> bool:
        """Whether the step measures the divergence from the training's start."""
        return self.kl_from_start

    def inputs(self) -> list[Input]:
        """Return the policy, and the rows, references and judges of each task."""
        rows = [Input(task.data, (SOURCE,), ("tasks", name, "data")) for name, task in self.tasks.items() if task.data]
        references = [(name, path.removeprefix(STEP)) for name, path in self._references() if path.startswith(STEP)]
        steps = [Input(step, (POLICY,), ("tasks", name, "reference")) for name, step in references]
        judges = [(name, each) for name, task in self.tasks.items() for each in judge_inputs(task.judges)]
        steps += [each._replace(loc=("tasks", name, *each.loc)) for name, each in judges]
        return [*(Input(policy, self._kinds, ("policies",)) for policy in self.policies), *rows, *steps]

    @property
    def _kinds(self) -> tuple[str, ...]:
        """What the step evaluates."""
        tasks = {task.task for task in self.tasks.values()}
        if tasks <= {*REWARD_TASKS}:
            return (REWARD_MODEL,)
        return (POLICY, EMBEDDER) if tasks <= {*EMBEDDING_TASKS} else (POLICY,)

    def _references(self) -> list[tuple[str, str]]:
        """Return the tasks with a reference policy, and its path."""
        return [(name, task.reference) for name, task in self.tasks.items() if task.reference is not None]

    def shares(self) -> dict[str, float]:
        """Return the sources of the tasks."""
        return {task.data: 1.0 for task in self.tasks.values() if task.data}

    def tests(self) -> list[str]:
        """Return the sources of the tasks."""
        return list(self.shares())

    def resolved(self, inputs: StepInputs) -> dict[str, Task]:
        """Return the task of each evaluation."""
        found: dict[str, Task] = {}
        for name, settings in self.tasks.items():
            with within("tasks", name):
                found[name] = settings.resolve(inputs.sources.get(settings.data))
        return found

    def validate_settings(self) -> None:
        """Raise for a launch file that shards, and for names of tasks that are no file names."""
        errors = ErrorList()
        with errors.collect():
            check_launch(self.launch)
        for name, task in self.tasks.items():
            with errors.collect():
                if task.task in REWARD_TASKS and self._kinds != (REWARD_MODEL,):
                    message = f"{task.task} evaluates reward models, and the other tasks do not: write another step"
                    raise InputError(message, ("tasks", name, "task"))
                if "/" in name or name.startswith("."):
                    raise InputError(
                        f"{name!r} is used as a file name, so it must not contain '/' or start with '.'",
                        ("tasks", name),
                    )
        errors.raise_found()

    def validate_inputs(self, inputs: StepInputs) -> None:
        """Raise for unknown tasks and metrics, and for rows that a task cannot read."""
        errors = ErrorList()
        for name, settings in self.tasks.items():
            with errors.collect(), within("tasks", name):
                has_policy = bool(self.policies or self.models)
                _check_task(settings, inputs.sources.get(settings.data), has_policy=has_policy)
                if KL_FROM_START in (settings.metrics or ()) and not self.kl_from_start:
                    raise InputError(
                        f"{KL_FROM_START} is measured only if the step has {KL_FROM_START}: true", ("metrics",)
                    )
        if not errors.found and self.kl_from_start:
            with errors.collect():
                _check_samples([(self.tasks[name], task) for name, task in self.resolved(inputs).items()])
        errors.raise_found()

    def open_rows(self, name: str, source: SourceSettings) -> None:
        """Raise for first rows that a task of the source cannot use."""
        for settings in self.tasks.values():
            if settings.data == name:
                open_task_rows(settings.resolve(source), source)

    def named_models(self) -> list[tuple[str, Location]]:
        """Return the models that are loaded here, and those of judges."""
        is_here = any(task.engine is None or task.engine.loads_model for task in self.tasks.values())
        own = [(name, ("models", number)) for number, name in enumerate(self.models) if is_here]
        own += [(path, ("tasks", name, "reference")) for name, path in self._references()]
        judges = [(name, task.judges) for name, task in self.tasks.items()]
        return [*own, *((path, ("tasks", name, *loc)) for name, each in judges for path, loc in judge_models(each))]

    def engines(self) -> list[UsedEngine]:
        """Return the engine of each task, and those of its judges."""
        found: list[UsedEngine] = []
        for name, task in self.tasks.items():
            if task.engine is not None:
                found.append(UsedEngine(task.engine, ("tasks", name, "engine"), self.policies, self.models))
            found += [used._replace(loc=("tasks", name, *used.loc)) for used in judge_engines(task.judges)]
        return found

    def named_files(self) -> list[tuple[str, Location]]:
        """Return the files of responses and the folders of tasks."""
        found = super().named_files()
        for name, task in self.tasks.items():
            found += [(path, ("tasks", name, "responses", number)) for number, path in enumerate(task.responses)]
            found += [(task.tasks_folder, ("tasks", name, "tasks_folder"))] if task.tasks_folder else []
            found += [(task.reference_answers, ("tasks", name, "reference_answers"))] if task.reference_answers else []
        return found

    def columns(self, inputs: StepInputs) -> list[Column]:
        """Return the columns of the results table, with what each asks."""
        found: list[Column] = []
        for name, task in self.resolved(inputs).items():
            settings = self.tasks[name]
            asked = name, settings.model_copy(update={"data": "", "metrics": None}), inputs.sources.get(settings.data)
            metrics = task.selected(settings.metrics, settings.num_responses)
            for metric in metrics:
                if metric == KL_FROM_START and not self._has_start_kl(name, inputs):
                    continue
                column = task.column(name, metric, is_only=len(metrics) == 1)
                found.append(Column(column, ("tasks", name), asked, metric))
        return found

    def _has_start_kl(self, name: str, inputs: StepInputs) -> bool:
        """Return whether answers to a task can be compared with the training's start."""
        start = inputs.training_start
        return start is not None and not start.lacking and self.tasks[name].is_sampled_here

    def decisive(self) -> dict[str, Any]:
        """Return the settings that decide the scores."""
        settings = super().decisive()
        if not self.kl_from_start:  # so that steps finished before there was this setting stay finished
            del settings[KL_FROM_START]
        for name, task in self.tasks.items():
            if task.limit is None:  # as above
                del settings["tasks"][name]["limit"]
            settings["tasks"][name]["engine"] = None if task.engine is None else task.engine.cache_key()
            settings["tasks"][name]["judges"] = [judge.cache_key() for judge in task.judges]
        return settings

    def cache_key(self, inputs: StepInputs) -> list[Any]:
        """Return what decides the scores, with the content of models and of files of responses."""
        tasks = self.tasks.values()
        files = [path for task in tasks for path in task.files]
        code = [name for task in tasks for name in task.contents]
        models = [*self.models, *(path for _, path in self._references())]
        judges = judge_key([judge for task in tasks for judge in task.judges], inputs)
        return [*super().cache_key(inputs), *map(inputs.content, [*models, *files, *code]), *judges]

    def estimate(self, planning: Planning) -> Estimate:
        """Return an upper bound: all responses as long as they may be."""
        from align.stages.responses.task_sizes import planned_size  # noqa: PLC0415 - imports torch

        tasks = self.resolved(planning.inputs)
        sizes = [
            _size_of_made(self.tasks[name], task, planning.made[self.tasks[name].data])
            if self.tasks[name].data in planning.made
            else planned_size(self.tasks[name], task, planning)
            for name, task in tasks.items()
        ]
        sizes = [
            size._replace(tokens=3 * size.tokens + 2 * size.max_sampled_tokens)  # both policies score all tokens
            if _samples(self.tasks[name], tasks[name]) and self._has_start_kl(name, planning.inputs)
            else size
            for name, size in zip(tasks, sizes, strict=True)
        ]
        rows, tokens, sampled = (sum(part) for part in zip(*sizes, strict=True)) if sizes else TaskSize(0, 0, 0)
        precision = next(iter(self.tasks.values())).precision
        return estimate_answers(self.stage, planning, rows, tokens, sampled, precision=precision)

    def run(self, context: RunContext) -> dict[str, Any]:
        """Evaluate the policy; the folder gets a file of verdicts for each task."""
        from align.stages.responses.evaluation import evaluate_policy  # noqa: PLC0415 - imports torch

        tasks = {name: (self.tasks[name], task) for name, task in self.resolved(context.inputs).items()}
        return evaluate_policy(tasks, next(iter([*self.policies, *self.models]), None), context)


def _samples(settings: TaskSettings, task: Task) -> bool:
    """Return whether the divergence from the training's start can be measured along the task's answers."""
    return KL_FROM_START in task.measures and task.samples(settings.metrics)


def _check_samples(tasks: Sequence[tuple[TaskSettings, Task]]) -> None:
    """Raise unless the divergence from the training's start can be measured along what the tasks sample."""
    if of_harness := [task.name for _, task in tasks if isinstance(task, HarnessTask)]:
        raise InputError(
            f"cannot be measured along answers that lm-evaluation-harness samples: evaluate {of_harness[0]} in a step "
            f"without it",
            (KL_FROM_START,),
        )
    if not any(_samples(settings, task) for settings, task in tasks):
        names = ", ".join(sorted({task.name for _, task in tasks}))
        raise InputError(f"has no effect on {names}; remove it", (KL_FROM_START,))


def _size_of_made(settings: TaskSettings, task: Task, made: Estimate) -> TaskSize:
    """Return an upper bound where an earlier step makes the rows."""
    sampled = made.rows * settings.max_new_tokens if "sampling" in task.options else 0
    return TaskSize(made.rows, made.tokens, sampled)


def _check_task(settings: TaskSettings, source: SourceSettings | None, *, has_policy: bool) -> None:
    """Raise for an unknown task or metric, a setting without effect, or a source that the task cannot read."""
    task = settings.resolve(source)
    if has_policy and not task.options & {"policy", "judges"}:
        command = f"align evaluate --task {task.name} --data FILE"
        raise InputError(f"{task.name} evaluates no policy; run `{command}` in place of a step", ("task",))
    settings.check_used(task)
    _check_metrics(settings, task)
    if source is None:
        return
    if "rows.constraints" not in task.options:
        check_without_constraints(settings.data, source.constraints is not None, ("data",))
    if "held_out" not in task.options:
        check_unsplit(settings.data, source, ("data",))


def _check_metrics(settings: TaskSettings, task: Task) -> None:
    if settings.metrics is not None and not settings.metrics:
        raise InputError("name at least one, or leave it out for all", ("metrics",))
    known = task.metrics_of(settings.num_responses)
    measures = task.measures
    for metric in settings.metrics or ():
        if known and metric not in (*known, *measures):
            raise InputError(
                f"{task.name} has no metric {metric!r}; {suggest(metric, [*known, *measures])}", ("metrics",)
            )
