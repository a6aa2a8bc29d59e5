"""Measure the items that a step `synthesize` made, by entry, for the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.curate.embeddings.encoder import make_encoder
from align.curate.embeddings.settings import EncoderSettings
from align.data.chat_encoder import ChatEncoder
from align.evaluation.likelihood import likelihoods
from align.models.loading.config import max_positions
from align.models.loading.pretrained import default_device
from align.models.policy import Policy, load_policy
from align.models.settings import PolicySettings
from align.records import Demonstration
from align.stages.inputs.context import RunContext
from align.stages.responses.synthesis_settings import SynthesisSettings
from align.synth.items import DEMONSTRATION, NAMES, Item
from align.synth.measures import write_measures
from align.synth.measures.written import Yields
from align.synth.workbench import ASKED, DROPPED, Workbench
from align.train.instruction_difficulty import instruction_difficulty

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def measure_items(
    step: SynthesisSettings,
    context: RunContext,
    made: Mapping[str, Sequence[Item]],
    benches: Mapping[str, Workbench],
) -> Path:
    """Write `measures.json` of the items of all entries, each with its workbench."""
    by_id = {item.id: item for items in made.values() for item in items}
    difficulties = _difficulties(step, context, list(by_id.values()))
    rows = [
        {
            "id": item.id,
            "family": entry,
            "text": _text(item),
            "topic": _topic(item, by_id),
            "reward": item.details.get("reward"),
            "parents": item.parents,
            "ifd": difficulties.get(item.id),
        }
        for entry, items in made.items()
        for item in items
    ]
    yields = _yields(step, made, benches, by_id)
    return write_measures(context.folder, rows, yields=yields, **_embedding(step, context))


def _text(item: Item) -> str:
    """Return what the user says in a prompt or dialogue, or the text of another item."""
    return "\n".join(each.content for each in item.messages if each.role == "user") or item.text


def _topic(item: Item, by_id: Mapping[str, Item]) -> str | None:
    """Return the nearest topic or keyword that the item was made from; None for one of these, or without one."""
    return None if item.kind in NAMES else _nearest(item.parents, by_id)


def _nearest(ids: Iterable[str], by_id: Mapping[str, Item]) -> str | None:
    """Return the nearest topic or keyword among items and their ancestors."""
    waiting = [*ids]
    seen = set[str]()
    for name in waiting:
        if name in seen or name not in by_id:
            continue
        seen.add(name)
        if by_id[name].kind in NAMES:
            return by_id[name].text
        waiting += by_id[name].parents
    return None


def _yields(
    step: SynthesisSettings,
    made: Mapping[str, Sequence[Item]],
    benches: Mapping[str, Workbench],
    by_id: Mapping[str, Item],
) -> Yields:
    """Return what each entry asked for and dropped, and how many rows were asked for about each topic."""
    readers = {entry: family for entry, family in step.families.items() if family.makes not in NAMES}
    entries = {parent for family in readers.values() for parent in family.parents if parent in made}
    topics = Counter({item.text: 0 for entry in entries for item in made[entry] if item.kind in NAMES})
    for entry in readers:
        for parent, number in benches[entry].asked_of.items():
            topic = _nearest([parent], by_id)
            if topic is not None:
                topics[topic] += number
    counts = {entry: bench.report() for entry, bench in benches.items()}
    return Yields(
        asked={entry: each.get(ASKED, 0) for entry, each in counts.items()},
        dropped={
            entry: {name.removeprefix(DROPPED): number for name, number in each.items() if name.startswith(DROPPED)}
            for entry, each in counts.items()
        },
        topics=topics,
    )


def _difficulties(step: SynthesisSettings, context: RunContext, items: Sequence[Item]) -> dict[str, float | None]:
    """Return the instruction-following difficulty of demonstrations by id, under the first policy that was asked."""
    rows = {item.id: Demonstration(item.messages) for item in items if item.kind == DEMONSTRATION}
    if not step.difficulty or not rows:
        return {}
    policy, tokenizer = _first_policy(step, context)
    encoder = ChatEncoder(tokenizer, on_error="skip", max_length=max_positions(policy.base.config))
    found = instruction_difficulty(list(rows.values()), encoder, partial(likelihoods, policy))
    return dict(zip(rows, found, strict=True))


def _embedding(step: SynthesisSettings, context: RunContext) -> dict[str, Any]:
    """Return how texts are embedded: by hashed words, or by the first policy that was asked."""
    if step.embeddings == "words":
        return {}
    name = step.policies[0]
    settings = EncoderSettings(model=str(context.inputs.folders[name]), pooling="mean")
    return {"embedder": make_encoder(settings).encode, "embedding": f"mean hidden states of {name}"}


def _first_policy(step: SynthesisSettings, context: RunContext) -> tuple[Policy, PreTrainedTokenizerBase]:
    policy, tokenizer = load_policy(PolicySettings(path=str(context.inputs.folders[step.policies[0]])))
    return policy.to(default_device()), tokenizer
