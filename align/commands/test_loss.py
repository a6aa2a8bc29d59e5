"""Check a preference loss and print one line for each property."""

from __future__ import annotations

from collections.abc import Sequence

from align.config import read_overrides
from align.errors import RunError
from align.losses.table import preference_loss
from align.testing import check_loss


def check_named_loss(name: str, settings: Sequence[str] = ()) -> None:
    """Print the result of every property of a built-in loss, or of a user's `module:name`, with `key=value` settings.

    An unknown loss or setting raises `InputError`, a failed property `RunError` after all results are printed.
    """
    results = check_loss(preference_loss(name, **read_overrides(settings)))
    for result in results:
        print(result)
    if failed := [result.name for result in results if result.status == "failed"]:
        raise RunError(f"loss {name!r} failed {len(failed)} of {len(results)} properties: {', '.join(failed)}")
