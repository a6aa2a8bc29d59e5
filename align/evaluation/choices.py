"""Likelihood of each of several short answers to a prompt, for multiple choice.

The answers are branches of one prompt, so that a tree forward computes the prompt once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizerBase

from align.data.chat_encoder import ChatEncoder
from align.data.token_groups import Ids, TokenGroup, TokenSequence, common_prefix
from align.errors import InputError
from align.records import Message


def choice_groups(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[Sequence[Message]],
    answers: Sequence[str],
) -> list[TokenGroup]:
    """Return a group of the answers to each prompt.

    A prompt that is a text is tokenized together with each answer, and what these do not share is measured. A prompt
    of messages is rendered by the chat template, and the answers begin the assistant's turn. Raises `InputError` for
    answers that a tokenizer cannot tell apart.
    """
    encoder = ChatEncoder(tokenizer) if any(not isinstance(prompt, str) for prompt in prompts) else None
    ends = [_ids(tokenizer(answer, add_special_tokens=False)) for answer in answers]
    groups: list[TokenGroup] = []
    for row, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            ids = [_ids(tokenizer(prompt + answer)) for answer in answers]
            start = min(common_prefix(ids[0], each) for each in ids[1:])
        else:
            assert encoder is not None, "made for prompts of messages"
            context = encoder.prompt_ids(prompt, row)
            ids = [np.concatenate([context, end]) for end in ends]
            start = len(context)
        groups.append(_group(ids, start, row))
    return groups


def _ids(encoding: BatchEncoding) -> Ids:
    return np.asarray(encoding["input_ids"], dtype=np.int32)


def _group(ids: Sequence[Ids], start: int, row: int) -> TokenGroup:
    """Return the sequences as a group whose tokens from `start` on are measured."""
    if any(len(each) <= start for each in ids):
        raise InputError("an answer of a choice begins with all tokens of another; they cannot be told apart")
    sequences = tuple(TokenSequence(each, np.arange(len(each)) >= start) for each in ids)
    return TokenGroup(sequences, None, None, tuple({} for _ in ids), row)
