"""What is answered to a task's rows, by a policy or in a file, and how it is graded by all processes of a launch."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.artifacts import write_text
from align.data.formats import read_rows
from align.distributed.journal import Journal
from align.distributed.processes import Processes
from align.distributed.progress import Progress
from align.distributed.work_split import WorkShard, split_work
from align.errors import InputError
from align.evaluation.tasks import TASKS, Answer, Grade, Row, grade_all
from align.inference.samples import TOO_LONG, Engine, Sample, SamplingSettings, distinct, prompt_key, resumed

NAMES = ("key", "task_id")  # columns that say which row a response answers
TEXTS = ("response", "completion", "output")


def ask_policy(
    task: str,
    rows: Sequence[Row],
    engine: Engine,
    *,
    sampling: SamplingSettings,
    kept: Journal | None,
    processes: Processes,
    report: Progress,
) -> list[Answer]:
    """(row number, response) of every response of the policy, in the rows' order; a journal keeps them.

    Each process asks about its share of the rows, and is told what all of them were answered.
    """
    asked = [TASKS[task].prompt(row) for row in rows]
    numbers: dict[str, list[int]] = defaultdict(list)
    for number, prompt in enumerate(asked):
        numbers[prompt_key(prompt)].append(number)
    own = WorkShard.of(processes).select(distinct(asked))
    report.phase("sample", len(own) * sampling.num_responses)

    def work() -> list[Sample]:
        samples: list[Sample] = []
        for sample in engine.sample(own, sampling) if kept is None else resumed(engine, own, sampling, kept):
            report.advance(1)
            if sample.finish == TOO_LONG:  # an empty answer would count as a wrong one
                row = numbers[sample.key][0] + 1
                raise InputError(
                    f"{task}: row {row} is too long for {engine.name} with max_new_tokens {sampling.max_new_tokens}: "
                    "lower that, or leave the row out"
                )
            samples.append(sample)
        return samples

    mine = processes.run_on_all(work, "sampling")
    report.note(f"{engine.name}: {engine.speed.tokens_per_s:,.0f} tokens/s")
    found = [sample for part in processes.all_gather_object(mine) for sample in part]
    found.sort(key=lambda sample: sample.number)
    return sorted(
        ((number, sample.text) for sample in found for number in numbers[sample.key]), key=lambda answer: answer[0]
    )


def match(task: str, rows: Sequence[Row], path: str) -> list[tuple[int, str]]:
    """(row number, response) of every response in a file, by `key` or `task_id`, or else by the prompt."""
    by_name: dict[str, list[int]] = defaultdict(list)
    by_prompt: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        name = next((str(row[each]) for each in NAMES if row.get(each) is not None), str(number))
        by_name[name].append(number)
        for text in {TASKS[task].ask(row), str(row.get("prompt") or row.get("question") or row.get("text"))}:
            by_prompt[text].append(number)
    found: list[tuple[int, str]] = []
    for place, row in enumerate(read_rows(path), start=1):
        where = f"{path}: row {place}"
        text = next((row[name] for name in TEXTS if isinstance(row.get(name), str)), None)
        if text is None:
            raise InputError(f"{where}: has no {' or '.join(TEXTS[:2])} in text")
        name = next((str(row[each]) for each in NAMES if row.get(each) is not None), None)
        candidates = by_name.get(name, []) if name is not None else by_prompt.get(str(row.get("prompt")), [])
        if len(candidates) > 1 and row.get("prompt") is not None:
            candidates = [number for number in candidates if number in by_prompt.get(str(row["prompt"]), [])]
        if len(candidates) != 1:
            said = f"{name!r} names" if name is not None else "its prompt is that of"
            raise InputError(f"{where}: {said} {len(candidates)} rows of the data; one is needed")
        found.append((candidates[0], text))
    if not found:
        raise InputError(f"{path}: holds no responses")
    return found


def by_prompt(path: str) -> dict[str, str]:
    """Each prompt's response; a prompt with two is one too many."""
    found: dict[str, str] = {}
    for place, row in enumerate(read_rows(path), start=1):
        text = next((row[name] for name in TEXTS if isinstance(row.get(name), str)), None)
        if text is None or not isinstance(row.get("prompt"), str):
            raise InputError(f"{path}: row {place}: a prompt and a response are needed, both in text")
        if row["prompt"] in found:
            raise InputError(f"{path}: row {place}: its prompt has a response already")
        found[row["prompt"]] = text
    return found


def grades_of(
    task: str, rows: Sequence[Row], answers: Sequence[Answer], *, processes: Processes, report: Progress
) -> list[Grade]:
    """The grade of each answer; each process grades its share of them."""
    report.phase("grade", len(answers))

    def work(own: Sequence[Answer]) -> Iterator[Grade]:
        for _, grade in grade_all(task, rows, own):
            report.advance(1)
            yield grade

    return split_work(answers, work, processes=processes, activity="grading")


def write_lines(out: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write the lines as JSON; the file appears whole."""
    write_text(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
