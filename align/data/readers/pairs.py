"""Pairs of a preferred and a rejected answer, and single answers that were liked or not."""

from __future__ import annotations

from collections.abc import Iterator

from align.data.readers.cells import as_list, as_number, as_object, as_text, metadata_of, shortened
from align.data.readers.prompts import SYSTEM_COLUMNS, RowPrompt, row_prompt, split_answer, with_system
from align.data.rows import Row
from align.errors import InputError
from align.records import Comparison, Record, Response

PAIRS = (("chosen", "rejected"), ("chosen_response", "rejected_response"), ("chosen_messages", "rejected_messages"))
PAIR_REWARDS = tuple(
    (form.format(side="chosen", kind=kind), form.format(side="rejected", kind=kind))
    for kind in ("reward", "score", "rating")
    for form in ("{side}_{kind}", "{kind}_{side}", "{side}-{kind}")
)
REWARD_COLUMNS = frozenset({"margin", *(name for names in PAIR_REWARDS for name in names)})
LABELS = {"true": 1.0, "1": 1.0, "false": 0.0, "0": 0.0}
LIKED = "liked"  # key of the metadata: whether a single response was liked


def preference(row: Row) -> Iterator[Record]:
    """Yield the chosen answer, then the rejected one, with rewards if the row has any. A margin is (margin, 0).

    Without a prompt column the answers are dialogues that differ in their last message only.
    """
    columns = next(pair for pair in PAIRS if set(pair) <= row.keys())
    prompt = row_prompt(row)
    (chosen_prompt, chosen), (rejected_prompt, rejected) = (
        split_answer(prompt.messages, row[name], name) for name in columns
    )
    if chosen_prompt != rejected_prompt:
        raise InputError("chosen and rejected have different prompts; they may differ in their last message only")
    chosen_reward, rejected_reward = pair_rewards(row)
    responses = (Response(chosen, chosen_reward), Response(rejected, rejected_reward))
    yield Comparison(chosen_prompt, responses, 0, metadata_of(row, {*prompt.columns, *columns}))


def pair_rewards(row: Row) -> tuple[float | None, float | None]:
    """Return the rewards of the chosen and the rejected answer, from the row's columns or its metadata."""
    values = metadata_of(row, ())
    for names in PAIR_REWARDS:
        chosen, rejected = (as_number(values.get(name), name) for name in names)
        if chosen is not None or rejected is not None:
            return chosen, rejected
    margin = as_number(values.get("margin"), "margin")
    return margin, None if margin is None else 0.0


def unpaired(row: Row) -> Iterator[Record]:
    """Yield one answer that was liked (reward 1) or not (reward 0); Ethayarajh et al. 2024 (KTO)."""
    label = "label" if "label" in row else "kto_tag"
    reward = LABELS.get(str(row[label]).lower())
    if reward is None:
        raise InputError(f"{label} is {shortened(row[label])}; true or false is needed")
    column = next(name for name in ("messages", "conversations", "completion", "output") if name in row)
    is_dialogue = column in ("messages", "conversations")
    prompt = RowPrompt(with_system(row, ()), SYSTEM_COLUMNS) if is_dialogue else row_prompt(row)
    value = as_list(row[column], column) if is_dialogue else row[column]
    before, content = split_answer(prompt.messages, value, column)
    metadata = {**metadata_of(row, {*prompt.columns, column, label}), LIKED: bool(reward)}
    yield Comparison(before, (Response(content, reward),), None, metadata)


def judged_pair(row: Row) -> Iterator[Record]:
    """Yield two responses, of which a judge preferred one in most aspects."""
    aspects = as_object(row["parsed_result"], "parsed_result").values()
    verdicts = [as_object(aspect, "a verdict").get("preference") for aspect in aspects]
    wins = [verdicts.count(side) for side in ("A", "B")]
    if wins[0] == wins[1]:
        raise InputError("the judge prefers neither response")
    texts = [as_text(row[name], name) for name in ("output_A", "output_B")]
    prompt = row_prompt(row, ("input",))
    metadata = metadata_of(row, {*prompt.columns, "output_A", "output_B"})
    yield Comparison(prompt.messages, tuple(map(Response, texts)), int(wins[1] > wins[0]), metadata)
