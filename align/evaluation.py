"""How well a policy answers: greedy responses, graded by a program, with a confidence interval."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align.config import pick
from align.records import Prompt
from align.synth import tasks

RESAMPLES = 1000  # of the bootstrap (Efron 1979)
LEVEL = 0.95


class Score(NamedTuple):
    """A mean with its bootstrap interval over prompts."""

    value: float
    low: float
    high: float
    n: int


def score(grades: Sequence[float], *, seed: int = 0) -> Score:
    """The mean of the grades with its 95 % percentile interval over resampled prompts."""
    draw = random.Random(seed)
    means = sorted(sum(draw.choices(grades, k=len(grades))) / len(grades) for _ in range(RESAMPLES))
    tail = round(RESAMPLES * (1 - LEVEL) / 2)
    return Score(sum(grades) / len(grades), means[tail], means[-1 - tail], len(grades))


@torch.no_grad()
def respond(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
) -> list[str]:
    """The model's greedy response to each prompt, without special tokens."""
    model.eval()
    tokenizer.padding_side = "left"
    found: list[str] = []
    for start in range(0, len(prompts), batch_size):
        chats = [_chat(prompt) for prompt in prompts[start : start + batch_size]]
        texts: Any = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        generate: Any = model.generate
        output = generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        found += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def evaluate(
    task: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
) -> Score:
    """How the model's greedy responses to the prompts of `task` are graded."""
    grade = pick(TASKS, task, "evaluation")
    responses = respond(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
    return score([grade(prompt, response) for prompt, response in zip(prompts, responses, strict=True)])


def _chat(prompt: Prompt) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in prompt.messages]


def _verified(prompt: Prompt, response: str) -> float:
    """1 if every check on the response holds."""
    metadata: Mapping[str, Any] = prompt.metadata
    return float(all(tasks.grade(metadata, response)))


# How a response to a prompt of the task is graded, 0 to 1.
TASKS: dict[str, Callable[[Prompt, str], float]] = {"general": _verified}
