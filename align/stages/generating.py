"""`align generate`: prompts, policies and judges to scored groups that RPO can train on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from pydantic import Field

from align.config import InputError, Settings, build, read_overrides
from align.data.formats import write
from align.models.loading import quiet_transformers
from align.records import Prompt
from align.stages.recipe import SourceSettings, content_of
from align.stages.sources import prompts
from align.synth.constrained import ConstraintSettings
from align.synth.engines import EngineSettings, make_engine
from align.synth.journal import Journal
from align.synth.judges import How, JudgeSettings, judge_of, make_judge
from align.synth.preferences import Account, GroupSettings, comparisons, judged, unjudged
from align.synth.samples import Sample, SamplingSettings, Speed, prompt_key, resumed
from align.synth.verdicts import Judge
from align.train.runtime import Reporter


class RowSettings(Settings):
    """How rows are read."""

    format: str = "auto"
    split: str | None = None
    invalid: Literal["error", "drop"] = "error"
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
    return build(kind, values, "")


def generate(
    policies: Sequence[str],
    data: str,
    out: Path,
    *,
    settings: GenerateSettings,
    limit: int | None = None,
    report: Reporter,
) -> dict[str, Any]:
    """The account of what was made, after `out` holds it in the native form.

    Samples and verdicts are kept beside `out` as they come: the same call goes on where an earlier one was stopped,
    and asks neither policy nor judge twice.
    """
    quiet_transformers()
    check_out(out)
    if not policies or len(set(policies)) < len(policies):
        raise InputError(f"policy: name at least one, and each once, not {', '.join(policies) or 'none'}")
    judge = make_judge(settings.judges, how=settings.combine) if settings.judges else None
    asked = prompts(settings.rows.source(data, limit), seed=0)
    origin = {"policies": {policy: content_of(policy) for policy in policies}, "data": content_of(data)}
    made_with = {**origin, "sampling": settings.sampling.model_dump(), "engine": settings.engine.model_dump()}
    account, speeds = Account(), dict[str, Speed]()
    with Journal(beside(out, "samples"), made_with) as journal:
        engines = {policy: policy for policy in policies}
        samples = list(sampled(engines, asked, settings, journal=journal, report=report, speeds=speeds))
    if judge is None:
        write(out, unjudged(asked, samples, account))
    else:
        write_judged(out, asked, samples, judge, settings, account=account, report=report)
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
    report: Reporter,
) -> None:
    """Write the samples with their verdicts as comparisons; the verdicts are kept beside `out` as they come."""
    report.phase("judge", len({prompt_key(prompt) for prompt in asked}))
    made_with = {"judges": _judged_with(settings.judges), "combine": settings.combine}
    with Journal(beside(out, "verdicts"), made_with) as kept:
        scored = _counted(judged(asked, samples, judge, journal=kept, account=account), report)
        write(out, comparisons(scored, settings.groups, account))


def check_out(out: Path, what: str = "samples") -> None:
    """Raise for a file that is not to be written over: it is there, and nothing of the command's beside it."""
    if out.suffix != ".jsonl":
        raise InputError(f"{out}: rows are written as .jsonl, not as {out.suffix or 'a file without suffix'}")
    if out.exists() and not beside(out, what).exists():
        raise InputError(f"{out}: is there, and not from this command: name another file, or move it away")


def beside(out: Path, what: str) -> Path:
    """Where the finished items of an output file are kept."""
    return out.with_name(f".{out.name}.{what}")


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


def sampled(
    policies: Mapping[str, str],
    asked: Sequence[Prompt],
    settings: Sampling,
    *,
    journal: Journal,
    report: Reporter,
    speeds: dict[str, Speed],
) -> Iterator[Sample]:
    """The responses of each policy, by name and path, one in memory at a time; `speeds` gets the speed of each."""
    num_prompts = len({prompt_key(prompt) for prompt in asked})
    for name, path in policies.items():
        engine = make_engine(path, settings.engine, name=name)
        report.phase("sample", num_prompts * settings.sampling.num_responses)
        for sample in resumed(engine, asked, settings.sampling, journal):
            report.advance(1)
            yield sample
        speeds[name] = engine.speed
        if engine.speed.seconds:
            report.note(f"{name}: {engine.speed.tokens_per_s:,.0f} tokens/s")


def _judged_with(judges: Sequence[JudgeSettings]) -> list[Any]:
    """The judges' settings, with the content of every file or folder that they name."""
    return [
        {
            **one.model_dump(),
            "content": {key: content_of(value) for key, value in one.settings.items() if isinstance(value, str)},
        }
        for one in judges
    ]


def _counted(scored: Iterator[Any], report: Reporter) -> Iterator[Any]:
    for one in scored:
        report.advance(1)
        yield one
