"""Instruction-following difficulty (IFD): how much a dialogue helps a policy to predict its last answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from align.data.chat_encoder import ChatEncoder
from align.data.token_groups import TokenGroup
from align.records import Comparison, Demonstration, Message, Response

# For each group the total log-probability in nats and the number of tokens of each of its responses
Likelihoods = Callable[[Sequence[TokenGroup]], Sequence[Sequence[tuple[float, int]]]]


def instruction_difficulty(
    rows: Sequence[Demonstration], encoder: ChatEncoder, likelihoods: Likelihoods
) -> list[float | None]:
    """Return the IFD of each row's last answer: mean NLL given the dialogue, divided by its mean NLL alone.

    Li et al. 2024 (Cherry LLM), eq. 3, as their code computes it, from mean losses and not from perplexities: low where
    the instruction makes the answer easy, above 1 where it does not help. Alone means after an empty message of the
    user. None for a row that `encoder` drops (`encoder.counts` has the reason), that has no text before the answer, or
    whose answer alone is certain.
    `likelihoods` is `align.evaluation.likelihood.likelihoods` with a policy.
    """
    pairs = [
        (encoder.encode(_given(row), index), encoder.encode(_alone(row), index)) if _has_prompt(row) else (None, None)
        for index, row in enumerate(rows)
    ]
    groups = [group for pair in pairs if None not in pair for group in pair if group is not None]
    losses = iter([-logp / length for ((logp, length),) in likelihoods(groups)] if groups else [])
    return [_ratio(next(losses), next(losses)) if None not in pair else None for pair in pairs]


def _ratio(given: float, alone: float) -> float | None:
    return given / alone if alone > 0 else None


def _last_answer(row: Demonstration) -> int:
    return max(index for index, message in enumerate(row.messages) if message.role == "assistant")


def _has_prompt(row: Demonstration) -> bool:
    return any(message.content.strip() for message in row.messages[: _last_answer(row)])


def _given(row: Demonstration) -> Comparison:
    last = _last_answer(row)
    return Comparison(row.messages[:last], (Response.of(row.messages[last]),), tools=row.tools)


def _alone(row: Demonstration) -> Demonstration:
    return Demonstration((Message("user", ""), row.messages[_last_answer(row)]))
