"""AlpacaEval's annotations.json.

Rows are {instruction, output_1, generator_1, output_2, generator_2, annotator, preference}: output 1 is the baseline's.
A preference is 1 plus the annotator's probability that output 2 is better; 0 and 1.5 are ties, null is no verdict. Each
pair was shown in one order, which AlpacaEval draws and does not write down. `void_a_first` and `void_b_first`, which
AlpacaEval does not read, hold why a game of a pair in both orders is void; the preference is that of the other game.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from align.errors import InputError
from align.evaluation.pairs.forms.form import VOID, Form, Row, text_or_error
from align.evaluation.pairs.table import A_FIRST, B_FIRST, TIE, JudgedGame, JudgedPair
from align.rewards.verdicts import NO_MARK

BASELINE_WINS, MODEL_WINS = 1.0, 2.0
DRAW = 0.0  # an older form of 1.5
VOID_IN = {A_FIRST: f"{VOID}_a_first", B_FIRST: f"{VOID}_b_first"}  # order -> key of why the pair's game in it is void


def read(row: Row) -> list[JudgedGame]:
    """Return the game of a row, or both; raise `InputError` for outputs that are no text and a wrong preference."""
    baseline, ours = text_or_error(row, "output_1"), text_or_error(row, "output_2")
    preference = row.get("preference")
    if preference is None:
        win = None
    elif not isinstance(preference, bool | str) and (preference == DRAW or BASELINE_WINS <= preference <= MODEL_WINS):
        win = TIE if preference == DRAW else float(preference) - BASELINE_WINS
    else:
        raise InputError(f"has preference {preference!r}; it is from 1 to 2, 0 or null")
    game = JudgedGame(
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
    reasons = {order: str(row[key]) for order, key in VOID_IN.items() if row.get(key)}
    if not reasons:
        return [game]
    void = [replace(game, order=order, raw="", verdict=None, void=reason) for order, reason in reasons.items()]
    if win is None:
        return void
    others = [order for order in VOID_IN if order not in reasons]
    if not others:
        raise InputError(f"has preference {preference!r}, and both of its games are void")
    return [replace(game, order=others[0]), *void]


def logprobs(completion: Any) -> dict[str, float] | str:  # noqa: ANN401 - JSON of a server
    """Return {token: log-probability} of the first token in a stored completion, else its text, if it has one."""
    if not isinstance(completion, dict):
        return completion if isinstance(completion, str) else ""
    content = (completion.get("logprobs") or {}).get("content") or []
    if not content:
        return str(completion.get("text") or "")
    return {each["token"]: float(each["logprob"]) for each in content[0]["top_logprobs"]}


def write(pair: JudgedPair) -> Row:
    """Return the row of a pair; of two games, the mean of those that are not void is its preference."""
    game = pair.games[0]
    if game.a is None or game.b is None:
        raise InputError(f"pair {game.id!r} is without its responses, which AlpacaEval's form holds")
    known = [win for win in pair.wins if win is not None]
    of_both = {VOID_IN[each.order]: each.void for each in pair.games if each.verdict is None and each.order in VOID_IN}
    of_one = {} if known or game.void == NO_MARK else {VOID: game.void}
    void = of_both if len(pair.games) > 1 else of_one
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
