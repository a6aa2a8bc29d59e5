"""Comparisons of one prompt, merged into one group of responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from align.curate.row_keys import response_key
from align.curate.settings import GroupChoiceSettings
from align.data.group_choice import best_and_low, most_variance
from align.records import Comparison, Record, Response

ORIGINS = "origins"  # metadata of sampled groups: one entry a response


def merge(comparisons: Sequence[Comparison]) -> Comparison:
    """Return one group with the distinct responses of comparisons of one prompt, in their order.

    The comparisons have rewards of one scale or none, and the same label or none (`RowKeys.prompt`). Of equal responses
    the first with the highest reward is kept. Prompt and metadata are those of the first comparison; keys that it lacks
    are those of the next.
    """
    kept: dict[bytes, tuple[Response, Any]] = {}
    metadata: dict[str, Any] = {}
    for comparison in comparisons:
        origins = _origins(comparison)
        metadata = {**comparison.metadata, **metadata}
        for response, origin in zip(comparison.responses, origins, strict=True):
            key = response_key(response)
            if key not in kept or _reward(response) > _reward(kept[key][0]):
                kept[key] = response, origin
    first = comparisons[0]
    chosen = None if first.chosen is None else list(kept).index(response_key(first.responses[first.chosen]))
    metadata.pop(ORIGINS, None)
    if any(origin is not None for _, origin in kept.values()):
        metadata[ORIGINS] = [origin for _, origin in kept.values()]
    return Comparison(first.prompt, tuple(each for each, _ in kept.values()), chosen, metadata, first.tools)


def is_tie(record: Record) -> bool:
    """Return whether a record is a group of several responses that all have the same reward, and none is labelled."""
    if not isinstance(record, Comparison) or len(record.responses) < 2 or record.chosen is not None:
        return False
    rewards = {response.reward for response in record.responses}
    return len(rewards) == 1 and rewards != {None}


def chosen_responses(record: Record, rule: GroupChoiceSettings) -> Record:
    """Return a group with the responses that the rule keeps; a labelled one is always kept.

    Other records, and groups without rewards, stay as they are.
    """
    if not isinstance(record, Comparison) or rule.keep == "all" or len(record.responses) < 2:
        return record
    rewards = [response.reward for response in record.responses if response.reward is not None]
    if not rewards:
        return record
    indices = best_and_low(rewards) if rule.responses is None else most_variance(rewards, rule.responses)
    if record.chosen is not None and record.chosen not in indices:
        indices = [record.chosen, *indices[1:]]
    chosen = None if record.chosen is None else indices.index(record.chosen)
    metadata = dict(record.metadata)
    if ORIGINS in metadata:
        origins = _origins(record)
        metadata[ORIGINS] = [origins[index] for index in indices]
    responses = tuple(record.responses[index] for index in indices)
    return Comparison(record.prompt, responses, chosen, metadata, record.tools)


def _origins(comparison: Comparison) -> Sequence[Any]:
    """Return the origin of each response; None where it is not known."""
    origins: Any = comparison.metadata.get(ORIGINS)
    if isinstance(origins, list | tuple) and len(cast(Sequence[Any], origins)) == len(comparison.responses):
        return cast(Sequence[Any], origins)
    return [None] * len(comparison.responses)


def _reward(response: Response) -> float:
    return float("-inf") if response.reward is None else response.reward
