"""Hints for keys and stages that other projects call otherwise, and for keys in the wrong place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import NamedTuple

from pydantic import BaseModel

from align.build_errors import models_in
from align.errors import InputError, Location, MissingKey, UnknownKey, dotted_loc, joined
from align.foreign_keys import FOREIGN_KEYS
from align.losses.table import LOSSES
from align.stages.table import STAGES
from align.workflow.recipe.schema import WrittenRecipe

MAX_PLACES = 2  # where a key may belong, in a hint

# Names of methods and stages elsewhere -> (stage, what to write)
FOREIGN_STAGES: dict[str, tuple[str, str]] = {
    **{name: ("preference", f"stage: preference with loss: {{name: {name}}}") for name in LOSSES},
    **dict.fromkeys(("rpo", "reward_dpo"), ("preference", "stage: preference with loss: {name: rpo_bwd_kl}")),
    **dict.fromkeys(("rm", "reward", "rewardmodel", "reward-model"), ("reward_model", "stage: reward_model")),
    **dict.fromkeys(("pt", "pretrain", "finetune", "instruct"), ("sft", "stage: sft")),
    **dict.fromkeys(("eval", "evaluation", "test"), ("evaluate", "stage: evaluate")),
    **dict.fromkeys(("sample", "inference", "predict"), ("generate", "stage: generate")),
    **dict.fromkeys(("judge", "rate"), ("score", "stage: score")),
    **dict.fromkeys(
        ("grpo", "ppo", "rloo"),
        ("preference", "stage: preference with on_policy: true for preference optimization on samples of the policy"),
    ),
}


class Hint(NamedTuple):
    """Where a key belongs, if the recipe has such a key, and what to say of it."""

    place: Location | None
    text: str


def with_hints(error: InputError, steps: Mapping[str, str]) -> InputError:
    """Return the errors of a recipe with hints for unknown keys; `steps` are the stages of the steps by name.

    A key that is missing where another error says that it is in the wrong place is not reported twice.
    """
    hints = {id(part): _hint(part.loc, steps) for part in error.parts if isinstance(part, UnknownKey)}
    meant = [hint.place for hint in hints.values() if hint is not None and hint.place is not None]
    kept: list[InputError] = []
    for part in error.parts:
        hint = hints.get(id(part))
        if isinstance(part, MissingKey) and any(place[: len(part.loc)] == part.loc for place in meant):
            continue
        kept.append(part if hint is None else UnknownKey(hint.text, part.loc))
    return joined(kept)


def stage_hint(name: str) -> tuple[str, str] | None:
    """Return the stage that is meant by a name, and what to write; None for a name that is not known."""
    lower = name.lower()
    return (lower, f"stage: {lower}") if lower in STAGES else FOREIGN_STAGES.get(lower)


def _hint(loc: Location, steps: Mapping[str, str]) -> Hint | None:
    """Return the hint for an unknown key; None for one that no table has."""
    section, *names, key = map(str, loc if len(loc) > 1 else ("", *loc))
    name = names[0] if names else None
    stage = steps.get(name) if section == "steps" and name is not None else None
    places = [_filled(place, section, name) for place in keys_of(stage) if place.rpartition(".")[2] == key]
    if key in FOREIGN_KEYS:
        target, note = FOREIGN_KEYS[key]
        if target is None:
            return Hint(None, f"unknown key, and not needed: {note}")
        is_elsewhere = target.rpartition(".")[0] not in keys_of(stage)  # in another kind of stage
        if not (is_elsewhere and places):
            place = _filled(target.replace("KEY", key), section, name)
            return Hint(place, f"unknown key; write {dotted_loc(place)}{f' ({note})' if note else ''}")
    meant = _most_general(places)
    return Hint(meant[0], f"unknown key here; write {' or '.join(map(dotted_loc, meant))}") if meant else None


def _most_general(places: list[Location]) -> list[Location]:
    """Return up to two places; of more, those with the fewest parts, and none if these are more than two."""
    fewest = min(map(len, places), default=0)
    shown = places if len(places) <= MAX_PLACES else [place for place in places if len(place) == fewest]
    return shown if len(shown) <= MAX_PLACES else []


def _filled(target: str, section: str, name: str | None) -> Location:
    """Return a place with the name of the source or step that an error is about, where it is in the same section."""
    first, *rest = target.split(".")
    filled = name if first == section and name is not None else "NAME"
    return (first, *(filled if part == "NAME" else part for part in rest))


@cache
def keys_of(stage: str | None) -> list[str]:
    """Return the dotted keys of a recipe, with those of the steps of one stage; of every stage for None."""
    found = list(WrittenRecipe.model_fields)
    for name, field in WrittenRecipe.model_fields.items():
        for model in models_in(field.annotation) if name != "steps" else ():
            found += _below(f"{name}.NAME" if name in ("data", "search") else name, model)
    for name, kind in STAGES.items():
        if stage in (None, name):
            found += _below("steps.NAME", kind)
    return list(dict.fromkeys(found))


def _below(prefix: str, settings: type[BaseModel]) -> Iterator[str]:
    """Yield the dotted keys of settings and of the settings in them."""
    for name, field in settings.model_fields.items():
        yield f"{prefix}.{name}"
        for model in models_in(field.annotation):
            yield from _below(f"{prefix}.{name}", model)
