"""Token groups of a source, with statistics of every row read, dropped and cut."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from align.artifacts import atomic_folder, read_json, remove_leftovers, write_json
from align.data.chat_encoder import ChatEncoder
from align.data.formats import RowStatistics, Stream, stream
from align.data.mixing import Mixture, told
from align.data.store import StoreWriter, TokenStore, writing_store
from align.data.token_groups import TokenGroup
from align.errors import InputError, one_line, within
from align.models.tree.batch import count_tokens
from align.procedural import tasks
from align.records import Comparison, Demonstration, Located, Prompt, Record, at_place
from align.stages.recipe import TASKS, Recipe, SourceSettings
from align.stages.steps import PreferenceStep, RewardStep, TrainStep
from align.stages.usable import comparable, of_kind, telling
from align.synth.constraints import constrain
from align.synth.scored_groups import prompt_of
from align.train.indexed_groups import ROWS

TRAIN, HELD_OUT, PARTS = "train", "held_out", "parts.json"  # of ROWS
HASH_SPACE = 1 << 32
UNUSED = "unused column:"  # prefix of the count of a column that is not used


@dataclass(frozen=True, slots=True)
class Rows:
    """Token groups of a step, in its store, and the statistics of the rows they were made from."""

    train: TokenStore
    held_out: TokenStore
    counts: dict[str, int]
    format: str
    mixture: Mixture | None = None  # of several sources, which follow each other in `train`


def alone(work: Callable[[], None], doing: str) -> None:
    """Do what one process of a launch has to do, where there is one; `doing` is what the others wait for."""
    work()


def step_rows(
    recipe: Recipe,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    model_limit: int | None,
    attributes: Sequence[str] = (),
    free: bool = False,
    first: Callable[[Callable[[], None], str], None] = alone,
) -> Rows:
    """The token groups of a step, of all its sources; `free` of the sources' limits of length.

    They are written into `folder` by the `first` of all processes and read there by all. What an earlier life has left
    is written anew, for its sources may have changed.
    """
    step, shares, store = recipe.steps[name], recipe.sources_of(name), folder / ROWS
    assert isinstance(step, TrainStep | PreferenceStep | RewardStep)
    sources = {each: recipe.source(each) for each in shares}
    if free:
        no_limits = {"max_length": None, "max_prompt_length": None}
        sources = {each: source.model_copy(update=no_limits) for each, source in sources.items()}
    asked = _Asked(step, tokenizer, recipe.seed, model_limit, tuple(attributes))
    first(lambda: _write(store, asked, list(sources.values())), "turning rows into tokens")
    parts: list[dict[str, Any]] = read_json(store / PARTS)
    train, held_out = TokenStore(store / TRAIN), TokenStore(store / HELD_OUT)
    if len(parts) == 1:
        return Rows(train, held_out, parts[0]["counts"], parts[0]["format"])
    assert isinstance(step, TrainStep)
    sizes = tuple(part["counts"]["trained"] for part in parts)
    replayed = len(recipe.replayed(name)) if step.replay else 0
    mixture = Mixture(sizes, tuple(shares.values()), step.stopping_strategy, recipe.seed, replayed)
    counts = Counter({"epoch": mixture.num_rows})
    for part in parts:
        counts.update(part["counts"])
    return Rows(train, held_out, dict(counts), told(mixture, list(shares)), mixture)


def remove_rows(folder: Path) -> None:
    """Remove what `step_rows` and the loop have left in the folder of a step that is finished."""
    shutil.rmtree(folder / ROWS, ignore_errors=True)


class _Asked(NamedTuple):
    """What a step wants of its sources."""

    step: TrainStep | PreferenceStep | RewardStep
    tokenizer: PreTrainedTokenizerBase
    seed: int
    model_limit: int | None
    attributes: tuple[str, ...]


def _write(target: Path, asked: _Asked, sources: Sequence[SourceSettings]) -> None:
    """Write the stores of the rows to train on and of those held out, and what became of each source's rows."""
    remove_leftovers(target.parent, of=target.name)
    parts: list[dict[str, Any]] = []
    with (
        atomic_folder(target) as folder,
        writing_store(folder / TRAIN, count_tokens) as train,
        writing_store(folder / HELD_OUT, count_tokens) as held_out,
    ):
        for source in sources:
            parts.append(
                _write_source(asked, source, train, held_out, sum(part["counts"]["records"] for part in parts))
            )
        write_json(folder / PARTS, parts)


def streamed(source: SourceSettings, *, kind: type[Record], seed: int) -> Stream:
    """The records of a source, one at a time; procedural tasks are made as the kind that the stage needs."""
    last = None if source.limit is None else source.skip + source.limit
    if source.path.startswith(TASKS):
        found = _made(source, last, kind, seed)
    else:
        found = stream(source.path, format=source.format, split=source.split, limit=last, on_error=source.on_error)
    return replace(found, records=_after_skipped(found, source)) if source.skip else found


def _after_skipped(found: Stream, source: SourceSettings) -> Iterator[Located[Record]]:
    first = next(islice(found.records, min(source.skip, sys.maxsize), None), None)
    if first is None:
        raise InputError(f"{source.path}: skip passes over {source.skip} rows, and there are no more", ("data",))
    for located in chain([first], found.records):
        yield replace(located, row=located.row - source.skip)
    found.statistics.num_rows -= source.skip


def _made(source: SourceSettings, last: int | None, kind: type[Record], seed: int) -> Stream:
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
    records = (
        Located(record, f"{source.path}: row {row + 1}", row, record.metadata) for row, record in enumerate(made)
    )
    return Stream(records=records, format="tasks", statistics=RowStatistics(num_rows=len(made)))


def prompts(source: SourceSettings, *, seed: int, counts: Counter[str] | None = None) -> list[Prompt]:
    """What the rows of a source ask, with verifiable instructions where the source puts some behind them.

    `counts` is told which rows were dropped, and how many prompts are of another split than the instructions'.
    """
    counts, found = Counter() if counts is None else counts, list[Prompt]()
    reading = streamed(source, kind=Prompt, seed=seed)
    for located in reading.records:
        with at_place(located.place):
            found.append(prompt_of(located.record))
    counts.update({f"rows:dropped {reason}": number for reason, number in reading.statistics.dropped.items()})
    if source.constraints is None:
        return found
    joined = constrain(found, source.constraints, seed=seed + source.seed)
    if not joined:
        split = source.constraints.split
        raise InputError(f"data: {source.path}: none of its {len(found)} prompts is of constraints.split {split!r}")
    counts.update({"prompts:of another split": len(found) - len(joined)} if len(joined) < len(found) else {})
    return joined


def _write_source(
    asked: _Asked, source: SourceSettings, train: StoreWriter, held_out: StoreWriter, before: int
) -> dict[str, Any]:
    """Write the groups of one source, behind `before` records of others, and say what became of its rows.

    A row of the wrong kind stops it; one that teaches nothing is dropped and counted.
    """
    step = asked.step
    kind = Demonstration if isinstance(step, TrainStep) else Comparison
    found = streamed(source, kind=kind, seed=asked.seed)
    encoder = ChatEncoder(
        asked.tokenizer,
        max_length=source.max_length or asked.model_limit,
        max_prompt_length=source.max_prompt_length,
        overlong=source.overlong,
    )
    told = Counter[str]()
    groups = encoder.encode_located(of_kind(found.records, kind, told))
    if isinstance(step, PreferenceStep):
        groups = comparable(groups, step, told)
    elif isinstance(step, RewardStep):
        groups = telling(groups, step, asked.attributes, told, source.path)
    trained, kept = train.number, held_out.number
    with within("data"):
        for located in groups:
            where = held_out if is_held_out(located.record, source.held_out) else train
            where.add(replace(located.record, row=before + located.row), located.metadata)
    counts = Counter({"rows": found.statistics.num_rows})
    counts += Counter({f"dropped:{reason}": number for reason, number in found.statistics.dropped.items()})
    counts += Counter({name: number for name, number in encoder.counts.items() if name != "rows"})
    counts += told
    counts += Counter({UNUSED + one_line(column): number for column, number in found.statistics.unused_columns.items()})
    counts["trained"], counts["held_out"] = train.number - trained, held_out.number - kept
    if not counts["trained"]:
        said = ", ".join(f"{name} {number}" for name, number in sorted(counts.items()))
        raise InputError(f"data: {source.path}: no row is left to train on ({said})")
    return {"counts": dict(counts), "format": found.format}


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


def is_held_out(group: TokenGroup, share: float) -> bool:
    """Whether the prompt falls into the held-out share.

    All rows of a prompt fall on one side, always the same, wherever they are cut.
    """
    assert group.prompt_hash is not None
    return group.prompt_hash < share * HASH_SPACE
