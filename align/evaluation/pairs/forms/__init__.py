"""Forms of files with judged pairs: this project's, FastChat's, AlpacaEval's and Arena-Hard's."""

from __future__ import annotations

from align.errors import InputError
from align.evaluation.pairs.forms import alpaca_eval, arena_hard, fastchat, own
from align.evaluation.pairs.forms.form import Form, Row
from align.evaluation.pairs.table import JudgedGame

__all__ = ["FORMS", "read_games"]

FORMS: dict[str, Form] = {
    "align": own.FORM,
    "alpaca_eval": alpaca_eval.FORM,
    "arena_hard": arena_hard.FORM,
    "arena_hard_2024": arena_hard.FORM_2024,
    "fastchat": fastchat.FORM,
    "vicuna": fastchat.VICUNA_FORM,
}


def read_games(rows: list[Row], place: str) -> list[JudgedGame]:
    """Return the games of a file's rows, whose form is that of the first row's columns.

    Raises `InputError`, which begins with `place`, if no form has these columns, and for rows that cannot be read.
    """
    if not rows:
        raise InputError(f"{place}: no rows")
    form = next((form for form in FORMS.values() if form.columns <= rows[0].keys()), None)
    if form is None:
        known = "; ".join(f"{name}: {', '.join(sorted(form.columns))}" for name, form in FORMS.items())
        raise InputError(f"{place}: no form of judged pairs has the columns {', '.join(rows[0])}; forms: {known}")
    return [game for number, row in enumerate(rows, start=1) for game in form.games(row, f"{place}: row {number}")]
