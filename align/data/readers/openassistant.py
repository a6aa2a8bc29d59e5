"""OpenAssistant's message trees; Köpf et al. 2023."""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from typing import Any

from align.data.columns import Row
from align.data.readers.cells import as_list, as_number, as_object, as_text
from align.data.readers.messages import Messages, as_message
from align.errors import InputError
from align.records import Comparison, Record, Response


def openassistant(row: Row) -> Iterator[Record]:
    """Yield a comparison for each user message with two ranked replies or more; rewards are -rank, best first.

    The message's id and language are kept as metadata, by which `where` selects.
    """
    comparisons = list(_ranked_replies(row.get("prompt", row), ()))
    if not comparisons:
        raise InputError("no message of the tree has two ranked replies")
    yield from comparisons


def _ranked_replies(tree: Any, before: Messages) -> Iterator[Comparison]:  # noqa: ANN401 - a node of the file
    node = as_object(tree, "a message")
    messages = (*before, as_message({**node, "content": node.get("text")}))
    replies = [as_object(reply, "a reply") for reply in as_list(node.get("replies") or [], "replies")]
    kept = [reply for reply in replies if not reply.get("deleted")]
    ranks = [(rank, reply) for reply in kept if (rank := as_number(reply.get("rank"), "rank")) is not None]
    if messages[-1].role == "user" and len(ranks) > 1:
        ranks.sort(key=itemgetter(0))
        responses = tuple(Response(as_text(reply.get("text"), "a reply"), 0 - rank) for rank, reply in ranks)
        language = {} if node.get("lang") is None else {"lang": node["lang"]}
        yield Comparison(messages, responses, 0, {"message_id": node.get("message_id"), **language})
    for reply in kept:
        yield from _ranked_replies(reply, messages)
