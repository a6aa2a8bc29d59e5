"""The judges of a step while it runs: a model on a managed engine has a server for as long as it judges."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from align.inference.managed.serving import serving
from align.inference.settings import EngineSettings
from align.rewards.judges import WithoutThoughts, make_judge
from align.rewards.settings import JudgeSettings
from align.stages.inputs.context import RunContext
from align.stages.responses.engines import engine_identity, engine_place
from align.stages.responses.settings import (
    JudgeChoice,
    JudgingSettings,
    judge_key,
    judge_model,
    with_folders,
)
from align.synth.settings import GroupSettings


@dataclass(frozen=True, slots=True)
class Judging:
    """The judge of a step, and which responses become a group."""

    judge: WithoutThoughts
    groups: GroupSettings
    identity: dict[str, Any]  # everything that decides a verdict


@contextmanager
def judging(settings: JudgingSettings, context: RunContext) -> Generator[Judging]:
    """Yield the judge of a step that keeps groups, as `loaded_judge` does."""
    with loaded_judge(settings, context) as (judge, identity):
        yield Judging(judge, settings.groups, identity)


@contextmanager
def loaded_judge(settings: JudgeChoice, context: RunContext) -> Generator[tuple[WithoutThoughts, dict[str, Any]]]:
    """Yield the judge of a step, and everything that decides its verdicts as JSON.

    The judges have the folders of the steps that they name, and their servers run during the block.
    """
    judges = with_folders(settings.judges, context.inputs)
    keys = [
        {**judge.cache_key(), "content": judge_key([judge], context.inputs), **_versions(judge, context)}
        for judge in judges
    ]
    identity = {"judges": keys, "combine": settings.combine, "thoughts": settings.thoughts.model_dump()}
    with serving_judges(judges, context) as reachable:
        yield make_judge(reachable, combine=settings.combine, thoughts=settings.thoughts), identity


@contextmanager
def serving_judges(judges: Sequence[JudgeSettings], context: RunContext) -> Generator[list[JudgeSettings]]:
    """Yield the judges, a model on a managed engine with the address of a server that was started for it."""
    with ExitStack() as stack:
        found: list[JudgeSettings] = []
        served: dict[str, EngineSettings] = {}  # judges of one model share its server
        for judge in judges:
            model = judge_model(judge)
            if model is None:
                found.append(judge)
                continue
            key = repr(model)
            if key not in served:
                place = engine_place(context)
                path = model.path
                reachable = serving(path, model.engine, name=path, place=place, rates=model.rates)
                served[key] = stack.enter_context(reachable)
            found.append(judge.with_values({**judge.values, "engine": served[key].model_dump(mode="json")}))
        yield found


def need_gpu_alone(judges: Sequence[JudgeSettings]) -> bool:
    """Return whether a judge starts a server, which takes the memory of the GPU."""
    return any(model.engine.managed is not None for model in map(judge_model, judges) if model is not None)


def _versions(judge: JudgeSettings, context: RunContext) -> dict[str, Any]:
    model = judge_model(judge)
    if model is None or model.engine.managed is None:
        return {}
    return {"engine": engine_identity(model.engine, context.processes)}
