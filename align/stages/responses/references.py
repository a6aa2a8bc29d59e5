"""The reference of an evaluation: the policy that another one is compared with, along answers of one of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from align.accounting.flops import sum_work
from align.content_hash import STEP
from align.data.chat_encoder import ChatEncoder
from align.data.chat_templates import apply_template
from align.data.readers.tool_calls import tools_of
from align.data.token_groups import TokenGroup
from align.errors import InputError
from align.evaluation.fidelity import different_vocabularies, divergences
from align.evaluation.likelihood import forward_work
from align.evaluation.task import Answer, NextTurn, Row, StartKL
from align.inference.engines import load_engine
from align.inference.samples import Sample, prompt_key, unique_prompts
from align.inference.settings import EngineSettings, LocalSettings, SamplingSettings
from align.models.loading.pretrained import default_device
from align.models.policy import Policy, load_policy
from align.models.settings import PolicySettings
from align.records import Comparison, Located, Response
from align.stages.inputs.context import RunContext, TrainingStart
from align.stages.inputs.sources import prompts, rows_of
from align.stages.responses.tasks import TaskSettings


def load_evaluated(path: str) -> tuple[Policy, PreTrainedTokenizerBase]:
    """Return a policy on the default device, and its tokenizer with a chat template."""
    policy, tokenizer = load_policy(PolicySettings(path=path))
    apply_template(tokenizer)
    return policy.to(default_device()), tokenizer


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
    policy, tokenizer = load_evaluated(path)
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
    return policy, found


class SampledAnswers(NamedTuple):
    """The answers of a policy to the rows of a task."""

    rows: Sequence[Row]
    answers: Sequence[Answer]
    next_turn: NextTurn

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> list[list[TokenGroup]]:
        """Return the turns of each answer that have text, each as a group of one response after its prompt."""
        turns: list[Located[Comparison]] = []
        for number, answer in enumerate(self.answers):
            row, responses = self.rows[answer.row], (*answer.earlier, answer.response)
            for turn, text in enumerate(responses):
                if text.strip():
                    prompt = tuple(self.next_turn(row, responses[:turn]) or ())
                    finish = answer.finish if turn == len(answer.earlier) else None
                    record = Comparison(prompt, (Response(text, finish=finish),), tools=tools_of(row))
                    turns.append(Located(record, f"row {answer.row + 1}", number))
        found: list[list[TokenGroup]] = [[] for _ in self.answers]
        for located in ChatEncoder(tokenizer).encode_located(turns):
            found[located.row].append(located.record)
        return found


def divergence_from_start(
    sampled: SampledAnswers, path: str, start: TrainingStart, *, precision: str, context: RunContext
) -> StartKL:
    """Return KL(policy at `path` || start of its training) along the policy's answers, as the task `drift` does."""
    policy, tokenizer = load_evaluated(path)
    reference = load_policy(PolicySettings(path=start.path, tokenizer=path))[0].to(default_device())
    if (message := different_vocabularies(policy, reference)) is not None:
        return StartKL(message)
    encoded = sampled.encode(tokenizer)
    turns = [turn for answer in encoded for turn in answer]
    if not turns:
        return StartKL("no answer has text")
    context.progress.phase(f"KL from {start.name}", len(turns))
    parts = iter(divergences(reference, policy, turns, precision=precision, processes=context.processes))
    context.progress.advance(len(turns))
    found: list[tuple[float, float] | None] = []
    for answer in encoded:
        nats, tokens = zip(*(next(parts)["kl"] for _ in answer), strict=True) if answer else ((), ())
        found.append((sum(nats), sum(tokens)) if answer else None)
    work = forward_work(turns)
    return StartKL(start=start.name, kl=found, work=sum_work([work, work]))  # one pass of each policy
