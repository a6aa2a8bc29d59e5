"""Find the program in a response: fenced blocks of Python, or code between lines of prose."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from align.rewards.thoughts import visible_text

FENCES = ("```", "~~~")
PYTHON = ("", "python", "py", "python3", "py3")  # languages of a fenced block that may be Python
CODE_STARTS = ("def ", "async def ", "class ", "import ", "from ", "@")


class Candidates(NamedTuple):
    """Texts that may be the program of a response. The sandbox selects one, as parsing untrusted text is not safe."""

    codes: list[tuple[str, str]]  # (text in front of the code, the code)
    cut: bool  # whether lines at the end may be prose


def candidates(response: str, before: str = "") -> Candidates:
    r"""Return the fenced blocks of Python in a response; without a fence, the response and what follows its prose.

    Thoughts are left out. `before` is the text in front of the program: the prompt that the response completes.

    >>> candidates("Sure:\n```python\nx = 1\n```").codes
    [('', 'x = 1')]
    """
    lines = visible_text(response).replace("\r\n", "\n").split("\n")
    prefix = before and before + "\n"
    if blocks := list(_fenced_blocks(lines)):
        return Candidates([(prefix, code) for code in blocks], cut=False)
    start = next((index for index, line in enumerate(lines) if line.startswith(CODE_STARTS)), 0)
    after_prose = [(prefix, "\n".join(lines[start:]))] if start else []
    return Candidates([*after_prose, (before, "\n".join(lines))], cut=True)


def _fenced_blocks(lines: Iterable[str]) -> Iterator[str]:
    """Yield the blocks whose language is Python or not given; a block without a closing fence ends with the text."""
    fence = ""
    language = ""
    indented = False
    block = list[str]()
    for line in [*lines, None]:
        bare = (line or "").strip()
        if not fence and bare.startswith(FENCES):
            fence = bare[: len(bare) - len(bare.lstrip(bare[0]))]
            language = [*bare[len(fence) :].lower().split(), ""][0]
            indented = bool(line) and line != line.lstrip()
            block = []
        elif fence and (line is None or (bare.startswith(fence) and not bare.strip(fence[0]))):
            if language in PYTHON:
                yield textwrap.dedent("\n".join(block)) if indented else "\n".join(block)
            fence = ""
        elif fence and line is not None:
            block.append(line)
