"""Judges that need no model: a prompt's instructions checked by programs, and its known answer compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from align.errors import InputError
from align.procedural import tasks
from align.records import Prompt
from align.rewards.builtin_judges import GroundTruthSettings, VerifierSettings
from align.rewards.final_answers import final_answer, same_answer
from align.rewards.verdicts import Group, Verdict
from align.rewards.verifiers.instructions import Instruction, instructions, with_custom

T = TypeVar("T")
Followed = Sequence[bool]  # one verdict an instruction


class VerifierJudge:
    """Checks a prompt's `instructions` (or IFEval's columns of them), or what a procedural task asks for."""

    def __init__(self, settings: VerifierSettings) -> None:
        self.settings = settings
        self.table = with_custom(settings.verifiers)

    def __call__(self, groups: Sequence[Group]) -> Iterator[tuple[Verdict, ...]]:
        """Verdicts of each group; `raw` has one a check, strict and loose."""
        graded = iter(_of_tasks(groups))
        for prompt, responses in groups:
            if asked := _at(prompt, lambda prompt: instructions(prompt.metadata, self.table)):
                yield tuple(self._of_instructions(asked, response) for response in responses)
            elif _is_task(prompt):
                yield tuple(self._of_task(next(graded)) for _ in responses)
            else:
                yield (Verdict(None, why="the prompt has no instructions that a program can check"),) * len(responses)

    def _of_instructions(self, asked: Sequence[Instruction], response: str) -> Verdict:
        strict = [instruction.followed(response) for instruction in asked]
        loose = [instruction.followed(response, loose=True) for instruction in asked]
        verdict = self._verdict(strict, loose, [instruction.name for instruction in asked])
        if (words := len(response.split())) < self.settings.min_words:
            return replace(verdict, reward=0.0, why=f"{words} words, of {self.settings.min_words}; {verdict.why}")
        return verdict

    def _of_task(self, verdicts: tasks.Verdicts) -> Verdict:
        checks = list(verdicts)  # a task is answered exactly: there is no looser reading
        return self._verdict(checks, checks, [f"check {place}" for place in range(len(checks))])

    def _verdict(self, strict: Followed, loose: Followed, names: Sequence[str]) -> Verdict:
        counted = loose if self.settings.loose else strict
        broken = [name for name, followed in zip(names, counted, strict=True) if not followed]
        why = f"{len(names) - len(broken)} of {len(names)} followed" + (f", not {', '.join(broken)}" if broken else "")
        return Verdict(REWARDS[self.settings.reward](counted), why=why, raw={"strict": strict, "loose": loose})


def _is_task(prompt: Prompt) -> bool:
    return prompt.metadata.get("kind") in tasks.KINDS


def _of_tasks(groups: Sequence[Group]) -> list[tasks.Verdicts]:
    """Verdicts on all responses to procedural tasks, made together since programs among them run side by side."""
    return tasks.grades(
        [(prompt.metadata, response) for prompt, responses in groups if _is_task(prompt) for response in responses]
    )


class GroundTruthJudge:
    """Compares each response's final answer with the `answer` of its prompt."""

    def __init__(self, settings: GroundTruthSettings) -> None:
        self.settings = settings

    def __call__(self, groups: Sequence[Group]) -> Iterator[tuple[Verdict, ...]]:
        """Verdicts of each group; `raw` has the answer that was found."""
        if self.settings.missing == "error":
            for prompt, _ in groups:
                _at(prompt, _required)
        for prompt, responses in groups:
            expected = _at(prompt, _expected)
            if expected is None:
                yield (Verdict(None, why="the prompt has no known answer"),) * len(responses)
            else:
                yield tuple(_compared(response, expected) for response in responses)


def _compared(response: str, expected: str) -> Verdict:
    given = final_answer(response)
    if given is None:
        return Verdict(0.0, why="no final answer found", raw={"given": None, "expected": expected})
    same = same_answer(given, expected)
    why = f"{given} is{'' if same else ' not'} {expected}"
    return Verdict(float(same), why=why, raw={"given": given, "expected": expected})


def _expected(prompt: Prompt) -> str | None:
    """The known answer; of a whole solution in GSM8K's form, what it comes to."""
    answer = prompt.metadata.get("answer")
    if answer is None:
        return None
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise InputError(f"answer is a text or a number, not {str(answer)[:80]!r}")
    text = str(answer)
    return (final_answer(text) or text) if "####" in text else text


def _required(prompt: Prompt) -> str:
    answer = _expected(prompt)
    if answer is None:
        raise InputError("the prompt has no `answer` to compare with (missing: abstain leaves such prompts out)")
    return answer


def _at(prompt: Prompt, read: Callable[[Prompt], T]) -> T:
    """What `read` gives for a prompt; an error names the row."""
    try:
        return read(prompt)
    except InputError as error:
        name = prompt.metadata.get("key", prompt.messages[-1].content[:40])
        raise InputError(f"prompt {name!r}: {error}") from error


# What is made of the verdicts on a response's instructions.
REWARDS: Mapping[str, Callable[[Followed], float]] = {
    "share": lambda followed: sum(followed) / len(followed),
    "all": lambda followed: float(all(followed)),
    "both": lambda followed: tasks.reward(tuple(followed)),  # half each, as the procedural tasks are rated
}
