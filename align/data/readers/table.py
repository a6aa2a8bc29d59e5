"""The table of row formats, and detection of a row's format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from align.data.readers.demonstrations import demonstration, dialogue, seed_tasks
from align.data.readers.native import native
from align.data.readers.openassistant import openassistant
from align.data.readers.pairs import LIKED, REWARD_COLUMNS, judged_pair, preference, unpaired
from align.data.readers.prompts import prompt_only
from align.data.readers.ratings import helpsteer, rated, steerlm
from align.data.readers.response_groups import group, sampling_report
from align.data.readers.vicuna_eval import reviewed_answers
from align.data.rows import Row
from align.errors import InputError, one_line
from align.records import Located, Record

MAX_COLUMNS_SHOWN = 12  # in an error
MAX_COLUMN_NAME = 40  # characters of a column's name in an error


@dataclass(frozen=True, slots=True)
class Reader:
    """How rows of one format become records.

    `read` returns the records of a row; it raises `InputError` for a row it cannot read. A reader of your own is an
    object of this class, named in a recipe as `module:name`.
    """

    columns: tuple[str, ...]  # alternatives, each a list of columns separated by spaces, all of which a row needs
    read: Callable[[Row], Iterator[Record]]
    join: Callable[[Iterable[Located[Row]]], Iterator[Located[Row]]] | None = None  # joins rows before they are read
    merge: bool = False  # whether consecutive rows of one prompt become one comparison
    keeps: frozenset[str] = frozenset()  # columns that are used although they are kept in the metadata

    def matches(self, row: Row) -> bool:
        """Return whether the row has the columns that this format needs."""
        return any(set(columns.split()) <= row.keys() for columns in self.columns)


# The first format whose columns a row has is used, so special formats come before general ones.
READERS = {
    "openassistant": Reader(("message_tree_id prompt", "message_id text role replies"), openassistant),
    "nemo_aligner": Reader(("prompt chosen_response rejected_response",), preference, keeps=REWARD_COLUMNS),
    "nemo_rl": Reader(("context completions",), group),
    "preference": Reader(("chosen rejected", "chosen_messages rejected_messages"), preference, keeps=REWARD_COLUMNS),
    "unpaired": Reader(
        ("messages label", "prompt completion label", "conversations kto_tag", "instruction output kto_tag"),
        unpaired,
        keeps=frozenset({LIKED}),
    ),
    "steerlm": Reader(("text label",), steerlm, merge=True),
    "helpsteer": Reader(("prompt response helpfulness",), helpsteer, merge=True),
    "just_eval": Reader(("prompt response ratings", "input output_cand parsed_result"), rated),
    "just_eval_pairs": Reader(
        ("input output_A output_B parsed_result",), judged_pair, keeps=frozenset({"parsed_result"})
    ),
    "ultrafeedback": Reader(("instruction completions",), group),
    "alpaca_eval": Reader(("instruction responses",), group),
    "acecode": Reader(("question inferences",), group),
    "completions": Reader(("prompt completions", "raw_text completions"), group),
    "sampling_report": Reader(("prompt results",), sampling_report),
    "vicuna_eval": Reader(("question_id text", "question_id answer1_id score"), native, join=reviewed_answers),
    "self_instruct": Reader(("instruction instances",), seed_tasks),
    "alpaca": Reader(("instruction output", "instruction response"), demonstration),
    "mbpp": Reader(("text code", "prompt code"), demonstration),
    "question_answer": Reader(("question answer", "problem solution"), demonstration),
    "prompt_completion": Reader(
        ("prompt completion", "prompt response", "prompt output", "input output", "query response"), demonstration
    ),
    "native": Reader(("prompt responses", "messages metadata", "prompt metadata"), native),
    "messages": Reader(("messages", "conversation"), dialogue),
    "sharegpt": Reader(("conversations",), dialogue),
    "topic_following": Reader(("conversation_json",), dialogue),
    "prompt": Reader(("prompt",), prompt_only),
}


def detect_format(first: Located[Row]) -> str:
    """Return the name of the first format whose columns the row has. Raise `InputError` if no format matches."""
    for name, reader in READERS.items():
        if reader.matches(first.record):
            return name
    similar = [
        f"{name} ({' or '.join(reader.columns)})"
        for name, reader in READERS.items()
        if any(first.record.keys() & set(columns.split()) for columns in reader.columns)
    ]
    present, formats = describe_columns(first.record), ", ".join(similar or READERS)
    raise InputError(f"{first.place}: no format matches {present}; formats: {formats}")


def describe_columns(row: Row) -> str:
    """Return the names of a row's columns, for an error."""
    names = [
        name if len(name) <= MAX_COLUMN_NAME else f"{name[: MAX_COLUMN_NAME - 3]}..." for name in map(one_line, row)
    ]
    more = len(names) - MAX_COLUMNS_SHOWN
    return f"the columns {', '.join(names[:MAX_COLUMNS_SHOWN])}" + (f" and {more} more" if more > 0 else "")
