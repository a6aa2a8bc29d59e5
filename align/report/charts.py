"""Which charts a run has, or two runs have together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.report.figures import Chart, Line, curves, histogram, score_dots
from align.report.quantities import NATS, PLAIN, RATE
from align.report.reading import SECOND, Run, Step
from align.report.samples import Generated

HELD_OUT = "held_out/"
IN_A_ROW = 4  # charts of a step that are all shown at once


@dataclass(frozen=True, slots=True)
class Curve:
    """A chart of some of the metrics of a training step."""

    title: str
    metrics: Mapping[str, str]  # metric -> label
    first: bool = True  # shown at once; the others unfold


CURVES = (
    Curve("Loss", {"loss": "training", "held_out/loss": "held out"}),
    Curve("Implicit rewards", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
    Curve("Reward margin", {"rewards/margins": "training", "held_out/rewards/margins": "held out"}),
    Curve("Log-probability", {"logps/chosen": "chosen", "logps/rejected": "rejected"}),
    Curve("Parts of the loss", {"loss/preference": "preference", "loss/sft": "supervised"}, first=False),
    Curve(
        "Pairs in order",
        {"rewards/accuracies": "training", "held_out/rewards/accuracies": "held out"},
        first=False,
    ),
    Curve("Gradient norm", {"grad_norm": "before clipping"}, first=False),
    Curve("Learning rate", {"lr": "learning rate"}, first=False),
)


@dataclass(frozen=True, slots=True)
class Trained:
    """The curves of one training step."""

    step: str
    stage: str
    charts: Sequence[Chart]
    more: Sequence[Chart]


def training(runs: Mapping[str, Run]) -> Iterator[Trained]:
    """The curves of each step that has metrics, of all runs in one chart; runs are by label."""
    for name in all_steps(runs.values()):
        steps = {label: step for label, run in runs.items() if (step := run.step(name)) is not None and step.metrics}
        if not steps:
            continue
        drawn = [(curve, _curve(curve, steps, f"c-{name}-{number}")) for number, curve in enumerate(CURVES)]
        few = sum(chart is not None for _, chart in drawn) <= IN_A_ROW
        shown = [chart for curve, chart in drawn if chart is not None and (curve.first or few)]
        more = [chart for curve, chart in drawn if chart is not None and not (curve.first or few)]
        yield Trained(name, next(iter(steps.values())).stage, shown, more)


def scores(runs: Mapping[str, Run]) -> Iterator[Chart]:
    """One chart a task: each policy's value with its interval."""
    for number, task in enumerate(all_tasks(runs.values())):
        found: list[tuple[str, Mapping[str, Any]]] = [
            (label, {policy: of[task] for policy, of in run.table.items() if task in of}) for label, run in runs.items()
        ]
        policies = [name for name in all_policies(runs.values()) if any(name in of for _, of in found)]
        yield score_dots(task, policies, found, unit=unit_of(task, runs.values()), name=f"s-{number}")


def rewards(made: Mapping[str, Sequence[Generated]]) -> Iterator[tuple[Chart, Sequence[tuple[str, Generated]]]]:
    """A histogram a step that generates, all over the same rewards; with what each run's step generated."""
    every = [reward for steps in made.values() for step in steps for reward in step.rewards]
    for name in dict.fromkeys(step.step for steps in made.values() for step in steps if step.rewards):
        here = [(label, step) for label, steps in made.items() for step in steps if step.step == name and step.rewards]
        drawn = [(label or "responses", step.rewards) for label, step in here]
        yield histogram(name, drawn, (min(every), max(every)), name=f"r-{name}"), here


def all_steps(runs: Iterable[Run]) -> list[str]:
    """The names of the runs' steps, in order, each once."""
    return list(dict.fromkeys(step.name for run in runs for step in run.steps))


def all_tasks(runs: Iterable[Run]) -> list[str]:
    """The names of the runs' tasks, each once."""
    return list(dict.fromkeys(task for run in runs for task in run.tasks))


def all_policies(runs: Iterable[Run]) -> list[str]:
    """The names of the evaluated policies, each once."""
    return list(dict.fromkeys(policy for run in runs for policy in run.table))


def unit_of(task: str, runs: Iterable[Run]) -> str:
    """NATS, RATE or PLAIN: what the task's values are, of all runs alike."""
    known = list(runs)
    values = [scores[task]["value"] for run in known for scores in run.table.values() if task in scores]
    if any(task in run.in_nats for run in known):
        return NATS
    return RATE if all(0 <= value <= 1 for value in values) else PLAIN


def _curve(curve: Curve, steps: Mapping[str, Step], name: str) -> Chart | None:
    """The chart, or None where no run has any of its metrics."""
    lines: list[Line] = []
    for label, step in steps.items():
        for colour, (metric, what) in enumerate(curve.metrics.items()):
            points = [
                (line.get("step", float(place)), line[metric])
                for place, line in enumerate(step.metrics, 1)
                if metric in line
            ]
            if points:
                lines.append(Line(what, points, colour, dashed=label == SECOND, marked=metric.startswith(HELD_OUT)))
    return curves(curve.title, lines, name=name) if lines else None
