"""Responses to show: chosen by a hash of the prompt, so that nobody has picked them."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.report.reading import SECOND, Run, read_lines

EVALUATE = "evaluate"
GROUPS = "groups.jsonl"
SHOWN = {"better": 3, "worse": 3, "unchanged": 2}  # prompts of each kind: losses are shown as gains are
GROUPS_SHOWN = 2  # of each step that generates
LONGEST = 2000  # characters of a text that are shown

Line = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Said:
    """One response, and how it fared."""

    who: str
    text: str
    reward: float | None
    verdict: str  # passed, failed, or the rates of parts; empty where nothing graded it


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt and responses to it."""

    prompt: str
    responses: Sequence[Said]
    kind: str = ""  # a name of SHOWN


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The samples of one task, and how many prompts there are of each kind."""

    task: str
    first: str  # policy
    last: str
    counts: Mapping[str, int]
    samples: Sequence[Sample]


@dataclass(slots=True)
class Generated:
    """What a step generated: rewards of all responses, and a few groups."""

    step: str
    report: Mapping[str, Any]
    rewards: list[float] = field(default_factory=list[float])
    samples: Sequence[Sample] = ()


def evaluated(run: Run, beside: Run | None = None) -> Iterator[Evaluated]:
    """Before and after, of each task whose responses were kept; with the last policy of a run beside it."""
    others = _responses(beside) if beside is not None else {}
    for task, by_policy in _responses(run).items():
        if len(by_policy) < 2:
            continue
        policies = list(by_policy)
        shown = {name: by_policy[name] for name in dict.fromkeys([policies[0], policies[len(policies) // 2]])}
        shown[policies[-1]] = by_policy[policies[-1]]
        if there := others.get(task):
            last = list(there)[-1]
            shown[f"{last} of {SECOND}"] = there[last]
        yield _before_and_after(task, policies[0], policies[-1], shown)


def generated(run: Run) -> Iterator[Generated]:
    """What each finished step that generates has made."""
    for step in run.steps:
        if not (step.folder / GROUPS).is_file():
            continue
        found = Generated(step.name, step.manifest.get("report") or {})
        chosen = heapq.nsmallest(GROUPS_SHOWN, _groups(step.folder / GROUPS, found.rewards), key=_by_hash)
        found.samples = [_best_and_worst(group) for group in chosen]
        yield found


def prompt_text(prompt: object) -> str:
    """A prompt in one text: itself, or its messages, with roles where there are several."""
    if not isinstance(prompt, list):
        return str(prompt)
    turns: list[Mapping[str, Any]] = [turn for turn in prompt if isinstance(turn, Mapping)]
    if len(turns) == 1:
        return str(turns[0].get("content", ""))
    return "\n\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in turns)


def shortened(text: str) -> str:
    """The text, or its beginning and how much more there is."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST:,} more characters)"


def _by_hash(group: Line) -> str:
    return _digest(prompt_text(group.get("prompt", "")))


def _digest(prompt: str) -> str:
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()


def _responses(run: Run) -> dict[str, dict[str, dict[str, Line]]]:
    """Of each task each policy's first response to each prompt, the policies in the order of their steps."""
    found: dict[str, dict[str, dict[str, Line]]] = {}
    files = [path for step in run.steps if step.stage == EVALUATE for path in sorted(step.folder.glob("[!.]*.jsonl"))]
    for path in files:
        for line in read_lines(path):
            if {"policy", "prompt", "response"} <= line.keys():
                by_policy = found.setdefault(path.stem, {})
                by_policy.setdefault(str(line["policy"]), {}).setdefault(prompt_text(line["prompt"]), line)
    places = {step.name: place for place, step in enumerate(run.steps)}
    return {task: dict(sorted(of.items(), key=lambda each: places.get(each[0], -1))) for task, of in found.items()}


def _before_and_after(task: str, first: str, last: str, shown: Mapping[str, Mapping[str, Line]]) -> Evaluated:
    kinds: dict[str, list[str]] = {kind: [] for kind in SHOWN}
    for prompt in sorted(shown[first].keys() & shown[last].keys(), key=_digest):
        gain = _worth(shown[last][prompt]) - _worth(shown[first][prompt])
        kinds["better" if gain > 0 else "worse" if gain < 0 else "unchanged"].append(prompt)
    samples = [
        Sample(shortened(prompt), [_said(who, of[prompt]) for who, of in shown.items() if prompt in of], kind)
        for kind, prompts in kinds.items()
        for prompt in prompts[: SHOWN[kind]]
    ]
    return Evaluated(task, first, last, {kind: len(of) for kind, of in kinds.items()}, samples)


def _parts(line: Line) -> dict[str, tuple[float, float]]:
    return {name: (part[0], part[1]) for name, part in (line.get("parts") or {}).items() if part[1]}


def _worth(line: Line) -> float:
    """The mean of the parts' rates, or the reward of what has no parts."""
    rates = [passed / of for passed, of in _parts(line).values()]
    return sum(rates) / len(rates) if rates else float(line.get("reward") or 0)


def _said(who: str, line: Line) -> Said:
    parts = _parts(line)
    if all(passed in (0, of) for passed, of in parts.values()) and len({bool(part[0]) for part in parts.values()}) == 1:
        verdict = "passed" if next(iter(parts.values()))[0] else "failed"
    else:
        verdict = ", ".join(f"{name.replace('_', ' ')} {passed:g} of {of:g}" for name, (passed, of) in parts.items())
    return Said(who, shortened(str(line["response"])), line.get("reward"), verdict)


def _groups(path: Path, rewards: list[float]) -> Iterator[Line]:
    """The groups whose responses are rated; their rewards are added to `rewards` on the way."""
    for line in read_lines(path):
        known = [float(one["reward"]) for one in line.get("responses") or () if one.get("reward") is not None]
        rewards.extend(known)
        if known:
            yield line


def _best_and_worst(group: Line) -> Sample:
    rated = sorted((one for one in group["responses"] if one.get("reward") is not None), key=lambda one: -one["reward"])
    ends = {f"best of {len(rated)}": rated[0]} | ({f"worst of {len(rated)}": rated[-1]} if len(rated) > 1 else {})
    responses = [Said(who, shortened(str(one.get("content", ""))), one["reward"], "") for who, one in ends.items()]
    return Sample(shortened(prompt_text(group.get("prompt", ""))), responses)
