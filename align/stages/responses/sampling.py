"""Sampling and judging over the processes of a launch, with journals that survive a kill."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from align.data.chat_encoder import ChatEncoder
from align.data.chat_templates import apply_template
from align.data.writing import write
from align.distributed.journal import Journal, remove_journal, run_with_journal
from align.distributed.processes import Processes
from align.distributed.progress import Progress
from align.distributed.work_split import WorkShard
from align.errors import RunError
from align.inference.engines import load_engine
from align.inference.managed.served_model import remove_merged
from align.inference.managed.serving import serving
from align.inference.samples import Sample, Throughput, journal_samples, prompt_key, sample_with_journal, unique_prompts
from align.inference.settings import EngineSettings, LocalSettings
from align.models.loading.tokenizer import load_tokenizer
from align.models.settings import PolicySettings
from align.records import Prompt
from align.stages.inputs.context import RunContext
from align.stages.responses.engines import engine_place
from align.stages.responses.judging import Judging
from align.stages.responses.settings import GenerationSettings
from align.synth.group_statistics import GroupStatistics
from align.synth.scored_groups import comparisons, score_groups

T = TypeVar("T")

JOURNALS = ("samples", "verdicts", "ratings")  # beside an output file


def journal_path(out: Path, what: str) -> Path:
    """Return the path of a journal of an output file."""
    return out.with_name(f".{out.name}.{what}")


def open_journal(path: Path, made_with: Mapping[str, Any], processes: Processes) -> Journal:
    """Open the journal of finished items on all processes before any of them writes to it."""
    return processes.run_on_all(lambda: Journal(path, made_with, WorkShard.of(processes)), f"opening {path}")


def remove_journals(folder: Path) -> None:
    """Remove the journals of a finished step, and what a killed server left."""
    remove_merged(folder)
    for what in JOURNALS:
        for path in folder.glob(f".*.{what}"):
            remove_journal(path)


def prompt_check(policies: Sequence[str], engine: EngineSettings) -> Callable[[Prompt], None] | None:
    """Return a check that the chat template of every policy can render a prompt; None if no model is loaded here."""
    if not engine.loads_model:
        return None
    local = engine.local or LocalSettings()
    encoders: list[ChatEncoder] = []
    for policy in policies:
        tokenizer = load_tokenizer(PolicySettings(path=policy, tokenizer=local.tokenizer))
        apply_template(tokenizer, local.chat_template)
        encoders.append(ChatEncoder(tokenizer))

    def check(prompt: Prompt) -> None:
        for encoder in encoders:
            encoder.check_prompt(prompt)

    return check


class Sampled(NamedTuple):
    """The responses of policies, and the throughput of each."""

    samples: list[Sample]
    speeds: dict[str, Throughput]


def sample_policies(
    policies: Mapping[str, str],
    asked: Sequence[Prompt],
    settings: GenerationSettings,
    context: RunContext,
    journal: Journal,
) -> Sampled:
    """Return the responses of each policy, given by name and path, with one policy in memory at a time.

    Each process samples its own part of the prompts. A response does not depend on which process draws it.
    """
    processes, progress = context.processes, context.progress
    distinct = unique_prompts(asked)
    own = WorkShard.of(processes).select(distinct)
    speeds: dict[str, Throughput] = {}

    def sample(name: str, path: str, engine_settings: EngineSettings) -> Throughput:
        engine = load_engine(path, engine_settings, name=name)
        progress.phase("sample", len(own) * settings.sampling.num_responses)
        for _ in sample_with_journal(engine, own, settings.sampling, journal):
            progress.advance(1, engine.throughput.metrics())
        return engine.throughput

    for name, path in policies.items():
        num_done = len(journal_samples(journal, name, distinct))
        asks_server = settings.engine.managed is not None or settings.engine.server is not None
        if asks_server and num_done == len(distinct) * settings.sampling.num_responses:
            speeds[name] = Throughput()  # nothing is left that a server would have to be started for
            continue
        with serving(path, settings.engine, name=name, place=engine_place(context)) as reachable:
            speeds[name] = run_with_journal(journal, processes, partial(sample, name, path, reachable), "sampling")
    of_all = processes.all_gather_object(speeds)
    together = {name: reduce(Throughput.merge, (each[name] for each in of_all)) for name in policies}
    for name, speed in together.items():
        if speed.new_tokens:
            progress.note(f"{name}: {speed.tokens_per_s:,.0f} tokens/s")
    return Sampled([one for name in policies for one in journal_samples(journal, name, asked)], together)


def write_judged(
    out: Path,
    asked: Sequence[Prompt],
    samples: Sequence[Sample],
    judging: Judging,
    context: RunContext,
    statistics: GroupStatistics,
) -> None:
    """Judge the samples and write them as groups; verdicts are kept in a journal beside `out`.

    Each process judges its own part, and the first writes; its statistics are those of everything.
    """
    processes = context.processes
    made_with = {**context.identity, **judging.identity}
    with open_journal(journal_path(out, "verdicts"), made_with, processes) as journal:
        if processes.world_size > 1:
            own = score_groups(
                asked,
                samples,
                judging.judge,
                journal=journal,
                statistics=GroupStatistics(),
                shard=WorkShard.of(processes),
            )
            run_with_journal(journal, processes, lambda: deque(counted(own, context.progress), maxlen=0), "judging")

        def write_all() -> None:
            scored = score_groups(asked, samples, judging.judge, journal=journal, statistics=statistics)
            groups = comparisons(counted(scored, context.progress), judging.groups, statistics)
            write(out, not_empty(groups, statistics))

        context.progress.phase("judge", len({prompt_key(prompt) for prompt in asked}))
        processes.run_on_main(write_all, f"writing {out}")


def not_empty(groups: Iterator[T], statistics: GroupStatistics) -> Iterator[T]:
    """Yield the groups; raise `RunError` with the counts of what was left out where there is none."""
    yield from groups
    if not statistics.counts["groups"]:
        counts = sorted(statistics.counts.items())
        shown = "; ".join(f"{number:,} {name.replace(':', ' ')}" for name, number in counts if number)
        raise RunError(f"no group of responses is kept: {shown}")


def counted(items: Iterator[T], progress: Progress) -> Iterator[T]:
    """Yield the items and advance the progress by each."""
    for item in items:
        progress.advance(1)
        yield item
