"""The table of judged pairs: one row per game, from which every pairwise metric is computed.

A game is one comparison of the response `a` of the evaluated model with the response `b` of the baseline. `verdict` is
about these two, whichever the judge was shown first: one of `LABELS`, the probability that `a` is the better one, or
None if the game is void.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, NamedTuple

from align.errors import InputError
from align.rewards.judge_prompts.parsing import LABELS
from align.rewards.verdicts import NO_MARK, Game

A_FIRST, B_FIRST = "a first", "b first"
Order = Literal["a first", "b first", ""]  # "": not known, or each response was rated by itself
TIE = 0.5
MAX_GAMES = 2  # of a pair: in both orders
LOST, WON = "B>>A", "A>>B"  # the extreme verdicts
FIRST_TOKEN, SECOND_TOKEN = "m", "M"  # noqa: S105 - AlpacaEval's names of the output shown first and second


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedGame:
    """A row of the table."""

    id: str  # of the prompt
    prompt: str
    a: str | None  # the evaluated model's response; None if a file of verdicts does not hold it
    b: str | None  # the baseline's
    order: Order
    judge: str
    raw: Any = ""  # the judge's text, or {token: log-probability}
    verdict: str | float | None
    void: str = ""  # why there is no verdict
    model: str = ""
    baseline: str = ""
    category: str = ""
    turn: int = 1

    @property
    def win(self) -> float | None:
        """1 if `a` is better, 0.5 for a tie, 0 if `b` is, or the probability that `a` is; None if the game is void."""
        return LABELS[self.verdict] if isinstance(self.verdict, str) else self.verdict

    @property
    def is_clear(self) -> bool:
        """Whether one response is better by much."""
        return isinstance(self.verdict, str) and ">>" in self.verdict

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> JudgedGame:
        """Return the row of a file; a verdict that is missing is computed from log-probabilities in `raw`.

        Raises `InputError` for missing columns and for values out of range.
        """
        known = {each.name for each in fields(cls)}
        if missing := [name for name in ("id", "prompt", "a", "b", "verdict") if name not in row]:
            raise InputError(f"a judged pair has no {missing[0]!r}; it has {', '.join(sorted(row))}")
        if row["id"] is None:
            raise InputError("has id null; the games of a pair have one id")
        for name in ("a", "b"):
            if not isinstance(row[name], str | None):
                raise InputError(f"has {name} {row[name]!r:.60}; a response is a text, or null where it is not known")
        values: dict[str, Any] = {"order": "", "judge": "", **{name: row[name] for name in known if name in row}}
        if values["order"] not in (A_FIRST, B_FIRST, ""):
            raise InputError(f"order is {A_FIRST!r}, {B_FIRST!r} or empty, not {values['order']!r}")
        verdict = values["verdict"]
        raw = values.get("raw")
        if verdict is None and not values.get("void") and isinstance(raw, Mapping):
            values["verdict"] = verdict = _verdict_of_logprobs(raw, values["order"])
        if not is_verdict(verdict):
            raise InputError(f"a verdict is one of {', '.join(LABELS)}, a number from 0 to 1 or null, not {verdict!r}")
        void = "" if verdict is not None else values.get("void") or NO_MARK
        values |= {"id": str(values["id"]), "void": void}
        return cls(**values)


class JudgedPair(NamedTuple):
    """The games of one pair of responses."""

    games: tuple[JudgedGame, ...]

    @property
    def wins(self) -> list[float | None]:
        """The outcome of each game for the evaluated model."""
        return [game.win for game in self.games]

    @property
    def longer_by(self) -> int | None:
        """Length of the evaluated model's response minus the baseline's, in characters; None if one is not known."""
        a, b = self.games[0].a, self.games[0].b
        return None if a is None or b is None else len(a) - len(b)


def pairs_of(games: Iterable[JudgedGame]) -> list[JudgedPair]:
    """Return the pairs in order of their first games.

    Raises `InputError` for a pair with more than two games, or with two in the same order.
    """
    found: dict[tuple[str, str, str, str, int], list[JudgedGame]] = {}
    for game in games:
        found.setdefault((game.model, game.baseline, game.category, game.id, game.turn), []).append(game)
    for (model, *_), each in found.items():
        orders = [game.order for game in each]
        if len(orders) > MAX_GAMES or len(set(orders)) < len(orders):
            of_model = f" of {model}" if model else ""
            raise InputError(
                f"pair {each[0].id!r}{of_model} has {len(each)} games: one, or one in each order, is right"
            )
    return [JudgedPair(tuple(sorted(each, key=lambda game: game.order == B_FIRST))) for each in found.values()]


def questions_of(pairs: Sequence[JudgedPair]) -> list[list[int]]:
    """Return the indices of the pairs of each question, which has one for each turn."""
    found: dict[tuple[str, str, str, str], list[int]] = {}
    for index, pair in enumerate(pairs):
        game = pair.games[0]
        found.setdefault((game.model, game.baseline, game.category, game.id), []).append(index)
    return list(found.values())


def models_of(games: Iterable[JudgedGame]) -> list[str]:
    """Return the names of the evaluated models, in order of appearance."""
    return list(dict.fromkeys(game.model for game in games))


def with_voids_as(pairs: Iterable[JudgedPair], verdict: str) -> list[JudgedPair]:
    """Return the pairs with this verdict in place of each void game."""
    return [
        JudgedPair(tuple(game if game.verdict is not None else replace(game, verdict=verdict) for game in pair.games))
        for pair in pairs
    ]


def bounds(
    pairs: Sequence[JudgedPair], metric: Callable[[Sequence[JudgedPair]], float | None]
) -> tuple[float | None, float | None]:
    """Return the metric if every void game were lost, and if every one were won."""
    return metric(with_voids_as(pairs, LOST)), metric(with_voids_as(pairs, WON))


def verdict_of(game: Game) -> str | float | None:
    """Return a judge's game as a verdict of the table."""
    if game.win is not None and not 0 <= game.win <= 1:
        raise InputError(f"win rate: the judge reports a game of {game.win!r}; it is from 0 to 1, or None")
    label = {1.0: "A>B", TIE: "A=B", 0.0: "B>A"}.get(-1 if game.win is None else game.win)
    return game.win if label is None else label.replace(">", ">>") if game.is_clear else label


def is_verdict(value: object) -> bool:
    """Return whether a value is a label, a probability or None."""
    if isinstance(value, str):
        return value in LABELS
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1)


def first_probability(logprobs: Mapping[str, float]) -> float | None:
    """Return the probability of AlpacaEval's token for the output shown first, among its two tokens.

    A token that is not among the reported ones has probability 0; None if neither is. Dubois et al. 2024
    (AlpacaEval 2.0): `1 - (preference - 1)` before both outputs are put back into their order.

    >>> round(first_probability({"m": -0.1, "M": -2.4, "The": -5.0}), 3)
    0.909
    """
    first, second = (math.exp(logprobs.get(token, -math.inf)) for token in (FIRST_TOKEN, SECOND_TOKEN))
    return first / (first + second) if first + second else None


def _verdict_of_logprobs(logprobs: Mapping[str, Any], order: str) -> float | None:
    if not order:
        raise InputError("a verdict of log-probabilities needs the order in which both responses were shown")
    first = first_probability(logprobs)
    return first if first is None or order == A_FIRST else 1 - first
