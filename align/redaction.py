"""What must not be shown or written: secrets, values of environment variables, and terminal escapes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

MIN_SECRET = 4  # characters; a shorter one would be replaced inside of words
ENVIRONMENT = "oc.env"  # OmegaConf's resolver of environment variables
VARIABLE = re.compile(r"\$\{oc\.env:\s*([A-Za-z_]\w*)")
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)
# Control sequences of terminals (ECMA-48: CSI, then OSC and other strings, then two-character escapes), and all other
# control characters except tab and line feed
ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]?|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)

_secrets: dict[str, str] = {}  # value -> what is shown in its place
_written: dict[tuple[str, str], str] = {}  # (key, value) of a setting -> its text in the recipe


def add_secret(value: str, shown: str = "***") -> None:
    """Have `redact` replace a value by `shown` from now on."""
    if len(value) >= MIN_SECRET:
        _secrets[value] = shown


def redact(text: str, *, min_length: int = MIN_SECRET) -> str:
    """Return the text without secrets of at least this length."""
    for value in sorted(_secrets, key=len, reverse=True):  # one may be part of another
        if len(value) >= min_length and value in text:
            text = text.replace(value, _secrets[value])
    return text


def printable(text: str) -> str:
    r"""Return foreign text without secrets and terminal escapes.

    >>> printable("\x1b[31mred\x1b[0m \x1b]0;title\x07done")
    'red done'
    """
    return ESCAPES.sub("", redact(text))


def add_interpolations(written: object, resolved: object, key: str = "", *, environment: Mapping[str, str]) -> None:
    """Remember each setting whose text names an environment variable, given all settings before and after.

    The variables whose names are those of secrets become secrets.
    """
    if isinstance(resolved, Mapping):
        inner = cast("Mapping[str, Any]", resolved)
        outer = written if isinstance(written, Mapping) else {}
        for name, value in inner.items():
            text = cast("Mapping[str, Any]", outer).get(name, written)  # a reference to a section of the recipe
            add_interpolations(text, value, str(name), environment=environment)
    elif isinstance(resolved, list):
        for number, value in enumerate(cast("list[Any]", resolved)):
            text = written[number] if isinstance(written, list) else cast(Any, written)
            add_interpolations(text, value, key, environment=environment)
    elif resolved and isinstance(resolved, str) and isinstance(written, str) and "${" in written:
        known = {value for _, value in _written}
        if ENVIRONMENT in written or resolved in known:
            _written.setdefault((key, resolved), written)
        for variable in VARIABLE.findall(written):
            if SECRET_NAME.search(variable) and (value := environment.get(variable, "").strip()):
                add_secret(value, f"${{{ENVIRONMENT}:{variable}}}")


def as_written(value: Any, key: str = "") -> Any:  # noqa: ANN401 - JSON holds any type
    """Return JSON with the recipe's own text in place of the value of an environment variable, and without secrets."""
    if isinstance(value, Mapping):
        return {name: as_written(each, str(name)) for name, each in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [as_written(each, key) for each in cast("Sequence[Any]", value)]
    return _written.get((key, value), redact(value)) if isinstance(value, str) else value
