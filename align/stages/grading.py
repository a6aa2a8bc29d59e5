"""`align evaluate`: a policy, or responses that are there already, graded by a task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from align.config import Settings, stable_hash
from align.data.chat_encoder import ChatEncoder
from align.data.chat_templates import apply_template
from align.data.formats import read_rows
from align.data.token_groups import TokenGroup
from align.distributed.processes import Processes, init_processes, shutdown_processes
from align.distributed.progress import Progress
from align.distributed.work_split import split_work
from align.errors import InputError, one_line, within
from align.evaluation.task import Answer, NextTurn, PairedResponses, Row, Task
from align.evaluation.tasks import pick_task
from align.inference.engines import load_engine
from align.inference.settings import EngineSettings, SamplingSettings
from align.models.loading.config import max_positions
from align.models.loading.pretrained import default_device, silence_transformers
from align.models.policy import Policy, load_policy
from align.models.settings import PolicySettings
from align.records import Comparison, Demonstration, Located
from align.rewards.judges import make_judge
from align.rewards.settings import How, JudgeSettings
from align.rewards.verdicts import Judge
from align.stages.answering import ask_policy, by_prompt, match, write_lines
from align.stages.contents import content_of
from align.stages.generating import RowSettings, beside, check_out, opened
from align.stages.recipe import TASKS as PROCEDURAL
from align.stages.recipe import SourceSettings
from align.stages.sources import is_held_out, preferred, prompts, streamed

T = TypeVar("T")
R = TypeVar("R")

# Options of the command line that are not settings
OPTIONS = {name: f"--{name}" for name in ("data", "policy", "responses", "limit", "out")} | {"judges": "--judge"}


class EvaluateSettings(Settings):
    """How a policy is asked and judged."""

    sampling: SamplingSettings = SamplingSettings(temperature=0.0)
    engine: EngineSettings = EngineSettings()
    rows: RowSettings = RowSettings()
    judges: list[JudgeSettings] = Field(default_factory=list[JudgeSettings])  # of the win rate
    combine: How = "precedence"
    max_length: int | None = Field(default=None, ge=2)  # tokens of a row whose likelihood is asked for
    tasks_folder: str | None = None  # lm-evaluation-harness's task files of one's own


class Asked(NamedTuple):
    """What is to be graded by which task."""

    task: str
    data: str | None = None
    policy: str | None = None
    responses: tuple[str, ...] = ()  # files
    limit: int | None = None  # rows

    def needed(self, what: str) -> str:
        """What the task cannot do without."""
        if (value := getattr(self, what)) is None:
            raise InputError(f"task {self.task}: --{what} is needed")
        return str(value)


def evaluate(asked: Asked, out: Path | None, *, settings: EvaluateSettings, report: Progress) -> dict[str, Any]:
    """Return `{task, scores: {name: {value, low, high, n}}, …}` of the policy or the responses."""
    silence_transformers()
    processes = init_processes()
    task = pick_task(asked.task)
    _check_used(task, asked, out, settings)
    for option in task.required:
        asked.needed(option)
    if out is not None:
        check_out(out, [asked.needed("data"), *asked.responses])
    inputs = _Inputs(asked, out, settings, processes, report)
    found = task.run(inputs)
    if out is not None:
        inputs.claim_responses()
        processes.run_on_main(lambda: write_lines(out, found.verdicts), f"writing {out}")
    shutdown_processes()
    written = {"out": str(out) if out else None} if "out" in task.options else {}
    scores = {name: value._asdict() for name, value in found.scores.items()}
    return {"task": asked.task, **inputs.counts, **found.counts, **written, "scores": scores}


def _check_used(task: Task, asked: Asked, out: Path | None, settings: EvaluateSettings) -> None:
    """Raise for the first option or setting that is given and has no effect on the task."""
    given = _given(asked, out, settings)
    used = set(task.used_with(given))
    made, constrained = (asked.data or "").startswith(PROCEDURAL), settings.rows.constraints is not None
    if made or (task.columns and not constrained):  # the rows are not read as records
        used -= {"rows.format", "rows.on_error"}
    if not made and not constrained:  # nothing is drawn
        used.discard("rows.seed")
    if not (ignored := [name for name in given if name not in used]):
        return
    if ignored[0] == "responses" and "responses" in task.options:
        raise InputError(f"task {asked.task}: give either --policy or one file of --responses")
    reading = " with --responses" if ignored[0] in task.options and asked.responses else ""
    raise InputError(f"task {asked.task}{reading} does not use {OPTIONS.get(ignored[0], ignored[0])}: leave it out")


def _given(asked: Asked, out: Path | None, settings: EvaluateSettings) -> list[str]:
    """Return the options and settings whose values differ from their defaults."""
    options = {**asked._asdict(), "out": out, "judges": settings.judges}
    found = [name for name, value in options.items() if name != "task" and value not in (None, (), [])]
    for prefix, own in (("", settings), ("rows.", settings.rows)):
        plain = type(own)()
        names = [name for name in type(own).model_fields if name not in ("rows", "judges")]
        found += [prefix + name for name in names if getattr(own, name) != getattr(plain, name)]
    return found


@dataclass
class _Inputs:
    """What the command line gives a task."""

    asked: Asked
    out: Path | None
    settings: EvaluateSettings
    processes: Processes
    progress: Progress
    counts: dict[str, Any] = field(default_factory=dict[str, Any])
    precision: str = "fp32"
    _rows: Sequence[Row] = ()

    @property
    def limit(self) -> int | None:
        return self.asked.limit

    @property
    def policy_path(self) -> str:
        return self.asked.needed("policy")

    @property
    def tasks_folder(self) -> str | None:
        return self.settings.tasks_folder

    @property
    def _source(self) -> SourceSettings:
        source = self.settings.rows.source(self.asked.needed("data"), self.asked.limit)
        return source.model_copy(update={"max_length": self.settings.max_length})

    def rows(self, task: Task) -> Sequence[Row]:
        left_out = Counter[str]()
        self._rows = task_rows(task, self._source, seed=0, counts=left_out)
        self.counts["left_out"] = dict(left_out)
        return self._rows

    @cached_property
    def _loaded(self) -> tuple[Policy, PreTrainedTokenizerBase]:
        policy, tokenizer = load_policy(PolicySettings(path=self.policy_path))
        apply_template(tokenizer)
        return policy.to(default_device()), tokenizer

    def policy(self) -> Policy:
        return self._loaded[0]

    def token_groups(self, *, preferred_only: bool) -> Sequence[TokenGroup]:
        policy, tokenizer = self._loaded
        limit = max_positions(policy.base.config)
        groups, row_counts = likelihood_rows(self._source, tokenizer, model_limit=limit, best=preferred_only)
        self.counts |= row_counts
        return groups

    def answers(self, rows: Sequence[Row], next_turn: NextTurn) -> Sequence[Answer]:
        """The responses of the file, or of the policy; the latter are kept beside `out` where there is one."""
        if self.asked.policy is None:
            if len(self.asked.responses) != 1:
                raise InputError(f"task {self.asked.task}: give either --policy or one file of --responses")
            if self.out is not None and self.out.exists():
                self.claim_responses()
            return match(rows, next_turn, self.asked.responses[0])
        engine, sampling = load_engine(self.asked.policy, self.settings.engine), self.settings.sampling
        ask = partial(
            ask_policy, rows, next_turn, engine, sampling=sampling, processes=self.processes, report=self.progress
        )
        if self.out is None:
            with within(self.asked.task):
                return ask(kept=None)
        by = {"sampling": sampling.model_dump(), "engine": self.settings.engine.cache_key()}
        made_with = {"policy": content_of(self.asked.policy), "rows": _content_of(rows), **by}
        with opened(beside(self.out, "samples"), made_with, self.processes) as journal, within(self.asked.task):
            return ask(kept=journal)

    def claim_responses(self) -> None:
        """Leave beside `out` what its verdicts are of; raises where that is something else already."""
        for path in self.asked.responses:
            made_with = {"responses": content_of(path), "rows": _content_of(self._rows)}
            assert self.out is not None
            with opened(beside(self.out, "samples"), made_with, self.processes):
                pass

    def judge(self) -> Judge:
        if len(self.asked.responses) != 2:  # noqa: PLR2004
            raise InputError(f"task {self.asked.task}: give --responses twice: the policy's and the baseline's")
        return make_judge(self.settings.judges, how=self.settings.combine)

    def paired_responses(self) -> PairedResponses:
        left_out = Counter[str]()
        known = {prompt.messages[-1].content: prompt for prompt in prompts(self._source, seed=0, counts=left_out)}
        self.counts["left_out"] = dict(left_out)
        ours, theirs = (by_prompt(path) for path in self.asked.responses)
        both = [text for text in known if text in ours and text in theirs]
        if not both:
            raise InputError(f"task {self.asked.task}: no prompt of {self.asked.data} is answered in both files")
        self.progress.note(f"{len(both)} of {len(known)} prompts are answered in both files")
        pairs = [(known[text], (ours[text], theirs[text])) for text in both]
        return PairedResponses(pairs, len(known) - len(both))

    def split(self, items: Sequence[T], work: Callable[[Sequence[T]], Iterable[R]], *, activity: str) -> list[R]:
        return split_work(items, work, processes=self.processes, activity=activity)


def task_rows(task: Task, source: SourceSettings, *, seed: int, counts: Counter[str] | None = None) -> list[Row]:
    """The task's rows, checked for what it needs; of procedural or constrained prompts what is known of each.

    `counts` is told what was left out.
    """
    if source.path.startswith(PROCEDURAL) or source.constraints is not None:
        found = prompts(source, seed=seed, counts=counts)
        if longer := [prompt for prompt in found if len(prompt.messages) > 1]:
            text = one_line(longer[0].messages[-1].content)[:40]
            raise InputError(f"{source.path}: prompt {text!r}: has messages before it; a task asks one message alone")
        rows: list[Row] = [{**prompt.metadata, "prompt": prompt.messages[-1].content} for prompt in found]
    else:
        last = None if source.limit is None else source.skip + source.limit
        rows = list(islice(read_rows(source.path, split=source.split), source.skip, last))
    if not rows:
        raise InputError(f"{source.path}: holds no rows")
    task.check_rows(rows, source.path, skipped=source.skip)
    return rows


def _content_of(rows: Sequence[Row]) -> str:
    return stable_hash([dict(row) for row in rows])


def likelihood_rows(
    source: SourceSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model_limit: int | None,
    seed: int = 0,
    best: bool = False,
) -> tuple[list[TokenGroup], dict[str, Any]]:
    """The rows whose likelihood can be told, and how many were read and left out.

    Of a source of which training holds a share of the prompts back, these are the ones that are held back. With `best`
    it is the preferred response of each row alone.
    """
    reading = streamed(source, kind=Demonstration, seed=seed)
    found = list(reading.records)
    answered = [(each.record, each.place) for each in found if isinstance(each.record, Comparison | Demonstration)]
    encoder = ChatEncoder(tokenizer, max_length=source.max_length or model_limit, overlong=source.overlong)
    numbered = (Located(record, place, row) for row, (record, place) in enumerate(answered))
    groups = [located.record for located in encoder.encode_located(numbered)]
    if source.held_out:
        groups = [group for group in groups if is_held_out(group, source.held_out)]
    if best:
        groups = [preferred(group) for group in groups]
    if not groups:
        raise InputError(f"{source.path}: no row has a response of which the likelihood could be told")
    counts = {name: number for name, number in encoder.counts.items() if name != "rows"}
    without = {"prompts without a response": len(found) - len(answered)}
    left_out = {**reading.statistics.dropped, **{name: number for name, number in without.items() if number}, **counts}
    return groups, {"rows": reading.statistics.num_rows, "left_out": left_out}
