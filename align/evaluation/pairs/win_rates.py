"""Win rates of a model over a baseline, as functions of the table of judged pairs.

A judge that prefers a position is asked in both orders. What becomes of pairs whose two games disagree, or of a game
without a readable verdict, changes the rate; each rule has a name, which is part of the metric's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from align.errors import InputError
from align.evaluation.pairs.length_control import LengthControl, length_control
from align.evaluation.pairs.table import MAX_GAMES, TIE, JudgedPair, bounds, questions_of
from align.evaluation.statistics import Score, score
from align.registry import LazyModule

if TYPE_CHECKING:
    import numpy as np
else:
    np = LazyModule("numpy")  # a recipe's tasks are validated without it

Rate = tuple[float, int]  # (wins, of how many) of one pair
Wins = Sequence[float | None]  # outcomes of a pair's games


def consistent(wins: Wins) -> Rate:
    """Return the mean of games that agree on the better response or on a tie; any other pair is left out.

    >>> consistent([1.0, 1.0]), consistent([1.0, 0.0]), consistent([1.0, None])
    ((1.0, 1), (0.0, 0), (0.0, 0))
    """
    known = _known(wins)
    return (sum(known) / len(known), 1) if len(known) == len(wins) and _agree(known) else (0.0, 0)


def both_games(wins: Wins) -> Rate:
    """Count each game for itself; only void games are left out.

    >>> both_games([1.0, 0.0]), both_games([1.0, None])
    ((1.0, 2), (1.0, 1))
    """
    known = _known(wins)
    return float(sum(known)), len(known)


def tie_if_inconsistent(wins: Wins) -> Rate:
    """Return a tie if the games disagree, else their mean; a pair with a void game is left out (MT-Bench, pairwise).

    >>> tie_if_inconsistent([1.0, 0.0]), tie_if_inconsistent([1.0, None])
    ((0.5, 1), (0.0, 0))
    """
    known = _known(wins)
    if len(known) < len(wins):
        return 0.0, 0
    return (sum(known) / len(known) if _agree(known) else TIE), 1


RULES: Mapping[str, Callable[[Wins], Rate]] = {
    "consistent": consistent,
    "both_games": both_games,
    "tie_if_inconsistent": tie_if_inconsistent,
}


def win_rate(pairs: Sequence[JudgedPair], rule: str) -> Score | None:
    """Return the win rate by a rule of `RULES`, with its interval over questions; None if no pair counts."""
    return _score_of_questions([(pair, *rate) for pair in pairs if (rate := RULES[rule](pair.wins))[1]])


def _score_of_questions(counted: Sequence[tuple[JudgedPair, float, int]]) -> Score | None:
    """Return the sum of values over that of counts, with its interval over questions: turns of one are dependent."""
    if not counted:
        return None
    found = [
        (sum(counted[place][1] for place in places), sum(counted[place][2] for place in places))
        for places in questions_of([pair for pair, _, _ in counted])
    ]
    return score(*zip(*found, strict=True))


def equal_length(pairs: Sequence[JudgedPair]) -> LengthControl:
    """Return the win rate at equal length. A pair's outcome is the mean of its games that are not void.

    Raises `InputError` if all are void, or if the table does not hold the responses.
    """
    counted = [(pair, *both_games(pair.wins)) for pair in pairs]
    decided = [(pair, wins / count) for pair, wins, count in counted if count]
    known = [(win, pair.longer_by) for pair, win in decided]
    if not known:
        raise InputError(f"win rate: the judge decides none of {len(pairs)} comparisons")
    if without := sum(longer_by is None for _, longer_by in known):
        raise InputError(f"win rate at equal length: {without} of {len(known)} pairs are without their responses")
    outcomes, longer_by = np.array(known, dtype=np.float64).T
    return length_control(outcomes, longer_by, questions_of([pair for pair, _ in decided]))


def position_bias(pairs: Sequence[JudgedPair]) -> Score | None:
    """Return how much more a response wins if it is shown first; None without pairs of two games that are not void.

    It is from -1 to 1: of a judge that names the first response with probability b, whatever it says, it is b.
    """
    both = [(pair, _known(pair.wins)) for pair in pairs if len(pair.games) == MAX_GAMES]
    return _score_of_questions([(pair, wins[0] - wins[1], 1) for pair, wins in both if len(wins) == MAX_GAMES])


def pair_counts(pairs: Sequence[JudgedPair]) -> dict[str, Any]:
    """Return what the judge did not decide, and how far each win rate depends on it, as JSON.

    `void` counts the games without a verdict by reason, `inconsistent` the pairs whose two games disagree. `bounds` are
    the win rates if every void game were lost, and if every one were won.
    """
    games = [game for pair in pairs for game in pair.games]
    reasons = Counter(game.void for game in games if game.verdict is None)
    known = [_known(pair.wins) for pair in pairs]

    return {
        "pairs": len(pairs),
        "games": len(games),
        "void_games": sum(reasons.values()),
        "void": dict(reasons),
        "inconsistent": sum(len(each) == MAX_GAMES and not _agree(each) for each in known),
        "bounds": {f"win_rate.{rule}": bounds(pairs, partial(win_rate_value, rule=rule)) for rule in RULES},
    }


def win_rate_value(pairs: Sequence[JudgedPair], rule: str) -> float | None:
    """Return the win rate by a rule without its interval."""
    rates = [RULES[rule](pair.wins) for pair in pairs]
    count = sum(number for _, number in rates)
    return sum(wins for wins, _ in rates) / count if count else None


def _known(wins: Wins) -> list[float]:
    return [win for win in wins if win is not None]


def _agree(wins: Sequence[float]) -> bool:
    """Return whether all games name the same response, or all a tie."""
    return len({(win > TIE) - (win < TIE) for win in wins}) == 1
