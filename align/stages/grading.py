"""`align evaluate`: a policy, or responses that are there already, graded by a task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from align.config import Settings, stable_hash
from align.data.chat import ChatEncoder
from align.data.formats import read_rows
from align.data.templates import apply_template
from align.data.token_groups import TokenGroup
from align.distributed.processes import Processes, init_processes, shutdown_processes
from align.distributed.progress import Progress
from align.distributed.work_split import split_work
from align.errors import InputError, one_line
from align.evaluation.likelihood import LIKELIHOODS, NLL, rates
from align.evaluation.lm_eval import harness
from align.evaluation.pairwise import win_rates
from align.evaluation.statistics import Score
from align.evaluation.tasks import TASKS, Answer, Row, check_rows, scores
from align.inference.engines import EngineSettings, make_engine
from align.inference.samples import SamplingSettings
from align.models.loading import length_limit, quiet_transformers
from align.models.policy import load_policy
from align.models.settings import PolicySettings
from align.records import Comparison, Demonstration, Located
from align.registry import pick, suggest
from align.rewards.judges import make_judge
from align.rewards.settings import How, JudgeSettings
from align.rewards.verdicts import Group, Verdict
from align.stages.answering import ask_policy, by_prompt, grades_of, match, write_lines
from align.stages.contents import content_of
from align.stages.generating import RowSettings, beside, check_out, opened
from align.stages.recipe import TASKS as PROCEDURAL
from align.stages.recipe import SourceSettings
from align.stages.sources import is_held_out, preferred, prompts, streamed

HARNESS = "harness:"  # prefix of a task of lm-evaluation-harness
WIN_RATE = "win_rate"
LIKELIHOOD, SAMPLED, GIVEN = "likelihood", "sampled", "given"  # a policy's numbers, its answers, or those of a file

ROWS = "rows.format rows.split rows.on_error rows.seed rows.constraints"
USES = {  # kind of task -> all that it looks at; what else is given would be without effect, and is refused
    HARNESS: "--policy --limit tasks_folder",
    LIKELIHOOD: "--data --policy --limit max_length rows.format rows.split rows.on_error rows.seed",
    WIN_RATE: f"--data --responses --limit --judge combine {ROWS}",
    SAMPLED: f"--data --policy --limit --out sampling engine {ROWS}",
    GIVEN: f"--data --responses --limit --out {ROWS}",
}


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
    """What is known of the policy or the responses: `{task, scores: {name: {value, low, high, n}}, …}`."""
    quiet_transformers()
    processes = init_processes()
    kind = _kind(asked)
    _check_used(kind, asked, out, settings)
    if kind == HARNESS:
        if processes.world_size > 1:
            raise InputError(f"task {asked.task} runs in one process: leave accelerate launch out")
        found = _by_harness(asked, settings)
    elif kind == LIKELIHOOD:
        found = _likelihood(asked, settings, processes)
    elif kind == WIN_RATE:
        found = _wins(asked, settings, processes, report)
    else:
        found = _graded(asked, out, settings, processes, report)
    shutdown_processes()
    return found


def _kind(asked: Asked) -> str:
    """The entry of USES that the task is."""
    if asked.task.startswith(HARNESS):
        return HARNESS
    names = [*TASKS, *LIKELIHOODS, WIN_RATE]
    if asked.task not in names:
        raise InputError(f"no task is called {asked.task!r}; {suggest(asked.task, [*names, HARNESS + 'NAME'])}")
    if asked.task in TASKS:
        return GIVEN if asked.policy is None else SAMPLED
    return WIN_RATE if asked.task == WIN_RATE else LIKELIHOOD


def _check_used(kind: str, asked: Asked, out: Path | None, settings: EvaluateSettings) -> None:
    """Raise for the first option or setting that is given and that the task does not look at."""
    unread = set[str]()
    made, constrained = (asked.data or "").startswith(PROCEDURAL), settings.rows.constraints is not None
    if made or (kind in (SAMPLED, GIVEN) and not constrained):  # no reader of records is asked
        unread |= {"rows.format", "rows.on_error"}
    if not made and not constrained:  # nothing is drawn
        unread.add("rows.seed")
    uses = set(USES[kind].split()) - unread
    if ignored := [name for name in _given(asked, out, settings) if name not in uses]:
        if kind == SAMPLED and ignored[0] == "--responses":
            raise InputError(f"task {asked.task}: give either --policy or one file of --responses")
        of = " with --responses" if kind == GIVEN else ""
        raise InputError(f"task {asked.task}{of} does not use {ignored[0]}: leave it out")


def _given(asked: Asked, out: Path | None, settings: EvaluateSettings) -> list[str]:
    """The options and settings that say something else than they do where they are left out, as they are written."""
    options = {**asked._asdict(), "out": out, "judge": settings.judges}
    found = [f"--{name}" for name, value in options.items() if name != "task" and value not in (None, (), [])]
    for prefix, own in (("", settings), ("rows.", settings.rows)):
        plain = type(own)()
        names = [name for name in type(own).model_fields if name not in ("rows", "judges")]
        found += [prefix + name for name in names if getattr(own, name) != getattr(plain, name)]
    return found


def _graded(
    asked: Asked, out: Path | None, settings: EvaluateSettings, processes: Processes, report: Progress
) -> dict[str, Any]:
    """What a program says of each answer, in total and, with `out`, one by one."""
    task, data = asked.task, asked.needed("data")
    if asked.policy is None and len(asked.responses) != 1:
        raise InputError(f"task {task}: give either --policy or one file of --responses")
    if out is not None:
        check_out(out, [data, *asked.responses])
    left_out = Counter[str]()
    rows = task_rows(task, settings.rows.source(data, asked.limit), seed=0, counts=left_out)
    answers = _answers(asked, rows, settings, out=out, processes=processes, report=report)
    grades = grades_of(task, rows, answers, processes=processes, report=report)
    unanswered = len(rows) - len({number for number, _ in answers})
    if unanswered:
        report.note(f"{unanswered} of {len(rows)} rows have no response and are not in the rates")
    if out is not None:
        for path in asked.responses:
            _claim(out, path, rows, processes)
        column = TASKS[task].name
        names = [rows[number].get(column, number) for number, _ in answers]
        lines = [{column: name, **grade.line} for name, grade in zip(names, grades, strict=True)]
        processes.run_on_main(lambda: write_lines(out, lines), f"writing {out}")
    more = {"rows": len(rows), "responses": len(answers), "unanswered": unanswered, "out": str(out) if out else None}
    return _summary(task, scores(task, answers, grades), left_out=dict(left_out), **more)


def task_rows(task: str, source: SourceSettings, *, seed: int, counts: Counter[str] | None = None) -> list[Row]:
    """The task's rows, checked for what it needs; of procedural or constrained prompts what is known of each.

    `counts` is told what was left out.
    """
    pick(TASKS, task, "task")
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
    check_rows(task, rows, source.path, skipped=source.skip)
    return rows


def _answers(
    asked: Asked,
    rows: Sequence[Row],
    settings: EvaluateSettings,
    *,
    out: Path | None,
    processes: Processes,
    report: Progress,
) -> list[Answer]:
    """The responses of the file, or of the policy; the latter are kept beside `out` where there is one."""
    if asked.policy is None:
        (path,) = asked.responses
        if out is not None and out.exists():
            _claim(out, path, rows, processes)
        return match(asked.task, rows, path)
    engine, sampling = make_engine(asked.policy, settings.engine), settings.sampling
    ask = partial(ask_policy, asked.task, rows, engine, sampling=sampling, processes=processes, report=report)
    if out is None:
        return ask(kept=None)
    by = {"sampling": sampling.model_dump(), "engine": settings.engine.deciding()}
    made_with = {"policy": content_of(asked.policy), "rows": _content_of(rows), **by}
    with opened(beside(out, "samples"), made_with, processes) as journal:
        return ask(kept=journal)


def _claim(out: Path, responses: str, rows: Sequence[Row], processes: Processes) -> None:
    """Leave beside `out` what its verdicts are of; raises where that is something else already."""
    made_with = {"responses": content_of(responses), "rows": _content_of(rows)}
    with opened(beside(out, "samples"), made_with, processes):
        pass


def _content_of(rows: Sequence[Row]) -> str:
    return stable_hash([dict(row) for row in rows])


def _by_harness(asked: Asked, settings: EvaluateSettings) -> dict[str, Any]:
    folder = Path(settings.tasks_folder) if settings.tasks_folder else None
    name = asked.task.removeprefix(HARNESS)
    return _summary(asked.task, harness(asked.needed("policy"), [name], folder=folder, limit=asked.limit))


def _likelihood(asked: Asked, settings: EvaluateSettings, processes: Processes) -> dict[str, Any]:
    policy, tokenizer = load_policy(PolicySettings(path=asked.needed("policy")))
    apply_template(tokenizer)
    source = settings.rows.source(asked.needed("data"), asked.limit)
    source = source.model_copy(update={"max_length": settings.max_length})
    limit = length_limit(policy.base.config)
    groups, row_counts = likelihood_rows(source, tokenizer, model_limit=limit, best=asked.task == NLL)
    parts = list(LIKELIHOODS[asked.task](policy, groups, processes=processes))
    return _summary(asked.task, rates(parts), **row_counts)


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


def _wins(asked: Asked, settings: EvaluateSettings, processes: Processes, report: Progress) -> dict[str, Any]:
    data = asked.needed("data")
    if len(asked.responses) != 2:  # noqa: PLR2004
        raise InputError(f"task {WIN_RATE}: give --responses twice: the policy's and the baseline's")
    judge = make_judge(settings.judges, how=settings.combine)
    source = settings.rows.source(data, asked.limit)
    left_out = Counter[str]()
    known = {prompt.messages[-1].content: prompt for prompt in prompts(source, seed=0, counts=left_out)}
    ours, theirs = (by_prompt(path) for path in asked.responses)
    both = [text for text in known if text in ours and text in theirs]
    if not both:
        raise InputError(f"task {WIN_RATE}: no prompt of {data} is answered in both files")
    report.note(f"{len(both)} of {len(known)} prompts are answered in both files")

    def shared(groups: Sequence[Group]) -> list[tuple[Verdict, ...]]:
        return split_work(groups, judge, processes=processes, activity="judging")

    found = win_rates([(known[text], (ours[text], theirs[text])) for text in both], shared)
    told = {name: value for name, value in found.items() if isinstance(value, Score)}
    more = {"undecided": found["undecided"], "unanswered": len(known) - len(both), "left_out": dict(left_out)}
    return _summary(WIN_RATE, told, **more)


def _summary(task: str, found: Mapping[str, Score], **more: object) -> dict[str, Any]:
    return {"task": task, **more, "scores": {name: value._asdict() for name, value in found.items()}}
