"""`align generate`: sample responses to prompts and have them judged, as scored groups."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from align.commands.one_step import SOURCE, RowOptions, check_out, publish, run_one_step
from align.config import Settings
from align.content_hash import content_of
from align.distributed.progress import Progress
from align.errors import InputError
from align.inference.settings import EngineSettings, SamplingSettings
from align.rewards.settings import Combination, JudgeSettings
from align.rewards.thoughts import THINK, ThoughtSettings
from align.stages.generate import Generate
from align.stages.inputs.context import RunContext
from align.stages.responses.settings import GROUPS_FILE
from align.synth.settings import GroupSettings


class GenerateSettings(Settings):
    """Settings of the command, as `key.sub=value`."""

    sampling: SamplingSettings = Field(
        default=SamplingSettings(num_responses=4), description="How responses are drawn."
    )
    engine: EngineSettings = Field(default=EngineSettings(), description="What runs the policies.")
    judges: list[JudgeSettings] = Field(
        default_factory=list[JudgeSettings], description="Judges that rate the responses."
    )
    combine: Combination = Field(default="precedence", description="How several judges are combined.")
    thoughts: ThoughtSettings = Field(default=THINK, description="Delimiters of reasoning, which judges do not see.")
    groups: GroupSettings = Field(default=GroupSettings(), description="Which responses become a group to train on.")
    rows: RowOptions = Field(default=RowOptions(), description="How the prompts are read.")


def generate(
    policies: Sequence[str],
    data: str,
    out: Path,
    *,
    settings: GenerateSettings,
    limit: int | None = None,
    progress: Progress,
) -> dict[str, Any]:
    """Write scored groups of responses to `out` and return their statistics.

    Samples and verdicts are kept beside `out` as they are made: the same call resumes, and asks no policy or judge
    twice.
    """
    check_out(out, [data, *policies])
    if not policies or len(set(policies)) < len(policies):
        raise InputError(f"policy: give at least one and no duplicates, not {', '.join(policies) or 'none'}")
    own = {name: getattr(settings, name) for name in GenerateSettings.model_fields if name != "rows"}
    step = Generate(models=list(policies), data=SOURCE, **own)
    identity = {"policies": {policy: content_of(policy) for policy in policies}, "data": content_of(data)}
    reading = settings.rows.model_dump(mode="json", include={"format", "columns"}, exclude_defaults=True)
    identity |= {"rows": reading} if reading else {}  # they decide what judges know of a prompt

    def work(context: RunContext) -> dict[str, Any]:
        found = step.run(context)
        publish(context.folder / GROUPS_FILE, out, context)
        return found

    source = settings.rows.source(data, limit)
    found = run_one_step("generate", step, source, out=out, identity=identity, progress=progress, work=work)
    return {
        "out": str(out),
        "policies": list(policies),
        **found["report"],
        "tokens_per_s": found["tokens_per_s"],
    }
