"""Sources of rows: their settings, and their records and prompts as a stream."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from typing import Any, Literal

from pydantic import Field

from align.config import Settings
from align.content_hash import PROCEDURAL, STEP, code_of
from align.data.reading import RowStatistics, Stream, find_reader, stream
from align.data.rejections import DROPPED, Rejections
from align.data.where import Scalar
from align.errors import InputError, RowOrigin, within
from align.procedural import tasks
from align.records import Comparison, Demonstration, Located, Prompt, Record
from align.registry import pick
from align.stages.inputs.row_choice import RowChoice
from align.synth.constraints import constrain
from align.synth.scored_groups import prompt_of
from align.synth.settings import ConstraintSettings

WHERE = (
    "Keep the rows in which a column of the file, or an entry of the metadata that the format adds, has a value or one "
    "of several: `{data_source: [PRM800K, ARB], flagged: false}`. The others are counted as dropped."
)
COLUMNS = (
    "Columns with other names than the format's: `{prompt: question}` reads the column `question` as `prompt`. A "
    "dotted path reads a value in a column, as in `{prompt: chat.0.content}`."
)
Overlong = Literal["drop", "cut_prompt", "cut_response", "error"]


class SourceSettings(Settings):
    """Where rows come from and how they become tokens."""

    path: str = Field(
        description="File, folder or Hugging Face dataset id; tasks:KIND for rows that the project generates; or "
        "step:NAME/FILE for a file of rows that a step makes."
    )
    format: str = Field(
        default="auto", description="Name of a row format, or module:name of your own reader; auto detects by column."
    )
    columns: dict[str, str] = Field(default_factory=dict[str, str], description=COLUMNS)
    where: dict[str, Scalar | list[Scalar]] = Field(default_factory=dict[str, Scalar | list[Scalar]], description=WHERE)
    split: str | None = Field(default=None, description="Split of a folder or dataset, or of a built-in task.")
    skip: int = Field(default=0, ge=0, description="Rows to skip first.")
    limit: int | None = Field(
        default=None,
        ge=1,
        description="Rows to read after those; all by default. Rows of one judged pair or question count as one.",
    )
    order: Literal["file", "random"] = Field(
        default="file",
        description="Order in which `skip` and `limit` count rows: that of the file, or a random one, for files that "
        "are sorted, as by subject. Sources with the same `seed` share no rows if their ranges do not overlap.",
    )
    responses: int = Field(default=4, ge=1, description="Responses per prompt, for comparisons of a built-in task.")
    on_error: Literal["error", "skip"] = Field(
        default="error", description="Stop at a row that cannot be read or encoded, or skip it and count it."
    )
    seed: int = Field(
        default=0,
        description="Seed of a built-in task and of constraints, added to the recipe's seed. A random `order` depends "
        "on it alone, so that a recipe reads the same rows with every seed of its own.",
    )
    constraints: ConstraintSettings | None = Field(
        default=None, description="Verifiable instructions to append to the prompts."
    )
    held_out: float = Field(
        default=0.0, ge=0, lt=1, description="Share of the prompts that training keeps for evaluation."
    )
    max_length: int | None = Field(
        default=None, ge=2, description="Maximum length of a row in tokens; the model's own limit by default."
    )
    max_prompt_length: int | None = Field(default=None, ge=1, description="Maximum length of a prompt in tokens.")
    overlong: Overlong = Field(default="drop", description="What happens to a row that exceeds these limits.")
    identical: Literal["drop", "keep"] = Field(
        default="drop",
        description="What happens to a comparison whose responses are the same tokens, where a loss compares them.",
    )

    @property
    def is_procedural(self) -> bool:
        """Whether the project generates the rows itself."""
        return self.path.startswith(PROCEDURAL)

    @property
    def choice(self) -> RowChoice:
        """Which of its rows are read."""
        return RowChoice(self.skip, self.limit, self.seed if self.order == "random" else None)

    @property
    def made_by(self) -> tuple[str, str] | None:
        """The step that makes the rows, and its file of them; None for rows that no step makes."""
        name, _, file = self.path.removeprefix(STEP).partition("/")
        return (name, file) if self.path.startswith(STEP) else None

    @property
    def kind(self) -> str | None:
        """The kind of procedural task; None for rows that are read."""
        return self.path.removeprefix(PROCEDURAL) if self.is_procedural else None


@contextmanager
def rows_of(name: str) -> Generator[None]:
    """Locate the errors of this block, which reads a source of data, at the source's `path`, or at their own key."""
    try:
        yield
    except InputError as error:
        for part in error.parts:
            part.loc = ("data", name, *(part.loc or ("path",)))
        raise


def check_source(source: SourceSettings) -> None:
    """Raise a located `InputError` for a setting that is wrong, or that would have no effect."""
    if source.kind is not None:
        with within("path"):
            pick(tasks.KINDS, source.kind, "kind of task")
        if source.split is not None:
            with within("split"):
                pick(tasks.SPLITS, source.split, "split")
    elif source.format != "auto":
        with within("format"):
            find_reader(source.format)
    without_effect = {
        "format": source.is_procedural and "procedural rows are not read from a file",
        "columns": source.is_procedural and "procedural rows are not read from a file",
        "where": source.is_procedural and "procedural rows are not read from a file",
        "order": "procedural rows are random"
        if source.is_procedural
        else source.limit is None and not source.skip and "it is for skip and limit, which choose rows",
        "responses": not source.is_procedural and f"it is only for {PROCEDURAL}KIND",
        "seed": not source.is_procedural
        and source.constraints is None
        and source.order == "file"
        and f"it is only for {PROCEDURAL}KIND, constraints or a random order",
    }
    for key, reason in without_effect.items():
        value = getattr(source, key)
        default = SourceSettings.model_fields[key].get_default(call_default_factory=True)
        if reason and value != default:
            raise InputError(f"{value!r} has no effect on {source.path}: {reason}; leave it at {default!r}", (key,))


def source_key(share: float, source: SourceSettings, content: Callable[[str], str]) -> list[Any]:
    """Return what decides the rows of a source: its share, settings, content, and the code of a user's reader."""
    return [share, source.model_dump(mode="json"), content(source.path), code_of(source.format)]


def streamed(source: SourceSettings, *, kind: type[Record], seed: int) -> Stream:
    """Return the records of a source one at a time; procedural rows are generated as `kind`."""
    if source.is_procedural:
        found = _generated(source, kind, seed)
    elif source.order == "random":
        found = _opened(source, None)
        return replace(found, records=_drawn_records(found, source))
    else:
        found = _opened(source, None if source.limit is None else source.skip + source.limit)
    return replace(found, records=_after_skipped(found, source)) if source.skip else found


def _opened(source: SourceSettings, limit: int | None) -> Stream:
    """Return the first `limit` records of a source that is read."""
    return stream(
        source.path,
        format=source.format,
        split=source.split,
        limit=limit,
        on_error=source.on_error,
        columns=source.columns,
        where=source.where,
    )


def _drawn_records(found: Stream, source: SourceSettings) -> Iterator[Located[Record]]:
    """Yield the records that the source takes of a random order, as in the file, which is read twice."""
    chosen = source.choice.places(sum(1 for _ in _opened(source, None).records))
    if not chosen:
        raise _all_skipped(source)
    number = 0
    for place, located in enumerate(found.records):
        if place in chosen:
            yield replace(located, row=number)
            number += 1
        else:
            found.statistics.num_rows -= 1


def _after_skipped(found: Stream, source: SourceSettings) -> Iterator[Located[Record]]:
    first = next(islice(found.records, min(source.skip, sys.maxsize), None), None)
    if first is None:
        raise _all_skipped(source)
    for located in chain([first], found.records):
        yield replace(located, row=located.row - source.skip)
    found.statistics.num_rows -= source.skip


def _all_skipped(source: SourceSettings) -> InputError:
    return InputError(f"{source.path}: skip is {source.skip}, and the source has no more rows", ("skip",))


def check_end(source: SourceSettings) -> int:
    """Return the number of procedural rows, those to skip included; raise `InputError` if there is no limit."""
    if source.limit is None:
        raise InputError(f"{source.path} is unlimited; set limit, the number of rows to generate", ("limit",))
    return source.skip + source.limit


def _generated(source: SourceSettings, kind: type[Record], seed: int) -> Stream:
    """Return procedural rows of a kind of record."""
    task = source.path.removeprefix(PROCEDURAL)
    split = source.split or "train"
    last = check_end(source)
    seed += source.seed
    made: Sequence[Record]
    if kind is Demonstration:
        made = tasks.demonstrations(task, num_rows=last, seed=seed, split=split)
    elif kind is Comparison:
        made = tasks.comparisons(task, num_rows=last, num_responses=source.responses, seed=seed, split=split)
    else:
        made = tasks.prompts(task, num_rows=last, seed=seed, split=split)
    records = (
        Located(record, f"{source.path}: row {row + 1}", row, record.metadata) for row, record in enumerate(made)
    )
    return Stream(records=records, format="tasks", statistics=RowStatistics(num_rows=len(made)))


def prompts(
    source: SourceSettings,
    *,
    seed: int,
    counts: Counter[str] | None = None,
    check: Callable[[Prompt], None] | None = None,
) -> list[Prompt]:
    """Return the prompts of a source, with verifiable instructions appended where the source has constraints.

    `check` raises `InputError` for a prompt that cannot be asked, which is an error of its row. `counts` receives the
    number of rows dropped, by reason, and of prompts that belong to another split.
    """
    counts = Counter() if counts is None else counts
    found = list[Prompt]()
    reading = streamed(source, kind=Prompt, seed=seed)
    rejections = Rejections(source.on_error)
    for located in reading.records:
        with rejections.at(located.place):
            prompt = prompt_of(located.record)
            if check is not None:
                check(prompt)
            found.append(replace(prompt, origin=RowOrigin(located.place, skips=source.on_error == "skip")))
    counts.update({f"rows:dropped {reason}": number for reason, number in reading.statistics.dropped.items()})
    counts.update({f"rows:dropped {name.removeprefix(DROPPED)}": n for name, n in rejections.counts.items()})
    if source.constraints is None:
        return found
    joined = constrain(found, source.constraints, seed=seed + source.seed)
    if not joined:
        split = source.constraints.split
        raise InputError(
            f"{source.path}: none of its {len(found)} prompts is in the split {split!r}",
            ("constraints", "split"),
        )
    counts.update({"prompts:not in constraints.split": len(found) - len(joined)} if len(joined) < len(found) else {})
    return joined


def check_unsplit(name: str, source: SourceSettings, loc: tuple[str, ...]) -> None:
    """Raise for prompts of a source that training splits: some of them may be trained on."""
    if source.held_out:
        raise InputError(
            f"{name} has held_out {source.held_out} for training, and all of its prompts would be used here; define a "
            "separate source of prompts with split, skip or limit",
            loc,
        )


def check_without_constraints(name: str, has_constraints: bool, loc: tuple[str, ...]) -> None:
    """Raise for a source with constraints whose responses were written without them."""
    if has_constraints:
        raise InputError(
            f"{name} has constraints, and its responses were written without them: constraints are for sampling and "
            "evaluation; use a source without them",
            loc,
        )
