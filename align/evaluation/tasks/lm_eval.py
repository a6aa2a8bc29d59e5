"""Tasks of lm-evaluation-harness, the extra `harness`, named `harness:TASK`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import InputError, one_line
from align.evaluation.statistics import Score
from align.evaluation.task import EstimateInputs, Task, TaskInputs, TaskResult, TaskSize

PREFIX = "harness:"
NORMAL_95 = 1.96  # standard errors on either side of a 95 % interval; the harness reports standard errors


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessTask(Task):
    """A task that lm-evaluation-harness loads, runs and grades."""

    options: frozenset[str] = frozenset({"policy", "limit", "tasks_folder"})
    required: tuple[str, ...] = ("policy",)

    def size(self, inputs: EstimateInputs) -> TaskSize:
        """Return no size: the harness knows its own rows."""
        return TaskSize(0, 0, 0)

    def run(self, inputs: TaskInputs) -> TaskResult:
        """Run the harness in this process."""
        if inputs.processes.world_size > 1:
            raise InputError(f"task {self.name} runs in one process: run it without accelerate launch")
        folder = Path(inputs.tasks_folder) if inputs.tasks_folder else None
        names = [self.name.removeprefix(PREFIX)]
        return TaskResult(scores=harness(inputs.policy_path, names, folder=folder, limit=inputs.limit))


def harness(
    model: str, names: Sequence[str], *, folder: Path | None = None, limit: int | None = None, batch_size: int = 8
) -> dict[str, Score]:
    """Return each metric of each harness task as `task/metric`, for the saved policy at `model`.

    `folder` holds additional task files. Without network access their data must be in the local cache. Metrics without
    a standard error are left out.
    """
    try:
        from lm_eval.evaluator import simple_evaluate  # noqa: PLC0415 - an extra, and slow to import
        from lm_eval.tasks import TaskManager  # noqa: PLC0415
    except ImportError as error:
        raise InputError('lm-evaluation-harness is not installed: pip install "align[harness]"') from error
    from align.models.loading.pretrained import default_device  # noqa: PLC0415 - imports torch

    manager: Any = TaskManager(include_path=str(folder) if folder else None)
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise InputError(f"lm-evaluation-harness has no task {unknown[0]!r}")
    try:
        found: Any = simple_evaluate(
            model="hf",
            model_args={"pretrained": model, "trust_remote_code": False, "device": default_device()},
            tasks=list(names),
            task_manager=manager,
            limit=limit,
            batch_size=batch_size,
        )
    except (OSError, ConnectionError) as error:
        raise InputError(f"lm-evaluation-harness cannot run {', '.join(names)}: {one_line(error)[:200]}") from error
    scores: dict[str, Score] = {}
    for task, metrics in found["results"].items():
        num_rows = found["n-samples"][task]["effective"]
        for name, value in metrics.items():
            metric, _, filtered = name.partition(",")
            error = metrics.get(f"{metric}_stderr,{filtered}")
            if isinstance(value, float | int) and isinstance(error, float) and not metric.endswith("_stderr"):
                margin = NORMAL_95 * error
                scores[f"{task}/{metric}"] = Score(float(value), value - margin, value + margin, num_rows)
    return scores
