"""Work of the stage `synthesize`: ask the teachers, entry by entry, and write rows with their lineage.

The answers are stored in the folder `responses` of the run, one file for each step, and stay there: a step that runs
again with another parser, family or row asks only for what has no answer. The step's folder gets a file of rows for
each split and kind (`sft-demonstrations.jsonl`), whose metadata hold their lineage, and `lineage.jsonl` with a line for
every item, intermediate ones included.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from align.artifacts import atomic_file
from align.data.rejections import DROPPED as DROPPED_ROWS
from align.data.rejections import Rejections
from align.data.writing import write
from align.errors import InputError, RunError
from align.inference.engines import load_engine
from align.inference.managed.serving import serving
from align.inference.samples import Engine
from align.models.loading.pretrained import silence_transformers
from align.records import Prompt, Record
from align.stages.base import RESPONSES
from align.stages.costs.measured import Done, sampling_done
from align.stages.inputs.context import RunContext
from align.stages.inputs.sources import SourceSettings, rows_of, streamed
from align.stages.responses.engines import engine_identity, engine_place
from align.stages.responses.judging import loaded_judge
from align.stages.responses.made_data import measure_items
from align.stages.responses.sampling import open_journal
from align.stages.responses.settings import local_precision
from align.stages.responses.synthesis_settings import SynthesisSettings, rows_file
from align.synth import ratings
from align.synth.items import DEMONSTRATION, Item, source_item
from align.synth.order import ordered, written
from align.synth.ratings import Ratings
from align.synth.requests import STORE_FORMAT, Teacher, Teachers
from align.synth.scored_groups import prompt_of
from align.synth.splits import FLAGGED, SEVERAL, seed_words
from align.synth.workbench import ASKED, KEPT, Workbench, is_unsafe, with_split

if TYPE_CHECKING:
    from align.synth.families.family import Family

LINEAGE_FILE = "lineage.jsonl"
SAMPLING_KEYS = ("temperature", "top_p", "max_new_tokens")  # of a family
ANOTHER_SPLIT = "parents: in another split"  # count


def synthesize(step: SynthesisSettings, context: RunContext) -> dict[str, Any]:
    """Make the items of all entries, write them, and return the counts of the step."""
    silence_transformers()
    with ExitStack() as stack:
        stores = context.inputs.run / RESPONSES
        store = stack.enter_context(open_journal(stores / f"{context.name}.jsonl", STORE_FORMAT, context.processes))
        # Teachers and judges are asked in turns, so their servers run at the same time; of teachers, one at a time
        servers = stack.enter_context(ExitStack())
        asked = _teachers(step, context, servers)
        teachers = Teachers(asked, store, context.processes, context.progress, step.thoughts)
        judge = None
        if step.judges:
            verdicts = open_journal(
                stores / "verdicts" / f"{context.name}.jsonl", ratings.STORE_FORMAT, context.processes
            )
            loaded, identity = stack.enter_context(loaded_judge(step, context))
            judge = Ratings(
                judge=loaded,
                identity=identity,
                store=stack.enter_context(verdicts),
                processes=context.processes,
                progress=context.progress,
            )
        made, benches, sources = _make(step, context, teachers, judge)
        teachers.release()
    counts = {name: bench.report() for name, bench in benches.items()}
    rows, left_out = _rows(step, made)
    everything = [*sources, *(item for items in made.values() for item in items)]
    context.processes.run_on_main(partial(_write, context.folder, everything, rows), f"writing {context.folder}")
    context.processes.run_on_main(partial(measure_items, step, context, made, benches), "measuring the rows")
    summary = {
        "entries": counts,
        "rows": {name: len(items) for name, items in rows.items()},
        "left_out": dict(sorted(left_out.items())),
        "requests": {"asked": teachers.num_asked, "answered_before": teachers.num_asked - teachers.num_new},
    }
    shown = [f"{number:,} {name}" for name, number in summary["rows"].items()]
    context.progress.note("; ".join([*shown, *(f"{number:,} left out, {why}" for why, number in left_out.items())]))
    if not any(rows.values()):
        raise RunError(f"no row was made: {_losses(counts)}")
    return {"report": summary, "done": _done(step, context, teachers)}


def _teachers(step: SynthesisSettings, context: RunContext, servers: ExitStack) -> list[Teacher]:
    """Return the models that can be asked, each with what decides its answers.

    `servers` holds the server of the teacher that was loaded last.
    """
    inputs, content = context.inputs, context.inputs.content
    paths = {inputs.sampled_name(name): str(inputs.folders[name]) for name in step.policies}
    paths |= {name: name for name in step.models}
    how = [engine_identity(step.engine, context.processes), *map(content, step.engine.contents)]

    def load(name: str, path: str) -> Engine:
        servers.close()
        reachable = servers.enter_context(serving(path, step.engine, name=name, place=engine_place(context)))
        return load_engine(path, reachable, name=name)

    return [Teacher(name, [name, content(path), how], partial(load, name, path)) for name, path in paths.items()]


class Made(NamedTuple):
    """What a step has made."""

    items: dict[str, list[Item]]  # by entry, in the order of the recipe
    benches: dict[str, Workbench]
    rows: list[Item]  # of sources, as far as something was made of them


def _make(step: SynthesisSettings, context: RunContext, teachers: Teachers, judge: Ratings | None) -> Made:
    """Return the items and the workbench of each entry, in the order of the recipe."""
    made = dict[str, list[Item]]()
    benches = dict[str, Workbench]()
    rows = dict[str, Item]()
    read = {
        (entry, name): _source_items(context, name, step.families[entry])
        for entry in ordered(step.families)
        for name in step.families[entry].parents
        if name not in step.families
    }
    unsafe = {seed_words(item.first_prompt) for items, _ in read.values() for item in items if item.flagged}
    for name in ordered(step.families):
        family = step.families[name]
        changes = {key: value for key in SAMPLING_KEYS if (value := getattr(family, key)) is not None}
        bench = Workbench(
            entry=name,
            family=family.family,
            seed=context.inputs.seed,
            sampling=step.sampling.model_copy(update={**changes, "num_responses": 1}),
            shares=step.splits,
            teachers=teachers,
            ratings=judge,
            language=step.language,
            unsafe=unsafe,
            by=family.by,
        )
        parents: list[Item] = []
        for parent in family.parents:
            if parent in made:  # without what was made on the way
                parents += [item for item in made[parent] if item.kind == step.families[parent].makes]
            else:
                items, counts = read[name, parent]
                bench.counts.update(counts)
                parents += _split(items, unsafe, step, context.inputs.sources[parent].path)
        chosen = _chosen(parents, family, bench)
        rows |= {item.id: item for item in chosen if item.entry not in made}
        made[name] = list(family.make(chosen, bench))
        benches[name] = bench
        context.progress.note(f"{name}: {_counts(bench.counts)}")
    in_order = {name: made[name] for name in step.families}
    return Made(in_order, {name: benches[name] for name in step.families}, list(rows.values()))


def _source_items(context: RunContext, name: str, family: Family) -> tuple[list[Item], Counter[str]]:
    """Return the rows of a source as items of the family's first kind, and the numbers of skipped rows by reason."""
    source = context.inputs.sources[name]
    found = list[Item]()
    counts = Counter[str]()
    with rows_of(name):
        reading = streamed(source, kind=Prompt, seed=context.inputs.seed)
        rejections = Rejections(source.on_error)
        for located in reading.records:
            with rejections.at(located.place):
                # A family that reads prompts only gets the prompt of a dialogue
                record = located.record if DEMONSTRATION in family.reads else prompt_of(located.record)
                found.append(source_item(record, family.reads[0], name))
    context.inputs.check_unchanged(source)
    counts.update({f"rows: {reason}": number for reason, number in reading.statistics.dropped.items()})
    counts.update({f"rows: {key.removeprefix(DROPPED_ROWS)}": each for key, each in rejections.counts.items()})
    return found, counts


def _split(items: Sequence[Item], unsafe: Set[str], step: SynthesisSettings, path: str) -> list[Item]:
    """Return the items of a source with their splits; rows with an `unsafe` prompt are flagged, and never in `sft`."""
    found = list[Item]()
    for each in items:
        item = replace(each, flagged=each.flagged or is_unsafe(each, unsafe))
        item = item if item.seeds else with_split(item, (), step.splits)
        found.append(replace(item, split=None) if item.flagged and item.split == "sft" else item)
    others = {item.split for item in found if item.split is not None} - {*step.splits.used}
    if others:
        raise InputError(f"{path} has rows of the split {min(others)}, whose share is 0 here", ("splits",))
    return found


def _chosen(parents: Sequence[Item], family: Family, bench: Workbench) -> list[Item]:
    """Return the parents that the family uses."""
    unique = list({item.id: item for item in parents}.values())
    if len(unique) < len(parents):
        bench.counts["parents: duplicate"] = len(parents) - len(unique)
    chosen = [item for item in unique if family.split is None or item.split == family.split]
    if len(chosen) < len(unique):
        bench.counts[ANOTHER_SPLIT] = len(unique) - len(chosen)
    if family.limit is not None and len(chosen) > family.limit:
        bench.counts["parents: over the limit"] = len(chosen) - family.limit
    return chosen[: family.limit]


def _rows(step: SynthesisSettings, made: Mapping[str, Sequence[Item]]) -> tuple[dict[str, list[Item]], Counter[str]]:
    """Return the items of each file, and how many are in none, by reason."""
    rows: dict[str, list[Item]] = {file: [] for file in step.row_files()}
    left_out = Counter[str]()
    for name in written(step.families):
        for item in made[name]:
            if item.kind != step.families[name].makes:
                continue  # on the way to an item
            if item.split is None:
                left_out[FLAGGED if item.flagged else SEVERAL] += 1
            else:
                rows[rows_file(item.split, item.kind)].append(item)
    return rows, left_out


def _write(folder: Path, everything: Sequence[Item], rows: Mapping[str, Sequence[Item]]) -> None:
    """Write the lineage of all items, and the files of rows."""
    with atomic_file(folder / LINEAGE_FILE) as partial_file, partial_file.open("w", encoding="utf-8") as lines:
        for item in everything:
            content = {"text": item.text} if item.text else {}
            lines.write(json.dumps({**item.lineage(), **content}, ensure_ascii=False) + "\n")
    for file, items in rows.items():
        write(folder / file, _records(items))


def _records(items: Iterable[Item]) -> Iterable[Record]:
    return (item.record() for item in items)


def _counts(counts: Mapping[str, int]) -> str:
    """Return the counts of an entry in one line."""
    first = [f"{counts.get(ASKED, 0):,} {ASKED}", f"{counts.get(KEPT, 0):,} {KEPT}"]
    others = sorted((name, number) for name, number in counts.items() if name not in (ASKED, KEPT) and number)
    return "; ".join([*first, *(f"{number:,} {name}" for name, number in others)])


def _losses(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Return the counts of the first entry that made nothing."""
    name = next((name for name, each in counts.items() if not each.get(KEPT)), "")
    return f"{name}: {_counts(counts[name])}" if name else "every item belongs to no split"


def num_rows(source: SourceSettings, seed: int) -> int:
    """Return the number of rows of a source, which are read."""
    return sum(1 for _ in streamed(source, kind=Prompt, seed=seed).records)


def _done(step: SynthesisSettings, context: RunContext, teachers: Teachers) -> Done:
    """Return what sampling computed, where it ran in these processes."""
    devices = context.processes.world_size
    if step.engine.kind != "local":
        return Done.elsewhere(devices=devices)
    inputs = context.inputs
    folders = {inputs.sampled_name(name): str(inputs.folders[name]) for name in step.policies}
    ran = [(folders.get(name, name), speed.work) for name, speed in teachers.throughput.items()]
    return replace(sampling_done(ran, local_precision(step.engine)), devices=devices)
