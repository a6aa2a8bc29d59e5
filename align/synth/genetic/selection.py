"""Selection: solve new tasks, compile the programs in a sandbox, and keep the pairs that pass tests and judgement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from align.procedural import code
from align.records import Message, Prompt
from align.sandbox.function_calls import Program, run_programs
from align.synth.families.family import Template, lost
from align.synth.genetic.parsing import asserts
from align.synth.genetic.settings import GeneticSettings, Part
from align.synth.items import DEMONSTRATION, Item
from align.synth.parsing.decisions import verdict
from align.synth.parsing.programs import program

if TYPE_CHECKING:  # imports torch
    from align.synth.requests import Answer
    from align.synth.workbench import Workbench

# Compiles a text in a process of its own: parsing untrusted text may crash the interpreter
COMPILER = "def f(text):\n    compile(text, '<program>', 'exec')\n    return True"
COMPILED = "True"  # its answer
# Reasons
NO_PROGRAM, NOT_COMPILED = "no program", "does not compile"
NO_TESTS, FAILED_TESTS = "no valid tests", "tests fail"
NO_JUDGEMENT, FAILED_JUDGEMENT = "judge without verdict", "judge: fail"


@dataclass(slots=True)
class Candidate:
    """A new task on its way into the pool of a colony."""

    colony: int
    task: str
    parents: tuple[Item, ...]
    template: str
    details: dict[str, Any]  # for the lineage: operation, heuristic, colony, generation, verdicts
    answers: list[Answer]  # of the instructor, coder and judge
    tests: list[str] = field(default_factory=list[str])

    @property
    def solution(self) -> str:
        """The coder's answer."""
        return self.answers[1].text


@dataclass(frozen=True, slots=True)
class Selection:
    """The coder, the compiler, the tests and the judge. Each step drops what does not pass it, with a reason."""

    settings: GeneticSettings
    bench: Workbench
    templates: Mapping[Part, Template]

    def select(self, candidates: Sequence[Candidate]) -> Iterator[tuple[int, Item]]:
        """Yield the pairs that pass, in order, each with its colony."""
        passing = self._compiled(self._solved(candidates))
        if self.settings.executes:
            passing = self._executed(passing)
        if self.settings.judges_by_model:
            passing = self._judged(passing)
        for each in passing:
            yield (
                each.colony,
                self.bench.item(
                    DEMONSTRATION,
                    each.parents,
                    answers=each.answers,
                    template=each.template,
                    messages=(Message("user", each.task), Message("assistant", each.solution)),
                    metadata=self._metadata(each),
                    details=each.details,
                ),
            )

    def ask(
        self,
        texts: Sequence[str],
        *,
        by: str | None = None,
        temperature: float | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[Answer]:
        """Return the answers of a model; `numbers` tell samples of equal texts apart."""
        requests = [
            self.bench.request(text, number, temperature=temperature)
            for text, number in zip(texts, numbers or [0] * len(texts), strict=True)
        ]
        return self.bench.ask(requests, by=by)

    def _keep(self, candidates: Sequence[Candidate], reason: Callable[[Candidate], str]) -> list[Candidate]:
        """Return the candidates without a reason to drop them; the others are counted."""
        reasons = [reason(each) for each in candidates]
        for why in filter(None, reasons):
            self.bench.drop(why)
        return [each for each, why in zip(candidates, reasons, strict=True) if not why]

    def _solved(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        answers = self.ask(self._texts("solution", candidates), by=self.settings.coder_by)
        for each, answer in zip(candidates, answers, strict=True):
            each.answers.append(answer)

        def reason(each: Candidate) -> str:
            return lost(each.answers[-1]) or ("" if self._program(each) else NO_PROGRAM)

        return self._keep(candidates, reason)

    def _compiled(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        valid = compiling([self._program(each) or "" for each in candidates])
        return self._keep(candidates, lambda each: "" if self._program(each) in valid else NOT_COMPILED)

    def _program(self, candidate: Candidate) -> str | None:
        """Return the program of a solution; the whole of it for the built-in task, whose answers are expressions."""
        return candidate.solution.strip() if self.settings.task is not None else program(candidate.solution)

    def _metadata(self, candidate: Candidate) -> dict[str, Any]:
        """Return what a judge needs to run a solution: written tests, or the examples of the built-in task."""
        if self.settings.task is not None:
            return {"kind": self.settings.task, **(code.parse(candidate.task) or {})}
        return {"tests": candidate.tests} if candidate.tests else {}

    def _executed(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Return the candidates that pass their tests; where a model judges too, those without tests as well."""
        if self.settings.task is None:
            self._add_tests(candidates)
        tested = [each for each in candidates if self._metadata(each)]
        groups = [(Prompt((Message("user", each.task),), self._metadata(each)), [each.solution]) for each in tested]
        for each, (found,) in zip(tested, self.bench.rate(groups), strict=True):
            if found.reward is None:
                each.tests = []  # that are invalid
            else:
                each.details["reward"] = found.reward

        def reason(each: Candidate) -> str:
            if "reward" in each.details:
                return "" if each.details["reward"] >= self.settings.min_reward else FAILED_TESTS
            if self.settings.fitness == "both":
                self.bench.counts["judged without tests"] += 1
                return ""
            return NO_TESTS

        return self._keep(candidates, reason)

    def _add_tests(self, candidates: Sequence[Candidate]) -> None:
        """Let the coder write tests of each task; lines that do not compile are left out."""
        answers = self.ask(self._texts("tests", candidates), by=self.settings.coder_by)
        valid = compiling([line for answer in answers for line in asserts(answer.text)])
        for each, answer in zip(candidates, answers, strict=True):
            each.tests = [line for line in asserts(answer.text) if line in valid]
            each.answers.append(answer)

    def _judged(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        texts = [self.templates["judgement"].fill(prompt=each.task, answer=each.solution) for each in candidates]
        answers = self.ask(texts, by=self.settings.judge_by, temperature=self.settings.judge_temperature)
        for each, answer in zip(candidates, answers, strict=True):
            each.answers.append(answer)
            each.details["judge"] = verdict(answer.text)
        reasons = {True: "", False: FAILED_JUDGEMENT, None: NO_JUDGEMENT}
        return self._keep(candidates, lambda each: reasons[each.details["judge"]])

    def _texts(self, part: Part, candidates: Sequence[Candidate]) -> list[str]:
        return [self.templates[part].fill(prompt=each.task) for each in candidates]


def compiling(texts: Sequence[str]) -> set[str]:
    """Return the texts that compile as Python, each tried in a process of its own."""
    programs = {text: Program(COMPILER, (repr(text),)) for text in texts}
    outputs = run_programs(list(programs.values()))
    return {text for text, each in programs.items() if outputs[each] == [COMPILED]}
