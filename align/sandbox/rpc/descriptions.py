"""What one process sends about a class of its objects, so that the other one can make its mirror."""

from __future__ import annotations

from typing import Any

from align.sandbox.rpc.proxies import SPECIAL_METHODS
from align.sandbox.rpc.values import PLAIN, SHARED, can_be_derived_from, is_known, is_standard


def visible_bases(kind: type) -> list[type]:
    """Return the base classes that the mirror of a class has: known ones, and those that are not standard."""
    found: list[type] = []
    for base in kind.__bases__:
        if base is object:
            continue
        visible = can_be_derived_from(base) if is_known(base) else not is_standard(base)
        found += [base] if visible else visible_bases(base)
    return list(dict.fromkeys(found))


def special_methods(kind: type) -> dict[str, bool]:
    """Return the special methods that a class and its invisible bases define, with False for None."""
    found: dict[str, bool] = {}
    inherited = {other for base in visible_bases(kind) for other in base.__mro__}
    for part in kind.__mro__:
        if part is kind or (part not in inherited and part is not object):
            for name, value in vars(part).items():
                if name in SPECIAL_METHODS:
                    found.setdefault(name, value is not None)
    return found


def payload_base(kind: type) -> Any:  # noqa: ANN401 - a class or None
    """Return the class of values from which a class is derived, if any."""
    for base in kind.__mro__:
        if base in PLAIN or base in SHARED or (issubclass(base, BaseException) and is_known(base)):
            return base if can_be_derived_from(base) else None
    return None
