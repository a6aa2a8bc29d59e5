"""Work of the stage `evaluate`: run each task for one policy, or on responses from a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

from align.accounting.flops import Work, sum_work
from align.config import stable_hash
from align.data.chat_templates import apply_template
from align.data.token_groups import TokenGroup
from align.distributed.processes import Processes
from align.distributed.progress import Progress
from align.distributed.work_split import split_work
from align.errors import InputError
from align.evaluation.answers import answers_from_file, answers_from_policy, responses_by_prompt, write_lines
from align.evaluation.task import Answer, NextTurn, PairedResponses, Row, Task, TaskResult, TaskSize
from align.inference.engines import load_engine
from align.inference.samples import Engine
from align.inference.settings import EngineSettings, LocalSettings
from align.models.loading.config import max_positions
from align.models.loading.pretrained import default_device, silence_transformers
from align.models.policy import Policy, load_policy
from align.models.settings import PolicySettings
from align.records import at_place
from align.registry import UserCode, suggest
from align.rewards.judges import make_judge
from align.rewards.thoughts import ThoughtSettings, visible_text
from align.rewards.verdicts import Judge
from align.stages.costs.estimates import Planning, prompt_tokens
from align.stages.costs.measured import Done
from align.stages.inputs.context import RunContext
from align.stages.inputs.sources import SourceSettings, prompts
from align.stages.responses.generation import sampling_done
from align.stages.responses.sampling import open_journal
from align.stages.responses.tasks import TaskSettings, likelihood_rows, task_rows

T = TypeVar("T")
R = TypeVar("R")


Tasks = Mapping[str, tuple[TaskSettings, Task]]  # by name


def evaluate_policy(tasks: Tasks, policy: str | None, context: RunContext) -> dict[str, Any]:
    """Return `{policy: {column: {value, low, high, n}}}` with counts of rows, and write the lines of each task."""
    engines = PolicyEngines(policy, context)
    found: dict[str, dict[str, float]] = {}
    columns: dict[str, tuple[str, str]] = {}
    counts: dict[str, dict[str, Any]] = {}
    work = Work(0, 0, 0)
    for name, result, read in evaluate_tasks(tasks, context, engines):
        settings, task = tasks[name]
        lines = [{"policy": engines.name, **line} for line in result.lines]
        out = context.folder / f"{name}.jsonl"
        context.processes.run_on_main(partial(write_lines, out, lines), f"writing {name}")
        work = sum_work([work, result.work])
        counts[name] = {**read, **result.counts}
        asked = settings.metrics
        metrics = [metric for metric in result.scores if asked is None or metric in asked]
        if unknown := [metric for metric in asked or () if metric not in result.scores]:
            raise InputError(
                f"{unknown[0]!r}; {suggest(unknown[0], result.scores)}",
                ("steps", context.name, "tasks", name, "metrics"),
            )
        for metric in metrics:
            column = task.column(name, metric, is_only=len(metrics) == 1)
            found[column] = result.scores[metric]._asdict()
            columns[column] = (name, task.part(metric))
    done = engines.done(context.processes, work)
    return {"scores": {engines.name: found}, "columns": columns, "counts": counts, "done": done}


class Evaluated(NamedTuple):
    """A task of a step, with its result."""

    name: str
    result: TaskResult
    counts: Mapping[str, Any]  # of the rows that were read


def evaluate_tasks(tasks: Tasks, context: RunContext, engines: PolicyEngines) -> Iterator[Evaluated]:
    """Yield each task with its result."""
    silence_transformers()
    for name, (settings, task) in tasks.items():
        inputs = _TaskInputs(context, name, settings, engines)
        is_users = not type(task).__module__.startswith("align.")
        result = UserCode("task", settings.task or name).call(task.run, inputs) if is_users else task.run(inputs)
        inputs.claim_responses()
        yield Evaluated(name, result, inputs.counts)


class PolicyEngines:
    """The engines of the policy that a step evaluates, each loaded once."""

    def __init__(self, policy: str | None, context: RunContext) -> None:
        self.name = policy or ""
        folder = context.inputs.folders.get(self.name)
        self.path = self.name if folder is None else str(folder)
        self._loaded: dict[str, Engine] = {}
        self._used: list[EngineSettings] = []

    def engine(self, settings: EngineSettings) -> Engine:
        """Return the engine with these settings."""
        key = settings.model_dump_json()
        if key not in self._loaded:
            self._loaded[key] = load_engine(self.path, settings, name=self.name)
            self._used.append(settings)
        return self._loaded[key]

    def done(self, processes: Processes, more: Work) -> Done:
        """Return the work of all engines, and of forward passes over `more`."""
        speeds = [
            speed
            for part in processes.all_gather_object([each.throughput for each in self._loaded.values()])
            for speed in part
        ]
        if not self.path or any(each.kind != "local" for each in self._used):
            return Done(devices=processes.world_size)
        precision = next((each.local.precision for each in self._used if each.local is not None), "fp32")
        return replace(sampling_done(self.path, speeds, precision, more), devices=processes.world_size)


def engine_settings(settings: TaskSettings) -> EngineSettings:
    """Return the engine of a task: its own, or this process in the task's precision."""
    if settings.engine is not None:
        return settings.engine
    return EngineSettings(local=LocalSettings(precision=settings.precision))


@dataclass
class _TaskInputs:
    """What a step gives one of its tasks (`align.evaluation.task.TaskInputs`)."""

    context: RunContext
    name: str
    settings: TaskSettings
    engines: PolicyEngines
    counts: dict[str, Any] = field(default_factory=dict[str, Any])
    _rows: Sequence[Row] = ()

    @property
    def processes(self) -> Processes:
        return self.context.processes

    @property
    def progress(self) -> Progress:
        return self.context.progress

    @property
    def precision(self) -> str:
        return self.settings.precision

    @property
    def thoughts(self) -> ThoughtSettings:
        return self.settings.thoughts

    @property
    def limit(self) -> int | None:
        return None if not self.settings.data else self._source.limit

    @property
    def policy_path(self) -> str:
        return self.engines.path

    @property
    def tasks_folder(self) -> str | None:
        return self.settings.tasks_folder

    @property
    def chat_template(self) -> bool | None:
        return self.settings.chat_template

    @property
    def _source(self) -> SourceSettings:
        return self.context.inputs.sources[self.settings.data]

    def rows(self, task: Task) -> Sequence[Row]:
        left_out = Counter[str]()
        rows = task_rows(task, self._source, seed=self.context.inputs.seed, counts=left_out)
        self.context.inputs.check_unchanged(self._source)
        self.counts["left_out"] = dict(left_out)
        for reason, number in left_out.items():
            self.progress.note(f"{self.name}: {number:,} {reason.replace(':', ' ')}")
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
        limit, seed = max_positions(policy.base.config), self.context.inputs.seed
        groups, counts = likelihood_rows(self._source, tokenizer, model_limit=limit, seed=seed, best=preferred_only)
        left_out = counts["left_out"] or "none"
        self.progress.note(f"{self.name}: {counts['rows']} rows read, {len(groups)} measured, {left_out} left out")
        self.counts |= counts
        return groups

    def answers(self, rows: Sequence[Row], next_turn: NextTurn) -> Sequence[Answer]:
        self._rows = rows
        if self.settings.responses:
            if self._journal.exists():
                self.claim_responses()
            return answers_from_file(rows, next_turn, self.settings.responses[0])
        engine, sampling = engine_settings(self.settings), self.settings.sampling
        made_with = {**self._identity, "sampling": sampling.model_dump(), "engine": engine.cache_key()}
        place = self.settings.task or self.name
        with open_journal(self._journal, made_with, self.processes) as journal, at_place(place):
            return answers_from_policy(
                rows,
                next_turn,
                self.engines.engine(engine),
                sampling=sampling,
                journal=journal,
                processes=self.processes,
                progress=self.progress,
            )

    @property
    def _journal(self) -> Path:
        return self.context.folder / f".{self.name}.samples"

    @property
    def _identity(self) -> dict[str, Any]:
        return {**self.context.identity, "rows": stable_hash([dict(row) for row in self._rows])}

    def claim_responses(self) -> None:
        """Record which responses the verdicts in this folder are of; raise where they are of others."""
        if self.settings.responses and self._rows:
            with open_journal(self._journal, self._identity, self.processes):
                pass

    def judge(self) -> Judge:
        return make_judge(self.settings.judges, combine=self.settings.combine, thoughts=self.thoughts)

    def paired_responses(self) -> PairedResponses:
        left_out = Counter[str]()
        source = self._source
        known = {prompt.messages[-1].content: prompt for prompt in prompts(source, seed=0, counts=left_out)}
        self.counts["left_out"] = dict(left_out)
        if len(self.settings.responses) != 2:  # noqa: PLR2004 - the policy's and the baseline's
            raise InputError(
                f"task {self.settings.task} compares two files of responses, not {len(self.settings.responses)}",
                ("responses",),
            )
        ours, theirs = (responses_by_prompt(path) for path in self.settings.responses)
        both = [text for text in known if text in ours and text in theirs]
        if not both:
            raise InputError(f"task {self.settings.task}: no prompt of {source.path} is answered in both files")
        self.progress.note(f"{len(both)} of {len(known)} prompts are answered in both files")
        visible = [tuple(visible_text(of[text], self.thoughts) for of in (ours, theirs)) for text in both]
        pairs = [(known[text], (one, two)) for text, (one, two) in zip(both, visible, strict=True)]
        return PairedResponses(pairs, len(known) - len(both))

    def split(self, items: Sequence[T], work: Callable[[Sequence[T]], Iterable[R]], *, activity: str) -> list[R]:
        return split_work(items, work, processes=self.processes, activity=activity)


class _EstimateInputs(NamedTuple):
    """What a task needs to estimate its size (`align.evaluation.task.EstimateInputs`)."""

    settings: TaskSettings
    planning: Planning

    @property
    def max_new_tokens(self) -> int:
        return self.settings.max_new_tokens

    @property
    def rows_source(self) -> SourceSettings:
        return self.planning.inputs.sources[self.settings.data]

    def rows(self, task: Task) -> Sequence[Row]:
        return task_rows(task, self.rows_source, seed=self.planning.inputs.seed)

    def token_groups(self, *, preferred_only: bool) -> Sequence[TokenGroup]:
        seed, tokenizer = self.planning.inputs.seed, self.planning.tokenizer
        groups, _ = likelihood_rows(self.rows_source, tokenizer, model_limit=None, seed=seed, best=preferred_only)
        return groups

    def num_prompt_tokens(self, prompts: Sequence[Any]) -> int:
        return prompt_tokens(prompts, self.planning.tokenizer)


def planned_size(settings: TaskSettings, task: Task, planning: Planning) -> TaskSize:
    """Return how much a task computes."""
    return task.size(_EstimateInputs(settings, planning))
