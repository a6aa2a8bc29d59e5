"""The place of a user's message in a chat template, for a model that writes the message itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.errors import InputError
from align.records import Message

SLOT = "TEXT_OF_THE_USER"  # stands for the message that the model writes


def open_user_turn(tokenizer: PreTrainedTokenizerBase, before: Sequence[Message]) -> list[int]:
    """Return the token ids of a dialogue up to where the text of the user's next message begins.

    Raises `InputError` for a chat template that does not show a message as it is.
    """
    chat = [{"role": each.role, "content": each.content} for each in before]
    shown: Any = tokenizer.apply_chat_template([*chat, {"role": "user", "content": SLOT}], tokenize=False)
    head, slot, _ = str(shown).partition(SLOT)
    if not slot:
        raise InputError("the chat template alters a user's message, so no prompt can be made with it")
    return plain_ids(tokenizer, head)


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a text in which special tokens are such."""
    ids: Any = tokenizer(text, add_special_tokens=False)["input_ids"]
    return list(ids)
