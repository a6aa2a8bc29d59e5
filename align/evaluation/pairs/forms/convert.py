"""Write a file of judged pairs in the form of another tool."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from align.artifacts import write_text
from align.data.rows import read_rows
from align.errors import InputError
from align.evaluation.pairs.forms import FORMS, read_games
from align.evaluation.pairs.table import pairs_of
from align.registry import pick


def convert_pairs(path: str, form: str, out: Path) -> dict[str, Any]:
    """Write the pairs of a file to `out` in a form of `FORMS`; return a summary.

    A file that ends in .json becomes one list, as AlpacaEval's annotations.json, and any other one row a line. Raises
    `InputError` for an unknown form, for pairs that it cannot hold, and if `out` exists.
    """
    if out.exists():
        raise InputError(f"{out}: exists; name another file")
    writer = pick(FORMS, form, "form of judged pairs")
    pairs = pairs_of(read_games(list(read_rows(path)), path))
    rows = [dict(writer.write(pair)) for pair in pairs]
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(out, json.dumps(rows, indent=2, ensure_ascii=False) if out.suffix == ".json" else "".join(lines))
    games = [game for pair in pairs for game in pair.games]
    void = Counter(game.void for game in games if game.verdict is None)
    return {"out": str(out), "form": form, "pairs": len(pairs), "games": len(games), "void": dict(void)}
