"""`align score`: every response of every row of a file, rated by a reward model, as rows that RPO can train on."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from align.data.formats import stream, write
from align.distributed.journal import run_with_journal
from align.distributed.processes import init_processes, shutdown_processes
from align.distributed.progress import Progress
from align.distributed.work_split import WorkShard
from align.errors import InputError
from align.records import Comparison, Demonstration, Prompt, Record, Response
from align.rewards.reward_model_judge import reward_model_judge
from align.rewards.verdicts import Verdict
from align.stages.contents import content_of
from align.stages.generating import beside, check_out, opened
from align.stages.pairs import accuracy, pairs_of

KEPT = "ratings"  # what is kept beside the file that is written


def score_file(
    model: str,
    data: str,
    out: Path,
    *,
    format: str = "auto",
    split: str | None = None,
    limit: int | None = None,
    on_error: str = "error",
    report: Progress,
) -> dict[str, Any]:
    """What was rated, after `out` holds it in the native form.

    Ratings are kept beside `out` as they are made, so that the same call goes on where an earlier one was stopped.
    A row that is too long for the model is not cut: it is left out and counted.
    """
    processes = init_processes()
    check_out(out, [data, model], KEPT)
    reading = stream(data, format=format, split=split, limit=limit, on_error=on_error)
    asked = [_asked(located.record, located.place) for located in reading.records]
    judge = reward_model_judge(model)
    made_with = {"model": judge.identity, "data": [content_of(data), reading.format, split, on_error]}
    began = time.monotonic()
    with opened(beside(out, KEPT), made_with, processes) as journal:
        missing = [row for row in range(len(asked)) if str(row) not in journal.done]
        own = [row for row in missing if WorkShard.of(processes).contains(row)]
        report.note(f"{len(asked)} rows to rate, {len(asked) - len(missing)} rated before")
        report.phase("score", len(own) + len(asked) - len(missing), len(asked) - len(missing))

        def rate() -> None:
            groups = [(asked[row][0], [one.content for one in asked[row][1].responses]) for row in own]
            for row, said in zip(own, judge(groups), strict=True):
                journal.add(str(row), [[verdict.reward, dict(verdict.attributes), verdict.why] for verdict in said])
                report.advance(1)

        run_with_journal(journal, processes, rate, "rating")
        verdicts = [[Verdict(*found) for found in journal.done[str(row)]] for row in range(len(asked))]
    worth = dict(zip(judge.rating.names, judge.rating.weights, strict=True))
    rated = [row for row, found in enumerate(verdicts) if all(each.reward is not None for each in found)]
    processes.run_on_main(lambda: write(out, (_rated(asked[row][1], verdicts[row]) for row in rated)), f"writing {out}")
    shutdown_processes()
    left_out = Counter(found[0].why.partition(":")[0] for found in verdicts if found[0].reward is None)
    return {
        "model": model,
        "data": data,
        "out": str(out),
        "rows": len(asked),
        "rated": len(rated),
        "rated_now": len(missing),
        "left_out": {**reading.statistics.dropped, **left_out},
        "responses": sum(len(verdicts[row]) for row in rated),
        **_figures([verdict for row in rated for verdict in verdicts[row]]),
        "agreement": accuracy(
            [pair for row in rated for pair in pairs_of(row, asked[row][1], _rewards(verdicts[row]), worth=worth)]
        ),
        "seconds": time.monotonic() - began,
    }


def _asked(record: Record, place: str) -> tuple[Prompt, Comparison]:
    """The record as responses to a prompt; of a demonstration the last assistant message."""
    if isinstance(record, Prompt):
        raise InputError(f"{place}: a prompt without a response, and there is nothing to rate")
    try:
        if isinstance(record, Demonstration):
            last = max(at for at, message in enumerate(record.messages) if message.role == "assistant")
            said = Response(record.messages[last].content)
            record = Comparison(record.messages[:last], (said,), None, record.metadata)
        return Prompt(record.prompt), record
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def _rated(comparison: Comparison, verdicts: list[Verdict]) -> Comparison:
    """The comparison with the verdicts in place of what was known of its responses."""
    pairs = zip(comparison.responses, verdicts, strict=True)
    return replace(
        comparison, responses=tuple(Response(one.content, said.reward, said.attributes) for one, said in pairs)
    )


def _rewards(verdicts: list[Verdict]) -> list[float]:
    return [verdict.reward for verdict in verdicts if verdict.reward is not None]


def _figures(verdicts: list[Verdict]) -> dict[str, Any]:
    """Mean, lowest and highest reward, and the mean of each attribute."""
    if not verdicts:
        return {}
    rewards = _rewards(verdicts)
    return {
        "reward": {"mean": mean(rewards), "lowest": min(rewards), "highest": max(rewards)},
        "attributes": {name: mean(each.attributes[name] for each in verdicts) for name in verdicts[0].attributes},
    }
