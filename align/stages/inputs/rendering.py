"""Check of a chat template on the first rows of a step, before any step runs."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from align.data.chat_encoder import ChatEncoder
from align.records import Comparison, Located, Prompt, Record, at_place
from align.stages.inputs.opening import SEARCHED_ROWS, first_records
from align.stages.inputs.sources import SourceSettings, rows_of
from align.synth.scored_groups import prompt_of


def check_template(
    name: str, source: SourceSettings, tokenizer: PreTrainedTokenizerBase, *, prompts: bool = False
) -> None:
    """Raise for a row that the tokenizer's chat template cannot render, or whose prompt it cannot, with `prompts`.

    Of the first rows, one of each combination of roles and tools is rendered. Rows that are generated, and those that
    the step would skip, are not looked at.
    """
    if source.is_procedural or source.on_error == "skip":
        return
    encoder = ChatEncoder(
        tokenizer,
        max_length=source.max_length,
        max_prompt_length=source.max_prompt_length,
        overlong=source.overlong,
    )
    with rows_of(name):
        _render(encoder, source, prompts=prompts)


def _render(encoder: ChatEncoder, source: SourceSettings, *, prompts: bool) -> None:
    """Render one of the first rows of each form."""
    seen = set[Hashable]()
    for located in first_records(source, SEARCHED_ROWS):
        record = prompt_of(located.record) if prompts else located.record
        if (form := _form(record)) in seen:
            continue
        seen.add(form)
        if isinstance(record, Prompt):
            with at_place(located.place):
                encoder.check_prompt(record)
        else:
            for _ in encoder.encode_located([Located(record, located.place)]):
                pass


def _form(record: Record) -> Hashable:
    """Return what a chat template may refuse: which roles follow each other, and tools."""
    messages = record.prompt if isinstance(record, Comparison) else record.messages
    roles = ["", *(message.role for message in messages)]
    calls = any(message.tool_calls for message in messages)
    return type(record), frozenset(pairwise(roles)), bool(record.tools), calls
