"""Generations of colonies: draw parents, ask for new tasks, select the pairs that pass, merge.

All colonies take their next batch at the same time, and each kind of request of all of them is answered together. A
colony's random numbers depend on its number, the generation and the batch only, its pairs join its pool at the end of
the batch, and colonies are merged in the order of their numbers: which answer came first decides nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from align.procedural import code, code_prompting
from align.procedural.splits import split_of
from align.synth.families.family import Template, unanswered
from align.synth.families.listing import LANGUAGE, NOT_OF_THE_TASK, OF_TEST_SPLIT, speaks
from align.synth.genetic.near_duplicates import KnownTexts
from align.synth.genetic.parsing import tasks
from align.synth.genetic.selection import Candidate, Selection
from align.synth.genetic.settings import GeneticSettings, Part
from align.synth.items import Item

if TYPE_CHECKING:  # imports torch
    from random import Random

    from align.synth.requests import Answer
    from align.synth.workbench import Workbench

MUTATION, CROSSOVER = "mutation", "crossover"


@dataclass(slots=True)
class Colony:
    """A population that grows on its own during a generation."""

    number: int
    wanted: int
    known: KnownTexts  # its own tasks, and all of the generations before
    made: list[Item] = field(default_factory=list[Item])
    asked: int = 0
    batches: int = 0

    def left(self, max_asked: float) -> int:
        """Return how many tasks it still asks for."""
        return max(0, min(self.wanted - len(self.made), round(max_asked * self.wanted) - self.asked))


class Birth(NamedTuple):
    """A request for new tasks, and what they descend from."""

    colony: Colony
    text: str
    parents: tuple[Item, ...]
    template: str  # its hash
    wanted: int
    details: Mapping[str, str | int]  # for the lineage


def evolve(
    seeds: Sequence[Item], settings: GeneticSettings, bench: Workbench, templates: Mapping[Part, Template]
) -> Iterator[Item]:
    """Yield the pairs of all generations, in the order of their colonies."""
    population = list(seeds)
    known = KnownTexts(settings.near_duplicate)
    for seed in seeds:
        known.add(seed.prompt)
    evolution = Evolution(settings, bench, templates, Selection(settings, bench, templates))
    num_kept = 0
    for generation in range(settings.generations if seeds else 0):
        wanted = settings.number * (generation + 1) // settings.generations - num_kept
        share, more = divmod(wanted, settings.colonies)
        colonies = [
            Colony(number, share + (number < more), KnownTexts(settings.near_duplicate, known))
            for number in range(settings.colonies)
        ]
        while growing := [colony for colony in colonies if colony.left(settings.max_asked)]:
            evolution.grow(growing, population, generation)
        for item in (item for colony in colonies for item in colony.made):
            if reason := known.reason(item.prompt):
                bench.drop(reason)
            elif bench.keep(item):
                known.add(item.prompt)
                population.append(item)
                num_kept += 1
                bench.counts[f"{item.details['operation']}: kept"] += 1
                yield item
        bench.counts[f"population after generation {generation}"] = len(population)


@dataclass(slots=True)
class Evolution:
    """The batches of a generation."""

    settings: GeneticSettings
    bench: Workbench
    templates: Mapping[Part, Template]
    selection: Selection
    asked_before: Counter[str] = field(default_factory=Counter[str])  # request -> samples of it that were asked for

    def grow(self, colonies: Sequence[Colony], population: Sequence[Item], generation: int) -> None:
        """Let each colony take a batch; the pairs that pass join its pool."""
        births = [birth for colony in colonies for birth in self._batch(colony, population, generation)]
        texts = [birth.text for birth in births]
        numbers: list[int] = []
        for text in texts:
            numbers.append(self.asked_before[text])
            self.asked_before[text] += 1
        answers = self.selection.ask(texts, temperature=self.settings.instructor_temperature, numbers=numbers)
        candidates = [
            candidate
            for birth, answer in zip(births, answers, strict=True)
            for candidate in self._candidates(birth, answer)
        ]
        for number, item in self.selection.select(candidates):
            colony = next(colony for colony in colonies if colony.number == number)
            colony.made.append(item)

    def _batch(self, colony: Colony, population: Sequence[Item], generation: int) -> list[Birth]:
        """Return the next requests of a colony."""
        rng = self.bench.random("batch", generation, colony.number, colony.batches)
        pool = [*population, *colony.made]
        left = colony.left(self.settings.max_asked)
        mutates = rng.random() < self.settings.mutation_probability
        details = {
            "operation": MUTATION if mutates else CROSSOVER,
            "colony": colony.number,
            "generation": generation,
        }
        births = (self._mutations if mutates else self._crossovers)(colony, pool, left, details, rng)
        wanted = sum(birth.wanted for birth in births)
        colony.asked += wanted
        colony.batches += 1
        self.bench.want(wanted)
        self.bench.counts[f"{details['operation']}: asked"] += wanted
        return births

    def _mutations(
        self, colony: Colony, pool: Sequence[Item], left: int, details: Mapping[str, str | int], rng: Random
    ) -> list[Birth]:
        template = self.templates[MUTATION]
        births = list[Birth]()
        for _ in range(min(left, self.settings.mutation_batch)):
            parent, heuristic = rng.choice(pool), rng.choice(list(self.settings.mutations))
            text = template.fill(prompt=parent.prompt, heuristic=self.settings.mutations[heuristic])
            births.append(Birth(colony, text, (parent,), template.hash, 1, {**details, "heuristic": heuristic}))
        return births

    def _crossovers(
        self, colony: Colony, pool: Sequence[Item], left: int, details: Mapping[str, str | int], rng: Random
    ) -> list[Birth]:
        template = self.templates[CROSSOVER]
        births = list[Birth]()
        for _ in range(self.settings.crossover_batch):
            number = min(left, self.settings.crossover_children)
            if not number:
                break
            left -= number
            first = rng.choice(pool)
            others = [each for each in pool if each.split == first.split and each is not first]
            parents = (first, *rng.sample(others, min(len(others), self.settings.crossover_parents - 1)))
            examples = code_prompting.listed([parent.prompt for parent in parents])
            text = template.fill(examples=examples, number=number)
            births.append(Birth(colony, text, parents, template.hash, number, details))
        return births

    def _candidates(self, birth: Birth, answer: Answer) -> Iterator[Candidate]:
        """Yield the new tasks of an answer that the colony does not know."""
        if reason := unanswered(answer):
            self.bench.drop(reason, birth.wanted)
            return
        parsed = tasks(answer.text, birth.wanted, finish=answer.finish)
        for reason, number in parsed.dropped.items():
            self.bench.drop(reason, number)
        if parsed.surplus:
            self.bench.counts["surplus"] += parsed.surplus
        for text in parsed.items:
            if reason := self._reason(text) or birth.colony.known.reason(text):
                self.bench.drop(reason)
            else:
                birth.colony.known.add(text)
                yield Candidate(birth.colony.number, text, birth.parents, birth.template, dict(birth.details), [answer])

    def _reason(self, text: str) -> str:
        """Return why a new task is not kept; empty if it may be."""
        if self.settings.task is None:
            return "" if speaks(text, self.bench.language) else LANGUAGE
        if code.parse(text) is None:
            return NOT_OF_THE_TASK
        return OF_TEST_SPLIT if split_of(text) == "test" else ""
