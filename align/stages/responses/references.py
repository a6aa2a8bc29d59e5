"""What an evaluated policy is compared with: a reference along answers of one of them, or responses in files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.accounting.flops import sum_work
from align.content_hash import STEP
from align.data.chat_encoder import ChatEncoder
from align.data.chat_templates import apply_template
from align.data.readers.tool_calls import tools_of
from align.data.token_groups import TokenGroup
from align.errors import InputError
from align.evaluation.answers import responses_by_prompt
from align.evaluation.fidelity import different_vocabularies, divergences
from align.evaluation.given_responses import row_id_of
from align.evaluation.likelihood import forward_work
from align.evaluation.sampled_task import with_kl
from align.evaluation.task import PairedResponses, Parts, Sampled, StartKL, TaskResult
from align.inference.engines import load_engine
from align.inference.samples import Sample, prompt_key, unique_prompts
from align.inference.settings import EngineSettings, LocalSettings, SamplingSettings
from align.models.loading.pretrained import default_device
from align.models.policy import Policy, load_policy
from align.models.reward_model import RewardModel, load_rating, load_reward_model
from align.models.settings import PolicySettings
from align.records import Comparison, Located, Prompt, Response
from align.rewards.thoughts import visible_text
from align.stages.inputs.context import RunContext, TrainingStart
from align.stages.inputs.sources import prompts, rows_of
from align.stages.responses.tasks import TaskSettings


def load_evaluated(path: str) -> tuple[Policy, PreTrainedTokenizerBase]:
    """Return a policy on the default device, and its tokenizer with a chat template."""
    policy, tokenizer = load_policy(PolicySettings(path=path))
    apply_template(tokenizer)
    return policy.to(default_device()), tokenizer


def load_evaluated_rewards(path: str) -> tuple[RewardModel, PreTrainedTokenizerBase]:
    """Return a reward model on the default device, and its tokenizer with a chat template."""
    if load_rating(path) is None:
        raise InputError(f"{path} is not a reward model; the stage reward_model trains one")
    model, tokenizer = load_reward_model(PolicySettings(path=path))
    apply_template(tokenizer)
    return model.to(default_device()), tokenizer


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


def with_divergences(
    results: Mapping[str, TaskResult], here: Mapping[str, str], path: str, start: TrainingStart, context: RunContext
) -> dict[str, TaskResult]:
    """Return the results of tasks with KL(policy at `path` || start of its training) along their sampled answers.

    It is what the task `drift` measures. `here` has the precision of each task whose answers this process has sampled;
    the measure of others is unknown. Both policies are loaded once.
    """
    sampled = {name: result.sampled for name, result in results.items() if result.sampled is not None}
    otherwise = StartKL(start.lacking or "its answers were not sampled by this process")
    found = dict.fromkeys(sampled, otherwise)
    asked = {} if start.lacking else {name: each for name, each in sampled.items() if name in here}
    if asked:
        policy, tokenizer = load_evaluated(path)
        reference = load_policy(PolicySettings(path=start.path, tokenizer=path))[0].to(default_device())
        unlike = different_vocabularies(policy, reference)
        for name, answers in asked.items():
            if unlike is not None:
                found[name] = StartKL(unlike)
                continue
            encoded = _encoded(answers, tokenizer)
            turns = [turn for answer in encoded for turn in answer]
            context.progress.phase(f"{name}: KL from {start.name}", len(turns))
            parts = divergences(reference, policy, turns, precision=here[name], processes=context.processes)
            context.progress.advance(len(turns))
            found[name] = _start_kl(encoded, parts, start) if turns else StartKL("no answer has text")
    return {name: with_kl(result, found[name]) if name in found else result for name, result in results.items()}


def _encoded(sampled: Sampled, tokenizer: PreTrainedTokenizerBase) -> list[list[TokenGroup]]:
    """Return the turns of each answer that have text, each as a group of one response after its prompt."""
    turns: list[Located[Comparison]] = []
    for number, answer in enumerate(sampled.answers):
        row = sampled.rows[answer.row]
        responses = (*answer.earlier, answer.response)
        for turn, text in enumerate(responses):
            if text.strip():
                prompt = tuple(sampled.next_turn(row, responses[:turn]) or ())
                finish = answer.finish if turn == len(answer.earlier) else None
                record = Comparison(prompt, (Response(text, finish=finish),), tools=tools_of(row))
                turns.append(Located(record, f"row {answer.row + 1}", number))
    found: list[list[TokenGroup]] = [[] for _ in sampled.answers]
    for located in ChatEncoder(tokenizer).encode_located(turns):
        found[located.row].append(located.record)
    return found


def _start_kl(encoded: Sequence[Sequence[TokenGroup]], of_turns: Sequence[Parts], start: TrainingStart) -> StartKL:
    """Return the divergence of each answer from that of its turns."""
    parts = iter(of_turns)
    found: list[tuple[float, float] | None] = []
    for answer in encoded:
        nats, tokens = zip(*(next(parts)["kl"] for _ in answer), strict=True) if answer else ((), ())
        found.append((sum(nats), sum(tokens)) if answer else None)
    work = forward_work([turn for answer in encoded for turn in answer])
    return StartKL(start=start.name, kl=found, work=sum_work([work, work]))  # one pass of each policy


def paired_responses(settings: TaskSettings, context: RunContext, counts: dict[str, Any]) -> PairedResponses:
    """Return the responses of a task's two files to the prompts of its source; `counts` receives those left out."""
    source = context.inputs.sources[settings.data]
    left_out = Counter[str]()
    with rows_of(settings.data):
        asked = list(prompts(source, seed=0, counts=left_out))
    known: dict[str, Prompt] = {}
    for prompt in asked:
        known.setdefault(prompt.messages[-1].content, prompt)
    left_out["prompts with the last message of an earlier one"] = len(asked) - len(known)
    counts["left_out"] = dict(+left_out)
    if len(settings.responses) != 2:  # noqa: PLR2004 - the policy's and the baseline's
        raise InputError(
            f"task {settings.task} compares two files of responses, not {len(settings.responses)}", ("responses",)
        )
    ids = {row_id: text for text, prompt in known.items() if (row_id := row_id_of(prompt.metadata)) is not None}
    ours, theirs = (responses_by_prompt(path, ids) for path in settings.responses)
    both = [text for text in known if text in ours and text in theirs]
    if not both:
        raise InputError(f"task {settings.task}: no prompt of {source.path} is answered in both files")
    context.progress.note(f"{len(both)} of {len(known)} prompts are answered in both files")
    visible = [tuple(visible_text(of[text], settings.thoughts) for of in (ours, theirs)) for text in both]
    pairs = [(known[text], (one, two)) for text, (one, two) in zip(both, visible, strict=True)]
    return PairedResponses(pairs, len(known) - len(both))
