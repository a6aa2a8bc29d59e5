"""`align generate`: prompts, policies and judges to scored groups that RPO can train on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from pydantic import Field

from align.config import Settings, build, read_overrides
from align.data.formats import write
from align.distributed.journal import Journal, remove_journal, run_with_journal
from align.distributed.processes import Processes, init_processes, shutdown_processes
from align.distributed.progress import Progress
from align.distributed.work_split import WorkShard
from align.errors import InputError
from align.inference.engines import load_engine
from align.inference.samples import Sample, Speed, distinct, kept, prompt_key, resumed
from align.inference.settings import EngineSettings, SamplingSettings
from align.models.loading.pretrained import silence_transformers
from align.records import Prompt
from align.rewards.judges import judge_of, make_judge
from align.rewards.settings import How, JudgeSettings
from align.rewards.verdicts import Judge
from align.stages.contents import content_of, contents_of
from align.stages.recipe import SourceSettings
from align.stages.sources import prompts
from align.synth.constraints import ConstraintSettings
from align.synth.scored_groups import Account, GroupSettings, comparisons, judged, unjudged

KEPT = ("samples", "verdicts")  # beside an output file, as they come


class RowSettings(Settings):
    """How rows are read."""

    format: str = "auto"
    split: str | None = None
    on_error: Literal["error", "skip"] = "error"
    seed: int = 0  # of procedural rows
    constraints: ConstraintSettings | None = None  # verifiable instructions to put behind the prompts

    def source(self, path: str, limit: int | None = None) -> SourceSettings:
        """The rows of `path`, read so."""
        return SourceSettings(
            path=path, limit=limit, **{name: getattr(self, name) for name in RowSettings.model_fields}
        )


class GenerateSettings(Settings):
    """How responses are made, judged and put together."""

    sampling: SamplingSettings = SamplingSettings(num_responses=4)
    engine: EngineSettings = EngineSettings()
    judges: list[JudgeSettings] = Field(default_factory=list[JudgeSettings])
    combine: How = "precedence"
    groups: GroupSettings = GroupSettings()
    rows: RowSettings = RowSettings()


S = TypeVar("S", bound=Settings)


def settings_of(kind: type[S], judges: Sequence[str], overrides: Sequence[str]) -> S:
    """The settings that a command line gives; a judge is `NAME key=value …`, `weight` among the keys."""
    values = read_overrides(overrides, kind().model_dump(mode="json"))
    if judges:
        values["judges"] = [judge_of(text) for text in judges]
    return build(kind, values)


def generate(
    policies: Sequence[str],
    data: str,
    out: Path,
    *,
    settings: GenerateSettings,
    limit: int | None = None,
    report: Progress,
) -> dict[str, Any]:
    """The account of what was made, after `out` holds it in the native form.

    Samples and verdicts are kept beside `out` as they come: the same call goes on where an earlier one was stopped,
    and asks neither policy nor judge twice.
    """
    silence_transformers()
    processes = init_processes()
    check_out(out, [data, *policies])
    if not policies or len(set(policies)) < len(policies):
        raise InputError(f"policy: name at least one, and each once, not {', '.join(policies) or 'none'}")
    judge = make_judge(settings.judges, how=settings.combine) if settings.judges else None
    account, engines = Account(), {policy: policy for policy in policies}
    asked = prompts(settings.rows.source(data, limit), seed=0, counts=account.counts)
    origin = {"policies": {policy: content_of(policy) for policy in policies}, "data": content_of(data)}
    made_with = {**origin, "sampling": settings.sampling.model_dump(), "engine": settings.engine.cache_key()}
    with opened(beside(out, "samples"), made_with, processes) as journal:
        samples, speeds = sampled(engines, asked, settings, journal=journal, processes=processes, report=report)
    if judge is None:
        processes.run_on_main(lambda: write(out, unjudged(asked, samples, account)), f"writing {out}")
    else:
        write_judged(out, asked, samples, judge, settings, account=account, processes=processes, report=report)
    shutdown_processes()
    told = {policy: speed.tokens_per_s for policy, speed in speeds.items() if speed.seconds}
    return {"out": str(out), "policies": list(policies), **account.report(), "tokens_per_s": told}


class Judging(Protocol):
    """Settings of who judges, and of what becomes a comparison."""

    @property
    def judges(self) -> Sequence[JudgeSettings]:
        """One or several."""
        ...

    @property
    def combine(self) -> How:
        """What several make together."""
        ...

    @property
    def groups(self) -> GroupSettings:
        """What is kept."""
        ...


def write_judged(
    out: Path,
    asked: Sequence[Prompt],
    samples: Sequence[Sample],
    judge: Judge,
    settings: Judging,
    *,
    account: Account,
    processes: Processes,
    report: Progress,
) -> None:
    """Write the samples with their verdicts as comparisons; the verdicts are kept beside `out` as they come.

    Of several processes each asks the judge about its share, and the first writes, whose account is of everything.
    """
    made_with = {"judges": _judged_with(settings.judges), "combine": settings.combine}
    with opened(beside(out, "verdicts"), made_with, processes) as journal:
        if processes.world_size > 1:
            own = judged(asked, samples, judge, journal=journal, account=Account(), shard=WorkShard.of(processes))
            run_with_journal(journal, processes, lambda: deque(_counted(own, report), maxlen=0), "judging")

        def write_all() -> None:
            scored = judged(asked, samples, judge, journal=journal, account=account)
            write(out, comparisons(_counted(scored, report), settings.groups, account))

        report.phase("judge", len({prompt_key(prompt) for prompt in asked}))
        processes.run_on_main(write_all, f"writing {out}")


def opened(path: Path, made_with: Mapping[str, Any], processes: Processes) -> Journal:
    """The journal of finished items, which is opened by all processes before any of them writes to it."""
    return processes.run_on_all(lambda: Journal(path, made_with, WorkShard.of(processes)), f"opening {path}")


def check_out(out: Path, inputs: Sequence[str], what: str = "samples") -> None:
    """Raise for a file that is not to be written: one that is read, or that is there and not of the command's own."""
    if out.suffix != ".jsonl":
        raise InputError(f"{out}: rows are written as .jsonl, not as {out.suffix or 'a file without suffix'}")
    folder = next(each for each in out.absolute().parents if each.exists())
    if not folder.is_dir():
        raise InputError(f"{out}: {folder} is a file, and not a folder to write into")
    if out.is_dir():
        raise InputError(f"{out}: is a folder; name a file in it")
    if out.exists() and any(Path(each).exists() and out.samefile(each) for each in inputs):
        raise InputError(f"{out}: is what this command reads; name another file")
    if out.exists() and not beside(out, what).exists():
        raise InputError(f"{out}: is there, and not from this command: name another file, or move it away")


def beside(out: Path, what: str) -> Path:
    """Where the finished items of an output file are kept."""
    return out.with_name(f".{out.name}.{what}")


def remove_kept(folder: Path) -> None:
    """Remove what is kept beside the output files in the folder of a step that is finished."""
    for what in KEPT:
        for path in folder.glob(f".*.{what}"):
            remove_journal(path)


class Sampling(Protocol):
    """Settings of how responses are made."""

    @property
    def sampling(self) -> SamplingSettings:
        """How they are drawn."""
        ...

    @property
    def engine(self) -> EngineSettings:
        """How the policies run."""
        ...


class Sampled(NamedTuple):
    """What policies have answered, and how fast each was."""

    samples: list[Sample]
    speeds: dict[str, Speed]


def sampled(
    policies: Mapping[str, str],
    asked: Sequence[Prompt],
    settings: Sampling,
    *,
    journal: Journal,
    processes: Processes,
    report: Progress,
) -> Sampled:
    """The responses of each policy, by name and path, one in memory at a time; each process makes those of its prompts.

    Which process makes a response is no part of what it is drawn by.
    """
    own = WorkShard.of(processes).select(distinct(asked))
    speeds: dict[str, Speed] = {}

    def work() -> None:
        for name, path in policies.items():
            engine = load_engine(path, settings.engine, name=name)
            report.phase("sample", len(own) * settings.sampling.num_responses)
            for _ in resumed(engine, own, settings.sampling, journal):
                report.advance(1)
            speeds[name] = engine.speed

    run_with_journal(journal, processes, work, "sampling")
    of_all = processes.all_gather_object(speeds)
    together = {name: reduce(Speed.beside, (each[name] for each in of_all)) for name in policies}
    for name, speed in together.items():
        if speed.seconds:
            report.note(f"{name}: {speed.tokens_per_s:,.0f} tokens/s")
    return Sampled([one for name in policies for one in kept(journal, name, asked)], together)


def _judged_with(judges: Sequence[JudgeSettings]) -> list[Any]:
    """The judges' settings, with the content of every file or folder that they name."""
    return [{**one.cache_key(), "content": contents_of(one)} for one in judges]


def _counted(scored: Iterator[Any], report: Progress) -> Iterator[Any]:
    for one in scored:
        report.advance(1)
        yield one
