"""Evaluation tasks, one file each. Importing the table does not import torch."""

from __future__ import annotations

from align.errors import InputError
from align.evaluation.task import Task
from align.evaluation.tasks import embeddings, ifeval, mmlu, nll, pair_accuracy, preference, procedural, topic_following
from align.evaluation.tasks.code import humaneval, mbpp
from align.evaluation.tasks.fidelity import DRIFT, FIDELITY
from align.evaluation.tasks.judged import alpaca_eval, arena_hard, judged_pairs, mt_bench, win_rate
from align.evaluation.tasks.lm_eval import PREFIX, HarnessTask
from align.evaluation.tasks.mathematics import gsm8k, math, svamp
from align.registry import import_dotted, suggest

__all__ = ["TASKS", "Task", "pick_task"]

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        ifeval.TASK,
        gsm8k.TASK,
        svamp.TASK,
        math.TASK,
        humaneval.TASK,
        mbpp.TASK,
        mbpp.PLUS,
        procedural.GENERAL,
        procedural.CODE,
        procedural.DIALOGUES,
        topic_following.TASK,
        mmlu.TASK,
        nll.TASK,
        preference.TASK,
        pair_accuracy.TASK,
        win_rate.TASK,
        judged_pairs.TASK,
        alpaca_eval.TASK,
        alpaca_eval.PUBLISHED_TASK,
        arena_hard.TASK,
        FIDELITY,
        DRIFT,
        mt_bench.TASK,
        embeddings.STS,
        embeddings.ALIGNMENT,
        embeddings.UNIFORMITY,
    )
}
# A recipe gives a task its rows and a policy
IN_RECIPES = {name: task for name, task in TASKS.items() if {"data", "policy"} <= task.options}


def pick_task(name: str) -> Task:
    """Return the task called `name`: an entry of `TASKS`, `harness:TASK`, or a user's own `Task` as `module:NAME`.

    Raises `InputError` for an unknown name.
    """
    if name.startswith(PREFIX):
        return HarnessTask(name=name)
    if ":" in name:
        task = import_dotted(name, "task")
        if not isinstance(task, Task):
            raise InputError(f"task {name!r} is a {type(task).__name__}, not an align.evaluation.tasks.Task")
        return task
    if name not in TASKS:
        raise InputError(f"no task is called {name!r}; {suggest(name, [*TASKS, PREFIX + 'NAME'])}")
    return TASKS[name]
