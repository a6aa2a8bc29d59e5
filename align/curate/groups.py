"""Comparisons of one prompt, merged into one group of responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from align.curate.row_keys import response_key
from align.curate.settings import GroupChoiceSettings
from align.data.group_choice import best_and_low, most_variance
from align.data.readers.response_groups import MODELS
from align.records import Comparison, Record, Response

# Keys of the metadata with one entry per response: of sampled groups, and of groups whose responses name their model
PER_RESPONSE = ("origins", MODELS)


def merge(comparisons: Sequence[Comparison]) -> Comparison:
    """Return one group with the distinct responses of comparisons of one prompt, in their order.

    The comparisons have rewards of one scale or none, and the same label or none (`RowKeys.prompt`). Of equal responses
    the first with the highest reward is kept. Prompt and metadata are those of the first comparison; keys that it lacks
    are those of the next.
    """
    kept: dict[bytes, tuple[Response, list[Any]]] = {}
    metadata: dict[str, Any] = {}
    for comparison in comparisons:
        metadata = {**comparison.metadata, **metadata}
        by_key = [_entries(comparison, name) for name in PER_RESPONSE]
        for response, *entries in zip(comparison.responses, *by_key, strict=True):
            key = response_key(response)
            if key not in kept or _reward(response) > _reward(kept[key][0]):
                kept[key] = response, entries
    first = comparisons[0]
    chosen = None if first.chosen is None else list(kept).index(response_key(first.responses[first.chosen]))
    for number, name in enumerate(PER_RESPONSE):
        found = [entries[number] for _, entries in kept.values()]
        if any(entry is not None for entry in found):
            metadata[name] = found
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
    for name in PER_RESPONSE:
        entries = _entries(record, name)
        if any(entry is not None for entry in entries):
            metadata[name] = [entries[index] for index in indices]
    responses = tuple(record.responses[index] for index in indices)
    return Comparison(record.prompt, responses, chosen, metadata, record.tools)


def _entries(comparison: Comparison, name: str) -> Sequence[Any]:
    """Return the entry of each response under a key of the metadata; None if it is not known."""
    entries: Any = comparison.metadata.get(name)
    if isinstance(entries, list | tuple) and len(cast(Sequence[Any], entries)) == len(comparison.responses):
        return cast(Sequence[Any], entries)
    return [None] * len(comparison.responses)


def _reward(response: Response) -> float:
    return float("-inf") if response.reward is None else response.reward
