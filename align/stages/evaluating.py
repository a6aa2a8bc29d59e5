"""The stage that tells how a policy answers, and how much each policy has changed against the one before it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from align.accounting.formulas import Work, added
from align.data.templates import apply_template
from align.distributed.processes import Processes, init_processes
from align.errors import InputError
from align.evaluation.likelihood import LIKELIHOODS, NLL, Parts, rates
from align.evaluation.statistics import Score, interval
from align.evaluation.tasks import CORRECT, TASKS, scores
from align.inference.samples import SamplingSettings
from align.inference.transformers_engine import LocalSettings, TransformersEngine
from align.models.loading import default_device, length_limit, quiet_transformers
from align.models.policy import load_policy
from align.models.settings import PolicySettings
from align.models.tree import tree_batch
from align.registry import suggest
from align.stages.answering import ask_policy, grades_of, write_lines
from align.stages.checks import kind_of
from align.stages.generating import opened
from align.stages.grading import likelihood_rows, task_rows
from align.stages.groups import sampling_done
from align.stages.recipe import Recipe
from align.stages.steps import EvaluateStep, TaskSettings
from align.stages.training import Context, about

Scores = dict[str, Score]


def evaluate_policy(context: Context) -> dict[str, Any]:
    """Scores of the step's policy, `{policy: {task: {value, low, high, n}}}`, and a file of verdicts for each task."""
    step = context.recipe.steps[context.name]
    assert isinstance(step, EvaluateStep)
    quiet_transformers()
    processes = init_processes()
    (policy,) = step.policies
    engines: dict[str, TransformersEngine] = {}
    found: dict[str, dict[str, float]] = {}
    columns: dict[str, tuple[str, str]] = {}
    more = Work(0, 0, 0)
    for name, task in step.tasks.items():
        kind = kind_of(task, context.recipe.source(task.data))
        if kind in LIKELIHOODS:
            told, more = _likely(context, name, task, more, processes)
        else:
            if task.precision not in engines:
                local = LocalSettings(path=str(context.inputs[policy]), precision=task.precision)
                engines[task.precision] = TransformersEngine.load(local, name=policy)
            told = _answered(context, name, task, engines[task.precision], processes)
        chosen = {rate: value for rate, value in told.items() if task.rates is None or rate in task.rates}
        if unknown := [rate for rate in task.rates or () if rate not in told]:
            raise InputError(f"steps.{context.name}.tasks.{name}.rates: {unknown[0]!r}; {suggest(unknown[0], told)}")
        for rate, value in chosen.items():
            told_alone = len(chosen) == 1 and (kind not in LIKELIHOODS or rate in name)
            column = name if told_alone else f"{name} {rate}"
            found[column] = value._asdict()
            columns[column] = (name, CORRECT if rate.startswith("pass@") else rate)
    speeds = [
        speed for part in processes.all_gather_object([engine.speed for engine in engines.values()]) for speed in part
    ]
    precision = next(iter(engines), "fp32")
    done = replace(sampling_done(context.inputs[policy], speeds, precision, more), devices=processes.world_size)
    return {**about(context), "scores": {policy: found}, "columns": columns, "done": done}


def _answered(
    context: Context, name: str, task: TaskSettings, engine: TransformersEngine, processes: Processes
) -> Scores:
    recipe, source, report = context.recipe, context.recipe.source(task.data), context.report
    kind, left_out = kind_of(task, source), Counter[str]()
    rows = task_rows(kind, source, seed=recipe.seed, counts=left_out)
    for what, number in left_out.items():
        report.note(f"{name}: {number:,} {what.replace(':', ' ')}")
    sampling = SamplingSettings(temperature=task.temperature, max_new_tokens=task.max_new_tokens)
    path = context.working / f".{name}.samples"
    with opened(path, {"sampling": sampling.model_dump()}, processes) as journal:
        answers = ask_policy(kind, rows, engine, sampling=sampling, kept=journal, processes=processes, report=report)
    grades = grades_of(kind, rows, answers, processes=processes, report=report)
    lines = [
        {
            "policy": engine.name,
            "prompt": TASKS[kind].ask(rows[number]),
            "response": text,
            "parts": grade.parts,
            "reward": grade.reward,
        }
        for (number, text), grade in zip(answers, grades, strict=True)
    ]
    processes.run_on_main(lambda: write_lines(context.working / f"{name}.jsonl", lines), f"writing {name}")
    return scores(kind, answers, grades)


def _likely(context: Context, name: str, task: TaskSettings, before: Work, processes: Processes) -> tuple[Scores, Work]:
    step, recipe = context.recipe.steps[context.name], context.recipe
    assert isinstance(step, EvaluateStep)
    policy, tokenizer = load_policy(PolicySettings(path=str(context.inputs[step.policies[0]])))
    apply_template(tokenizer)
    limit = length_limit(policy.base.config)
    source = recipe.source(task.data)
    kind = kind_of(task, source)
    groups, row_counts = likelihood_rows(source, tokenizer, model_limit=limit, seed=recipe.seed, best=kind == NLL)
    context.report.note(
        f"{name}: {row_counts['rows']} rows read, {len(groups)} told, {row_counts['left_out'] or 'none'} left out"
    )
    context.report.phase(name, len(groups))
    policy.to(default_device())
    parts: list[Parts] = []
    for each in LIKELIHOODS[kind](policy, groups, precision=task.precision, processes=processes):
        parts.append(each)
        context.report.advance(1)
    lines = [
        {"policy": step.policies[0], "row": group.row, "parts": each} for group, each in zip(groups, parts, strict=True)
    ]
    processes.run_on_main(lambda: write_lines(context.working / f"{name}.jsonl", lines), f"writing {name}")
    return rates(parts), added([before, *(tree_batch(group.sequences).work() for group in groups)])


class _Column(NamedTuple):
    """Where the verdicts of a policy's column stand, and what was asked for them."""

    file: Path
    part: str  # of a line
    task: dict[str, Any]  # its settings with those of its rows


def changes(recipe: Recipe, made: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each policy and column the change against the evaluated policy that it comes from, over the same prompts.

    `{policy: {column: {value, low, high, n, from}}}`, with the 95 % bootstrap interval of the paired difference.
    Where the two were asked something else, or in another way, no change is told.
    """
    columns: dict[str, dict[str, _Column]] = {}
    for name, manifest in made.items():
        for column, (task, part) in manifest.get("columns", {}).items():
            policy, file = next(iter(manifest["scores"])), recipe.root / name / f"{task}.jsonl"
            columns.setdefault(policy, {})[column] = _Column(file, part, _asked_in(recipe, name, task))
    found: dict[str, dict[str, Any]] = {}
    for policy, own in columns.items():
        before = recipe.policy_of(policy)
        while before is not None and before not in columns:
            before = recipe.policy_of(before)
        if before is None:
            continue
        for column in [each for each in own if each in columns[before]]:
            then, now = columns[before][column], own[column]
            if then.task == now.task and (change := _change(_parts_in(then), _parts_in(now))):
                found.setdefault(policy, {})[column] = {**change, "from": before}
    return found


def _asked_in(recipe: Recipe, name: str, task: str) -> dict[str, Any]:
    """The task's settings, with those of its rows in place of their name, and without which of its rates are told."""
    step = recipe.steps[name]
    assert isinstance(step, EvaluateStep)
    settings = step.tasks[task]
    return settings.model_dump(exclude={"rates"}) | {"data": recipe.source(settings.data).model_dump()}


class _Parts(NamedTuple):
    """What is known of each prompt that has the part."""

    prompts: list[Any]  # in text, or the number of the row
    passed: list[tuple[float, float]]  # and of how many


def _parts_in(column: _Column) -> _Parts:
    lines = [json.loads(line) for line in column.file.read_text("utf-8").splitlines()]
    known = [line for line in lines if column.part in line["parts"]]
    prompts = [line["row"] if "row" in line else line["prompt"] for line in known]
    return _Parts(prompts, [(line["parts"][column.part][0], line["parts"][column.part][1]) for line in known])


def _change(then: _Parts, now: _Parts) -> dict[str, Any] | None:
    """The paired difference with its interval; None where the prompts are not the same."""
    if then.prompts != now.prompts:
        return None
    pairs = list(zip(then.passed, now.passed, strict=True))
    values = np.asarray(pairs, dtype=np.float64)  # [prompts, then or now, passed or of]

    def difference(chosen: np.ndarray) -> float:
        (passed, of), (passed_now, of_now) = values[chosen].sum(axis=0)
        return float(passed_now / of_now - passed / of)

    low, high = interval(difference, len(values))
    return Score(difference(np.arange(len(values))), low, high, len(values))._asdict()
