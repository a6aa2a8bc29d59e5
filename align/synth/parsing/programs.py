"""Programs in a teacher's answer."""

from __future__ import annotations

from align.rewards.code_extraction import CODE_STARTS, candidates


def program(text: str) -> str | None:
    r"""Return the Python program of an answer: the longest fenced block, else the code after its prose; None without.

    >>> program("Here:\n```python\ndef f(x):\n    return x\n```"), program("I cannot.")
    ('def f(x):\n    return x', None)
    """
    found = candidates(text)
    if not found.cut:
        return max((code for _, code in found.codes), key=len, default="").strip("\n") or None
    code = found.codes[0][1].strip("\n")
    return code if code.startswith(CODE_STARTS) else None
