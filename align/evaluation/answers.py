"""What is answered to a task's rows, by a policy or in a file, and how it is graded by all processes of a launch."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.artifacts import write_text
from align.data.rows import read_rows
from align.distributed.journal import Journal
from align.distributed.processes import Processes
from align.distributed.progress import Progress
from align.distributed.work_split import WorkShard
from align.errors import InputError
from align.evaluation.task import Answer, NextTurn, Row, first_question
from align.inference.samples import TOO_LONG, Engine, Sample, prompt_key, sample_with_journal, unique_prompts
from align.inference.settings import SamplingSettings
from align.records import Prompt

NAMES = ("key", "task_id")  # columns that say which row a response answers
TEXTS = ("response", "completion", "output")


def ask_policy(
    rows: Sequence[Row],
    next_turn: NextTurn,
    engine: Engine,
    *,
    sampling: SamplingSettings,
    kept: Journal | None,
    processes: Processes,
    report: Progress,
) -> list[Answer]:
    """Return every response of the policy, ordered by row, after the last turn; a journal stores the samples.

    Each process samples its share of the prompts, and all return all answers. The first turn is sampled
    `num_responses` times; later turns continue each of these dialogues once.
    """
    finished: list[Answer] = []
    dialogues: list[tuple[int, tuple[str, ...]]] = [(number, ()) for number in range(len(rows))]
    while dialogues:
        turns = [(number, said, next_turn(rows[number], said)) for number, said in dialogues]
        finished += [Answer(number, said[-1], said[:-1]) for number, said, turn in turns if turn is None]
        asked = [(number, said, Prompt(tuple(turn), dict(rows[number]))) for number, said, turn in turns if turn]
        responses = _sample(asked, engine, sampling=sampling, kept=kept, processes=processes, report=report)
        dialogues = [
            (number, (*said, text)) for number, said, prompt in asked for text in responses[prompt_key(prompt)]
        ]
        sampling = sampling.model_copy(update={"num_responses": 1})
    report.note(f"{engine.name}: {engine.throughput.tokens_per_s:,.0f} tokens/s")
    return sorted(finished, key=lambda answer: answer.row)


def _sample(
    asked: Sequence[tuple[int, tuple[str, ...], Prompt]],
    engine: Engine,
    *,
    sampling: SamplingSettings,
    kept: Journal | None,
    processes: Processes,
    report: Progress,
) -> dict[str, list[str]]:
    """Return the responses to each prompt, by its key, in the order of their numbers."""
    rows = {prompt_key(prompt): row for row, _, prompt in reversed(asked)}
    own = WorkShard.of(processes).select(unique_prompts([prompt for _, _, prompt in asked]))
    report.phase("sample", len(own) * sampling.num_responses)

    def work() -> list[Sample]:
        samples: list[Sample] = []
        found = engine.sample(own, sampling) if kept is None else sample_with_journal(engine, own, sampling, kept)
        for sample in found:
            report.advance(1)
            if sample.finish == TOO_LONG:  # an empty answer would count as a wrong one
                raise InputError(
                    f"row {rows[sample.key] + 1} is too long for {engine.name} with max_new_tokens "
                    f"{sampling.max_new_tokens}: lower that, or leave the row out"
                )
            samples.append(sample)
        return samples

    mine = processes.run_on_all(work, "sampling")
    found = sorted(
        (sample for part in processes.all_gather_object(mine) for sample in part), key=lambda sample: sample.number
    )
    responses: dict[str, list[str]] = defaultdict(list)
    for sample in sorted(found, key=lambda sample: sample.number):
        responses[sample.key].append(sample.text)
    return responses


def match(rows: Sequence[Row], next_turn: NextTurn, path: str) -> list[Answer]:
    """Return every response in a file with the index of its row, found by `key` or `task_id`, or else by the prompt."""
    by_name: dict[str, list[int]] = defaultdict(list)
    by_prompt: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        name = next((str(row[each]) for each in NAMES if row.get(each) is not None), str(number))
        by_name[name].append(number)
        for text in {first_question(next_turn, row), str(row.get("prompt") or row.get("question") or row.get("text"))}:
            by_prompt[text].append(number)
    found: list[Answer] = []
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
        found.append(Answer(candidates[0], text))
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


def write_lines(out: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write the lines as JSON; the file appears whole."""
    write_text(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
