"""Pairs of a preferred and a rejected answer, and single answers that were liked or not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from align.data.columns import Row
from align.data.readers.cells import as_list, as_number, as_text, metadata_of, shortened
from align.data.readers.prompts import SYSTEM_COLUMNS, RowPrompt, row_prompt, split_answer, with_system
from align.errors import InputError
from align.records import Comparison, Record, Response

PAIRS = (  # columns of the better and of the worse answer
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("chosen_messages", "rejected_messages"),
    ("completion_a", "completion_b"),  # Peng et al. 2023 (GPT-4-LLM)
    ("good_edited_response", "bad_edited_response"),  # Wang et al. 2025 (HelpSteer3)
    ("edited_response", "original_response"),
)
PAIR_REWARDS = tuple(
    (form.format(side="chosen", kind=kind), form.format(side="rejected", kind=kind))
    for kind in ("reward", "score", "rating")
    for form in ("{side}_{kind}", "{kind}_{side}", "{side}-{kind}")
)
REWARD_COLUMNS = frozenset({"margin", *(name for names in PAIR_REWARDS for name in names)})
LABELS = {"true": 1.0, "1": 1.0, "false": 0.0, "0": 0.0}
LIKED_COLUMNS = ("messages", "conversations", "completion", "output", "generated_solution")
LIKED = "liked"  # key of the metadata: whether a single response was liked
# Why such a row is no comparison, for errors
LABELLED_RESPONSE = "one response with a label, and a comparison needs two; the loss kto takes such rows"


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
    responses = (Response.of(chosen, chosen_reward), Response.of(rejected, rejected_reward))
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


def distilabel_pair(row: Row) -> Iterator[Record]:
    """Yield the chosen and the rejected one of distilabel's generations, with the ratings that are a list beside them.

    `chosen_score`, which has no counterpart, is one of these ratings.
    """
    generations, ratings = as_list(row["generations"], "generations"), as_list(row["rating"], "rating")
    if len(generations) != len(ratings):
        raise InputError(f"rating has {len(ratings)} items, and generations has {len(generations)}")
    rewards = dict(zip((as_text(text, "a generation") for text in generations), ratings, strict=True))
    used = ("generations", "rating", "chosen_score")
    rated = {f"{side}_rating": rewards.get(as_text(row[side], side)) for side in PAIRS[0]}
    (pair,) = preference({**{name: row[name] for name in row if name not in used}, **rated})
    yield replace(pair, metadata={name: value for name, value in pair.metadata.items() if name not in rated})


def best_of(row: Row) -> Iterator[Record]:
    """Yield the right answers, then the wrong ones, with rewards 1 and 0; Malik et al. 2025 (RewardBench 2).

    A single right answer is the chosen one.
    """
    right, wrong = ([as_text(answer, name) for answer in as_list(row[name], name)] for name in ("chosen", "rejected"))
    prompt = row_prompt(row)
    rewards = [1.0] * len(right) + [0.0] * len(wrong)
    responses = tuple(map(Response, (*right, *wrong), rewards))
    metadata = metadata_of(row, {*prompt.columns, "chosen", "rejected"})
    yield Comparison(prompt.messages, responses, 0 if len(right) == 1 else None, metadata)


def has_lists_of_answers(row: Row) -> bool:
    """Return whether the chosen and the rejected answers are lists of texts, not dialogues."""
    return all(isinstance(row[name], list) and all(isinstance(each, str) for each in row[name]) for name in PAIRS[0])


def unpaired(row: Row) -> Iterator[Record]:
    """Yield one answer that was liked (reward 1) or not (reward 0); Ethayarajh et al. 2024 (KTO)."""
    label = next(name for name in ("label", "kto_tag", "is_correct") if name in row)
    reward = LABELS.get(str(row[label]).lower())
    if reward is None:
        raise InputError(f"{label} is {shortened(row[label])}; true or false is needed")
    column = next(name for name in LIKED_COLUMNS if name in row)
    is_dialogue = column in ("messages", "conversations")
    prompt = RowPrompt(with_system(row, ()), SYSTEM_COLUMNS) if is_dialogue else row_prompt(row)
    value = as_list(row[column], column) if is_dialogue else row[column]
    before, answer = split_answer(prompt.messages, value, column)
    metadata = {**metadata_of(row, {*prompt.columns, column, label}), LIKED: bool(reward)}
    yield Comparison(before, (Response.of(answer, reward),), None, metadata)
