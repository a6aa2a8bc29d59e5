"""Items: what the families of a `synthesize` step make, each with its lineage.

An item is a name (topic or keyword), a document, a prompt, a demonstration, or a pair of responses. Its id depends on
the entry of `families` that made it, its parents and its content only, so it is the same in every run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from align.config import stable_hash
from align.errors import InputError
from align.records import Comparison, Demonstration, Message, Prompt, Record, Response, message_key

TOPIC, KEYWORD, DOCUMENT, PROMPT, DEMONSTRATION, PAIR = (
    "topic",
    "keyword",
    "document",
    "prompt",
    "demonstration",
    "pair",
)
NAMES = (TOPIC, KEYWORD)  # kinds that are only names
ROWS = (PROMPT, DEMONSTRATION, PAIR)  # kinds that later steps read
LINEAGE = "lineage"  # key of an output row's metadata
FLAGS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "": False}  # as text, as in CSV


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One thing that a family made or that a source holds.

    `messages` of a prompt end with the message to answer, those of a demonstration with an answer. Those of a pair are
    the prompt, and `responses` its chosen and its rejected response. `text` is the content of all other kinds.
    """

    kind: str
    entry: str  # of `families`, or the name of the source
    text: str = ""
    messages: tuple[Message, ...] = ()
    responses: tuple[str, ...] = ()
    parents: tuple[str, ...] = ()  # ids
    seeds: tuple[str, ...] = ()  # ids of the prompts and documents at the start of its lineage
    split: str | None = None  # of its seeds; None for names, and where its seeds belong to several
    flagged: bool = False  # whether a seed is marked as unsafe
    family: str = ""  # kind of the entry; empty for a source
    template: str = ""  # hash of the template that the request was made from
    model: str = ""  # that was asked
    requests: tuple[str, ...] = ()  # keys of the requests whose answers it was made from
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])  # how its family made it; part of the lineage
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])  # what verifiers and judges need, and verdicts

    @property
    def id(self) -> str:
        """16 hex digits."""
        chat = message_key(self.messages)
        return stable_hash([self.entry, list(self.parents), self.text, chat, list(self.responses)])

    @property
    def prompt(self) -> str:
        """The last user message, or the text of an item without messages."""
        return next((each.content for each in reversed(self.messages) if each.role == "user"), self.text)

    @property
    def first_prompt(self) -> str:
        """The first user message, or the text of an item without messages."""
        return next((each.content for each in self.messages if each.role == "user"), self.text)

    @property
    def first_user(self) -> int:
        """Position of the first user message."""
        return next(at for at, message in enumerate(self.messages) if message.role == "user")

    def lineage(self) -> dict[str, Any]:
        """Return where the item comes from, as JSON."""
        return {
            "id": self.id,
            "kind": self.kind,
            "entry": self.entry,
            "family": self.family,
            "parents": list(self.parents),
            "seeds": list(self.seeds),
            "split": self.split,
            "flagged": self.flagged,
            "template": self.template,
            "model": self.model,
            "requests": list(self.requests),
            **({"details": dict(self.details)} if self.details else {}),
        }

    def record(self) -> Record:
        """Return the row of a later step; its metadata holds the lineage."""
        metadata = {**self.metadata, LINEAGE: self.lineage()}
        if self.kind == PROMPT:
            return Prompt(self.messages, metadata)
        if self.kind == DEMONSTRATION:
            return Demonstration(self.messages, metadata)
        assert self.kind == PAIR, f"a {self.kind} is not a row"
        return Comparison(self.messages, tuple(map(Response, self.responses)), 0, metadata)


def source_item(record: Record, kind: str, source: str) -> Item:
    """Return a row of a source as an item of a kind; a document or a name is the last user message of its prompt.

    A row that a step `synthesize` has made keeps its seeds and their split.
    """
    if isinstance(record, Comparison):
        record = Prompt(record.prompt, record.metadata, record.tools)
    if record.tools or any(message.tool_calls or message.role == "tool" for message in record.messages):
        raise InputError(f"source {source!r}: a row uses tools, which items do not have; remove such rows")
    user = [message.content for message in record.messages if message.role == "user"]
    if not user:
        raise InputError(f"source {source!r}: a row without a user message is no {kind}")
    lineage = record.metadata.get(LINEAGE) or {}
    if not isinstance(lineage, Mapping) or (lineage and "id" not in lineage):
        raise InputError(f"source {source!r}: the column {LINEAGE} is not one that a step synthesize wrote; rename it")
    metadata = {key: value for key, value in record.metadata.items() if key != LINEAGE}
    item = Item(
        kind=kind,
        entry=source,
        flagged=is_flagged(record.metadata) or bool(lineage.get("flagged")),
        parents=(lineage["id"],) if lineage else (),
        seeds=tuple(lineage.get("seeds", ())),
        split=lineage.get("split"),
        metadata=metadata,
    )
    if kind in (PROMPT, DEMONSTRATION):
        return replace(
            item, kind=DEMONSTRATION if isinstance(record, Demonstration) else PROMPT, messages=record.messages
        )
    return replace(item, text=user[-1])


def is_flagged(metadata: Mapping[str, Any]) -> bool:
    """Return whether a row is marked as unsafe: by a `flagged` column, or by one of LMSYS-Chat-1M's moderations.

    Raises `InputError` for text that is neither true nor false.

    >>> is_flagged({"openai_moderation": [{"flagged": False}, {"flagged": True}]}), is_flagged({"flagged": 0})
    (True, False)
    """
    moderation: object = metadata.get("openai_moderation")
    entries: Sequence[Any] = moderation if isinstance(moderation, list) else [moderation]
    marks = [metadata, *(each for each in entries if isinstance(each, Mapping))]
    return any([_is_true(each.get("flagged")) for each in marks])


def _is_true(flag: object) -> bool:
    if not isinstance(flag, str):
        return bool(flag)
    if flag.strip().lower() not in FLAGS:
        raise InputError(f"flagged is {flag!r}; it must be one of true, false, yes, no, 1, 0 and empty")
    return FLAGS[flag.strip().lower()]
