"""The reference of an evaluation: the policy that another one is compared with, and greedy answers of one of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.content_hash import STEP
from align.data.chat_encoder import ChatEncoder
from align.data.chat_templates import apply_template
from align.data.token_groups import TokenGroup
from align.errors import InputError
from align.inference.engines import load_engine
from align.inference.samples import Sample, prompt_key, unique_prompts
from align.inference.settings import EngineSettings, LocalSettings, SamplingSettings
from align.models.loading.pretrained import default_device
from align.models.policy import Policy, load_policy
from align.models.settings import PolicySettings
from align.records import Comparison, Response
from align.stages.inputs.context import RunContext
from align.stages.inputs.sources import prompts, rows_of
from align.stages.responses.tasks import TaskSettings


def reference_answers(
    name: str, settings: TaskSettings, context: RunContext, counts: dict[str, Any], *, by: str | None
) -> tuple[Policy, Sequence[TokenGroup]]:
    """Return the reference of a task, and a greedy answer to each prompt as a group of one response.

    The model at the path `by` answers, or the reference. A prompt that is too long, or whose answer is empty, is left
    out; `counts` receives the numbers of rows. `name` is that of the task.
    """
    assert settings.reference is not None
    path = context.inputs.path_of(settings.reference)
    whose = settings.reference.removeprefix(STEP) if by is None else Path(by).name
    source = context.inputs.sources[settings.data]
    left_out = Counter[str]()
    with rows_of(settings.data):
        asked = unique_prompts(prompts(source, seed=context.inputs.seed, counts=left_out))
    context.inputs.check_unchanged(source)
    sampling = SamplingSettings(temperature=0.0, max_new_tokens=settings.max_new_tokens)
    engine = load_engine(by or path, EngineSettings(local=LocalSettings(precision=settings.precision)), name=whose)
    context.progress.phase(f"{name}: answers of {whose}", len(asked))
    answers: dict[str, Sample] = {}
    for sample in engine.sample(asked, sampling):
        answers[sample.key] = sample
        context.progress.advance(1)
    del engine  # frees its model
    policy, tokenizer = load_policy(PolicySettings(path=path))
    apply_template(tokenizer)
    encoder = ChatEncoder(tokenizer)
    found: list[TokenGroup] = []
    for row, prompt in enumerate(asked):
        sample = answers[prompt_key(prompt)]
        if sample.text.strip():
            record = Comparison(prompt.messages, (Response(sample.text, finish=sample.finish),), tools=prompt.tools)
            group = encoder.encode(record, row)
            found += [] if group is None else [group]
    if not found:
        raise InputError(f"{source.path}: {whose} answers none of its prompts", ("tasks", name, "reference"))
    counts |= {"rows": len(asked), "unanswered": len(asked) - len(found), "left_out": dict(left_out)}
    if len(found) < len(asked):
        context.progress.note(f"{name}: {len(asked) - len(found)} of {len(asked)} prompts have no answer of {whose}")
    return policy.to(default_device()), found
