"""Select responses to show by a hash of their prompt, so that they are not cherry-picked."""

from __future__ import annotations

import hashlib
import heapq
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.registry import lower_is_better
from align.report.run_folder import Run, read_lines

EVALUATE = "evaluate"
GROUPS = "groups.jsonl"
MAX_SAMPLES = {"improved": 3, "regressed": 3, "unchanged": 2}  # prompts of each outcome
MAX_GROUPS = 2  # of each generation step
PASSED, FAILED = "passed", "failed"
WORD_START, WORD_END = r"(?<!\w)", r"(?!\w)"
MAX_CHARACTERS = 2000  # of a prompt or response

Line = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Response:
    """One response with its grade."""

    label: str  # the policy, or the rank in a group
    text: str
    reward: float | None
    verdict: str  # "passed", "failed", the counts of several metrics, or "" where it was not graded
    checks: Sequence[tuple[str, str]] = ()  # name, and "passed" or "failed"
    segments: Sequence[tuple[str, str]] = ()  # the text in parts, each with "passed", "failed" or ""


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt with responses to it."""

    prompt: str
    responses: Sequence[Response]
    outcome: str = ""  # a key of MAX_SAMPLES


@dataclass(frozen=True, slots=True)
class EvaluationSamples:
    """The samples of one task and the number of prompts of each outcome, from the first policy to the last."""

    task: str
    first: str
    last: str
    counts: Mapping[str, int]
    samples: Sequence[Sample]


@dataclass(slots=True)
class GenerationSamples:
    """The rewards of all responses that a step generated, and a few of its groups."""

    step: str
    report: Mapping[str, Any]
    rewards: list[float] = field(default_factory=list[float])
    samples: Sequence[Sample] = ()


def evaluation_samples(run: Run, others: Mapping[str, Run] = {}) -> Iterator[EvaluationSamples]:  # noqa: B006 - not written to
    """Yield samples of each task with stored responses of at least two policies.

    Shows the first, the middle and the last policy of `run`, and the last policy of each of `others`, by label.
    """
    of_others = {label: _responses(other) for label, other in others.items()}
    for task, by_policy in _responses(run).items():
        if len(by_policy) < 2:
            continue
        policies = list(by_policy)
        shown = {name: by_policy[name] for name in dict.fromkeys([policies[0], policies[len(policies) // 2]])}
        shown[policies[-1]] = by_policy[policies[-1]]
        for label, of_other in of_others.items():
            if found := of_other.get(task):
                last = list(found)[-1]
                shown[f"{last} of {label}"] = found[last]
        yield _compared(task, policies[0], policies[-1], shown)


def generation_samples(run: Run) -> Iterator[GenerationSamples]:
    """Yield the rewards and a few groups of each finished generation step."""
    for step in run.steps:
        if not (step.folder / GROUPS).is_file():
            continue
        found = GenerationSamples(step.name, step.manifest.get("report") or {})
        chosen = heapq.nsmallest(MAX_GROUPS, _groups(step.folder / GROUPS, found.rewards), key=_group_hash)
        found.samples = [_best_and_worst(group) for group in chosen]
        yield found


def prompt_text(prompt: object) -> str:
    """Return a prompt as one text; several messages get their roles in front."""
    if not isinstance(prompt, list):
        return str(prompt)
    turns: list[Mapping[str, Any]] = [turn for turn in prompt if isinstance(turn, Mapping)]
    if len(turns) == 1:
        return answer_text(turns[0])
    return "\n\n".join(f"{turn.get('role', '')}: {answer_text(turn)}" for turn in turns)


def answer_text(turn: Mapping[str, Any]) -> str:
    """Return the content of a message or a response, followed by each tool call as JSON."""
    calls = [json.dumps(call.get("function"), ensure_ascii=False) for call in turn.get("tool_calls") or ()]
    return "\n".join(text for text in (str(turn.get("content", "")), *calls) if text)


def shortened(text: str) -> str:
    """Return the text, cut to MAX_CHARACTERS with the number of characters that are left out."""
    num_more = len(text) - MAX_CHARACTERS
    return text if num_more <= 0 else f"{text[:MAX_CHARACTERS]} … ({num_more:,} more characters)"


def marked(text: str, marks: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the text in parts, each with its style; what is to be marked is found as whole words.

    >>> list(marked("a sea, seas", {"sea": "failed"}))
    [('a ', ''), ('sea', 'failed'), (', seas', '')]
    """
    parts = [part for part in sorted(marks, key=len, reverse=True) if part]
    whole = [
        f"{WORD_START if part[0].isalnum() else ''}{re.escape(part)}{WORD_END if part[-1].isalnum() else ''}"
        for part in parts
    ]
    place = 0
    for match in re.finditer("|".join(whole), text) if whole else ():
        if match.start() > place:
            yield text[place : match.start()], ""
        yield match[0], marks[match[0]]
        place = match.end()
    if place < len(text):
        yield text[place:], ""


def _group_hash(group: Line) -> str:
    return _hash(prompt_text(group.get("prompt", "")))


def _hash(prompt: str) -> str:
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()


def _responses(run: Run) -> dict[str, dict[str, dict[str, Line]]]:
    """Return {task: {policy: {prompt: first response}}}, with the policies in the order of their steps."""
    found: dict[str, dict[str, dict[str, Line]]] = {}
    files = [path for step in run.steps if step.stage == EVALUATE for path in sorted(step.folder.glob("[!.]*.jsonl"))]
    for path in files:
        for line in read_lines(path):
            if {"policy", "prompt", "response"} <= line.keys():
                by_policy = found.setdefault(path.stem, {})
                by_policy.setdefault(str(line["policy"]), {}).setdefault(prompt_text(line["prompt"]), line)
    positions = {step.name: position for position, step in enumerate(run.steps)}
    return {
        task: dict(sorted(by_policy.items(), key=lambda item: positions.get(item[0], -1)))
        for task, by_policy in found.items()
    }


def _compared(task: str, first: str, last: str, shown: Mapping[str, Mapping[str, Line]]) -> EvaluationSamples:
    outcomes: dict[str, list[str]] = {outcome: [] for outcome in MAX_SAMPLES}
    for prompt in sorted(shown[first].keys() & shown[last].keys(), key=_hash):
        gain = line_value(shown[last][prompt]) - line_value(shown[first][prompt])
        outcomes["improved" if gain > 0 else "regressed" if gain < 0 else "unchanged"].append(prompt)
    samples = [
        Sample(
            shortened(prompt),
            [_response(label, lines[prompt]) for label, lines in shown.items() if prompt in lines],
            outcome,
        )
        for outcome, prompts in outcomes.items()
        for prompt in prompts[: MAX_SAMPLES[outcome]]
    ]
    counts = {outcome: len(prompts) for outcome, prompts in outcomes.items()}
    return EvaluationSamples(task, first, last, counts, samples)


def _parts(line: Line) -> dict[str, tuple[float, float]]:
    """Return {metric: (passed, total)} of a graded response."""
    return {name: (part[0], part[1]) for name, part in (line.get("parts") or {}).items() if part[1]}


def line_value(line: Line) -> float:
    """Return the mean of a response's metrics, or its reward where it has none.

    Metrics of which the lower value is better count only where there are no others.
    """
    found = {name: passed / total for name, (passed, total) in _parts(line).items()}
    rates = [rate for name, rate in found.items() if not lower_is_better(name)] or list(found.values())
    return sum(rates) / len(rates) if rates else float(line.get("reward") or 0)


def _response(label: str, line: Line) -> Response:
    text = shortened(str(line["response"]))
    checks = line.get("checks") or ()
    verdict = _verdict(_parts(line))
    marks = {part: PASSED if check["passed"] else FAILED for check in checks for part in check.get("found") or ()}
    marks |= {part: FAILED for check in checks if not check["passed"] for part in check.get("found") or ()}
    styles = [(shortened(str(check["name"])), PASSED if check["passed"] else FAILED) for check in checks]
    return Response(label, text, line.get("reward"), verdict, styles, list(marked(text, marks)))


def _verdict(parts: Mapping[str, tuple[float, float]]) -> str:
    """Return "passed" or "failed" where all metrics agree, else the counts of each."""
    if parts and all(passed == total for passed, total in parts.values()):
        return PASSED
    if parts and all(passed == 0 for passed, _ in parts.values()):
        return FAILED
    return ", ".join(f"{name.replace('_', ' ')} {passed:g} of {total:g}" for name, (passed, total) in parts.items())


def _groups(path: Path, rewards: list[float]) -> Iterator[Line]:
    """Yield the groups that have a rated response, and append all rewards to `rewards` on the way."""
    for line in read_lines(path):
        known = [float(one["reward"]) for one in line.get("responses") or () if one.get("reward") is not None]
        rewards.extend(known)
        if known:
            yield line


def _best_and_worst(group: Line) -> Sample:
    rated = sorted((one for one in group["responses"] if one.get("reward") is not None), key=lambda one: -one["reward"])
    ends = {f"best of {len(rated)}": rated[0]} | ({f"worst of {len(rated)}": rated[-1]} if len(rated) > 1 else {})
    responses = [Response(label, shortened(answer_text(one)), one["reward"], "") for label, one in ends.items()]
    return Sample(shortened(prompt_text(group.get("prompt", ""))), responses)
