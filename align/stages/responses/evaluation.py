"""Work of the stage `evaluate`: run each task for one policy, or on responses from a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

from align.accounting.flops import Work, sum_work
from align.config import stable_hash
from align.curate.embeddings.cache import Vectors
from align.data.token_groups import TokenGroup
from align.distributed.processes import Processes
from align.distributed.progress import Progress
from align.distributed.work_split import split_work
from align.errors import InputError
from align.evaluation.answers import answers_from_file, answers_from_policy, write_lines
from align.evaluation.choices import choice_groups
from align.evaluation.likelihood import forward_work, likelihoods
from align.evaluation.task import Answer, NextTurn, PairedResponses, Row, Task, TaskResult
from align.evaluation.tasks.pair_accuracy import REWARD_TASKS
from align.models.loading.config import max_positions
from align.models.loading.pretrained import silence_transformers
from align.models.policy import Policy
from align.models.reward_model import RewardModel
from align.records import Message, at_place
from align.registry import UserCode, suggest
from align.rewards.judges import make_judge
from align.rewards.thoughts import ThoughtSettings
from align.rewards.verdicts import Judge
from align.stages.inputs.context import RunContext
from align.stages.inputs.sources import SourceSettings
from align.stages.responses.engines import PolicyEngines, engine_identity, engine_settings
from align.stages.responses.judging import need_gpu_alone, serving_judges
from align.stages.responses.references import (
    load_evaluated,
    load_evaluated_rewards,
    paired_responses,
    reference_answers,
    with_divergences,
)
from align.stages.responses.sampling import open_journal
from align.stages.responses.settings import with_folders
from align.stages.responses.tasks import TaskSettings, likelihood_rows, task_rows

T = TypeVar("T")
R = TypeVar("R")

Tasks = Mapping[str, tuple[TaskSettings, Task]]  # by name


def evaluate_policy(tasks: Tasks, policy: str | None, context: RunContext) -> dict[str, Any]:
    """Return `{policy: {column: {value, low, high, n}}}` with counts of rows, and write the lines of each task."""
    engines = PolicyEngines(policy, context)
    found: dict[str, dict[str, float]] = {}
    columns: dict[str, tuple[str, str]] = {}
    counts, measures = dict[str, dict[str, Any]](), dict[str, dict[str, Any]]()
    work = Work(0, 0, 0)
    for name, result, read in evaluate_tasks(tasks, context, engines):
        settings, task = tasks[name]
        lines = [{"policy": engines.name, **line} for line in result.lines]
        context.processes.run_on_main(partial(write_lines, context.folder / f"{name}.jsonl", lines), f"writing {name}")
        work = sum_work([work, result.work])
        counts[name] = {**read, **result.counts}
        measures[name] = {measure: score._asdict() for measure, score in result.measures.items()}
        measures[name] |= {measure: {"value": None, "reason": why} for measure, why in result.unknown.items()}
        asked = settings.metrics
        known = {**result.scores, **result.measures, **dict.fromkeys(result.unknown)}
        metrics = [metric for metric in known if metric in (result.scores if asked is None else asked)]
        if unknown := [metric for metric in asked or () if metric not in known]:
            is_declared = unknown[0] in task.selected(asked, settings.num_responses)
            reason = " counts none of the rows" if is_declared else f"; {suggest(unknown[0], known)}"
            raise InputError(f"{unknown[0]!r}{reason}", ("steps", context.name, "tasks", name, "metrics"))
        for metric in metrics:
            if (score := known[metric]) is not None:  # None of an unknown one
                column = task.column(name, metric, is_only=len(metrics) == 1)
                found[column] = score._asdict()
                columns[column] = (name, task.part(metric))
    done = engines.done(context.processes, work)
    return {"scores": {engines.name: found}, "columns": columns, "counts": counts, "measures": measures, "done": done}


class Evaluated(NamedTuple):
    """A task of a step, with its result."""

    name: str
    result: TaskResult
    counts: Mapping[str, Any]  # of the rows that were read


def evaluate_tasks(tasks: Tasks, context: RunContext, engines: PolicyEngines) -> Iterator[Evaluated]:
    """Yield each task with its result."""
    silence_transformers()
    with engines:
        found = _evaluated(tasks, context, engines)
        if (start := context.inputs.training_start) is not None:
            done = list(found)
            engines.release()
            here = {name: each.precision for name, (each, _) in tasks.items() if engines.path and each.is_sampled_here}
            results = with_divergences({each.name: each.result for each in done}, here, engines.path, start, context)
            found = (each._replace(result=results[each.name]) for each in done)
        yield from found


def _evaluated(tasks: Tasks, context: RunContext, engines: PolicyEngines) -> Iterator[Evaluated]:
    for name, (settings, task) in tasks.items():
        with ExitStack() as servers:
            inputs = _TaskInputs(context, name, settings, engines, servers)
            is_users = not type(task).__module__.startswith("align.")
            run = partial(UserCode("task", settings.task or name).call, task.run) if is_users else task.run
            result = run(inputs)
        inputs.claim_responses()
        yield Evaluated(name, result, inputs.counts)


@dataclass
class _TaskInputs:
    """What a step gives one of its tasks (`align.evaluation.task.TaskInputs`)."""

    context: RunContext
    name: str
    settings: TaskSettings
    engines: PolicyEngines
    servers: ExitStack  # of judges, until the task ends
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
        return self.settings.limit

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
    def response_files(self) -> Sequence[str]:
        return self.settings.responses

    @property
    def reference_answers(self) -> str | None:
        return self.settings.reference_answers

    @property
    def judge_name(self) -> str:
        models = [(judge.name, judge.values.get("model", "")) for judge in self.settings.judges]
        return ", ".join(" ".join(filter(None, each)) for each in models)

    @property
    def _source(self) -> SourceSettings:
        return self.context.inputs.sources[self.settings.data]

    def rows(self, task: Task) -> Sequence[Row]:
        left_out = Counter[str]()
        rows = task_rows(task, self.settings.data, self.context.inputs, counts=left_out)
        self.context.inputs.check_unchanged(self._source)
        self.counts["left_out"] = dict(left_out)
        for reason, number in left_out.items():
            self.progress.note(f"{self.name}: {number:,} {reason.replace(':', ' ')}")
        return rows

    @cached_property
    def _loaded(self) -> tuple[Policy, PreTrainedTokenizerBase]:
        return load_evaluated(self.policy_path)

    @cached_property
    def _rewards(self) -> tuple[RewardModel, PreTrainedTokenizerBase]:
        return load_evaluated_rewards(self.policy_path)

    def policy(self) -> Policy:
        return self._loaded[0]

    def reward_model(self) -> RewardModel:
        return self._rewards[0]

    @property
    def metrics(self) -> Sequence[str] | None:
        return self.settings.metrics

    @property
    def measures_likelihood(self) -> bool:
        return bool(self.policy_path) and self.settings.is_sampled_here

    def choice_logps(
        self, prompts: Sequence[str] | Sequence[Sequence[Message]], answers: Sequence[str]
    ) -> list[tuple[float, ...]]:
        self.progress.phase("choices", len(prompts))
        groups = choice_groups(self._loaded[1], prompts, answers)
        self.engines.observed.append(forward_work(groups))
        found = likelihoods(self.policy(), groups, precision=self.precision, processes=self.processes)
        return [tuple(each.logp for each in group) for group in found]

    def token_groups(self, *, preferred_only: bool, compares: bool = False) -> Sequence[TokenGroup]:
        model, tokenizer = self._rewards if self.settings.task in REWARD_TASKS else self._loaded
        name = self.settings.data
        inputs = self.context.inputs
        limit = max_positions(model.base.config)
        kinds = {"best": preferred_only, "compares": compares}
        groups, counts = likelihood_rows(name, inputs, tokenizer, model_limit=limit, **kinds)
        left_out = ", ".join(f"{number} {reason}" for reason, number in counts["left_out"].items()) or "none"
        self.progress.note(f"{self.name}: {counts['rows']} rows read, {len(groups)} measured, {left_out} left out")
        self.counts |= counts
        return groups

    def reference(self, *, own_answers: bool) -> tuple[Policy, Sequence[TokenGroup]]:
        by = self.policy_path if own_answers else None
        return reference_answers(self.name, self.settings, self.context, self.counts, by=by)

    def answers(
        self, rows: Sequence[Row], next_turn: NextTurn, *, temperature: float | None = None
    ) -> Sequence[Answer]:
        self._rows = rows
        if self.settings.responses:
            if self._journal.exists():
                self.claim_responses()
            return answers_from_file(rows, next_turn, self.settings.responses[0])
        engine, sampling, journal_file = engine_settings(self.settings), self.settings.sampling, self._journal
        if temperature is not None:
            if sampling.temperature:
                raise InputError(f"{self.settings.task} has its own temperatures; remove it", ("temperature",))
            sampling = sampling.model_copy(update={"temperature": temperature})
            journal_file = self.context.folder / f".{self.name}-{temperature}.samples"
        of_engine = engine_identity(engine, self.processes)
        made_with = {**self._identity, "sampling": sampling.model_dump(), "engine": of_engine}
        place = self.settings.task or self.name
        with open_journal(journal_file, made_with, self.processes) as journal, at_place(place):
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

    @property
    def has_judge(self) -> bool:
        return bool(self.settings.judges)

    def embed(self, texts: Sequence[str]) -> Vectors:
        return self.settings.embed(texts, self.policy_path, self.context.inputs)

    def judge(self) -> Judge:
        judges = with_folders(self.settings.judges, self.context.inputs)
        if need_gpu_alone(judges):
            self.engines.release()
        reachable = self.servers.enter_context(serving_judges(judges, self.context))
        return make_judge(reachable, combine=self.settings.combine, thoughts=self.thoughts)

    def paired_responses(self) -> PairedResponses:
        return paired_responses(self.settings, self.context, self.counts)

    def split(self, items: Sequence[T], work: Callable[[Sequence[T]], Iterable[R]], *, activity: str) -> list[R]:
        return split_work(items, work, processes=self.processes, activity=activity)
