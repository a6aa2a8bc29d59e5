"""Single responses with rated attributes: HelpSteer, SteerLM and just-eval."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import cast

from align.data.columns import Row
from align.data.readers.cells import as_list, as_ratings, as_text, metadata_of
from align.data.readers.prompts import row_prompt, split_answer
from align.errors import InputError
from align.records import Comparison, Located, Record, Response

JUST_EVAL = (("prompt", "response", "ratings"), ("input", "output_cand", "parsed_result"))
HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")  # Wang et al. 2024 (HelpSteer2)
STEERLM = ("quality", "toxicity", "humor", "creativity", *HELPSTEER)  # NeMo-Aligner's order of a label vector
MISSING_LABEL = -100


def rated(row: Row) -> Iterator[Record]:
    """Yield one response with the attributes that a judge rated."""
    request, reply, marks = next(columns for columns in JUST_EVAL if set(columns) <= row.keys())
    yield _with_attributes(row, (request,), reply, as_ratings(row[marks]), used={marks})


def helpsteer(row: Row) -> Iterator[Record]:
    """Yield one response with HelpSteer's five attributes. Consecutive rows of a prompt are merged."""
    attributes = as_ratings({name: row[name] for name in HELPSTEER if name in row})
    yield _with_attributes(row, ("prompt",), "response", attributes, used=set(HELPSTEER))


def _with_attributes(
    row: Row, request: Sequence[str], reply: str, attributes: Mapping[str, float], *, used: set[str]
) -> Comparison:
    prompt = row_prompt(row, request)
    response = Response(as_text(row[reply], reply), None, attributes)
    return Comparison(prompt.messages, (response,), None, metadata_of(row, {*prompt.columns, reply, *used}))


def steerlm(row: Row) -> Iterator[Record]:
    """Yield one response in SteerLM markup with its label vector. A label of -100 is missing."""
    label = as_list(row["label"], "label")
    if len(label) != len(STEERLM):
        raise InputError(f"label has {len(label)} numbers; {len(STEERLM)} are needed: {', '.join(STEERLM)}")
    prompt, answer = split_answer((), row["text"], "text")
    labels = {name: value for name, value in zip(STEERLM, label, strict=True) if value != MISSING_LABEL}
    response = Response(answer.content, None, as_ratings(labels))
    yield Comparison(prompt, (response,), None, metadata_of(row, {"text", "label"}))


def merged(comparisons: Iterable[Located[Record]]) -> Iterator[Located[Record]]:
    """Merge consecutive comparisons of one prompt into one, at the place of the first."""
    found = cast(Iterable[Located[Comparison]], comparisons)
    for (prompt, tools), group_of_prompt in groupby(found, key=lambda each: (each.record.prompt, each.record.tools)):
        members = list(group_of_prompt)
        responses = tuple(response for member in members for response in member.record.responses)
        yield replace(members[0], record=Comparison(prompt, responses, None, members[0].record.metadata, tools))
