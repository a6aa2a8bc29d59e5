"""`align evaluate`: a policy, or responses that are there already, graded by a task."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from align.config import InputError, Settings, nearest, pick, stable_hash
from align.data.chat import ChatEncoder, TokenGroup
from align.data.formats import read_rows
from align.data.templates import apply_template
from align.evaluation.harness import harness
from align.evaluation.likelihood import LIKELIHOODS, NLL, rates
from align.evaluation.scores import Score
from align.evaluation.tasks import TASKS, Row, check_rows, scores
from align.evaluation.winning import win_rates
from align.models.loading import PolicySettings, length_limit, quiet_transformers
from align.models.policy import load_policy
from align.records import Comparison, Demonstration
from align.stages.answering import ask_policy, grades_of, write_lines
from align.stages.generating import RowSettings, beside, opened
from align.stages.recipe import TASKS as PROCEDURAL
from align.stages.recipe import SourceSettings, content_of
from align.stages.shares import dealt, join, leave
from align.stages.sources import is_held_out, preferred, prompts, records
from align.synth.engines import EngineSettings, make_engine
from align.synth.judges import How, JudgeSettings, make_judge
from align.synth.samples import SamplingSettings
from align.synth.verdicts import Group, Verdict
from align.train.runtime import Processes, Reporter

HARNESS = "harness:"  # prefix of a task of lm-evaluation-harness
WIN_RATE = "win_rate"
NAMES = ("key", "task_id")  # columns that say which row a response answers
TEXTS = ("response", "completion", "output")


class EvaluateSettings(Settings):
    """How a policy is asked and judged."""

    sampling: SamplingSettings = SamplingSettings(temperature=0.0)
    engine: EngineSettings = EngineSettings()
    rows: RowSettings = RowSettings()
    judges: list[JudgeSettings] = Field(default_factory=list[JudgeSettings])  # of the win rate
    combine: How = "precedence"
    max_length: int | None = Field(default=None, ge=2)  # tokens of a row whose likelihood is asked for
    tasks_folder: str | None = None  # lm-evaluation-harness's task files of one's own


def task_names() -> list[str]:
    """Every task that there is."""
    return [*TASKS, *LIKELIHOODS, WIN_RATE]


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


def evaluate(asked: Asked, out: Path | None, *, settings: EvaluateSettings, report: Reporter) -> dict[str, Any]:
    """What is known of the policy or the responses: `{task, scores: {name: {value, low, high, n}}, …}`."""
    quiet_transformers()
    processes = join()
    found = _evaluated(asked, out, settings, processes, report)
    leave()
    return found


def _evaluated(
    asked: Asked, out: Path | None, settings: EvaluateSettings, processes: Processes, report: Reporter
) -> dict[str, Any]:
    task = asked.task
    if task.startswith(HARNESS):
        if processes.count > 1:
            raise InputError(f"task {task} runs in one process: leave accelerate launch out")
        return _by_harness(asked, settings)
    names = [*TASKS, *LIKELIHOODS, WIN_RATE]
    if task not in names:
        raise InputError(f"no task is called {task!r}; {nearest(task, [*names, HARNESS + 'NAME'])}")
    if task in LIKELIHOODS:
        return _likelihood(asked, settings, processes)
    if task == WIN_RATE:
        return _wins(asked, settings, processes, report)
    rows = task_rows(task, settings.rows.source(asked.needed("data"), asked.limit), seed=0)
    if (asked.policy is None) != (len(asked.responses) == 1):
        raise InputError(f"task {task}: give either --policy or one file of --responses")
    if asked.policy is not None:
        answers = _asked(task, rows, asked.policy, settings, out=out, processes=processes, report=report)
    else:
        answers = match(task, rows, asked.responses[0])
    return _graded(task, rows, answers, out=out, processes=processes, report=report)


def task_rows(task: str, source: SourceSettings, *, seed: int) -> list[Row]:
    """The task's rows, checked for what it needs; of procedural or constrained prompts what is known of each."""
    pick(TASKS, task, "task")
    if source.path.startswith(PROCEDURAL) or source.constraints is not None:
        found = prompts(source, seed=seed)
        rows: list[Row] = [{**prompt.metadata, "prompt": prompt.messages[-1].content} for prompt in found]
    else:
        last = None if source.limit is None else source.skip + source.limit
        rows = list(islice(read_rows(source.path, split=source.split), source.skip, last))
    if not rows:
        raise InputError(f"{source.path}: holds no rows")
    check_rows(task, rows, source.path)
    return rows


def _asked(
    task: str,
    rows: Sequence[Row],
    policy: str,
    settings: EvaluateSettings,
    *,
    out: Path | None,
    processes: Processes,
    report: Reporter,
) -> list[tuple[int, str]]:
    """The policy's responses; they are kept beside `out` where there is one."""
    engine, sampling = make_engine(policy, settings.engine), settings.sampling
    ask = partial(ask_policy, task, rows, engine, sampling=sampling, processes=processes, report=report)
    if out is None:
        return ask(kept=None)
    asked = {"sampling": sampling.model_dump(), "engine": settings.engine.model_dump()}
    made_with = {"policy": content_of(policy), "rows": stable_hash([dict(row) for row in rows]), **asked}
    with opened(beside(out, "samples"), made_with, processes) as journal:
        return ask(kept=journal)


def match(task: str, rows: Sequence[Row], path: str) -> list[tuple[int, str]]:
    """(row number, response) of every response in a file, by `key` or `task_id`, or else by the prompt."""
    by_name: dict[str, list[int]] = defaultdict(list)
    by_prompt: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        name = next((str(row[each]) for each in NAMES if row.get(each) is not None), str(number))
        by_name[name].append(number)
        for text in {TASKS[task].ask(row), str(row.get("prompt") or row.get("question") or row.get("text"))}:
            by_prompt[text].append(number)
    found: list[tuple[int, str]] = []
    for place, row in enumerate(read_rows(path)):
        where = f"{path}: row {place}"
        text = next((row[name] for name in TEXTS if isinstance(row.get(name), str)), None)
        if text is None:
            raise InputError(f"{where}: has no {' or '.join(TEXTS[:2])} in text")
        name = next((str(row[each]) for each in NAMES if row.get(each) is not None), None)
        candidates = by_name.get(name, []) if name is not None else by_prompt.get(str(row.get("prompt")), [])
        if len(candidates) > 1 and row.get("prompt") is not None:
            candidates = [number for number in candidates if number in by_prompt.get(str(row["prompt"]), [])]
        if len(candidates) != 1:
            said = f"{name!r} names" if name is not None else "its prompt is that of"
            raise InputError(f"{where}: {said} {len(candidates)} rows of the data; one is needed")
        found.append((candidates[0], text))
    if not found:
        raise InputError(f"{path}: holds no responses")
    return found


def _graded(
    task: str,
    rows: Sequence[Row],
    answers: Sequence[tuple[int, str]],
    *,
    out: Path | None,
    processes: Processes,
    report: Reporter,
) -> dict[str, Any]:
    kind = pick(TASKS, task, "task")
    grades = grades_of(task, rows, answers, processes=processes, report=report)
    unanswered = len(rows) - len({number for number, _ in answers})
    if unanswered:
        report.note(f"{unanswered} of {len(rows)} rows have no response and are not in the rates")
    if out is not None:
        names = [rows[number].get(kind.name, number) for number, _ in answers]
        lines = [{kind.name: name, **grade.line} for name, grade in zip(names, grades, strict=True)]
        processes.first(lambda: write_lines(out, lines), f"writing {out}")
    more = {"rows": len(rows), "responses": len(answers), "unanswered": unanswered, "out": str(out) if out else None}
    return _summary(task, scores(task, answers, grades), **more)


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
    groups, account = likelihood_rows(source, tokenizer, model_limit=limit, best=asked.task == NLL)
    parts = list(LIKELIHOODS[asked.task](policy, groups, processes=processes))
    return _summary(asked.task, rates(parts), **account)


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
    reading = records(source, kind=Demonstration, seed=seed)
    usable = [record for record in reading.records if isinstance(record, Comparison | Demonstration)]
    encoder = ChatEncoder(tokenizer, max_length=source.max_length or model_limit, overlong=source.overlong)
    groups = list(encoder.encode_all(usable))
    if source.held_out:
        groups = [group for group in groups if is_held_out(group, source.held_out)]
    if best:
        groups = [preferred(group) for group in groups]
    if not groups:
        raise InputError(f"{source.path}: no row has a response of which the likelihood could be told")
    counts = {name: number for name, number in encoder.counts.items() if name != "rows"}
    without = {"prompts without a response": len(reading.records) - len(usable)}
    left_out = {**reading.dropped, **{name: number for name, number in without.items() if number}, **counts}
    return groups, {"rows": reading.num_rows, "left_out": left_out}


def _wins(asked: Asked, settings: EvaluateSettings, processes: Processes, report: Reporter) -> dict[str, Any]:
    data = asked.needed("data")
    if len(asked.responses) != 2:  # noqa: PLR2004
        raise InputError(f"task {WIN_RATE}: give --responses twice: the policy's and the baseline's")
    judge = make_judge(settings.judges, how=settings.combine)
    source = settings.rows.source(data, asked.limit)
    known = {prompt.messages[-1].content: prompt for prompt in prompts(source, seed=0)}
    ours, theirs = (_by_prompt(path) for path in asked.responses)
    both = [text for text in known if text in ours and text in theirs]
    if not both:
        raise InputError(f"task {WIN_RATE}: no prompt of {data} is answered in both files")
    report.note(f"{len(both)} of {len(known)} prompts are answered in both files")

    def shared(groups: Sequence[Group]) -> list[tuple[Verdict, ...]]:
        return dealt(groups, judge, processes=processes, doing="judging")

    found = win_rates([(known[text], (ours[text], theirs[text])) for text in both], shared)
    told = {name: value for name, value in found.items() if isinstance(value, Score)}
    return _summary(WIN_RATE, told, undecided=found["undecided"], unanswered=len(known) - len(both))


def _by_prompt(path: str) -> dict[str, str]:
    """Each prompt's response; a prompt with two is one too many."""
    found: dict[str, str] = {}
    for place, row in enumerate(read_rows(path)):
        text = next((row[name] for name in TEXTS if isinstance(row.get(name), str)), None)
        if text is None or not isinstance(row.get("prompt"), str):
            raise InputError(f"{path}: row {place}: a prompt and a response are needed, both in text")
        if row["prompt"] in found:
            raise InputError(f"{path}: row {place}: its prompt has a response already")
        found[row["prompt"]] = text
    return found


def _summary(task: str, found: Mapping[str, Score], **more: object) -> dict[str, Any]:
    return {"task": task, **more, "scores": {name: value._asdict() for name, value in found.items()}}
