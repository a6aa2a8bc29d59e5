"""The contract of a family: how one kind of synthetic row is made.

A family is a pydantic model with the settings of an entry of `families`. `makes` is the kind of its items, `reads` the
kinds of its parents, and `make` makes the items of all parents. It works in batches: `bench.ask` answers many requests
at once, and a dialogue is one batch per turn. Its result must depend on its settings, the parents and the answers only:
random numbers come from `bench.random`, and items are made in the order of their parents.

Every wanted item is counted by `bench.want`, and then either kept (`bench.keep`) or dropped with a reason
(`bench.drop`), so that a report adds up. Items come from `bench.item`, which writes their lineage.

A recipe may name a family of your own as `family: module:Class`; the class is a subclass of `Family` or, for a list per
parent, of `align.synth.families.listing.ListFamily`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import Field

from align.config import Settings, stable_hash
from align.errors import InputError, one_line
from align.inference.samples import REFUSED as REFUSED_BY_SERVER
from align.inference.samples import TOO_LONG
from align.rewards.verifiers.refusals import is_refusal
from align.synth.items import Item
from align.synth.parsing.lists import CUT, EMPTY, REFUSED
from align.synth.splits import SplitName

if TYPE_CHECKING:  # imports torch
    from align.synth.requests import Answer
    from align.synth.workbench import Workbench

WORDING = Path(__file__).parents[1] / "wording"  # built-in templates; copy one to change it
TOKENS_PER_CHARACTER = 0.25  # of English text; an estimate before any request
TEXT_CHARACTERS = {"topic": 25, "keyword": 20, "document": 4000, "prompt": 300, "demonstration": 4000, "pair": 3000}


class Calls(NamedTuple):
    """What an entry takes at most, before any request is made; further tries for what is missing are not included."""

    items: int
    requests: int = 0
    prompt_tokens: int = 0  # of all requests, estimated from characters
    response_tokens: int = 0  # of all requests, at most


class Template(NamedTuple):
    """The wording of a request, with placeholders in braces."""

    text: str

    @property
    def hash(self) -> str:
        """16 hex digits of its content, as lineage has it."""
        return stable_hash(self.text)

    def fill(self, **values: object) -> str:
        """Return the wording with the values in place of the placeholders."""
        return self.text.format(**values)


class Family(Settings, ABC):
    """One kind of synthetic rows, and the settings of its entry."""

    family: Any = Field(description="Kind of the entry.")  # each family narrows it to its own name
    by: str | None = Field(default=None, description="Model that is asked; the step's first one if left out.")
    temperature: float | None = Field(default=None, ge=0, description="Replaces sampling.temperature.")
    top_p: float | None = Field(default=None, gt=0, le=1, description="Replaces sampling.top_p.")
    max_new_tokens: int | None = Field(default=None, ge=1, description="Replaces sampling.max_new_tokens.")
    split: SplitName | None = Field(
        default=None, description="Use only parents whose seed prompts are in this split; all if left out."
    )
    limit: int | None = Field(default=None, ge=1, description="Use only so many parents, the first ones.")
    write: bool | None = Field(
        default=None, description="Write the items as rows; if left out, unless another entry is made `of` them."
    )

    makes: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ()

    @property
    def parents(self) -> list[str]:
        """Names of the entries and sources whose items the family reads."""
        return []

    @property
    def needs_local(self) -> bool:
        """Whether the family needs a model in this process."""
        return False

    @property
    def needs_judges(self) -> bool:
        """Whether the family asks the judges of the step."""
        return False

    def check(self) -> None:
        """Raise a located `InputError` for settings that cannot work together."""

    def asked_models(self) -> dict[str, str]:
        """Return the models of the step that settings name, by setting."""
        return {} if self.by is None else {"by": self.by}

    def files(self) -> list[str]:
        """Return the files that the settings name."""
        return []

    @abstractmethod
    def calls(self, parents: int, max_new_tokens: int) -> Calls:
        """Return what the entry takes at most for so many parents; a response has up to `max_new_tokens`."""

    @abstractmethod
    def make(self, parents: Sequence[Item], bench: Workbench) -> Iterator[Item]:
        """Yield the items that are kept."""


class ChildFamily(Family):
    """A family whose items have parents."""

    of: str | list[str] = Field(
        description="Entries of `families`, or sources under `data`, whose items are the parents."
    )

    @property
    def parents(self) -> list[str]:
        """Names of the entries and sources whose items the family reads."""
        return [self.of] if isinstance(self.of, str) else self.of


def unanswered(answer: Answer) -> str:
    """Return why a request was not answered; empty if it was."""
    if answer.finish.startswith(REFUSED_BY_SERVER):
        return "refused by the server"
    return TOO_LONG if answer.finish == TOO_LONG else ""


def lost(answer: Answer, *, refusals: bool = True) -> str:
    """Return why an answer cannot be a message; empty if it can. `refusals` are among the reasons."""
    if reason := unanswered(answer):
        return reason
    if answer.is_cut:
        return CUT
    if not answer.text.strip():
        return EMPTY
    return REFUSED if refusals and is_refusal(answer.text) else ""


def builtin_template(name: str) -> Template:
    """Return a template of the project, from its folder `synth/wording`."""
    return Template((WORDING / f"{name}.txt").read_text("utf-8").rstrip("\n"))


def read_template(path: str, placeholders: Sequence[str]) -> Template:
    """Return a user's template; raise `InputError` unless it can be filled with the placeholders."""
    try:
        text = Path(path).read_text("utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {one_line(error)}") from error
    try:
        text.format(**dict.fromkeys(placeholders, ""))
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        known = ", ".join(f"{{{name}}}" for name in placeholders)
        raise InputError(
            f"{path}: cannot be filled ({type(error).__name__}: {one_line(error)}); its placeholders are {known}, and "
            "another brace is written twice"
        ) from error
    return Template(text)


def text_tokens(template: str, kinds: Sequence[str]) -> int:
    """Return the estimated tokens of a request about one parent."""
    longest = max((TEXT_CHARACTERS[kind] for kind in kinds), default=0)
    return round((len(template) + longest) * TOKENS_PER_CHARACTER)
