"""The order of the entries of `families`, and checks of what each reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from graphlib import CycleError, TopologicalSorter

from align.errors import ErrorList, InputError, within
from align.registry import suggest
from align.synth.families.family import Calls, Family
from align.synth.items import NAMES, ROWS


def ordered(families: Mapping[str, Family]) -> list[str]:
    """Return the entries so that each follows those it reads; as written where that is so already."""
    sorter = TopologicalSorter(
        {name: [each for each in family.parents if each in families] for name, family in families.items()}
    )
    try:
        sorter.prepare()
    except CycleError as error:
        raise InputError(f"entries are made of each other: {' of '.join(error.args[1])}") from error
    found: list[str] = []
    while sorter.is_active():
        ready = sorted(sorter.get_ready(), key=list(families).index)
        found += ready
        sorter.done(*ready)
    return found


def check_families(families: Mapping[str, Family], sources: Collection[str]) -> None:
    """Raise for every entry that reads a name that does not exist, or items of another kind than it can use."""
    errors = ErrorList()
    for name, family in families.items():
        with errors.collect(), within(name):
            family.check()
            _check_used(family, [families[parent].makes for parent in family.parents if parent in families])
        for parent in family.parents:
            with errors.collect(), within(name, "of"):
                if parent in families and parent in sources:
                    raise InputError(f"{parent!r} is both an entry of families and a source; rename one of them")
                if parent in families and families[parent].makes not in family.reads:
                    kinds = " or ".join(f"{kind}s" for kind in family.reads)
                    raise InputError(f"{parent!r} makes {families[parent].makes}s, and {family.family} reads {kinds}")
                if parent not in families and parent not in sources:
                    raise InputError(
                        f"no entry of families and no source is called {parent!r}; {suggest(parent, families)}"
                    )
    if not errors.found:
        with errors.collect():
            ordered(families)
    errors.raise_found()


def _check_used(family: Family, kinds: Collection[str]) -> None:
    """Raise for a setting of every family that has no effect on this one."""
    if not family.reads:
        for name in sorted({"split", "limit"} & family.model_fields_set):
            raise InputError(f"has no effect: {family.family} has no parents; remove it", (name,))
    if family.split is not None and any(kind in NAMES for kind in kinds):
        raise InputError("topics and keywords belong to no split; set it where prompts are made of prompts", ("split",))
    if family.write and family.makes not in ROWS:
        raise InputError(f"has no effect: {family.makes}s are no rows; remove it", ("write",))


def written(families: Mapping[str, Family]) -> list[str]:
    """Return the entries whose items are written as rows: of prompts and answers that no other entry is made of."""
    read = {parent for family in families.values() for parent in family.parents}
    return [
        name
        for name, family in families.items()
        if family.makes in ROWS and (family.write if family.write is not None else name not in read)
    ]


def planned_calls(families: Mapping[str, Family], rows: Mapping[str, int], max_new_tokens: int) -> dict[str, Calls]:
    """Return what each entry takes at most; `rows` are the numbers of rows of the sources that are read."""
    items = dict(rows)
    found = dict[str, Calls]()
    for name in ordered(families):
        family = families[name]
        parents = sum(items[parent] for parent in family.parents)
        parents = min(parents, family.limit or parents)
        found[name] = family.calls(parents, family.max_new_tokens or max_new_tokens)
        items[name] = found[name].items
    return {name: found[name] for name in families}
