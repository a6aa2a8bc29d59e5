"""Everything else that can be measured, by lm-evaluation-harness (the extra `harness`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.errors import InputError, one_line
from align.evaluation.statistics import Score
from align.models.loading import default_device

NORMAL_95 = 1.96  # standard errors on either side of a 95 % interval; the harness gives standard errors


def harness(
    model: str, names: Sequence[str], *, folder: Path | None = None, limit: int | None = None, batch_size: int = 8
) -> dict[str, Score]:
    """The harness's figures of a saved policy: each task's metrics as `task/metric`.

    `folder` holds task files of the user's own. Their data must be there already where there is no network.
    """
    try:
        from lm_eval.evaluator import simple_evaluate  # noqa: PLC0415 - an extra, and slow to import
        from lm_eval.tasks import TaskManager  # noqa: PLC0415
    except ImportError as error:
        raise InputError('lm-evaluation-harness is not installed: pip install "align[harness]"') from error
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
                around = NORMAL_95 * error
                scores[f"{task}/{metric}"] = Score(float(value), value - around, value + around, num_rows)
    return scores
