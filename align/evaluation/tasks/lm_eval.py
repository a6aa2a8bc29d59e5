"""Tasks of lm-evaluation-harness, the extra `harness`, named `harness:TASK`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import InputError, one_line
from align.evaluation.statistics import Score
from align.evaluation.task import EstimateInputs, Task, TaskInputs, TaskResult, TaskSize

PREFIX = "harness:"
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}  # precision -> the harness's name of the weights' data type
NORMAL_95 = 1.96  # standard errors on either side of a 95 % interval; the harness reports standard errors


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessTask(Task):
    """A task that lm-evaluation-harness loads, runs and grades."""

    options: frozenset[str] = frozenset({"policy", "limit", "tasks_folder", "chat_template"})
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
        chat = uses_chat_template(inputs.policy_path, inputs.chat_template)
        inputs.progress.note(f"{self.name}: prompts {'with' if chat else 'without'} the policy's chat template")
        scores = harness(
            inputs.policy_path,
            names,
            folder=folder,
            limit=inputs.limit,
            precision=inputs.precision,
            chat_template=chat,
        )
        return TaskResult(scores=scores, counts={"chat_template": chat})


def uses_chat_template(model: str, asked: bool | None) -> bool:
    """Return whether prompts are rendered by the policy's chat template: where it has one, unless asked otherwise."""
    from align.models.loading.tokenizer import load_tokenizer  # noqa: PLC0415 - imports transformers
    from align.models.settings import PolicySettings  # noqa: PLC0415

    has_template = load_tokenizer(PolicySettings(path=model)).chat_template is not None
    if asked and not has_template:
        raise InputError(f"{model} has no chat template; set chat_template: false", ("chat_template",))
    return has_template if asked is None else asked


def harness(
    model: str,
    names: Sequence[str],
    *,
    folder: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    precision: str = "fp32",
    chat_template: bool = False,
) -> dict[str, Score]:
    """Return each metric of each harness task as `task/metric` (`scores_of`), for the saved policy at `model`.

    `folder` holds additional task files. Without network access their data must be in the local cache. With
    `chat_template` each request is a user turn, and few-shot examples are turns before it. Metrics without a standard
    error are left out; raise `InputError` if none has one.
    """
    if folder is not None and not folder.is_dir():
        raise InputError(f"{folder} is not a folder of task files", ("tasks_folder",))
    try:
        from lm_eval.evaluator import simple_evaluate  # noqa: PLC0415 - an extra, and slow to import
        from lm_eval.tasks import TaskManager  # noqa: PLC0415
    except ImportError as error:
        raise InputError("lm-evaluation-harness is not installed: pip install 'lm-eval[hf]'") from error
    from align.models.loading.pretrained import default_device  # noqa: PLC0415 - imports torch

    manager: Any = TaskManager(include_path=str(folder.resolve()) if folder else None)
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        where = f", and neither has {folder}" if folder else "; name the folder of your own as tasks_folder"
        raise InputError(f"lm-evaluation-harness has no task {unknown[0]!r}{where}")
    try:
        found: Any = simple_evaluate(
            model="hf",
            model_args={
                "pretrained": model,
                "trust_remote_code": False,
                "device": default_device(),
                "dtype": DTYPES[precision],
            },
            tasks=list(names),
            task_manager=manager,
            limit=limit,
            batch_size=batch_size,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
        )
    except (OSError, ConnectionError) as error:
        raise InputError(f"lm-evaluation-harness cannot run {', '.join(names)}: {one_line(error)[:200]}") from error
    scores = scores_of(found)
    if not scores:
        raise InputError(
            f"lm-evaluation-harness gives no metric of {', '.join(names)} a standard error; a single row has none"
        )
    return scores


def scores_of(found: Mapping[str, Any]) -> dict[str, Score]:
    """Return the metrics with a standard error in the results of `simple_evaluate`, of tasks and of groups of tasks.

    A metric that a task computes by several filters of the answers has a score for each, `task/metric/filter`.
    """
    scores: dict[str, Score] = {}
    for task, values in found["results"].items():
        known: list[tuple[str, str, float, float]] = []
        for name, value in values.items():
            metric, _, filtered = name.partition(",")
            error = values.get(f"{metric}_stderr,{filtered}")
            if isinstance(value, float | int) and isinstance(error, float) and not metric.endswith("_stderr"):
                known.append((metric, filtered, float(value), NORMAL_95 * float(error)))
        times = Counter(metric for metric, *_ in known)
        for metric, filtered, value, margin in known:
            name = f"{task}/{metric}/{filtered}" if times[metric] > 1 else f"{task}/{metric}"
            scores[name] = Score(value, value - margin, value + margin, _num_rows(found, task))
    return scores


def _num_rows(found: Mapping[str, Any], task: str) -> int:
    """Return the number of rows of a task, or of all tasks of a group."""
    if task in found["n-samples"]:
        return found["n-samples"][task]["effective"]
    return sum(_num_rows(found, each) for each in found["group_subtasks"].get(task, ()))
