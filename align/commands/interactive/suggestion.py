"""Which step a file of rows is for, from its first records. Nothing here imports torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.data.reading import stream
from align.errors import InputError
from align.losses.unpaired import LABELS
from align.records import Comparison, Demonstration, Record
from align.stages.inputs.opening import lack_of_preference
from align.train.objectives.settings import MIN_KL_PROMPTS

LOOKED_AT = 1000  # rows
HELD_OUT_FROM = 20  # rows from which a tenth is held out
STEPS_AN_EPOCH = 4  # at least, where a file has few rows
PROMPTS_PER_STEP = 16

# Kinds of steps in the order in which they follow each other
SFT, RATE, DPO, KTO, RPO, SAMPLES = "sft", "rate", "dpo", "kto", "rpo", "samples"
KINDS = (SFT, RATE, DPO, KTO, RPO, SAMPLES)


@dataclass(frozen=True, slots=True)
class Rows:
    """What is known of a source of rows."""

    path: str
    name: str  # under `data`
    kind: str  # the step that it is for, one of KINDS
    format: str
    num_rows: int  # that were looked at
    is_all: bool  # whether the source has no more
    about: str  # what the rows hold
    attributes: tuple[str, ...] = ()  # that the rows rate
    reading: Mapping[str, Any] = field(default_factory=dict[str, Any])  # settings of the source that were given
    dropped: Mapping[str, int] = field(default_factory=dict[str, int])  # reason -> rows that cannot be read

    @property
    def prompts_per_step(self) -> int:
        """Rows of an optimizer step: fewer where the file is small."""
        fewest = MIN_KL_PROMPTS if self.kind == KTO else 1
        return max(fewest, min(PROMPTS_PER_STEP, self.num_rows // STEPS_AN_EPOCH))

    @property
    def is_held_out(self) -> bool:
        """Whether a share of the rows is kept for evaluation."""
        return self.kind != SAMPLES and self.num_rows >= HELD_OUT_FROM


def look_at(path: str, taken: Sequence[str], reading: Mapping[str, Any]) -> Rows:
    """Return what the first rows of a source are and which step they are for.

    `taken` are names of other sources, `reading` settings of this one, such as `split`.
    """
    found = stream(path, limit=LOOKED_AT + 1, **reading)
    try:
        records = [located.record for located in found.records]
    except InputError as error:
        if "on_error" not in reading:
            raise InputError(f"{error}; correct the row, or give --on-error skip") from error
        raise
    shown, is_all = records[:LOOKED_AT], len(records) <= LOOKED_AT
    kind, about = _kind_of(path, shown)
    names = {name for record in shown for name in _attributes(record)} if kind == RATE else set[str]()
    return Rows(
        path=path,
        name=_name_of(path, taken),
        kind=kind,
        format=found.format,
        num_rows=len(shown),
        is_all=is_all,
        about=about,
        attributes=tuple(sorted(names)),
        reading=reading,
        dropped=dict(found.statistics.dropped),
    )


def _kind_of(path: str, records: Sequence[Record]) -> tuple[str, str]:
    """Return the kind of step, and in words what the rows are."""
    comparisons = [record for record in records if isinstance(record, Comparison)]
    if len(comparisons) < len(records):
        if comparisons:
            raise InputError(f"{path}: some rows compare responses and some do not; write them into two files")
        is_answered = all(isinstance(record, Demonstration) for record in records)
        return (SFT, "dialogues to imitate") if is_answered else (SAMPLES, "prompts")
    if any(_attributes(record) for record in comparisons):
        return RATE, "responses with rated attributes"
    sizes = sorted({len(record.responses) for record in comparisons})
    if sizes == [1] and {record.responses[0].reward for record in comparisons} == set(LABELS):
        return KTO, "single responses, labelled as good or not"
    if sizes == [1]:
        return SFT, "single responses, of which the good ones are imitated"
    lacks = [lack_of_preference(record, needs_rewards=False) for record in comparisons]
    if all(lacks):
        raise InputError(f"{path}: {lacks[0]}; align score rates responses with a reward model")
    rewarded = all(response.reward is not None for record in comparisons for response in record.responses)
    if rewarded and sizes[-1] > 2:  # noqa: PLR2004 - a pair
        number = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]}"
        return RPO, f"{number} scored responses to a prompt"
    return DPO, "pairs with scores" if rewarded else "pairs" if sizes == [2] else "ranked responses"


def _attributes(record: Record) -> list[str]:
    if not isinstance(record, Comparison):
        return []
    return [name for response in record.responses for name in response.attributes]


def _name_of(path: str, taken: Sequence[str]) -> str:
    """Return a name for a source: that of its file, made different from those in `taken`."""
    stem = re.sub(r"\W+", "_", Path(path.partition(":")[0]).name.partition(".")[0]).strip("_") or "rows"
    stem = f"{stem}_rows" if stem in KINDS else stem  # a source and a step need different names
    names = [stem, *(f"{stem}_{number}" for number in range(2, len(taken) + 2))]
    return next(name for name in names if name not in taken)
