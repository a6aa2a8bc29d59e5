"""Answers to a task's rows: sampled from a policy, or read from a file."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from align.artifacts import write_text
from align.data.readers.tool_calls import tools_of
from align.distributed.journal import Journal
from align.distributed.processes import Processes
from align.distributed.progress import Progress
from align.distributed.work_split import WorkShard
from align.errors import InputError, RowOrigin
from align.evaluation.given_responses import read_responses, row_id_of
from align.evaluation.sampled_task import first_question
from align.evaluation.task import Answer, NextTurn, Row
from align.inference.samples import TOO_LONG, Engine, Sample, prompt_key, sample_with_journal, unique_prompts
from align.inference.settings import SamplingSettings
from align.records import Prompt

EVALPLUS = re.compile(r"mbpp/(?=\d+$)", re.IGNORECASE)  # EvalPlus writes Mbpp/2 for MBPP's task 2; Liu et al. 2023


class Dialogue(NamedTuple):
    """A row with the policy's responses so far, and the prompt of the next turn."""

    row: int  # index
    responses: tuple[str, ...]
    prompt: Prompt


def answers_from_policy(
    rows: Sequence[Row],
    next_turn: NextTurn,
    engine: Engine,
    *,
    sampling: SamplingSettings,
    journal: Journal | None,
    processes: Processes,
    progress: Progress,
) -> list[Answer]:
    """Return all responses of the policy to the last turns, ordered by row; `journal` stores the samples.

    Each process samples its share of the prompts, and all return all answers. Each row has `num_responses` dialogues,
    whose turns are sampled independently, also where the next prompt does not depend on the responses. Raises
    `InputError` for a row that is too long for the model: an empty response would count as wrong.
    """
    finished: list[Answer] = []
    active: list[tuple[int, tuple[str, ...], str | None]] = [
        (index, (), None) for index in range(len(rows)) for _ in range(sampling.num_responses)
    ]
    while active:
        dialogues: list[Dialogue] = []
        for index, responses, finish in active:
            turn = next_turn(rows[index], responses)
            if turn is None:
                finished.append(Answer(index, responses[-1], responses[:-1], finish))
            else:
                origin = RowOrigin(f"row {index + 1}")
                prompt = Prompt(tuple(turn), dict(rows[index]), tools_of(rows[index]), origin)
                dialogues.append(Dialogue(index, responses, prompt))
        if not dialogues:
            break
        found: dict[str, list[Sample]] = {}
        numbers, by_count = _sample_numbers(dialogues)
        for count, some in sorted(by_count.items()):
            each_time = sampling.model_copy(update={"num_responses": count})
            found |= _sample(some, engine, sampling=each_time, journal=journal, processes=processes, progress=progress)
        samples = [found[prompt_key(each.prompt)][number] for each, number in zip(dialogues, numbers, strict=True)]
        active = [
            (each.row, (*each.responses, sample.whole_text), sample.finish)
            for each, sample in zip(dialogues, samples, strict=True)
        ]
    progress.note(f"{engine.name}: {engine.throughput.tokens_per_s:,.0f} tokens/s")
    return sorted(finished, key=lambda answer: answer.row)


def _sample_numbers(dialogues: Sequence[Dialogue]) -> tuple[list[int], dict[int, list[Dialogue]]]:
    """Return which sample of its prompt each dialogue has, and the dialogues by the number of samples of their prompts.

    Dialogues of one row with the same prompt have different samples; those of different rows share them.
    """
    keys = [prompt_key(each.prompt) for each in dialogues]
    seen = Counter[tuple[int, str]]()
    numbers: list[int] = []
    for each, key in zip(dialogues, keys, strict=True):
        numbers.append(seen[each.row, key])
        seen[each.row, key] += 1
    counts: dict[str, int] = {}
    for (_, key), number in seen.items():
        counts[key] = max(number, counts.get(key, 0))
    by_count: dict[int, list[Dialogue]] = defaultdict(list)
    for each, key in zip(dialogues, keys, strict=True):
        by_count[counts[key]].append(each)
    return numbers, by_count


def _sample(
    dialogues: Sequence[Dialogue],
    engine: Engine,
    *,
    sampling: SamplingSettings,
    journal: Journal | None,
    processes: Processes,
    progress: Progress,
) -> dict[str, list[Sample]]:
    """Return the responses to each prompt, by its key, ordered by their number."""
    rows = {prompt_key(each.prompt): each.row for each in reversed(dialogues)}
    share = WorkShard.of(processes).select(unique_prompts([each.prompt for each in dialogues]))
    progress.phase("sample", len(share) * sampling.num_responses)

    def work() -> list[Sample]:
        samples: list[Sample] = []
        coming = (
            engine.sample(share, sampling) if journal is None else sample_with_journal(engine, share, sampling, journal)
        )
        for sample in coming:
            progress.advance(1)
            if sample.finish == TOO_LONG:
                raise InputError(
                    f"row {rows[sample.key] + 1} is too long for {engine.name} with max_new_tokens "
                    f"{sampling.max_new_tokens}: lower it, or leave the row out"
                )
            samples.append(sample)
        return samples

    own = processes.run_on_all(work, "sampling")
    samples = [sample for part in processes.all_gather_object(own) for sample in part]
    responses: dict[str, list[Sample]] = defaultdict(list)
    for sample in sorted(samples, key=lambda sample: sample.number):
        responses[sample.key].append(sample)
    return responses


def answers_from_file(rows: Sequence[Row], next_turn: NextTurn, path: str) -> list[Answer]:
    """Return every response in a file, in any form of `given_responses`, with the index of the row that it answers.

    The row is identified by its id (for MBPP also in EvalPlus's form), by its index if the data has none, or by the
    prompt if the response has no id of the data. Raises `InputError` for a response without text, that matches no or
    several rows, or whose id and prompt are those of different rows.
    """
    by_id: dict[str, list[int]] = defaultdict(list)
    by_prompt: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        row_id = row_id_of(row)
        by_id[str(index) if row_id is None else EVALPLUS.sub("", row_id)].append(index)
        for text in {first_question(next_turn, row), str(row.get("prompt") or row.get("question") or row.get("text"))}:
            by_prompt[text].append(index)
    found: list[Answer] = []
    for number, given in read_responses(path):
        of_prompt = by_prompt.get(given.prompt, []) if given.prompt is not None else []
        matches = [] if given.row_id is None else by_id.get(EVALPLUS.sub("", given.row_id), [])
        if not matches:
            matches = of_prompt
        elif len(matches) > 1 and given.prompt is not None:
            matches = [index for index in matches if index in of_prompt]
        if len(matches) == 1 and of_prompt and matches[0] not in of_prompt:
            own = f"row {matches[0] + 1} of the data"
            raise InputError(f"{path}: row {number}: {given.row_id!r} is {own}, whose prompt is another")
        if len(matches) != 1:
            what = "its prompt" if given.row_id is None else repr(given.row_id)
            raise InputError(f"{path}: row {number}: {what} matches {len(matches)} rows of the data; it must match one")
        found.append(Answer(matches[0], given.turns[-1], given.turns[:-1], given.finish))
    if not found:
        raise InputError(f"{path}: no responses")
    return found


def responses_by_prompt(path: str, prompt_of: Mapping[str, str]) -> dict[str, str]:
    """Return the response to each prompt in a file; raise `InputError` for a prompt with two.

    `prompt_of` has the prompts by their ids, for responses that do not repeat their prompt.
    """
    found: dict[str, str] = {}
    for number, given in read_responses(path):
        prompt = given.prompt if given.prompt is not None else prompt_of.get(given.row_id or "")
        if prompt is None:
            raise InputError(f"{path}: row {number} needs a prompt, or the id of a row of the data")
        if prompt in found:
            raise InputError(f"{path}: row {number}: an earlier row answers the same prompt")
        found[prompt] = given.turns[-1]
    return found


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write the lines as JSON, atomically."""
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
