"""A source of rows to token groups, with an account of every row read, dropped and cut."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import itemgetter

from transformers import PreTrainedTokenizerBase

from align.config import InputError, one_line
from align.data.chat import ChatEncoder, TokenGroup
from align.data.formats import Reading, read
from align.data.mixing import Mixture, told
from align.losses.preference import preference_loss
from align.records import Comparison, Demonstration, Message, Prompt, Record
from align.stages.recipe import TASKS, Recipe, SourceSettings
from align.stages.steps import PreferenceStep, RewardStep, TrainStep
from align.synth import tasks
from align.synth.constrained import constrain
from align.synth.preferences import prompt_of
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
    mixture: Mixture | None = None  # of several sources, which follow each other in `train`


def step_rows(
    recipe: Recipe,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model_limit: int | None,
    attributes: Sequence[str] = (),
    free: bool = False,
) -> Rows:
    """The token groups of a step, of all its sources; `free` of the sources' limits of length."""
    step = recipe.steps[name]
    assert isinstance(step, TrainStep | PreferenceStep | RewardStep)
    shares, parts = recipe.sources_of(name), list[Rows]()
    for each in shares:
        source = recipe.source(each)
        if free:
            source = source.model_copy(update={"max_length": None, "max_prompt_length": None})
        parts.append(rows(step, source, tokenizer, seed=recipe.seed, model_limit=model_limit, attributes=attributes))
    if len(parts) == 1:
        return parts[0]
    assert isinstance(step, TrainStep)
    sizes = tuple(len(part.train) for part in parts)
    replayed = len(recipe.replayed(name)) if step.replay else 0
    mixture = Mixture(sizes, tuple(shares.values()), step.exhausted, recipe.seed, replayed)
    counts = Counter({"epoch": mixture.num_rows})
    for part in parts:
        counts.update(part.counts)
    firsts = accumulate((len(part.records) for part in parts), initial=0)
    moved = [
        [[replace(group, row=first + group.row) for group in groups] for groups in (part.train, part.held_out)]
        for first, part in zip(firsts, parts, strict=False)
    ]
    return Rows(
        train=[group for train, _ in moved for group in train],
        held_out=[group for _, held_out in moved for group in held_out],
        counts=dict(counts),
        format=told(mixture, list(shares)),
        records=[record for part in parts for record in part.records],
        mixture=mixture,
    )


def records(source: SourceSettings, *, kind: type[Record], seed: int) -> Reading:
    """The records of a source; procedural tasks are made as the kind that the stage needs."""
    last = None if source.limit is None else source.skip + source.limit
    reading = _made(source, last, kind, seed) if source.path.startswith(TASKS) else _read(source, last)
    if source.skip:
        if source.skip >= len(reading.records):
            raise InputError(f"data: {source.path}: skip passes over {source.skip} rows, and there are no more")
        reading = replace(reading, records=reading.records[source.skip :], num_rows=reading.num_rows - source.skip)
    return reading


def _read(source: SourceSettings, last: int | None) -> Reading:
    return read(source.path, format=source.format, split=source.split, limit=last, invalid=source.invalid)


def _made(source: SourceSettings, last: int | None, kind: type[Record], seed: int) -> Reading:
    task, split = source.path.removeprefix(TASKS), source.split or "train"
    if last is None:
        raise InputError(f"data: {source.path} has no end; give limit, the number of rows to make")
    seed += source.seed
    made: Sequence[Record]
    if kind is Demonstration:
        made = tasks.demonstrations(task, num_rows=last, seed=seed, split=split)
    elif kind is Comparison:
        made = tasks.comparisons(task, num_rows=last, num_responses=source.responses, seed=seed, split=split)
    else:
        made = tasks.prompts(task, num_rows=last, seed=seed, split=split)
    return Reading(records=list(made), format="tasks", num_rows=len(made), dropped={})


def prompts(source: SourceSettings, *, seed: int) -> list[Prompt]:
    """What the rows of a source ask, with verifiable instructions where the source puts some behind them."""
    found: list[Prompt] = []
    for number, record in enumerate(records(source, kind=Prompt, seed=seed).records):
        try:
            found.append(prompt_of(record))
        except InputError as error:
            raise InputError(f"{source.path}: record {number}: {one_line(error)}") from error
    if source.constraints is None:
        return found
    return constrain(found, source.constraints, seed=seed + source.seed)


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
        (held_out if is_held_out(group, source.held_out) else train).append(group)
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
        elif group.rewards is None and (needs_values or step.min_chosen is not None):
            wants = f"{step.loss.name} aims at them" if needs_values else "min_chosen looks at them"
            raise InputError(f"data: {path}: record {group.row} has no rewards, and {wants}")
        elif step.min_chosen is not None and _of_best(group) < step.min_chosen:
            counts["dropped:best response too bad"] += 1
        elif not needs_values and group.chosen is None and len(set(group.rewards or ())) < 2:  # noqa: PLR2004
            counts["dropped:no response is preferred"] += 1
        else:
            kept.append(group)
    return kept


def _of_best(group: TokenGroup) -> float:
    """The reward of the response that the row prefers."""
    assert group.rewards is not None
    return group.rewards[group.chosen] if group.chosen is not None else max(group.rewards)


def preferred(group: TokenGroup) -> TokenGroup:
    """The group with the response alone that its row names, else the best rewarded; as it is where neither is known."""
    if group.chosen is None and group.rewards is None:
        return group
    best = group.chosen if group.chosen is not None else max(enumerate(group.rewards or ()), key=itemgetter(1))[0]
    return replace(
        group,
        sequences=(group.sequences[best],),
        rewards=None if group.rewards is None else (group.rewards[best],),
        chosen=None,
        attributes=(group.attributes[best],),
    )


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


def is_held_out(group: TokenGroup, share: float) -> bool:
    """Whether the prompt falls into the held-out share; all rows of a prompt fall on one side, always the same."""
    first = group.sequences[0]
    prompt = first.ids[: int(first.trained.argmax())]
    return int.from_bytes(hashlib.sha256(prompt.tobytes()).digest()[:4], "big") < share * HASH_SPACE
