"""AlpacaEval's length-controlled win rate, computed by its own package (the extra `alpaca-eval`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align.errors import InputError, one_line
from align.evaluation.pairs.forms.alpaca_eval import write
from align.evaluation.pairs.table import JudgedPair
from align.evaluation.statistics import Score

NUM_INSTRUCTIONS = 805  # the difficulties of the instructions are known by their place in AlpacaEval's list
NORMAL_95 = 1.96


def length_controlled_win_rate(pairs: Sequence[JudgedPair]) -> Score:
    """Return the length-controlled win rate of AlpacaEval 2.0, by `alpaca_eval.metrics`.

    The interval is 1.96 of its standard errors of the predicted preferences, which leave out the error of the fit. The
    package reads `df_gamed.csv` from the Hub's dataset tatsu-lab/alpaca_eval. It takes an instruction's difficulty by
    the number of its row, so the pairs must be all 805 in AlpacaEval's order, which cannot be checked here.
    Raises `InputError` if there are not 805 different instructions, without the package, and without the file.
    """
    instructions = {pair.games[0].prompt for pair in pairs}
    if len(pairs) != NUM_INSTRUCTIONS or len(instructions) != NUM_INSTRUCTIONS:
        raise InputError(
            f"alpaca_eval_lc: {len(pairs)} rows with {len(instructions)} instructions; the length-controlled win rate "
            f"needs the {NUM_INSTRUCTIONS} of AlpacaEval, in its order; task alpaca_eval takes any"
        )
    try:
        import pandas as pd  # noqa: PLC0415 - of the extra
        from alpaca_eval.metrics.glm_winrate import (  # noqa: PLC0415 # pyright: ignore[reportMissingImports, reportMissingTypeStubs]
            get_length_controlled_winrate,
        )
    except ImportError as error:
        raise InputError(
            f"alpaca_eval_lc: alpaca_eval cannot be imported ({one_line(error)}): pip install 'align[alpaca-eval]'"
        ) from error
    rows: Any = pd.DataFrame([write(pair) for pair in pairs])
    try:
        found: Any = get_length_controlled_winrate(rows, save_weights_dir=None)
    except OSError as error:
        raise InputError(
            f"alpaca_eval_lc: df_gamed.csv of the dataset tatsu-lab/alpaca_eval cannot be read: {one_line(error)[:200]}"
        ) from error
    value, margin = found["length_controlled_winrate"] / 100, NORMAL_95 * found["lc_standard_error"] / 100
    return Score(value, value - margin, value + margin, len(pairs))
