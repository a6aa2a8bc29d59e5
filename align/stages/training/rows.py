"""Rows of a training step: sources to token groups in the step's store, with statistics of every row."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from align.artifacts import atomic_folder, fingerprint, read_json, remove_leftovers, write_json
from align.config import stable_hash
from align.data.chat_encoder import ChatEncoder
from align.data.mixing import Mixture
from align.data.rejections import Rejections
from align.data.store import StoreWriter, TokenStore, writing_store
from align.data.token_groups import TokenGroup
from align.errors import InputError, one_line
from align.models.tree.batch import count_tokens
from align.stages.inputs.context import StepInputs
from align.stages.inputs.sources import SourceSettings, rows_of, source_key, streamed
from align.stages.training.contract import TrainingSettings
from align.train.filters import of_kind
from align.train.indexed_groups import ROWS
from align.train.selection.folds import SomeGroups, folds_of

TRAIN, HELD_OUT, PARTS, SEAL = "train", "held_out", "parts.json", "seal.json"  # in the folder ROWS
HASH_SPACE = 1 << 32
UNUSED = "unused column:"  # prefix of a column that no reader uses, in the row statistics
SUMMARY = {"rows", "records", "trained", "held_out"}  # counts that every line of statistics begins with


@dataclass(frozen=True, slots=True)
class StepRows:
    """Token groups of a step in its store, with row statistics."""

    train: Sequence[TokenGroup]
    held_out: TokenStore
    counts: dict[str, int]
    format: str
    mixture: Mixture | None = None  # of several sources, which follow each other in `train`
    sources: Mapping[str, int] = field(default_factory=dict[str, int])  # training rows of each source, in order


class RowRequest(NamedTuple):
    """What a step needs of its sources."""

    step: TrainingSettings
    tokenizer: PreTrainedTokenizerBase
    inputs: StepInputs
    model_limit: int | None  # tokens that the model takes; no limit for None
    attributes: tuple[str, ...] = ()  # that a reward model rates


def run_here(work: Callable[[], None], doing: str) -> None:
    """Run `work` directly: the counterpart of `Processes.run_on_main` in one process."""
    work()


RunOnMain = Callable[[Callable[[], None], str], None]


def step_rows(
    request: RowRequest,
    folder: Path,
    *,
    limited: bool = True,
    run_on_main: RunOnMain = run_here,
) -> StepRows:
    """Return the token groups of a step, of all its sources; without the sources' own limits if not `limited`.

    The main process writes them into `folder`, and all read them there. Those of an earlier attempt are read again if
    its sources were the same and they are undamaged.
    """
    step = request.step
    shares = step.shares()
    store = folder / ROWS
    sources = {name: request.inputs.sources[name] for name in shares}
    if not limited:
        no_limits = {"max_length": None, "max_prompt_length": None}
        sources = {name: source.model_copy(update=no_limits) for name, source in sources.items()}
    run_on_main(lambda: _write_once(store, request, sources), "tokenizing rows")
    parts: list[dict[str, Any]] = read_json(store / PARTS)
    train, held_out = TokenStore(store / TRAIN), TokenStore(store / HELD_OUT)
    sizes = tuple(part["counts"]["trained"] for part in parts)
    counts = Counter[str]()
    if step.selection is not None and step.selection.fold is not None:
        train, sizes = _fold(train, sizes, step.selection.fold)
        counts["in_fold"] = len(train)
    for part in parts:
        counts.update(part["counts"])
    named = dict(zip(shares, sizes, strict=True))
    if len(parts) == 1:
        return StepRows(train, held_out, dict(counts), parts[0]["format"], None, named)
    mixture = step.mixture(sizes, request.inputs.seed)
    counts["epoch"] = mixture.num_rows
    return StepRows(train, held_out, dict(counts), mixture.describe(list(shares)), mixture, named)


def _fold(train: TokenStore, sizes: Sequence[int], fold: int) -> tuple[Sequence[TokenGroup], tuple[int, ...]]:
    """Return one half of the training rows, and how many are of each source; raise if one has none."""
    indices = np.flatnonzero(folds_of(train) == fold)
    counts = np.histogram(indices, bins=np.cumsum([0, *sizes]))[0]
    if not counts.all():
        raise InputError("a source has too few prompts for two halves", ("selection", "reference"))
    return SomeGroups(train, indices.tolist()), tuple(counts.tolist())


def remove_rows(folder: Path) -> None:
    """Remove the stored rows from the folder of a finished step."""
    shutil.rmtree(folder / ROWS, ignore_errors=True)


def describe(counts: Mapping[str, int], form: str = "") -> str:
    """Return the row statistics in one line."""
    unused = sorted(name for name in counts if name.startswith(UNUSED))
    parts = [
        f"{counts['rows']} rows read{f' as {form}' if form else ''}",
        f"{counts['trained']} trained",
        f"{counts['held_out']} held out",
        *(f"{name} {number}" for name, number in sorted(counts.items()) if name not in (*SUMMARY, *unused)),
    ]
    columns = ", ".join(name.removeprefix(UNUSED) for name in unused)
    return ", ".join(parts) + (f"; unused columns: {columns}" if columns else "")


def _write_once(target: Path, request: RowRequest, sources: Mapping[str, SourceSettings]) -> None:
    """Write the stores unless an earlier attempt has, whose tokens stay the same however rows are encoded now."""
    remove_leftovers(target.parent, of=target.name)
    keys = [source_key(request.step.shares()[name], source, request.inputs.content) for name, source in sources.items()]
    if (target / SEAL).is_file() and (target / SEAL).read_bytes() == _seal(target, keys):
        return
    with atomic_folder(target) as folder:
        _write(folder, request, sources)
        request.inputs.check_unchanged(*sources.values())
        (folder / SEAL).write_bytes(_seal(folder, keys))


def _seal(folder: Path, keys: list[Any]) -> bytes:
    """Return what decides the stored rows, and the SHA-256 of both stores and of the statistics."""
    files = {name: fingerprint(folder / name) for name in (TRAIN, HELD_OUT, PARTS) if (folder / name).exists()}
    return json.dumps([stable_hash(keys), files]).encode()


def _write(folder: Path, request: RowRequest, sources: Mapping[str, SourceSettings]) -> None:
    """Write the stores of trained and of held-out rows, and the statistics of each source."""
    parts: list[dict[str, Any]] = []
    with (
        writing_store(folder / TRAIN, count_tokens) as train,
        writing_store(folder / HELD_OUT, count_tokens) as held_out,
    ):
        for name, source in sources.items():
            before = sum(part["counts"]["records"] for part in parts)
            with rows_of(name):
                parts.append(_write_source(request, source, train, held_out, before))
    write_json(folder / PARTS, parts)


def _write_source(
    request: RowRequest, source: SourceSettings, train: StoreWriter, held_out: StoreWriter, before: int
) -> dict[str, Any]:
    """Write the groups of one source, after `before` records of others, and return its statistics.

    A row of the wrong kind is an error; one that contributes nothing to the loss is dropped and counted.
    """
    kind = request.step.record_kind
    found = streamed(source, kind=kind, seed=request.inputs.seed)
    encoder = ChatEncoder(
        request.tokenizer,
        max_length=source.max_length or request.model_limit,
        max_prompt_length=source.max_prompt_length,
        overlong=source.overlong,
        on_error=source.on_error,
        closes_cut=not request.step.has_lm_head,
    )
    rejections = Rejections(source.on_error)
    groups = request.step.filter_groups(
        encoder.encode_located(of_kind(found.records, kind, rejections)),
        rejections,
        attributes=request.attributes,
        source=source,
    )
    trained, kept = train.num_groups, held_out.num_groups
    for located in groups:
        store = held_out if is_held_out(located.record, source.held_out) else train
        store.add(replace(located.record, row=before + located.row), located.metadata)
    counts = Counter({"rows": found.statistics.num_rows})
    counts += Counter({f"dropped:{reason}": number for reason, number in found.statistics.dropped.items()})
    counts += Counter({name: number for name, number in encoder.counts.items() if name != "rows"})
    counts += rejections.counts
    counts += Counter({UNUSED + one_line(column): number for column, number in found.statistics.unused_columns.items()})
    counts["trained"], counts["held_out"] = train.num_groups - trained, held_out.num_groups - kept
    if not counts["trained"]:
        reasons = ", ".join(f"{name} {number}" for name, number in sorted(counts.items()))
        raise InputError(f"{source.path}: no row is left to train on ({reasons})")
    return {"counts": dict(counts), "format": found.format}


def preferred(group: TokenGroup) -> TokenGroup:
    """Return the group with only its chosen or best rewarded response; unchanged if neither is known."""
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
    """Return whether the prompt belongs to the held-out share.

    All rows of a prompt are on the same side, in every run and whatever `max_length` cuts.
    """
    assert group.prompt_hash is not None
    return group.prompt_hash < share * HASH_SPACE
