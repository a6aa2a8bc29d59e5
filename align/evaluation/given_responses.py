"""Responses that other tools have written: what a row of their files says, by its form.

| form | columns |
|---|---|
| evaluations of `align`, EvalPlus, AlpacaEval | a text in one of `RESPONSE_COLUMNS` |
| OpenAI batches, `vllm run-batch` | `custom_id`, and `response` with the completion, in `body` or itself |
| an OpenAI completion | `choices` of objects with a `message` or a `text` |
| vLLM's RequestOutput as JSON | `outputs` of objects with a `text` |
| FastChat (MT-Bench), Arena-Hard until 2024 | `question_id`, and `choices` of objects with `turns` |
| Arena-Hard since 2025, chat lists | `messages`, of which the last one is the response |
| samples of lm-evaluation-harness | `doc_id`, `doc`, and `resps` |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from align.data.readers.cells import as_list, as_object, as_text, shortened
from align.data.rows import read_rows
from align.errors import InputError
from align.evaluation.task import Row

ID_COLUMNS = ("key", "task_id", "question_id", "uid", "unique_id", "custom_id", "ID", "id")  # the first that is there
RESPONSE_COLUMNS = ("response", "completion", "solution", "output", "generated_text")
PROMPT_COLUMNS = ("prompt", "instruction")
FINISH_COLUMNS = ("finish", "finish_reason")


class GivenResponse(NamedTuple):
    """A response, and what the file says of the row that it answers."""

    turns: tuple[str, ...]  # responses to the turns of a dialogue; mostly one
    row_id: str | None = None
    prompt: str | None = None
    finish: str | None = None


def read_responses(path: str) -> Iterator[tuple[int, GivenResponse]]:
    """Yield the number of the file's row, from 1, and each of its responses; none for a request that failed.

    lm-evaluation-harness writes the responses to a row again for each filter of its task, such as the two of gsm8k:
    only those of the first filter are read. Raises `InputError` for a row without a response in a known form.
    """
    first_filter: object = None
    for number, row in enumerate(read_rows(path), start=1):
        if "resps" in row:
            first_filter = row.get("filter") if first_filter is None else first_filter
            if row.get("filter") != first_filter:
                continue
        try:
            found = list(_responses(row))
        except InputError as error:
            raise InputError(f"{path}: row {number} {error.message}") from error
        for each in found:
            yield number, each


def row_id_of(row: Row) -> str | None:
    """Return the id of a row of data or of a response, None if it has none."""
    return next((str(row[name]) for name in ID_COLUMNS if row.get(name) is not None), None)


def _responses(row: Row) -> Iterator[GivenResponse]:
    row_id = row_id_of(row)
    prompt = next((row[name] for name in PROMPT_COLUMNS if isinstance(row.get(name), str)), None)
    text = next((row[name] for name in RESPONSE_COLUMNS if isinstance(row.get(name), str)), None)
    if text is not None:
        yield GivenResponse((text,), row_id, prompt, _finish(row))
    elif "resps" in row:
        yield from _of_harness(row)
    elif row.get("choices") or row.get("outputs"):
        for choice in as_list(row.get("choices") or row.get("outputs"), "choices"):
            yield _of_choice(as_object(choice, "a choice"))._replace(row_id=row_id, prompt=prompt)
    elif "custom_id" in row:
        given = cast(Mapping[str, Any], row.get("response") or {})
        completion = given.get("body", given) or {}
        for choice in completion.get("choices") or ():
            yield _of_choice(choice)._replace(row_id=str(row["custom_id"]))
    elif row.get("messages"):
        yield _of_messages(as_list(row["messages"], "messages"))._replace(row_id=row_id)
    else:
        forms = f"{', '.join(RESPONSE_COLUMNS)}, choices, outputs, messages or resps"
        raise InputError(f"has no response in a known form: {forms}")


def _of_choice(choice: Mapping[str, Any]) -> GivenResponse:
    """Return the response of an item of `choices` or `outputs`."""
    if "turns" in choice:
        turns = as_list(choice["turns"], "turns")
        return GivenResponse(tuple(_content(turn) for turn in turns))
    text = choice["message"] if choice.get("message") is not None else choice.get("text")
    return GivenResponse((_content(text),), finish=_finish(choice))


def _of_messages(messages: Sequence[Any]) -> GivenResponse:
    """Return the last message as the response to the one before it; raise `InputError` for a prompt without one."""
    if isinstance(messages[-1], Mapping) and (role := messages[-1].get("role")) in ("system", "user"):
        raise InputError(f"has no response: its messages end with the {role}")
    before = messages[-2] if len(messages) > 1 else None
    return GivenResponse((_content(messages[-1]),), prompt=None if before is None else _content(before))


def _of_harness(row: Row) -> Iterator[GivenResponse]:
    """Yield the responses of a sample of lm-evaluation-harness; its row is that of its `doc`, else of its number."""
    doc = cast(Row, row["doc"]) if isinstance(row.get("doc"), Mapping) else {}
    row_id = row_id_of(doc) or str(row["doc_id"])
    prompt = _text(doc, ("prompt", "question", "problem"))
    for request in as_list(row["resps"], "resps"):
        for text in request if isinstance(request, list) else [request]:
            if not isinstance(text, str):
                raise InputError(f"has {shortened(text)} in resps: likelihoods, and no generated text to grade")
            yield GivenResponse((text,), row_id, prompt)


def _content(value: Any) -> str:  # noqa: ANN401 - a text, or an object that holds it
    """Return a text, the content of a message, or Arena-Hard's {"answer": text}."""
    if isinstance(value, Mapping):
        fields = cast(Row, value)
        return _content(fields.get("content") if fields.get("content") is not None else fields.get("answer"))
    return as_text(value, "a response")


def _finish(row: Row) -> str | None:
    return _text(row, FINISH_COLUMNS)


def _text(row: Row, columns: Sequence[str]) -> str | None:
    """Return the first of the columns that holds a text."""
    return next((row[name] for name in columns if isinstance(row.get(name), str)), None)
