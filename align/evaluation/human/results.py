"""Results of a human evaluation: wins against a baseline, lengths, and how far annotators agree."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from align.errors import InputError
from align.evaluation.human.ratings import Rating
from align.evaluation.human.scales import FAILED, LENGTHS, LEVELS, SCALES
from align.evaluation.statistics import Score, score
from align.registry import LazyModule

if TYPE_CHECKING:
    import numpy as np
else:
    np = LazyModule("numpy")  # takes a tenth of a second

OVERALL = "overall"  # the mean of the levels on both scales
OUTCOMES = ("win", "tie", "loss")


def human_results(ratings: Sequence[Rating], baseline: str, categories: Mapping[str, str]) -> dict[str, Any]:
    """Return the results as JSON; `categories` are those of the items.

    A model and the baseline are compared by their levels for the same item and annotator. Intervals are over items:
    ratings of one item by several annotators are dependent. Raises `InputError` if the baseline has no rating.
    """
    models = sorted({rating.model for rating in ratings})
    if baseline not in models:
        raise InputError(f"no rating is of the baseline {baseline!r}; rated models: {', '.join(models) or 'none'}")
    compared = {model: _outcomes(ratings, model, baseline) for model in models if model != baseline}
    return {
        "against": baseline,
        "models": {
            model: {
                **{scale: _shares(found, scale) for scale in (OVERALL, *SCALES)},
                "by_category": {
                    name: _shares(own, OVERALL)
                    for name in sorted({categories[item] for item in found})
                    if (own := {item: each for item, each in found.items() if categories[item] == name})
                },
            }
            for model, found in compared.items()
        },
        "length": {model: _length_shares(ratings, model) for model in models},
        "complete_failure": {model: _failures(ratings, model)._asdict() for model in models},
        "agreement": agreement(ratings),
    }


Differences = Mapping[str, list[Mapping[str, float]]]  # item -> for each annotator, {scale: level minus the baseline's}


def _outcomes(ratings: Sequence[Rating], model: str, baseline: str) -> Differences:
    known = {(each.item, each.annotator, each.model): each.levels for each in ratings}
    found: dict[str, list[Mapping[str, float]]] = defaultdict(list)
    for (item, annotator, whose), levels in known.items():
        other = known.get((item, annotator, baseline))
        if whose == model and other is not None:
            differences: dict[str, float] = {scale: levels[scale] - other[scale] for scale in SCALES}
            found[item].append({**differences, OVERALL: sum(differences.values())})
    if not found:
        raise InputError(f"no annotator rated both {model!r} and the baseline {baseline!r} for one prompt")
    return found


def _shares(found: Differences, scale: str) -> dict[str, Any]:
    """Return the shares of wins, ties and losses, and wins minus losses, with intervals over items."""
    signs = [[(each[scale] > 0) - (each[scale] < 0) for each in differences] for differences in found.values()]
    counts = [len(each) for each in signs]
    shares = {
        name: score([sum(sign == wanted for sign in each) for each in signs], counts)._asdict()
        for name, wanted in zip(OUTCOMES, (1, 0, -1), strict=True)
    }
    net = score([float(sum(each)) for each in signs], counts)
    return {**shares, "net": net._asdict(), "ratings": sum(counts)}


def _length_shares(ratings: Sequence[Rating], model: str) -> dict[str, Any]:
    by_item: dict[str, list[str]] = defaultdict(list)
    for each in ratings:
        if each.model == model and each.length is not None:
            by_item[each.item].append(each.length)
    if not by_item:
        return {}
    counts = [len(each) for each in by_item.values()]
    return {name: score([each.count(name) for each in by_item.values()], counts)._asdict() for name in LENGTHS}


def _failures(ratings: Sequence[Rating], model: str) -> Score:
    by_item: dict[str, list[bool]] = defaultdict(list)
    for each in ratings:
        if each.model == model:
            by_item[each.item].append(FAILED in each.levels.values())
    return score([sum(each) for each in by_item.values()], [len(each) for each in by_item.values()])


def agreement(ratings: Sequence[Rating]) -> dict[str, float | None]:
    """Return Krippendorff's alpha of each question, with ordinal differences; None if it is not defined.

    It is 1 for perfect agreement and 0 for that of chance. It is not defined for one annotator, or if all ratings are
    equal.
    """
    places = {name: number for number, name in enumerate(LENGTHS)}
    questions: dict[str, dict[tuple[str, str, str], int]] = {
        **{scale: {_unit(each): each.levels[scale] for each in ratings} for scale in SCALES},
        "length": {_unit(each): places[each.length] for each in ratings if each.length is not None},
    }
    domains = {**dict.fromkeys(SCALES, [FAILED, *LEVELS]), "length": list(places.values())}
    return {name: _alpha(known, domains[name]) for name, known in questions.items()}


def _unit(rating: Rating) -> tuple[str, str, str]:
    return rating.annotator, rating.item, rating.model


def _alpha(known: Mapping[tuple[str, str, str], int], domain: Sequence[int]) -> float | None:
    import krippendorff  # noqa: PLC0415 - only this command needs it

    annotators = sorted({annotator for annotator, _, _ in known})
    units = sorted({(item, model) for _, item, model in known})
    if len(annotators) < 2 or len(set(known.values())) < 2:  # noqa: PLR2004
        return None
    values = [[known.get((annotator, *unit), np.nan) for unit in units] for annotator in annotators]
    if not any(sum(not math.isnan(row[column]) for row in values) > 1 for column in range(len(units))):
        return None
    found: Any = krippendorff.alpha(
        reliability_data=np.array(values, dtype=np.float64), value_domain=domain, level_of_measurement="ordinal"
    )
    return None if math.isnan(found) else float(found)
