"""Decide whether one policy is significantly worse than another, paired by prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from align.report.run_folder import Facts, Run, Step, read_lines
from align.report.samples import EVALUATE

Z_95 = 1.959964  # standard normal quantile of 0.975


@dataclass(frozen=True, slots=True)
class Answers:
    """The values of a policy on the prompts of a task, as it was asked."""

    asked: Any  # settings of the task
    prompts: list[Any] = field(default_factory=list[Any])
    passed: list[float] = field(default_factory=list[float])
    of: list[float] = field(default_factory=list[float])

    def add(self, prompt: Any, passed: float, of: float) -> None:  # noqa: ANN401 - text, or row number
        """Add the next response; several to a prompt, which are dependent, follow each other and are added up."""
        if self.prompts and self.prompts[-1] == prompt:
            self.passed[-1] += passed
            self.of[-1] += of
        else:
            self.prompts.append(prompt)
            self.passed.append(passed)
            self.of.append(of)


ByTask = Mapping[str, Mapping[str, Answers]]  # task -> policy -> its answers


def read_answers(run: Run) -> ByTask:
    """Return the values by prompt that evaluations have written, {task: {policy: answers}}."""
    found: dict[str, dict[str, Answers]] = {}
    for step in run.steps:
        if step.stage == EVALUATE:
            for task, own in _answers_of(step).items():
                found.setdefault(task, {}).update(own)
    return found


def _answers_of(step: Step) -> ByTask:
    """Return the values that one evaluation has written; each of its files is read once for all metrics in it."""
    columns: Mapping[str, Sequence[str]] = step.manifest.get("columns") or {}
    policy = next(iter(step.manifest.get("scores") or {}), "")
    tasks = step.settings.get("tasks") or {}
    found: dict[str, dict[str, Answers]] = {}
    for file in dict.fromkeys(file for file, _ in columns.values()):
        parts = {column: part for column, (of_file, part) in columns.items() if of_file == file}
        for line in read_lines(step.folder / f"{file}.jsonl"):
            values = {**(line.get("parts") or {}), **(line.get("measures") or {})}
            for column, part in parts.items():
                if part in values:
                    own = found.setdefault(column, {})
                    answers = own.setdefault(str(line.get("policy", policy)), Answers(tasks.get(file)))
                    answers.add(line["row"] if "row" in line else line.get("prompt"), *values[part])
    return found


def is_worse(run: Run, answers: ByTask, task: str, one: str, other: str) -> bool:
    """Return whether policy `one` is significantly worse on a task than policy `other`, at 95 %.

    Decided by the interval of the paired change in `changes.json`, else by the paired interval of the values by prompt,
    else by whether the intervals of the two scores are disjoint, which asks for a larger difference.
    """
    low, high = _interval(run, answers, task, one, other)
    return high < 0 if task in run.lower_is_better else low > 0


def _interval(run: Run, answers: ByTask, task: str, one: str, other: str) -> tuple[float, float]:
    """Return the interval of the change from policy `one` to policy `other`."""
    for before, after, sign in ((one, other, 1), (other, one, -1)):
        change: Facts = run.changes.get(after, {}).get(task) or {}
        if change.get("from") == before and change.get("low") is not None and change.get("high") is not None:
            low, high = sorted((sign * change["low"], sign * change["high"]))
            return low, high
    own = answers.get(task, {})
    if one in own and other in own and (found := paired_interval(own[one], own[other])) is not None:
        return found
    first, second = run.table[one][task], run.table[other][task]
    ends = [score.get(end) for score in (first, second) for end in ("low", "high")]
    if any(end is None for end in ends):
        return -np.inf, np.inf
    return second["low"] - first["high"], second["high"] - first["low"]


def paired_interval(then: Answers, now: Answers) -> tuple[float, float] | None:
    """Return the 95 % interval of the change of Σ passed ÷ Σ of, paired by prompt, by the delta method.

    None if the two were asked other prompts or in another way, or if there are fewer than two prompts.
    """
    if then.asked != now.asked or then.prompts != now.prompts or len(now.prompts) < 2 or not sum(now.of) * sum(then.of):
        return None
    (before, before_N), (after, after_N) = _linearized(then), _linearized(now)
    margin = Z_95 * float((after_N - before_N).std(ddof=1)) / len(now.prompts) ** 0.5
    return after - before - margin, after - before + margin


def _linearized(answers: Answers) -> tuple[float, np.ndarray]:
    """Return the ratio of the sums, and how much each prompt moves it, shape [N] (prompts)."""
    passed_N, of_N = np.array(answers.passed, dtype=np.float64), np.array(answers.of, dtype=np.float64)
    ratio = passed_N.sum() / of_N.sum()
    return float(ratio), (passed_N - ratio * of_N) / of_N.mean()
