"""Rows ranked by a score: similarity to target examples (RDS+), or instruction-following difficulty (IFD).

Shapes: `N` rows, `M` targets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from align.curate.semantic import Vectors, unit_length


def nearest_target(rows_ND: Vectors, targets_MD: Vectors) -> tuple[list[float], list[int]]:
    """Return each row's largest cosine to a target, and the rows in the order in which the targets choose them.

    In turns each target takes the most similar row that no target has taken (RDS+, Ivison et al. 2025, arXiv
    2503.01807, sec. 3), so that no target is left out for another with many similar rows. Of equal cosines the earlier
    row is taken.
    """
    cosines_MN = unit_length(targets_MD) @ unit_length(rows_ND).T
    wanted = [iter(np.argsort(-cosines_N, kind="stable").astype(np.int32)) for cosines_N in cosines_MN]
    is_taken = [False] * cosines_MN.shape[1]
    order: list[int] = []
    while len(order) < len(is_taken):
        for rows in wanted:
            row = next((row for row in rows if not is_taken[row]), None)
            if row is not None:
                is_taken[row] = True
                order.append(int(row))
    return cosines_MN.max(axis=0).tolist(), order


def most_difficult(scores: Sequence[float | None]) -> list[int]:
    """Return the rows whose instruction-following difficulty is below 1, the most difficult first.

    At 1 and above the instruction does not help to predict the answer: they belong to different rows, by rule of thumb
    (Li et al. 2024, Cherry LLM, sec. 2.3). Rows without a score are left out.
    """
    known = [(-score, row) for row, score in enumerate(scores) if score is not None and score < 1]
    return [row for _, row in sorted(known)]
