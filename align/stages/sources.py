"""A source of rows to token groups, with an account of every row read, dropped and cut."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from align.config import InputError
from align.data.chat import ChatEncoder, TokenGroup
from align.data.formats import Reading, read
from align.losses.preference import preference_loss
from align.records import Comparison, Demonstration, Message, Prompt, Record
from align.stages.recipe import TASKS, PreferenceStep, RewardStep, SourceSettings, TrainStep
from align.synth import tasks
from align.train.reward_objective import BradleyTerryObjective

HASH_SPACE = 1 << 32


@dataclass(frozen=True, slots=True)
class Rows:
    """Token groups of a step and the account of how they came about."""

    train: list[TokenGroup]
    held_out: list[TokenGroup]
    counts: dict[str, int]
    format: str
    records: list[Demonstration | Comparison]  # by the `row` of a group


def records(source: SourceSettings, *, kind: type[Record], seed: int) -> Reading:
    """The records of a source; procedural tasks are made as the kind that the stage needs."""
    if not source.path.startswith(TASKS):
        return read(source.path, format=source.format, split=source.split, limit=source.limit, invalid=source.invalid)
    task, split = source.path.removeprefix(TASKS), source.split or "train"
    if source.limit is None:
        raise InputError(f"data: {source.path} has no end; give limit, the number of rows to make")
    seed += source.seed
    made: Sequence[Record]
    if kind is Demonstration:
        made = tasks.demonstrations(task, num_rows=source.limit, seed=seed, split=split)
    elif kind is Comparison:
        made = tasks.comparisons(task, num_rows=source.limit, num_responses=source.responses, seed=seed, split=split)
    else:
        made = tasks.prompts(task, num_rows=source.limit, seed=seed, split=split)
    return Reading(records=list(made), format="tasks", num_rows=len(made), dropped={})


def rows(
    step: TrainStep | PreferenceStep | RewardStep,
    source: SourceSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    model_limit: int | None,
    attributes: Sequence[str] = (),
) -> Rows:
    """The step's token groups; a row of the wrong kind stops it, one that teaches nothing is dropped and counted."""
    kind = Demonstration if isinstance(step, TrainStep) else Comparison
    reading = records(source, kind=kind, seed=seed)
    encoder = ChatEncoder(
        tokenizer,
        max_length=source.max_length or model_limit,
        max_prompt_length=source.max_prompt_length,
        overlong=source.overlong,
    )
    usable = [_of_kind(record, kind, source, row) for row, record in enumerate(reading.records)]
    groups = list(encoder.encode_all(usable))
    counts = Counter({"rows": reading.num_rows, "records": len(reading.records)})
    counts += Counter({f"dropped:{reason}": number for reason, number in reading.dropped.items()})
    counts += Counter({name: number for name, number in encoder.counts.items() if name != "rows"})
    if isinstance(step, PreferenceStep):
        groups = _comparable(groups, step, counts, source.path)
    elif isinstance(step, RewardStep):
        groups = _telling(groups, step, attributes, counts, source.path)
    train: list[TokenGroup] = []
    held_out: list[TokenGroup] = []
    for group in groups:
        (held_out if _is_held_out(group, source.held_out) else train).append(group)
    counts["trained"], counts["held_out"] = len(train), len(held_out)
    if not train:
        said = ", ".join(f"{name} {number}" for name, number in sorted(counts.items()))
        raise InputError(f"data: {source.path}: no row is left to train on ({said})")
    return Rows(train, held_out, dict(counts), reading.format, usable)


def _of_kind(
    record: Record, kind: type[Demonstration | Comparison], source: SourceSettings, row: int
) -> Demonstration | Comparison:
    """The record as what the stage trains on; a comparison's best response can also be imitated."""
    if isinstance(record, kind):
        return record
    if kind is Demonstration and isinstance(record, Comparison):
        best = max(record.responses, key=lambda response: response.reward or 0.0)
        if record.chosen is not None:
            best = record.responses[record.chosen]
        return Demonstration((*record.prompt, Message("assistant", best.content)), record.metadata)
    found = {Demonstration: "a demonstration", Comparison: "a comparison", Prompt: "a prompt without a response"}
    needs = "this stage needs comparisons of responses" if kind is Comparison else "sft needs demonstrations"
    raise InputError(f"data: {source.path}: record {row} is {found[type(record)]}, and {needs}")


def _comparable(groups: list[TokenGroup], step: PreferenceStep, counts: Counter[str], path: str) -> list[TokenGroup]:
    """The groups that say something to the step's loss; the others are counted by what they lack."""
    needs_values = preference_loss(step.loss.name, **step.loss.settings).uses_rewards
    kept: list[TokenGroup] = []
    for group in groups:
        if len(group.sequences) < 2:  # noqa: PLR2004 - a comparison takes two
            counts["dropped:one response"] += 1
        elif needs_values and group.rewards is None:
            raise InputError(f"data: {path}: record {group.row} has no rewards, and {step.loss.name} aims at them")
        elif not needs_values and group.chosen is None and len(set(group.rewards or ())) < 2:  # noqa: PLR2004
            counts["dropped:no response is preferred"] += 1
        else:
            kept.append(group)
    return kept


def _telling(
    groups: list[TokenGroup], step: RewardStep, attributes: Sequence[str], counts: Counter[str], path: str
) -> list[TokenGroup]:
    """The groups that say something to a reward model's loss; the others are counted."""
    if step.loss == "regression":
        found = sorted({name for group in groups for known in group.attributes for name in known})
        if unknown := [name for name in found if name not in attributes]:
            raise InputError(
                f"data: {path}: attribute {unknown[0]!r} is none of the model's ({', '.join(attributes)}); "
                f"head.attributes names what the data rates: {', '.join(found)}"
            )
        if not found and groups:
            raise InputError(f"data: {path}: no response has an attribute; regression needs {', '.join(attributes)}")
        kept, lacks = [group for group in groups if any(group.attributes)], "no label"
    else:
        if step.loss != "bt" and (unrated := [group for group in groups if group.rewards is None]):
            raise InputError(f"data: {path}: record {unrated[0].row} has no rewards, and {step.loss} takes its margin")
        has_pair = BradleyTerryObjective(step.loss, ()).has_pair
        kept, lacks = [group for group in groups if has_pair(group)], "no response is preferred"
    if len(kept) < len(groups):
        counts[f"dropped:{lacks}"] = len(groups) - len(kept)
    return kept


def _is_held_out(group: TokenGroup, share: float) -> bool:
    """Whether the prompt falls into the held-out share; all rows of a prompt fall on one side, always the same."""
    first = group.sequences[0]
    prompt = first.ids[: int(first.trained.argmax())]
    return int.from_bytes(hashlib.sha256(prompt.tobytes()).digest()[:4], "big") < share * HASH_SPACE
