"""Any number of responses to a prompt, with rewards, ranks or ratings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from align.data.columns import Row
from align.data.readers.cells import (
    FINISH_KEYS,
    as_finish,
    as_list,
    as_number,
    as_object,
    as_ratings,
    as_text,
    metadata_of,
    shortened,
)
from align.data.readers.messages import as_messages, check_trained
from align.data.readers.prompts import row_prompt
from align.data.readers.tool_calls import calls_of
from align.errors import InputError
from align.records import Comparison, Message, Record, Response

GROUP_COLUMNS = ("responses", "completions", "inferences", "answers", "responses_and_scores")
CONTENT_KEYS = ("content", "completion", "response", "output", "answer")
REWARD_KEYS = ("reward", "overall_score", "fine-grained_score", "score", "rating", "preference", "pass_rate")
ATTRIBUTE_KEYS = ("attributes", "annotations", "ratings")
MODEL_KEYS = ("model", "generator", "model_name", "source", "sampling_config")
MODELS = "models"  # key of the metadata: the model of each response
RATING_COLUMNS = ("ratings", "rating")  # of distilabel
GENERATOR_COLUMNS = ("generation_models", "model_names", "generation_model")
CALL_KEYS = ("tool_calls", "function_call")
READ_KEYS = (CONTENT_KEYS, REWARD_KEYS, ATTRIBUTE_KEYS, MODEL_KEYS)  # of each, the first that a response has is read
EMPTY = (None, "", [], {})


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
    chosen = row["chosen"] if row.get("chosen") is not None else best_ranked(items)
    if chosen is not None and (not isinstance(chosen, int) or isinstance(chosen, bool)):
        raise InputError(f"chosen is {shortened(chosen)}; the index of a response is needed")
    filled = [item for item in items if _has_answer(item)]
    kept = items if chosen is not None or len(filled) < 2 else filled
    models = [next((item[key] for key in MODEL_KEYS if key in item), None) for item in kept]
    if any(models):
        metadata[MODELS] = models
    comparison = Comparison(prompt.messages, tuple(map(as_response, kept)), chosen, metadata)
    if len(kept) < len(items):
        raise EmptyResponses(comparison)
    yield comparison


def unread_fields(row: Row) -> set[str]:
    """Return the fields of a group's responses that are not read, as in `completions.critique`."""
    column = next((name for name in GROUP_COLUMNS if name in row), "")
    value = row.get(column)
    items = (
        [cast(Row, item) for item in cast(list[Any], value) if isinstance(item, Mapping)]
        if isinstance(value, list)
        else []
    )
    return {
        f"{column}.{key}" for item in items for key in item if item[key] not in EMPTY and key not in _read_keys(item)
    }


def _read_keys(item: Row) -> set[str]:
    keys = {next((key for key in keys if item.get(key) is not None), "") for keys in READ_KEYS}
    return {*keys, *FINISH_KEYS, *CALL_KEYS, "rank"}


def has_answer_objects(row: Row) -> bool:
    """Return whether the answers are ranked responses, not the right answers to a question."""
    answers = row["answers"]
    return isinstance(answers, list) and all(isinstance(each, Mapping) and "answer" in each for each in answers or [0])


def distilabel(row: Row) -> Iterator[Record]:
    """Yield the generations of distilabel's tasks, with the ratings and models that are lists beside them."""
    generations = as_list(row["generations"], "generations")
    ratings, models = (_beside(row, names, len(generations)) for names in (RATING_COLUMNS, GENERATOR_COLUMNS))
    items = [
        {"content": text, "reward": rating, "model": model}
        for text, rating, model in zip(generations, ratings, models, strict=True)
    ]
    used = {"generations", *RATING_COLUMNS, *GENERATOR_COLUMNS}
    yield from group({**{name: row[name] for name in row if name not in used}, "responses": items})


def _beside(row: Row, columns: Sequence[str], length: int) -> list[Any]:
    """Return the list in the first of the columns that the row has, or as many None."""
    column = next((name for name in columns if row.get(name) is not None), None)
    if column is None:
        return [None] * length
    values = as_list(row[column], column)
    if len(values) != length:
        raise InputError(f"{column} has {len(values)} items, and generations has {length}")
    return values


def sampling_report(row: Row) -> Iterator[Record]:
    """Yield all outputs of one policy for a prompt, from every sampling setting."""
    outputs = [
        {"output": text, "sampling_config": result.get("sampling_config")}
        for result in (as_object(result, "a result") for result in as_list(row["results"], "results"))
        for text in as_list(result.get("outputs"), "outputs")
    ]
    yield from group({**{name: row[name] for name in row if name != "results"}, "responses": outputs})


def _has_answer(item: Mapping[str, Any]) -> bool:
    message = answer_of(item)
    return bool(message.tool_calls or message.content.strip())


def answer_of(item: Mapping[str, Any]) -> Message:
    """Return a response as a message; it may be a chat list of one assistant message, and have tool calls."""
    value = next((item[key] for key in CONTENT_KEYS if item.get(key) is not None), None)
    if isinstance(value, list) and any("role" in as_object(part, "a message") for part in cast(list[Any], value)):
        messages = as_messages(cast(list[Any], value), "a response")
        if [message.role for message in messages] != ["assistant"]:
            raise InputError(f"a response has {len(messages)} messages; it must be one assistant message")
        check_trained(value)
        return messages[0]
    calls = calls_of(item)
    return Message("assistant", "" if value is None and calls else as_text(value, "a response"), calls)


def as_response(item: Mapping[str, Any]) -> Response:
    """Return the response with its reward and attributes."""
    rewards = (as_number(item.get(key), key) for key in REWARD_KEYS)
    rank = as_number(item.get("rank"), "rank")
    reward = next((value for value in rewards if value is not None), None if rank is None else 0 - rank)
    attributes = next((item[key] for key in ATTRIBUTE_KEYS if item.get(key)), {})
    return Response.of(answer_of(item), reward, as_ratings(attributes), as_finish(item))


def best_ranked(items: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the index of the response with the lowest rank, or None for a tie or without ranks."""
    ranks = [as_number(item.get("rank"), "rank") for item in items]
    present = [rank for rank in ranks if rank is not None]
    return ranks.index(min(present)) if present and present.count(min(present)) == 1 else None
