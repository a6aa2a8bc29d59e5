"""`align generate`: prompts, policies and judges to scored groups that RPO can train on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field

from align.artifacts import fingerprint
from align.config import InputError, Settings, build, one_line, read_overrides
from align.data.formats import write
from align.models.loading import GGUF, quiet_transformers
from align.records import Prompt
from align.stages.recipe import SourceSettings
from align.stages.sources import records
from align.synth.engines import EngineSettings, make_engine
from align.synth.journal import Journal
from align.synth.judges import How, JudgeSettings, judge_of, make_judge
from align.synth.preferences import Account, GroupSettings, comparisons, judged, prompt_of, unjudged
from align.synth.samples import Sample, SamplingSettings, prompt_key, resumed
from align.train.runtime import Reporter


class RowSettings(Settings):
    """How rows are read."""

    format: str = "auto"
    split: str | None = None
    invalid: Literal["error", "drop"] = "error"
    seed: int = 0  # of procedural rows


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
    judge = make_judge(settings.judges, how=settings.combine) if settings.judges else None
    prompts = read_prompts(data, settings.rows, limit=limit)
    account = Account()
    origin = {"policies": {policy: content_of(policy) for policy in policies}, "data": content_of(data)}
    made_with = {**origin, "sampling": settings.sampling.model_dump(), "engine": settings.engine.model_dump()}
    speeds: dict[str, float] = {}
    with Journal(beside(out, "samples"), made_with) as journal:
        samples = list(sampled(policies, prompts, settings, journal=journal, report=report, speeds=speeds))
    if judge is None:
        write(out, unjudged(prompts, samples, account))
    else:
        report.phase("judge", len({prompt_key(prompt) for prompt in prompts}))
        with Journal(beside(out, "verdicts"), {"judges": _judged_with(settings), "combine": settings.combine}) as kept:
            scored = _counted(judged(prompts, samples, judge, journal=kept, account=account), report)
            write(out, comparisons(scored, settings.groups, account))
    return {"out": str(out), "policies": list(policies), **account.report(), "tokens_per_s": speeds}


def check_out(out: Path, what: str = "samples") -> None:
    """Raise for a file that is not to be written over: it is there, and nothing of the command's beside it."""
    if out.suffix != ".jsonl":
        raise InputError(f"{out}: rows are written as .jsonl, not as {out.suffix or 'a file without suffix'}")
    if out.exists() and not beside(out, what).exists():
        raise InputError(f"{out}: is there, and not from this command: name another file, or move it away")


def beside(out: Path, what: str) -> Path:
    """Where the finished items of an output file are kept."""
    return out.with_name(f".{out.name}.{what}")


def content_of(path: str) -> str:
    """The content hash of a local file or folder; a hub id or a server's name for a model stands for itself."""
    local = Path(path.removeprefix(GGUF)).expanduser()
    return fingerprint(local) if local.exists() else path


def read_prompts(data: str, how: RowSettings, *, limit: int | None) -> list[Prompt]:
    """The prompts of a file, folder, hub id or of the procedural tasks."""
    source = SourceSettings(path=data, format=how.format, split=how.split, invalid=how.invalid, limit=limit)
    prompts: list[Prompt] = []
    for number, record in enumerate(records(source, kind=Prompt, seed=how.seed).records):
        try:
            prompts.append(prompt_of(record))
        except InputError as error:
            raise InputError(f"{data}: record {number}: {one_line(error)}") from error
    return prompts


def sampled(
    policies: Sequence[str],
    prompts: Sequence[Prompt],
    settings: GenerateSettings,
    *,
    journal: Journal,
    report: Reporter,
    speeds: dict[str, float],
) -> Iterator[Sample]:
    """The responses of each policy, one policy in memory at a time; `speeds` gets the tokens a second of each."""
    if not policies or len(set(policies)) < len(policies):
        raise InputError(f"policy: name at least one, and each once, not {', '.join(policies) or 'none'}")
    num_prompts = len({prompt_key(prompt) for prompt in prompts})
    for policy in policies:
        engine = make_engine(policy, settings.engine)
        report.phase("sample", num_prompts * settings.sampling.num_responses)
        for sample in resumed(engine, prompts, settings.sampling, journal):
            report.advance(1)
            yield sample
        if engine.speed.seconds:
            speeds[policy] = engine.speed.tokens_per_s
            report.note(f"{policy}: {engine.speed.tokens_per_s:,.0f} tokens/s")


def _judged_with(settings: GenerateSettings) -> list[Any]:
    """The judges' settings, with the content of every file or folder that they name."""
    return [
        {
            **one.model_dump(),
            "content": {key: content_of(value) for key, value in one.settings.items() if isinstance(value, str)},
        }
        for one in settings.judges
    ]


def _counted(scored: Iterator[Any], report: Reporter) -> Iterator[Any]:
    for one in scored:
        report.advance(1)
        yield one
