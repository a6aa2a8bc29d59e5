"""How the hidden states of a text's tokens become one vector.

Shape legend: T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from align.curate.embeddings.settings import PoolingName

TEXT = "{text}"  # place of the text in a template
LAST_LAYER = (-1,)
FIRST_AND_LAST = (1, -1)  # layer 0 holds the token embeddings
ECHO = f"Rewrite the sentence: {TEXT}, rewritten sentence: {TEXT}"  # Springer et al. 2024 (arXiv 2402.15449)
PROMPT_EOL = f'This sentence : "{TEXT}" means in one word:"'  # Jiang et al. 2023 (arXiv 2307.16645), sec. 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooling:
    """The tokens that count, the layers whose states are averaged, and how the states become one."""

    reduce: Callable[[Tensor], Tensor]  # [T, D] -> [D]
    layers: tuple[int, ...] = LAST_LAYER
    template: str = TEXT
    whole: bool = False  # all tokens count; else those of the last copy of the text, without special tokens


def weighted_mean(states_TD: Tensor) -> Tensor:
    """Return the mean with weights 1, 2, … T (SGPT, Muennighoff 2022, eq. 2): a later token has seen more text."""
    weights_T = torch.arange(1, len(states_TD) + 1, dtype=states_TD.dtype, device=states_TD.device)
    return weights_T @ states_TD / weights_T.sum()


def _mean(states_TD: Tensor) -> Tensor:
    return states_TD.mean(dim=0)


def _last(states_TD: Tensor) -> Tensor:
    return states_TD[-1]


POOLINGS: Mapping[PoolingName, Pooling] = {
    "cls": Pooling(reduce=lambda states_TD: states_TD[0], whole=True),
    "mean": Pooling(reduce=_mean),
    "max": Pooling(reduce=lambda states_TD: states_TD.amax(dim=0)),
    "last": Pooling(reduce=_last),
    "weighted_mean": Pooling(reduce=weighted_mean),
    "first_last": Pooling(reduce=_mean, layers=FIRST_AND_LAST),
    "echo": Pooling(reduce=_mean, template=ECHO),
    "prompt_eol": Pooling(reduce=_last, template=PROMPT_EOL, whole=True),
}
