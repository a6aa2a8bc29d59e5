"""Judges that need no model: verifiable instructions, and comparison with a known answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from align.errors import InputError, within
from align.procedural import tasks
from align.records import Prompt
from align.rewards.answers.comparison import same_answer
from align.rewards.answers.extraction import final_answer
from align.rewards.builtin_judges import GroundTruthSettings, VerifierSettings
from align.rewards.published_rows import known_answer
from align.rewards.thoughts import visible_text
from align.rewards.verdicts import Group, Verdict
from align.rewards.verifiers.instructions import Instruction, instructions, with_custom
from align.rewards.verifiers.patterns import SlowPatternError, shared_limit

Followed = Sequence[bool]  # one value per instruction

# Name of the setting `reward` -> the reward of a response, from which of its instructions it follows
REWARDS: Mapping[str, Callable[[Followed], float]] = {
    "share": lambda followed: sum(followed) / len(followed),
    "all": lambda followed: float(all(followed)),
    "both": lambda followed: tasks.reward(tuple(followed)),  # the mean of both, as procedural tasks are rated
}


class VerifierJudge:
    """Checks the instructions of a prompt: `instructions`, IFEval's columns, or those of a procedural task."""

    def __init__(self, settings: VerifierSettings) -> None:
        self.settings = settings
        self.table = with_custom(settings.verifiers)

    def __call__(self, groups: Sequence[Group]) -> Iterator[tuple[Verdict, ...]]:
        """Yield the verdicts of each group; `raw` has the strict and the loose result of each check."""
        graded = iter(_grade_tasks(groups))
        for prompt, responses in groups:
            with _located(prompt):
                given = instructions(prompt.metadata, self.table)
            if given:
                yield self._check_group(given, responses)
            elif _is_task(prompt):
                yield tuple(self._from_checks(next(graded)) for _ in responses)
            else:
                yield (Verdict(None, why="the prompt has no verifiable instructions"),) * len(responses)

    def _check_group(self, given: Sequence[Instruction], responses: Sequence[str]) -> tuple[Verdict, ...]:
        """Return the verdicts of a group, none of them where a pattern of the row takes too long."""
        try:
            return tuple(self._check_instructions(given, response) for response in responses)
        except SlowPatternError as error:
            return (Verdict(None, why=error.message),) * len(responses)

    def _check_instructions(self, given: Sequence[Instruction], response: str) -> Verdict:
        response = visible_text(response)
        with shared_limit():
            strict = [instruction.followed(response) for instruction in given]
            loose = [instruction.followed(response, loose=True) for instruction in given]
        verdict = self._verdict(strict, loose, [instruction.name for instruction in given])
        if (num_words := len(response.split())) < self.settings.min_words:
            why = f"{num_words} words, fewer than {self.settings.min_words}; {verdict.why}"
            return replace(verdict, reward=0.0, why=why)
        return verdict

    def _from_checks(self, verdicts: tasks.Verdicts) -> Verdict:
        checks = list(verdicts)  # a procedural task has no loose check
        return self._verdict(checks, checks, [f"check {index}" for index in range(len(checks))])

    def _verdict(self, strict: Followed, loose: Followed, names: Sequence[str]) -> Verdict:
        counted = loose if self.settings.loose else strict
        violated = [name for name, followed in zip(names, counted, strict=True) if not followed]
        why = f"{len(names) - len(violated)} of {len(names)} followed"
        why += f", not {', '.join(violated)}" if violated else ""
        return Verdict(REWARDS[self.settings.reward](counted), why=why, raw={"strict": strict, "loose": loose})


def _is_task(prompt: Prompt) -> bool:
    return prompt.metadata.get("kind") in tasks.KINDS


def _grade_tasks(groups: Sequence[Group]) -> list[tasks.Verdicts]:
    """Return the checks of all responses to procedural tasks, in one call because programs among them run together."""
    return tasks.grade_all(
        [
            (prompt.metadata, visible_text(response))
            for prompt, responses in groups
            if _is_task(prompt)
            for response in responses
        ]
    )


class GroundTruthJudge:
    """Compares the final answer of each response with the `answer` of its prompt."""

    def __init__(self, settings: GroundTruthSettings) -> None:
        self.settings = settings

    def __call__(self, groups: Sequence[Group]) -> Iterator[tuple[Verdict, ...]]:
        """Yield the verdicts of each group; `raw` has the answer that was found and the expected one."""
        if self.settings.missing == "error":
            for prompt, _ in groups:
                with _located(prompt):
                    _required_answer(prompt)
        for prompt, responses in groups:
            with _located(prompt):
                expected = _known_answer(prompt)
            if expected is None:
                yield (Verdict(None, why="the prompt has no known answer"),) * len(responses)
            else:
                yield tuple(_compare(response, expected) for response in responses)


def _compare(response: str, expected: str) -> Verdict:
    visible = visible_text(response)
    given = final_answer(visible)
    if given is None:
        why = "no final answer found" + (" before the response was cut off" if visible.is_cut else "")
        return Verdict(0.0, why=why, raw={"given": None, "expected": expected})
    same = same_answer(given, expected)
    why = f"{given} is {'equal to' if same else 'different from'} {expected}"
    return Verdict(float(same), why=why, raw={"given": given, "expected": expected})


def _known_answer(prompt: Prompt) -> str | None:
    """Return the known answer; of a whole solution in GSM8K's form, the number after `####`."""
    answer = known_answer(prompt.metadata)
    if answer is None:
        return None
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise InputError(f"`answer` is a string or a number, not {str(answer)[:80]!r}")
    text = str(answer)
    return (final_answer(text) or text) if "####" in text else text


def _required_answer(prompt: Prompt) -> str:
    answer = _known_answer(prompt)
    if answer is None:
        raise InputError("the prompt has no `answer`; set missing: abstain to give no reward for such prompts")
    return answer


def _located(prompt: Prompt) -> AbstractContextManager[None]:
    """Return a block whose errors name the prompt."""
    return within(f"prompt {prompt.metadata.get('key', prompt.messages[-1].content[:40])!r}")
