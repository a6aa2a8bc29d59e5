"""Choose the charts of one run, or of several runs together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.report.curves import Line, curves
from align.report.figures import Chart, histogram, score_dots
from align.report.formatting import NATS, PLAIN, RATE
from align.report.run_folder import LABELS, MEMORY, START, THROUGHPUT, Run, Step
from align.report.samples import GenerationSamples

HELD_OUT = "held_out/"
MAX_DASHED = 2  # runs in a chart whose colours tell metrics apart: solid and dashed
CHARTS_PER_ROW = 4  # a step with fewer primary charts than this shows others beside them


@dataclass(frozen=True, slots=True)
class Curve:
    """A chart of some metrics of a training step."""

    title: str
    metrics: Mapping[str, str]  # metric -> label
    primary: bool = True  # shown directly; the others are collapsed
    allow_log: bool = False  # logarithmic where the values span orders of magnitude


CURVES = (
    Curve("Loss", {"loss": "training", "held_out/loss": "held out"}, allow_log=True),
    Curve("Implicit rewards", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
    Curve("Reward margin", {"rewards/margins": "training", "held_out/rewards/margins": "held out"}),
    Curve("Log-probability", {"logps/chosen": "chosen", "logps/rejected": "rejected"}),
    Curve("Loss terms", {"loss/preference": "preference", "loss/sft": "SFT"}, primary=False),
    Curve(
        "Reward accuracy",
        {"rewards/accuracies": "training", "held_out/rewards/accuracies": "held out"},
        primary=False,
    ),
    Curve("Gradient norm", {"grad_norm": "before clipping"}, primary=False, allow_log=True),
    Curve("Learning rate", {"lr": "learning rate"}, primary=False),
    Curve("Throughput", {THROUGHPUT: "trained tokens per second"}, primary=False),
    Curve("Peak memory", {MEMORY: "MiB"}, primary=False),
)


@dataclass(frozen=True, slots=True)
class StepCurves:
    """The charts of one training step."""

    step: str
    stage: str
    charts: Sequence[Chart]
    more: Sequence[Chart]  # collapsed


def training_curves(runs: Mapping[str, Run]) -> Iterator[StepCurves]:
    """Yield the charts of each step that has metrics, with all runs in one chart; `runs` is {label: run}."""
    for name in all_steps(runs.values()):
        steps = {label: step for label, run in runs.items() if (step := run.step(name)) is not None and step.metrics}
        if not steps:
            continue
        drawn = [(curve, _chart(curve, steps, f"c-{name}-{number}")) for number, curve in enumerate(CURVES)]
        charts = [(curve, chart) for curve, chart in drawn if chart is not None]
        shown = [chart for curve, chart in charts if curve.primary]
        more = [chart for curve, chart in charts if not curve.primary]
        num_free = max(0, CHARTS_PER_ROW - len(shown))
        shown = shown + more[:num_free]
        more = more[num_free:]
        yield StepCurves(name, next(iter(steps.values())).stage, shown, more)


def score_charts(runs: Mapping[str, Run]) -> Iterator[Chart]:
    """Yield one chart per task with each policy's score and interval."""
    for number, task in enumerate(all_tasks(runs.values())):
        scores: list[tuple[str, Mapping[str, Any]]] = [
            (label, {policy: by_task[task] for policy, by_task in run.table.items() if task in by_task})
            for label, run in runs.items()
        ]
        policies = [name for name in all_policies(runs.values()) if any(name in by_policy for _, by_policy in scores)]
        yield score_dots(task, policies, scores, unit=unit_of(task, runs.values()), name=f"s-{number}")


def reward_histograms(
    generated: Mapping[str, Sequence[GenerationSamples]],
) -> Iterator[tuple[Chart, Sequence[tuple[str, GenerationSamples]]]]:
    """Yield a histogram of rewards per generation step, and each run's samples of that step."""
    for name in dict.fromkeys(step.step for steps in generated.values() for step in steps if step.rewards):
        by_run = [
            (label, step) for label, steps in generated.items() for step in steps if step.step == name and step.rewards
        ]
        series = [(label or "responses", step.rewards) for label, step in by_run]
        yield histogram(name, series, name=f"r-{name}"), by_run


def all_steps(runs: Iterable[Run]) -> list[str]:
    """Return the names of the runs' steps in order, without duplicates."""
    return list(dict.fromkeys(step.name for run in runs for step in run.steps))


def all_tasks(runs: Iterable[Run]) -> list[str]:
    """Return the names of the runs' tasks, without duplicates."""
    return list(dict.fromkeys(task for run in runs for task in run.tasks))


def all_policies(runs: Iterable[Run]) -> list[str]:
    """Return the names of the evaluated policies, without duplicates."""
    return list(dict.fromkeys(policy for run in runs for policy in run.table))


def unit_of(task: str, runs: Iterable[Run]) -> str:
    """Return the unit of a task's scores over all runs: NATS, RATE or PLAIN."""
    known = list(runs)
    values = [scores[task]["value"] for run in known for scores in run.table.values() if task in scores]
    if any(task in run.in_nats for run in known):
        return NATS
    return RATE if all(0 <= value <= 1 for value in values) else PLAIN


def _chart(curve: Curve, steps: Mapping[str, Step], name: str) -> Chart | None:
    """Return the chart of a step in each run, or None if no run has any of the metrics."""
    lines: list[Line] = []
    by_colour = len(steps) > MAX_DASHED  # more runs than kinds of lines have a colour each
    for number, (run, step) in enumerate(steps.items()):
        for colour, (metric, label) in enumerate(curve.metrics.items()):
            points = _points(step, metric)
            is_held_out = metric.startswith(HELD_OUT)
            if points and by_colour:
                is_second = colour > 0 and not is_held_out
                lines.append(Line(f"{label}, {run}", points, number, dashed=is_second, marked=is_held_out))
            elif points:
                is_second = run == LABELS[1]
                lines.append(
                    Line(label, points, colour, dashed=is_second, marked=is_held_out, run=run if is_second else "")
                )
    return curves(curve.title, lines, name=name, allow_log=curve.allow_log) if lines else None


def _points(step: Step, metric: str) -> list[tuple[float, float]]:
    """Return (optimizer step, value) of a metric; a held-out metric from step 0, before the first update."""
    start = START + metric
    before = [(0.0, line[start]) for line in step.metrics[:1] if start in line]
    return before + [
        (line.get("step", float(position)), line[metric])
        for position, line in enumerate(step.metrics, 1)
        if metric in line
    ]
