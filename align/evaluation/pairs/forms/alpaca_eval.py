"""AlpacaEval's annotations.json.

Rows are {instruction, output_1, generator_1, output_2, generator_2, annotator, preference}: output 1 is the baseline's.
A preference is 1 plus the annotator's probability that output 2 is better; 0 and 1.5 are ties, null is no verdict. Each
pair was shown in one order, which AlpacaEval draws and does not write down.
"""

from __future__ import annotations

from typing import Any

from align.errors import InputError
from align.evaluation.pairs.forms.form import VOID, Form, Row, text_or_error
from align.evaluation.pairs.table import TIE, JudgedGame, JudgedPair
from align.rewards.verdicts import NO_MARK

BASELINE_WINS, MODEL_WINS = 1.0, 2.0
DRAW = 0.0  # an older form of 1.5


def read(row: Row) -> list[JudgedGame]:
    """Return the game of a row; raise `InputError` for outputs that are no text and a preference out of range."""
    baseline, ours = text_or_error(row, "output_1"), text_or_error(row, "output_2")
    preference = row.get("preference")
    if preference is None:
        win = None
    elif not isinstance(preference, bool | str) and (preference == DRAW or BASELINE_WINS <= preference <= MODEL_WINS):
        win = TIE if preference == DRAW else float(preference) - BASELINE_WINS
    else:
        raise InputError(f"has preference {preference!r}; it is from 1 to 2, 0 or null")
    return [
        JudgedGame(
            id=str(row["instruction"]),
            prompt=str(row["instruction"]),
            a=ours,
            b=baseline,
            order="",
            judge=str(row.get("annotator") or ""),
            raw=logprobs(row.get("raw_completion")),
            verdict=win,
            void=str(row.get(VOID) or NO_MARK) if win is None else "",
            model=str(row.get("generator_2") or ""),
            baseline=str(row.get("generator_1") or ""),
            category=str(row.get("dataset") or ""),
        )
    ]


def logprobs(completion: Any) -> dict[str, float] | str:  # noqa: ANN401 - JSON of a server
    """Return {token: log-probability} of the first token in a stored completion, else its text, if it has one."""
    if not isinstance(completion, dict):
        return completion if isinstance(completion, str) else ""
    content = (completion.get("logprobs") or {}).get("content") or []
    if not content:
        return str(completion.get("text") or "")
    return {each["token"]: float(each["logprob"]) for each in content[0]["top_logprobs"]}


def write(pair: JudgedPair) -> Row:
    """Return the row of a pair; of two games, the mean of those that are not void is its preference.

    The reason is that of the first game where all are void.
    """
    game = pair.games[0]
    if game.a is None or game.b is None:
        raise InputError(f"pair {game.id!r} is without its responses, which AlpacaEval's form holds")
    known = [win for win in pair.wins if win is not None]
    void = {} if known or game.void == NO_MARK else {VOID: game.void}
    return {
        "dataset": game.category,
        "instruction": game.prompt,
        "output_1": game.b,
        "generator_1": game.baseline,
        "output_2": game.a,
        "generator_2": game.model,
        "annotator": game.judge,
        "preference": BASELINE_WINS + sum(known) / len(known) if known else None,
        **void,
    }


FORM = Form(frozenset({"instruction", "output_1", "output_2"}), read, write)
