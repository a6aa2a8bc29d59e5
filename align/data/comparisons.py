"""Rows to comparisons: labelled pairs, scored groups, rated and ranked responses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from typing import Any, cast

from align.data.dialogues import (
    SYSTEM_COLUMNS,
    Asked,
    Messages,
    asked,
    listed,
    mapped,
    message,
    messages,
    reply_messages,
    rest,
    shortened,
    spoken,
    with_system,
)
from align.data.rows import Row
from align.errors import InputError
from align.records import Comparison, Located, Record, Response

PAIRS = (("chosen", "rejected"), ("chosen_response", "rejected_response"), ("chosen_messages", "rejected_messages"))
PAIR_REWARDS = tuple(
    (form.format(side="chosen", kind=kind), form.format(side="rejected", kind=kind))
    for kind in ("reward", "score", "rating")
    for form in ("{side}_{kind}", "{kind}_{side}", "{side}-{kind}")
)
READ_AND_KEPT = frozenset({"margin", *(name for names in PAIR_REWARDS for name in names)})
GROUPS = ("responses", "completions", "inferences")
CONTENTS = ("content", "completion", "response", "output")
REWARDS = ("reward", "overall_score", "fine-grained_score", "score", "preference", "pass_rate")
ATTRIBUTES = ("attributes", "annotations")
GENERATORS = ("model", "generator", "model_name", "sampling_config")
RATED = (("prompt", "response", "ratings"), ("input", "output_cand", "parsed_result"))
UNRATED = (None, "", "N/A")
LIKED = "liked"  # in the metadata: whether a response that stands alone is
MARKS = ("score", "Rating")  # of an object that rates an attribute
LABELS = {"true": 1.0, "1": 1.0, "false": 0.0, "0": 0.0}
HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")  # Wang et al. 2024 (HelpSteer2)
STEERLM = ("quality", "toxicity", "humor", "creativity", *HELPSTEER)  # NeMo-Aligner's order of a label vector
MISSING_LABEL = -100


class EmptyResponses(InputError):
    """Some responses of a group are empty; `remaining` is the group without them."""

    def __init__(self, remaining: Comparison) -> None:
        super().__init__("a response is empty")
        self.remaining = remaining


def preference(row: Row) -> Iterator[Record]:
    """A chosen and a rejected answer, in this order, with their rewards where the row has any; a margin is (margin, 0).

    Without a prompt column the answers are whole dialogues, which differ in their last message only.
    """
    columns = next(pair for pair in PAIRS if set(pair) <= row.keys())
    prompt = asked(row)
    (asked_chosen, chosen), (asked_rejected, rejected) = (answer(prompt.messages, row[name], name) for name in columns)
    if asked_chosen != asked_rejected:
        raise InputError("chosen and rejected differ before their last message; a pair answers one prompt")
    chosen_reward, rejected_reward = pair_rewards(row)
    responses = (Response(chosen, chosen_reward), Response(rejected, rejected_reward))
    yield Comparison(asked_chosen, responses, 0, rest(row, {*prompt.columns, *columns}))


def answer(prompt: Messages, value: Any, what: str) -> tuple[Messages, str]:  # noqa: ANN401 - text, message or list
    """The prompt and the text of an answer; a dialogue that holds a user message brings its own prompt."""
    said = reply_messages(value, what)
    own = any(one.role == "user" for one in said)
    before = tuple(one for one in prompt if one.role == "system" and one not in said) if own else prompt
    if own and before and any(one.role == "system" for one in said):
        raise InputError(f"{what} has another system message than the row; one is needed, in {what} or in a column")
    if not own and not before:
        raise InputError(f"there is no prompt: neither in a column nor in {what}")
    return (*before, *said[:-1]), said[-1].content


def pair_rewards(row: Row) -> tuple[float | None, float | None]:
    """Rewards of the chosen and the rejected answer, from the row's columns or its metadata."""
    known = rest(row, ())
    for names in PAIR_REWARDS:
        chosen, rejected = (number(known.get(name), name) for name in names)
        if chosen is not None or rejected is not None:
            return chosen, rejected
    margin = number(known.get("margin"), "margin")
    return margin, None if margin is None else 0.0


def unpaired(row: Row) -> Iterator[Record]:
    """One answer that was liked (reward 1) or not (reward 0); Ethayarajh et al. 2024 (KTO)."""
    label = "label" if "label" in row else "kto_tag"
    reward = LABELS.get(str(row[label]).lower())
    if reward is None:
        raise InputError(f"{label} is {shortened(row[label])}; true or false is needed")
    column = next(name for name in ("messages", "conversations", "completion", "output") if name in row)
    is_whole = column in ("messages", "conversations")
    prompt = Asked(with_system(row, ()), SYSTEM_COLUMNS) if is_whole else asked(row)
    before, content = answer(prompt.messages, listed(row[column], column) if is_whole else row[column], column)
    known = {**rest(row, {*prompt.columns, column, label}), LIKED: bool(reward)}
    yield Comparison(before, (Response(content, reward),), None, known)


def group(row: Row) -> Iterator[Record]:
    """Any number of responses, as text or with rewards, ranks and ratings; a rank (0 is best) is the reward −rank."""
    column = next(name for name in GROUPS if name in row)
    items = [
        {"content": item} if isinstance(item, str) else mapped(item, "a response")
        for item in listed(row[column], column)
    ]
    prompt = asked(row)
    metadata = rest(row, {*prompt.columns, column, "chosen"})
    models = [next((item[name] for name in GENERATORS if name in item), None) for item in items]
    if any(models):
        metadata["models"] = models
    chosen = row["chosen"] if row.get("chosen") is not None else best_ranked(items)
    if chosen is not None and (not isinstance(chosen, int) or isinstance(chosen, bool)):
        raise InputError(f"chosen is {shortened(chosen)}; the index of a response is needed")
    full = [item for item in items if content_of(item).strip()]
    if len(full) == len(items) or chosen is not None or len(full) < 2:
        yield Comparison(prompt.messages, tuple(map(response, items)), chosen, metadata)
    else:
        raise EmptyResponses(Comparison(prompt.messages, tuple(map(response, full)), None, metadata))


def content_of(item: Mapping[str, Any]) -> str:
    """The text of a response, which may be written as the one message that it is."""
    value = next((item[name] for name in CONTENTS if item.get(name) is not None), None)
    if isinstance(value, list) and any("role" in mapped(part, "a message") for part in cast(list[Any], value)):
        said = messages(cast(list[Any], value), "a response")
        if [one.role for one in said] != ["assistant"]:
            raise InputError(f"a response is {len(said)} messages; it has to be one of the assistant")
        return said[0].content
    return spoken(value, "a response")


def response(item: Mapping[str, Any]) -> Response:
    """The response with its reward and attributes."""
    rewards = (number(item.get(name), name) for name in REWARDS)
    rank = number(item.get("rank"), "rank")
    reward = next((value for value in rewards if value is not None), None if rank is None else 0 - rank)
    rated = next((item[name] for name in ATTRIBUTES if item.get(name)), {})
    return Response(content_of(item), reward, ratings(rated))


def best_ranked(items: Sequence[Mapping[str, Any]]) -> int | None:
    """Index of the response that is ranked before all others, where there is one."""
    ranks = [number(item.get("rank"), "rank") for item in items]
    known = [rank for rank in ranks if rank is not None]
    return ranks.index(min(known)) if known and known.count(min(known)) == 1 else None


def number(value: Any, name: str) -> float | None:  # noqa: ANN401 - a cell of whatever type
    """The number that `value` is or spells; None where it says that there is none."""
    if value in UNRATED:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{name} is {shortened(value)}; a number is needed") from error


def ratings(values: Any) -> dict[str, float]:  # noqa: ANN401 - a cell of whatever type
    """The attributes that are rated, each by a number or by an object that holds it beside its reason."""
    rated: dict[str, float] = {}
    for name, value in mapped(values, "a set of ratings").items():
        mark = next((value[key] for key in MARKS if key in value), value) if isinstance(value, Mapping) else value
        if mark is value and isinstance(value, Mapping):
            raise InputError(
                f"{name} is {shortened(value)}; a number is needed, or an object with a {' or a '.join(MARKS)}"
            )
        found = number(mark, name)
        if found is not None:
            rated[name] = found
    return rated


def sampling_report(row: Row) -> Iterator[Record]:
    """All outputs of one policy to a prompt, under whichever sampling settings."""
    outputs = [
        {"output": text, "sampling_config": result.get("sampling_config")}
        for result in (mapped(result, "a result") for result in listed(row["results"], "results"))
        for text in listed(result.get("outputs"), "outputs")
    ]
    yield from group({**{name: row[name] for name in row if name != "results"}, "responses": outputs})


def rated(row: Row) -> Iterator[Record]:
    """One response with the attributes that a judge rated."""
    request, reply, marks = next(columns for columns in RATED if set(columns) <= row.keys())
    yield _with_attributes(row, (request,), reply, ratings(row[marks]), used={marks})


def helpsteer(row: Row) -> Iterator[Record]:
    """One response with HelpSteer's five attributes; the rows of a prompt follow one another and are merged."""
    attributes = ratings({name: row[name] for name in HELPSTEER if name in row})
    yield _with_attributes(row, ("prompt",), "response", attributes, used=set(HELPSTEER))


def _with_attributes(
    row: Row, request: Sequence[str], reply: str, attributes: Mapping[str, float], *, used: set[str]
) -> Comparison:
    prompt = asked(row, request)
    only = Response(spoken(row[reply], reply), None, attributes)
    return Comparison(prompt.messages, (only,), None, rest(row, {*prompt.columns, reply, *used}))


def steerlm(row: Row) -> Iterator[Record]:
    """One response in SteerLM markup with its label vector, of which −100 is left out."""
    label = listed(row["label"], "label")
    if len(label) != len(STEERLM):
        raise InputError(f"label has {len(label)} numbers; {len(STEERLM)} are needed: {', '.join(STEERLM)}")
    prompt, content = answer((), row["text"], "text")
    known = {name: value for name, value in zip(STEERLM, label, strict=True) if value != MISSING_LABEL}
    yield Comparison(prompt, (Response(content, None, ratings(known)),), None, rest(row, {"text", "label"}))


def judged_pair(row: Row) -> Iterator[Record]:
    """Two responses of which a judge preferred one in most aspects."""
    aspects = mapped(row["parsed_result"], "parsed_result").values()
    verdicts = [mapped(aspect, "a verdict").get("preference") for aspect in aspects]
    wins = [verdicts.count(side) for side in ("A", "B")]
    if wins[0] == wins[1]:
        raise InputError("the judge prefers neither response")
    texts = [spoken(row[name], name) for name in ("output_A", "output_B")]
    prompt = asked(row, ("input",))
    metadata = rest(row, {*prompt.columns, "output_A", "output_B"})
    yield Comparison(prompt.messages, tuple(map(Response, texts)), int(wins[1] > wins[0]), metadata)


def openassistant(row: Row) -> Iterator[Record]:
    """A comparison for each place of the tree where people ranked two replies or more; reward −rank, best first."""
    found = list(_ranked(row.get("prompt", row), ()))
    if not found:
        raise InputError("no message of the tree has two ranked replies")
    yield from found


def _ranked(tree: Any, before: Messages) -> Iterator[Comparison]:  # noqa: ANN401 - a node as it stands in the file
    node = mapped(tree, "a message")
    said = (*before, message({**node, "content": node.get("text")}))
    replies = [mapped(reply, "a reply") for reply in listed(node.get("replies") or [], "replies")]
    kept = [reply for reply in replies if not reply.get("deleted")]
    ranks = [(rank, reply) for reply in kept if (rank := number(reply.get("rank"), "rank")) is not None]
    if said[-1].role == "user" and len(ranks) > 1:
        ranks.sort(key=itemgetter(0))
        responses = tuple(Response(spoken(reply.get("text"), "a reply"), 0 - rank) for rank, reply in ranks)
        yield Comparison(said, responses, 0, {"message_id": node.get("message_id")})
    for reply in kept:
        yield from _ranked(reply, said)


def merged(comparisons: Iterable[Located[Record]]) -> Iterator[Located[Record]]:
    """Merge consecutive comparisons of one prompt into one, at the place of the first."""
    found = cast(Iterable[Located[Comparison]], comparisons)
    for prompt, group_of_prompt in groupby(found, key=lambda located: located.record.prompt):
        members = list(group_of_prompt)
        responses = tuple(response for member in members for response in member.record.responses)
        yield replace(members[0], record=Comparison(prompt, responses, None, members[0].record.metadata))
