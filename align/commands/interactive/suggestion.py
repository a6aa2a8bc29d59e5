"""Which step a file of rows is for, from its first records. Nothing here imports torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from align.data.reading import stream
from align.errors import InputError
from align.losses.unpaired import LABELS
from align.records import Comparison, Demonstration, Located, Prompt, Record
from align.rewards.published_rows import known_answer, known_tests
from align.stages.inputs.opening import lack_of_preference
from align.synth.scored_groups import prompt_of
from align.train.objectives.settings import MIN_KL_PROMPTS

LOOKED_AT = 1000  # rows
HELD_OUT_FROM = 20  # distinct prompts from which a tenth is held out
STEPS_AN_EPOCH = 4  # at least, where a file has few rows
PROMPTS_PER_STEP = 16

# Kinds of steps in the order in which they follow each other
SFT, RATE, DPO, KTO, RPO, SAMPLES = "sft", "rate", "dpo", "kto", "rpo", "samples"
KINDS = (SFT, RATE, DPO, KTO, RPO, SAMPLES)


@dataclass(frozen=True, slots=True)
class Rows:
    """What the first rows of a source are."""

    path: str
    name: str  # under `data`
    kind: str  # the step that it is for, one of KINDS
    format: str
    num_rows: int  # that were looked at
    num_prompts: int  # that differ, among these
    is_all: bool  # whether the source has no more
    about: str  # what the rows hold
    attributes: tuple[str, ...] = ()  # that the rows rate
    reading: Mapping[str, Any] = field(default_factory=dict[str, Any])  # settings of the source that were given
    dropped: Mapping[str, int] = field(default_factory=dict[str, int])  # reason -> rows that cannot be read
    judges: tuple[str, ...] = ()  # that rate responses by what the rows know

    @property
    def prompts_per_step(self) -> int:
        """Rows of an optimizer step: fewer where the file is small."""
        fewest = MIN_KL_PROMPTS if self.kind == KTO else 1
        return max(fewest, min(PROMPTS_PER_STEP, self.num_rows // STEPS_AN_EPOCH))

    @property
    def is_held_out(self) -> bool:
        """Whether a share of the rows is kept for evaluation."""
        return self.kind != SAMPLES and self.num_prompts >= HELD_OUT_FROM


def look_at(path: str, taken: Sequence[str], reading: Mapping[str, Any]) -> Rows:
    """Return what the first rows of a source are and which step they are for.

    `taken` are names of other sources, `reading` settings of this one, such as `split`.
    """
    found = stream(path, limit=LOOKED_AT + 1, **reading)
    try:
        rows = list(found.records)
        shown = _of_one_kind(rows[:LOOKED_AT], found.statistics.dropped, reading)
        is_all = len(rows) <= LOOKED_AT
    except InputError as error:
        if "on_error" not in reading:
            raise InputError(f"{error}; correct the row, or give --on-error skip") from error
        raise
    kind, about = _kind_of(path, shown)
    names = {name for record in shown for name in _attributes(record)} if kind == RATE else set[str]()
    return Rows(
        path=path,
        name=_name_of(path, taken),
        kind=kind,
        format=found.format,
        num_rows=len(shown),
        num_prompts=len({repr(prompt_of(record).messages) for record in shown}),
        is_all=is_all,
        about=about,
        attributes=tuple(sorted(names)),
        reading=reading,
        dropped=dict(found.statistics.dropped),
        judges=_judges(shown) if kind == SAMPLES else (),
    )


def _of_one_kind(rows: Sequence[Located[Record]], dropped: Counter[str], reading: Mapping[str, Any]) -> list[Record]:
    """Return the records; of a file that is mostly dialogues, without those that end before an answer."""
    unanswered = [row for row in rows if isinstance(row.record, Prompt)]
    num_answered = sum(isinstance(row.record, Demonstration) for row in rows)
    if not unanswered or num_answered < len(rows) / 2:
        return [row.record for row in rows]
    if "on_error" not in reading:
        raise InputError(f"{unanswered[0].place}: the dialogue has no answer, and {num_answered} others have one")
    dropped["no answer"] += len(unanswered)
    return [row.record for row in rows if not isinstance(row.record, Prompt)]


def _judges(records: Sequence[Record]) -> tuple[str, ...]:
    """Return the judges that can rate responses to some of the prompts, by an answer, tests or instructions."""
    prompts = [prompt_of(record) for record in records]
    known = {
        "verifier": any(prompt.metadata.get("instruction_id_list") for prompt in prompts),
        "executed_tests": any(known_tests(prompt) is not None for prompt in prompts),
        "ground_truth": any(known_answer(prompt.metadata) is not None for prompt in prompts),
    }
    return tuple(name for name, is_known in known.items() if is_known)


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
    is_text = isinstance(yaml.safe_load(stem), str) and not stem[0].isdigit()  # unlike null and 1e5
    stem = stem if is_text and stem not in KINDS else f"{stem}_rows"  # a source and a step need different names
    names = [stem, *(f"{stem}_{number}" for number in range(2, len(taken) + 2))]
    return next(name for name in names if name not in taken)
