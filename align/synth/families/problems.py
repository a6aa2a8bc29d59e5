"""Keywords, and problems in mathematics and programming about them (Adler et al. 2024, sec. 3.2.1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from align.config import Settings
from align.synth.families.family import Calls, ChildFamily, Template, builtin_template, read_template, text_tokens
from align.synth.families.listing import Ask, ListFamily
from align.synth.items import KEYWORD, PROMPT, TOPIC, Item
from align.synth.parsing.decisions import best_threshold, yes_no

if TYPE_CHECKING:  # imports torch
    from align.synth.workbench import Workbench

SUBJECTS = {  # subject -> how the question describes it, and examples
    "maths": ("mathematics", "a theorem, a structure, an operation, a method of proof or of calculation"),
    "python": ("programming in Python", "a language feature, a data structure, an algorithm, a library or a technique"),
}
LEVELS = ("primary school", "secondary school", "university")
CODE_LEVELS = ("beginner", "intermediate", "advanced")


class Labelled(Settings):
    """Concepts whose class is known."""

    yes: list[str] = Field(min_length=1, description="Concepts of the subject.")
    no: list[str] = Field(min_length=1, description="Concepts that are none of the subject.")


class Keywords(ChildFamily):
    """Those of the given concepts that belong to a subject, by yes or no."""

    family: Literal["keywords"] = "keywords"
    subject: Literal["maths", "python"] = Field(description="Subject that a keyword must belong to.")
    template_file: str | None = Field(default=None, description="File with your own wording of the request.")
    tries: int = Field(default=2, ge=1, description="Requests about a concept, until the answer is yes or no.")
    labelled: Labelled | None = Field(
        default=None,
        description="Concepts with known classes. Then likelihoods decide: Yes against No, with the threshold that is "
        "right for most of these. Needs the engine local.",
    )
    max_new_tokens: int | None = Field(default=16, ge=1, description="Replaces sampling.max_new_tokens.")

    makes: ClassVar[str] = KEYWORD
    reads: ClassVar[tuple[str, ...]] = (KEYWORD, TOPIC)

    def check(self) -> None:
        """Raise for a template that cannot be filled."""
        self._template()

    def files(self) -> list[str]:
        """Return the template."""
        return [] if self.template_file is None else [self.template_file]

    def _template(self) -> Template:
        placeholders = ("keyword", "subject", "examples")
        if self.template_file is not None:
            return read_template(self.template_file, placeholders)
        return builtin_template("keywords")

    @property
    def needs_local(self) -> bool:
        """Whether likelihoods decide."""
        return self.labelled is not None

    def calls(self, parents: int, max_new_tokens: int) -> Calls:
        """Return one request a concept."""
        tokens = text_tokens(self._template().text, self.reads)
        return Calls(parents, parents, parents * tokens, parents * max_new_tokens)

    def make(self, parents: Sequence[Item], bench: Workbench) -> Iterator[Item]:
        """Yield a keyword for each concept whose answer is yes."""
        if self.labelled is not None:
            yield from self._by_likelihood(parents, self.labelled, bench)
            return
        template = self._template()
        subject, examples = SUBJECTS[self.subject]
        bench.want_each(parents)
        waiting = list(parents)
        accepted = dict[str, Item]()
        for number in range(self.tries):
            texts = [template.fill(keyword=each.prompt, subject=subject, examples=examples) for each in waiting]
            answers = bench.ask([bench.request(text, number) for text in texts])
            undecided: list[Item] = []
            for parent, answer in zip(waiting, answers, strict=True):
                decision = yes_no(answer.text)
                if decision is None:
                    undecided.append(parent)
                elif decision:
                    item = bench.item(KEYWORD, [parent], answers=[answer], template=template.hash, text=parent.prompt)
                    accepted[parent.id] = item
                else:
                    bench.drop("no")
            waiting = undecided
        bench.drop("neither yes nor no", len(waiting))
        yield from (accepted[each.id] for each in parents if each.id in accepted and bench.keep(accepted[each.id]))

    def _by_likelihood(self, parents: Sequence[Item], labelled: Labelled, bench: Workbench) -> Iterator[Item]:
        """Yield the concepts whose log-odds of Yes against No exceed the calibrated threshold."""
        template, (subject, examples) = self._template(), SUBJECTS[self.subject]
        known = [*labelled.yes, *labelled.no]
        names = [*known, *(parent.prompt for parent in parents)]
        texts = [template.fill(keyword=name, subject=subject, examples=examples) for name in names]
        scores = [yes - no for yes, no in bench.score([bench.request(text) for text in texts], ("Yes", "No"))]
        labels = [True] * len(labelled.yes) + [False] * len(labelled.no)
        threshold = best_threshold(scores[: len(known)], labels)
        right = sum((score > threshold) == label for score, label in zip(scores, labels, strict=False))
        bench.counts["labelled concepts"] = len(known)
        bench.counts["labelled concepts: right"] = right
        bench.want_each(parents)
        for parent, score in zip(parents, scores[len(known) :], strict=True):
            if score <= threshold:
                bench.drop("no")
                continue
            metadata = {"log_odds": score, "threshold": threshold}
            item = bench.item(KEYWORD, [parent], template=template.hash, text=parent.prompt, metadata=metadata)
            if bench.keep(item):
                yield item


class _Problems(ListFamily, ChildFamily):
    """Problems about each topic or keyword, at each of several levels."""

    number: int = Field(default=5, ge=1, description="Problems asked for, of each topic and level.")

    makes: ClassVar[str] = PROMPT
    reads: ClassVar[tuple[str, ...]] = (TOPIC, KEYWORD)

    def _asks(self, parents: Sequence[Item], levels: Sequence[str], **values: object) -> list[Ask]:
        template = self.worded()
        return [
            Ask(
                (parent,),
                {"number": self.number, "level": level, "topic": parent.prompt, **values},
                template,
                self.number,
                {"level": level, **values},
            )
            for parent in parents
            for level in levels
        ]


class MathsProblems(_Problems):
    """Mathematical problems about each topic or keyword, at each level."""

    family: Literal["maths_problems"] = "maths_problems"
    levels: list[str] = Field(default=list(LEVELS), min_length=1, description="Levels of difficulty.")

    placeholders: ClassVar[tuple[str, ...]] = ("number", "level", "topic")

    def asks(self, parents: Sequence[Item], bench: Workbench) -> list[Ask]:
        """Return what is asked about each topic at each level."""
        return self._asks(parents, self.levels)

    def calls(self, parents: int, max_new_tokens: int) -> Calls:
        """Return one request a topic and level."""
        return super().calls(parents * len(self.levels), max_new_tokens)


class CodeProblems(_Problems):
    """Programming tasks about each topic or keyword, at each of three levels."""

    family: Literal["code_problems"] = "code_problems"
    levels: list[str] = Field(default=list(CODE_LEVELS), min_length=1, description="Levels of difficulty.")
    language: str = Field(default="Python", description="Programming language.")

    placeholders: ClassVar[tuple[str, ...]] = ("number", "level", "language", "topic")

    def asks(self, parents: Sequence[Item], bench: Workbench) -> list[Ask]:
        """Return what is asked about each topic at each level."""
        return self._asks(parents, self.levels, language=self.language)

    def calls(self, parents: int, max_new_tokens: int) -> Calls:
        """Return one request a topic and level."""
        return super().calls(parents * len(self.levels), max_new_tokens)
