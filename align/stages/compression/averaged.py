"""Work of the stage `average`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from align.compress.averaging import interpolate, mean, slerp, write_average
from align.compress.weights import StoredWeights, plain_folder
from align.errors import InputError
from align.registry import lower_is_better
from align.stages.compression.average_settings import AverageSettings
from align.stages.costs.measured import Done, observing_done
from align.stages.inputs.context import RunContext
from align.stages.responses.engines import PolicyEngines
from align.stages.responses.evaluation import evaluate_tasks


def average_models(step: AverageSettings, context: RunContext) -> dict[str, Any]:
    """Write the average of a step's models to its folder, and return what the manifest says of it."""
    with tempfile.TemporaryDirectory(dir=context.folder, prefix=".merged.partial-") as name:
        work = Path(name)
        names = list(dict.fromkeys(each for each in (*step.of, step.base, step.toward) if each is not None))
        stored = {each: StoredWeights(plain_folder(str(context.inputs.folders[each]), work / each)) for each in names}
        report: dict[str, Any] = {"of": step.of, "how": step.how}
        chosen = step.of
        ran = list[Done]()
        if step.how == "greedy":
            chosen, report["values"] = _greedy(step, stored, context, work, ran)
            report["of"] = chosen
        sources = [stored[each] for each in (*chosen, step.base, step.toward) if each is not None]
        like = stored[step.of[-1] if step.of[-1] in chosen else chosen[-1]]
        weights = write_average(sources, context.folder, partial(_combined, step, len(chosen)), like=like)
    return {"average": report, "done": replace(_evaluated(ran), weights=weights)}


def _evaluated(ran: Sequence[Done]) -> Done:
    """Return the work of the evaluations of policies in this process."""
    known = [(each.dimensions, each.observed) for each in ran if each.dimensions is not None]
    return replace(observing_done(known), precision=ran[0].precision) if known else Done()


def _combined(step: AverageSettings, count: int, values: Iterator[Tensor]) -> Tensor:
    """Return the average of a tensor's values: those of the `count` models, of the base, and of the earlier model."""
    if step.how == "slerp":
        result = slerp(next(values), next(values), next(values), step.slerp_weight)
    else:
        result = mean(next(values) for _ in range(count))
    return result if step.toward is None else interpolate(result, next(values), step.toward_weight)


def _greedy(
    step: AverageSettings, stored: dict[str, StoredWeights], context: RunContext, work: Path, ran: list[Done]
) -> tuple[list[str], dict[str, float]]:
    """Return the policies whose mean does not make the metric worse, taken in order of their own value.

    `ran` receives the work of each evaluation.
    """
    assert step.task is not None
    task = step.task.resolve(context.inputs.sources.get(step.task.data))
    metric = step.metric or task.metrics_of(step.task.num_responses)[0]
    sign = -1 if lower_is_better(f"{task.name} {metric}") else 1

    def value(folder: Path, place: str) -> float:
        assert step.task is not None
        (work / place).mkdir()
        inside = replace(context, folder=work / place)  # journals of samples are this policy's own
        engines = PolicyEngines(str(folder), inside)
        (found,) = evaluate_tasks({"task": (step.task, task)}, inside, engines)
        ran.append(engines.done(context.processes, found.result.work))
        if metric not in found.result.scores:
            raise InputError(f"{task.name} has no value of {metric} for its rows; choose another metric", ("metric",))
        return found.result.scores[metric].value

    values = {name: value(stored[name].folder, f"own-{name}") for name in step.of}
    ranked = sorted(step.of, key=lambda name: sign * values[name], reverse=True)
    chosen, best = ranked[:1], values[ranked[0]]
    for name in ranked[1:]:
        soup = work / f"soup-{name}"
        soup.mkdir()
        write_average([stored[each] for each in (*chosen, name)], soup, mean)
        found = value(soup, f"with-{name}")
        shutil.rmtree(soup)
        is_kept = sign * found >= sign * best
        context.progress.note(
            f"{name} {'kept' if is_kept else 'left out'}: {metric} {found:.4f} with it, {best:.4f} without"
        )
        if is_kept:
            chosen = [*chosen, name]
            best = found
    return chosen, {**values, "average": best}
