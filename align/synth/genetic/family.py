"""The family `genetic_code`: programming tasks with solutions, bred from seed tasks (arXiv 2407.21077)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from align.errors import within
from align.procedural import code_prompting
from align.synth.families.family import (
    TEXT_CHARACTERS,
    Calls,
    ChildFamily,
    Template,
    builtin_template,
    read_template,
    text_tokens,
)
from align.synth.genetic.evolution import evolve
from align.synth.genetic.settings import PLACEHOLDERS, GeneticSettings, Part
from align.synth.items import DEMONSTRATION, PROMPT, Item

if TYPE_CHECKING:  # imports torch
    from align.synth.workbench import Workbench


# Of a model that knows the built-in code task
WORDINGS: dict[Part, str] = {
    "mutation": code_prompting.MUTATION,
    "crossover": code_prompting.CROSSOVER,
    "solution": "{prompt}",
}


class GeneticCode(GeneticSettings, ChildFamily):
    """Programming tasks with solutions, bred from seed tasks by mutation and crossover.

    `by` is the instructor, and `temperature` that of the coder. Parents of one child share a split, so that children
    belong to it, too.
    """

    family: Literal["genetic_code"] = "genetic_code"

    makes: ClassVar[str] = DEMONSTRATION
    reads: ClassVar[tuple[str, ...]] = (PROMPT, DEMONSTRATION)

    @property
    def needs_judges(self) -> bool:
        """Whether judges of the step run the tests."""
        return self.executes

    def asked_models(self) -> dict[str, str]:
        """Return the models that are asked, by the setting that names them."""
        named = {"coder_by": self.coder_by, "judge_by": self.judge_by}
        return ChildFamily.asked_models(self) | {key: model for key, model in named.items() if model is not None}

    def check(self) -> None:
        """Raise for settings without effect, and for templates that cannot be filled."""
        self.check_used()
        with within("templates"):
            for part in self.templates:
                with within(part):
                    self._template(part)

    def files(self) -> list[str]:
        """Return the templates."""
        return list(self.templates.values())

    def calls(self, parents: int, max_new_tokens: int) -> Calls:
        """Return the requests for so many pairs if all pass: a task, its solution, tests and a judgement for each."""
        if not parents:
            return Calls(0)
        characters = len(max(self.mutations.values(), key=len))  # beside one parent, which `text_tokens` counts
        crossed = (self.crossover_parents - 1) * TEXT_CHARACTERS[PROMPT]
        more = {"mutation": text_tokens(" " * characters, ()), "crossover": text_tokens(" " * crossed, ())}
        kinds = {"judgement": (PROMPT, DEMONSTRATION)}
        tokens = {
            part: text_tokens(self._template(part).text, kinds.get(part, (PROMPT,))) + more.get(part, 0)
            for part in self.parts
        }
        requests = {part: self.number for part in self.parts}
        if "mutation" in requests:
            tokens["mutation"] = max(tokens["mutation"], tokens.pop("crossover", 0))
            requests.pop("crossover", None)
        else:
            requests["crossover"] = math.ceil(self.number / self.crossover_children)
        total = sum(requests.values())
        prompt_tokens = sum(requests[part] * tokens[part] for part in requests)
        return Calls(self.number, total, prompt_tokens, total * max_new_tokens)

    def make(self, parents: Sequence[Item], bench: Workbench) -> Iterator[Item]:
        """Yield the pairs that pass, by generation and colony."""
        return evolve(parents, self, bench, {part: self._template(part) for part in self.parts})

    def _template(self, part: Part) -> Template:
        if part in self.templates:
            return read_template(self.templates[part], PLACEHOLDERS[part])
        return builtin_template(f"genetic_{part}") if self.task is None else Template(WORDINGS[part])
