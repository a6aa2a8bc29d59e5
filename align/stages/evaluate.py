"""Stage `evaluate`: tasks whose answers a program can check, and likelihoods of given rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from align.distributed.launch import check_launch
from align.errors import ErrorList, InputError, Location, within
from align.evaluation.task import Task, TaskSize
from align.registry import suggest
from align.stages.base import POLICY, SCORES, SOURCE, Column, Input, Placed, Stage
from align.stages.costs.estimates import Estimate, Planning, estimate_answers
from align.stages.inputs.context import RunContext, StepInputs
from align.stages.inputs.sources import SourceSettings, check_unsplit, check_without_constraints
from align.stages.responses.settings import judge_models
from align.stages.responses.tasks import TaskSettings, open_task_rows

NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._-]+")


class Evaluate(Stage):
    """Scores of policies on tasks. A step for several policies becomes one for each."""

    stage: Literal["evaluate"] = "evaluate"
    policies: list[str] | Literal["all"] = Field(
        default_factory=list[str], description="Steps whose policies are evaluated, or 'all' that the recipe makes."
    )
    models: list[str] = Field(
        default_factory=list[str], description="Further policies that no step makes: hub ids, folders, gguf:FILE."
    )
    tasks: dict[str, TaskSettings] = Field(min_length=1, description="Evaluations by the name of their column.")

    makes: ClassVar[str] = SCORES

    def expand(self, name: str, before: Mapping[str, Stage], policies: Sequence[str]) -> list[Placed]:
        """Return one step for each policy, directly after the step that makes it."""
        asked = list(policies) if self.policies == "all" else list(self.policies)
        if self.policies == "all" and not asked:
            raise InputError("'all', and no step makes a policy; import one first", ("policies",))
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

    def inputs(self) -> list[Input]:
        """Return the policy, and the rows of each task."""
        rows = [Input(task.data, (SOURCE,), ("tasks", name, "data")) for name, task in self.tasks.items() if task.data]
        return [*(Input(policy, (POLICY,), ("policies",)) for policy in self.policies), *rows]

    def shares(self) -> dict[str, float]:
        """Return the sources of the tasks."""
        return {task.data: 1.0 for task in self.tasks.values() if task.data}

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
        for name in self.tasks:
            with errors.collect():
                if "/" in name or name.startswith("."):
                    raise InputError(
                        f"it names a file: no '/' in it and no '.' at its start, not {name!r}",
                        ("tasks", name),
                    )
        errors.raise_found()

    def validate_inputs(self, inputs: StepInputs) -> None:
        """Raise for unknown tasks and metrics, and for rows that a task cannot read."""
        errors = ErrorList()
        for name, settings in self.tasks.items():
            with errors.collect(), within("tasks", name):
                _check_task(settings, inputs.sources.get(settings.data))
        errors.raise_found()

    def open_rows(self, name: str, source: SourceSettings) -> None:
        """Raise for first rows that a task of the source cannot use."""
        for settings in self.tasks.values():
            if settings.data == name:
                open_task_rows(settings.resolve(source), source)

    def named_models(self) -> list[tuple[str, Location]]:
        """Return the models that this process runs, and those of judges."""
        is_here = any(task.engine is None or task.engine.kind == "local" for task in self.tasks.values())
        own = [(name, ("models", number)) for number, name in enumerate(self.models) if is_here]
        judges = [(name, task.judges) for name, task in self.tasks.items()]
        return [*own, *((path, ("tasks", name, *loc)) for name, each in judges for path, loc in judge_models(each))]

    def named_files(self) -> list[tuple[str, Location]]:
        """Return the files of responses and the folders of tasks."""
        found = super().named_files()
        for name, task in self.tasks.items():
            found += [(path, ("tasks", name, "responses", number)) for number, path in enumerate(task.responses)]
            found += [(task.tasks_folder, ("tasks", name, "tasks_folder"))] if task.tasks_folder else []
        return found

    def columns(self, inputs: StepInputs) -> list[Column]:
        """Return the columns of the results table, with what each asks."""
        found: list[Column] = []
        for name, task in self.resolved(inputs).items():
            settings = self.tasks[name]
            asked = name, settings.model_copy(update={"data": "", "metrics": None}), inputs.sources.get(settings.data)
            known = task.metrics_of(settings.num_responses)
            metrics = [each for each in known if settings.metrics is None or each in settings.metrics]
            columns = [task.column(name, metric, is_only=len(metrics) == 1) for metric in metrics]
            found += [Column(column, ("tasks", name), asked) for column in columns]
        return found

    def decisive(self) -> dict[str, Any]:
        """Return the settings that decide the scores."""
        settings = super().decisive()
        for name, task in self.tasks.items():
            settings["tasks"][name]["engine"] = None if task.engine is None else task.engine.cache_key()
            settings["tasks"][name]["judges"] = [judge.cache_key() for judge in task.judges]
        return settings

    def cache_key(self, inputs: StepInputs) -> list[Any]:
        """Return what decides the scores, with the content of models and of files of responses."""
        tasks = self.tasks.values()
        files = [path for task in tasks for path in task.responses]
        code = [name for task in tasks for name in (task.code, *(task.engine.code if task.engine else ())) if name]
        return [*super().cache_key(inputs), *map(inputs.content, [*self.models, *files, *code])]

    def estimate(self, planning: Planning) -> Estimate:
        """Return an upper bound: all responses as long as they may be."""
        from align.stages.responses.evaluation import planned_size  # noqa: PLC0415 - imports torch

        tasks = self.resolved(planning.inputs)
        sizes = [planned_size(self.tasks[name], task, planning) for name, task in tasks.items()]
        rows, tokens, sampled = (sum(part) for part in zip(*sizes, strict=True)) if sizes else TaskSize(0, 0, 0)
        precision = next(iter(self.tasks.values())).precision
        return estimate_answers(self.stage, planning, rows, tokens, sampled, precision=precision)

    def run(self, context: RunContext) -> dict[str, Any]:
        """Evaluate the policy; the folder gets a file of verdicts for each task."""
        from align.stages.responses.evaluation import evaluate_policy  # noqa: PLC0415 - imports torch

        tasks = {name: (self.tasks[name], task) for name, task in self.resolved(context.inputs).items()}
        return evaluate_policy(tasks, next(iter([*self.policies, *self.models]), None), context)


def _check_task(settings: TaskSettings, source: SourceSettings | None) -> None:
    """Raise for an unknown task or metric, a setting without effect, or a source that the task cannot read."""
    task = settings.resolve(source)
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
    for metric in settings.metrics or ():
        if known and metric not in known:
            raise InputError(f"{task.name} has no metric {metric!r}; {suggest(metric, known)}", ("metrics",))
