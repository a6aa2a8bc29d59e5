"""Any number of responses to a prompt, with rewards, ranks or ratings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from align.data.readers.cells import (
    as_finish,
    as_list,
    as_number,
    as_object,
    as_ratings,
    as_text,
    metadata_of,
    shortened,
)
from align.data.readers.messages import as_messages
from align.data.readers.prompts import row_prompt
from align.data.rows import Row
from align.errors import InputError
from align.records import Comparison, Record, Response

GROUP_COLUMNS = ("responses", "completions", "inferences")
CONTENT_KEYS = ("content", "completion", "response", "output")
REWARD_KEYS = ("reward", "overall_score", "fine-grained_score", "score", "preference", "pass_rate")
ATTRIBUTE_KEYS = ("attributes", "annotations")
MODEL_KEYS = ("model", "generator", "model_name", "sampling_config")


class EmptyResponses(InputError):
    """Some responses of a group are empty; `remaining` is the group without them."""

    def __init__(self, remaining: Comparison) -> None:
        super().__init__("a response is empty")
        self.remaining = remaining


def group(row: Row) -> Iterator[Record]:
    """Yield any number of responses, as text or as objects. A rank (0 is best) becomes the reward -rank.

    Raise `EmptyResponses` if responses are empty, at least two are not, and none is named as chosen.
    """
    column = next(name for name in GROUP_COLUMNS if name in row)
    items = [
        {"content": item} if isinstance(item, str) else as_object(item, "a response")
        for item in as_list(row[column], column)
    ]
    prompt = row_prompt(row)
    metadata = metadata_of(row, {*prompt.columns, column, "chosen"})
    models = [next((item[key] for key in MODEL_KEYS if key in item), None) for item in items]
    if any(models):
        metadata["models"] = models
    chosen = row["chosen"] if row.get("chosen") is not None else best_ranked(items)
    if chosen is not None and (not isinstance(chosen, int) or isinstance(chosen, bool)):
        raise InputError(f"chosen is {shortened(chosen)}; the index of a response is needed")
    filled = [item for item in items if content_of(item).strip()]
    if len(filled) == len(items) or chosen is not None or len(filled) < 2:
        yield Comparison(prompt.messages, tuple(map(as_response, items)), chosen, metadata)
    else:
        raise EmptyResponses(Comparison(prompt.messages, tuple(map(as_response, filled)), None, metadata))


def sampling_report(row: Row) -> Iterator[Record]:
    """Yield all outputs of one policy for a prompt, from every sampling setting."""
    outputs = [
        {"output": text, "sampling_config": result.get("sampling_config")}
        for result in (as_object(result, "a result") for result in as_list(row["results"], "results"))
        for text in as_list(result.get("outputs"), "outputs")
    ]
    yield from group({**{name: row[name] for name in row if name != "results"}, "responses": outputs})


def content_of(item: Mapping[str, Any]) -> str:
    """Return the text of a response, which may be a chat list of one assistant message."""
    value = next((item[key] for key in CONTENT_KEYS if item.get(key) is not None), None)
    if isinstance(value, list) and any("role" in as_object(part, "a message") for part in cast(list[Any], value)):
        messages = as_messages(cast(list[Any], value), "a response")
        if [message.role for message in messages] != ["assistant"]:
            raise InputError(f"a response has {len(messages)} messages; it must be one assistant message")
        return messages[0].content
    return as_text(value, "a response")


def as_response(item: Mapping[str, Any]) -> Response:
    """Return the response with its reward and attributes."""
    rewards = (as_number(item.get(key), key) for key in REWARD_KEYS)
    rank = as_number(item.get("rank"), "rank")
    reward = next((value for value in rewards if value is not None), None if rank is None else 0 - rank)
    attributes = next((item[key] for key in ATTRIBUTE_KEYS if item.get(key)), {})
    return Response(content_of(item), reward, as_ratings(attributes), as_finish(item))


def best_ranked(items: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the index of the response with the lowest rank, or None for a tie or without ranks."""
    ranks = [as_number(item.get("rank"), "rank") for item in items]
    present = [rank for rank in ranks if rank is not None]
    return ranks.index(min(present)) if present and present.count(min(present)) == 1 else None
