"""Fill the table of judged pairs by a judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from align.errors import InputError
from align.evaluation.pairs.table import A_FIRST, B_FIRST, TIE, JudgedGame, Order, verdict_of
from align.records import Prompt
from align.rewards.judge_prompts.own import conversation
from align.rewards.verdicts import NO_MARK, Game, Group, Judge, Verdict

PAIR = 2
ORDERS: Sequence[Order] = (A_FIRST, B_FIRST)


def judged_games(groups: Sequence[Group], judge: Judge, *, name: str = "") -> list[JudgedGame]:
    """Return the games of each group's first response against its second; `name` is the judge's.

    A prompt's id is its `id` in the metadata, or its number from 1. Raises `InputError` if a group does not have two
    responses, and for two prompts with one id.
    """
    if wrong := [number for number, (_, responses) in enumerate(groups) if len(responses) != PAIR]:
        raise InputError(f"win rate: prompt {wrong[0] + 1} has {len(groups[wrong[0]][1])} responses; it needs two")
    ids = [_id(prompt, number) for number, (prompt, _) in enumerate(groups, start=1)]
    if repeated := [name for name, count in Counter(ids).items() if count > 1]:
        raise InputError(f"win rate: {ids.count(repeated[0])} prompts have the id {repeated[0]!r}; give each its own")
    found: list[JudgedGame] = []
    for name_of_prompt, (prompt, responses), verdicts in zip(ids, groups, judge(groups), strict=True):
        known: dict[str, Any] = {
            "id": name_of_prompt,
            "prompt": _text(prompt),
            "a": str(responses[0]),
            "b": str(responses[1]),
            "judge": name,
            "category": str(prompt.metadata.get("category") or ""),
        }
        for order, game in _games(*verdicts):
            void = (game.void or NO_MARK) if game.win is None else ""
            found.append(JudgedGame(**known, order=order, raw=game.raw, verdict=verdict_of(game), void=void))
    return found


def _id(prompt: Prompt, number: int) -> str:
    given = prompt.metadata.get("id")
    return str(number if given is None else given)


def _games(ours: Verdict, theirs: Verdict) -> list[tuple[Order, Game]]:
    """Return the games that the judge reports; of one that rates each response by itself, one game by the rewards."""
    if len(ours.games) > len(ORDERS):
        raise InputError(f"win rate: the judge reports {len(ours.games)} games of a pair; it has one in each order")
    if ours.games:
        return list(zip(ORDERS, ours.games, strict=False))
    raw = {"rewards": [ours.reward, theirs.reward]}
    if ours.reward is None or theirs.reward is None:
        void = next(each.why or NO_MARK for each in (ours, theirs) if each.reward is None)
        return [("", Game(None, raw, void))]
    return [("", Game(TIE if ours.reward == theirs.reward else float(ours.reward > theirs.reward), raw))]


def _text(prompt: Prompt) -> str:
    """Return the text of a single message, or the dialogue with its roles."""
    return prompt.messages[-1].text if len(prompt.messages) == 1 else conversation(prompt)
