"""Work of the stages `generate` and `score`: sample and judge prompts, or judge given responses."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from align.accounting.flops import Work
from align.data.reading import Stream
from align.data.rejections import DROPPED, Rejections
from align.data.writing import write
from align.distributed.journal import run_with_journal
from align.distributed.work_split import WorkShard
from align.errors import InputError, within
from align.evaluation.pair_accuracy import pair_accuracy, preference_pairs
from align.inference.samples import GIVEN, Sample, Throughput, prompt_key
from align.models.loading.config import load_config, max_positions
from align.models.loading.pretrained import default_device, silence_transformers
from align.records import Comparison, Prompt, Record, Response
from align.rewards.judges import check_known
from align.rewards.thoughts import response_text
from align.rewards.verdicts import Verdict
from align.stages.costs.measured import NOTHING, Done, dimensions
from align.stages.inputs.context import RunContext
from align.stages.inputs.sources import SourceSettings, streamed
from align.stages.responses.sampling import journal_path, not_empty, open_journal, sample_policies, write_judged
from align.stages.responses.settings import (
    GROUPS_FILE,
    GenerationSettings,
    Judging,
    JudgingSettings,
    local_precision,
)
from align.synth.group_statistics import GroupStatistics
from align.synth.scored_groups import prompt_of, unscored_comparisons


def generate_groups(
    settings: GenerationSettings,
    folders: Mapping[str, str],
    asked: Sequence[Prompt],
    context: RunContext,
    statistics: GroupStatistics,
) -> dict[str, Any]:
    """Sample the prompts from the policies in `folders` and from `settings.models`, judge, and write the groups."""
    silence_transformers()
    with within("steps", context.name):
        check_known(settings.judges, asked, combine=settings.combine)
    policies = {**folders, **{model: model for model in settings.models}}
    settings = _fitted(settings, list(policies.values()), context)
    judging = Judging.load(settings, context.inputs) if settings.judges else None
    made_with = {
        **context.identity,
        "sampling": settings.sampling.model_dump(),
        "engine": settings.engine.cache_key(),
        "models": [context.inputs.content(model) for model in settings.models],
    }
    out = context.folder / GROUPS_FILE
    with open_journal(journal_path(out, "samples"), made_with, context.processes) as journal:
        samples, speeds = sample_policies(policies, asked, settings, context, journal)
    if judging is None:
        context.processes.run_on_main(
            lambda: write(out, not_empty(unscored_comparisons(asked, samples, statistics), statistics)),
            f"writing {out}",
        )
    else:
        _judge(asked, samples, judging, context, statistics)
    rates = {name: speed.tokens_per_s for name, speed in speeds.items() if speed.seconds}
    done = _sampling_work(settings, next(iter(folders.values()), None), speeds)
    return {
        "report": statistics.report(),
        "tokens_per_s": rates,
        "done": replace(done, devices=context.processes.world_size),
    }


def _fitted(settings: GenerationSettings, policies: Sequence[str], context: RunContext) -> GenerationSettings:
    """Return the settings with the default length of responses cut to half of the smallest policy's positions."""
    sampling = settings.sampling
    if "max_new_tokens" in sampling.model_fields_set or settings.engine.kind != "local":
        return settings
    limits = [limit for path in policies if (limit := max_positions(load_config(path))) is not None]
    half = min(limits, default=2 * sampling.max_new_tokens) // 2
    if half >= sampling.max_new_tokens:
        return settings
    context.progress.note(
        f"responses end after {half} tokens, half of the policy's positions; sampling.max_new_tokens is another limit"
    )
    return settings.model_copy(update={"sampling": sampling.model_copy(update={"max_new_tokens": half})})


def score_rows(source: SourceSettings, settings: JudgingSettings, context: RunContext) -> dict[str, Any]:
    """Judge the responses of the rows and write them as groups to train on."""
    silence_transformers()
    judging = Judging.load(settings, context.inputs)
    reading = streamed(source, kind=Comparison, seed=context.inputs.seed)
    statistics = GroupStatistics()
    asked: list[Prompt] = []
    samples: list[Sample] = []
    rejections = Rejections(source.on_error)
    for number, (prompt, given) in enumerate(_with_responses(reading, rejections)):
        key, policy = prompt_key(prompt), f"{GIVEN} {number}"
        asked.append(prompt)
        samples += [
            Sample(key, at, policy, one.content, None, one.finish or GIVEN, 0) for at, one in enumerate(given.responses)
        ]
    with within("steps", context.name):
        check_known(settings.judges, asked, combine=settings.combine)
    context.inputs.check_unchanged(source)
    dropped = {f"rows:dropped {reason}": number for reason, number in _dropped(reading, rejections).items()}
    statistics.counts.update(dropped)
    _judge(asked, samples, judging, context, statistics)
    return {"report": statistics.report(), "done": Done(devices=context.processes.world_size)}


def _judge(
    asked: Sequence[Prompt],
    samples: Sequence[Sample],
    judging: Judging,
    context: RunContext,
    statistics: GroupStatistics,
) -> None:
    """Write the groups and report the statistics, which are complete on the main process."""
    write_judged(context.folder / GROUPS_FILE, asked, samples, judging, context, statistics)
    counts = sorted(statistics.counts.items())
    context.progress.note("; ".join(f"{number:,} {name.replace(':', ' ')}" for name, number in counts if number))


def score_every_row(source: SourceSettings, settings: JudgingSettings, context: RunContext) -> dict[str, Any]:
    """Write each row as it was read, with the judge's rewards; rows that the judge cannot rate are counted."""
    silence_transformers()
    judging, processes, progress = Judging.load(settings, context.inputs), context.processes, context.progress
    reading = streamed(source, kind=Comparison, seed=context.inputs.seed)
    rejections = Rejections(source.on_error)
    rows = list(_with_responses(reading, rejections))
    with within("steps", context.name):
        check_known(settings.judges, [prompt for prompt, _ in rows], combine=settings.combine)
    context.inputs.check_unchanged(source)
    out, began = context.folder / GROUPS_FILE, time.monotonic()
    made_with = dict(context.identity) or judging.identity  # a command's identity includes its model
    with open_journal(journal_path(out, "ratings"), made_with, processes) as journal:
        missing = [row for row in range(len(rows)) if str(row) not in journal.done]
        own = [row for row in missing if WorkShard.of(processes).contains(row)]
        progress.note(f"{len(rows)} rows to rate, {len(rows) - len(missing)} rated before")
        progress.phase("score", len(own) + len(rows) - len(missing), len(rows) - len(missing))

        def rate() -> None:
            groups = [
                (rows[row][0], [response_text(one.content, one.finish) for one in rows[row][1].responses])
                for row in own
            ]
            for row, verdicts in zip(own, judging.judge(groups), strict=True):
                journal.add(str(row), [[each.reward, dict(each.attributes), each.why] for each in verdicts])
                progress.advance(1)

        run_with_journal(journal, processes, rate, "rating")
        verdicts = [[Verdict(*value) for value in journal.done[str(row)]] for row in range(len(rows))]
    rated = [row for row, found in enumerate(verdicts) if all(each.reward is not None for each in found)]
    processes.run_on_main(lambda: write(out, (_rated(rows[row][1], verdicts[row]) for row in rated)), f"writing {out}")
    reasons = ([each.why for each in found if each.reward is None] for found in verdicts)
    left_out = Counter(why[0].partition(":")[0] for why in reasons if why)
    rating = getattr(judging.judge.judge, "rating", None)  # of a reward model
    aggregate = {} if rating is None else dict(zip(rating.names, rating.weights, strict=True))
    pairs = [
        pair
        for row in rated
        for pair in preference_pairs(row, rows[row][1], _rewards(verdicts[row]), weights=aggregate)
    ]
    summary = {
        "rows": len(rows),
        "rated": len(rated),
        "rated_now": len(missing),
        "left_out": {**_dropped(reading, rejections), **left_out},
        "responses": sum(len(verdicts[row]) for row in rated),
        **_reward_summary([verdict for row in rated for verdict in verdicts[row]]),
        "agreement": pair_accuracy(pairs),
        "seconds": time.monotonic() - began,
    }
    return {"ratings": summary, "done": Done(devices=processes.world_size)}


def _with_responses(reading: Stream, rejections: Rejections) -> Iterator[tuple[Prompt, Comparison]]:
    """Yield the prompt of each row and its responses; of a demonstration the last assistant message."""
    for located in reading.records:
        with rejections.at(located.place):
            given = _comparison_of(located.record)
            yield prompt_of(located.record), given


def _comparison_of(record: Record) -> Comparison:
    if isinstance(record, Prompt):
        raise InputError("a prompt without a response cannot be scored")
    if isinstance(record, Comparison):
        return record
    last = max(at for at, message in enumerate(record.messages) if message.role == "assistant")
    response = Response(record.messages[last].content, finish=record.finish)
    return Comparison(record.messages[:last], (response,), None, record.metadata)


def _dropped(reading: Stream, rejections: Rejections) -> dict[str, int]:
    """Return the number of rows that could not be read or scored, by reason."""
    own = {name.removeprefix(DROPPED): number for name, number in rejections.counts.items()}
    return {**reading.statistics.dropped, **own}


def _rated(comparison: Comparison, verdicts: Sequence[Verdict]) -> Comparison:
    """Return the comparison with the verdicts in place of its own rewards and attributes."""
    pairs = zip(comparison.responses, verdicts, strict=True)
    responses = tuple(replace(one, reward=verdict.reward, attributes=verdict.attributes) for one, verdict in pairs)
    return replace(comparison, responses=responses)


def _rewards(verdicts: Sequence[Verdict]) -> list[float]:
    return [verdict.reward for verdict in verdicts if verdict.reward is not None]


def _reward_summary(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return mean, lowest and highest reward, and the mean of each attribute."""
    if not verdicts:
        return {}
    rewards = _rewards(verdicts)
    return {
        "reward": {"mean": mean(rewards), "lowest": min(rewards), "highest": max(rewards)},
        "attributes": {name: mean(each.attributes[name] for each in verdicts) for name in verdicts[0].attributes},
    }


def _sampling_work(settings: GenerationSettings, folder: str | None, speeds: Mapping[str, Throughput]) -> Done:
    """Return what sampling computed, where it ran in this process."""
    if settings.engine.kind != "local" or settings.models or folder is None:
        return Done(dimensions="the models' dimensions are unknown: they run on a server, or no step made them")
    return sampling_done(folder, list(speeds.values()), local_precision(settings.engine))


def sampling_done(folder: Path | str, speeds: Sequence[Throughput], precision: str, more: Work = NOTHING) -> Done:
    """Return the work of sampling from a policy, and of a forward pass over `more`."""
    tokens = sum(speed.processed_tokens for speed in speeds) + more.tokens
    pairs = sum(speed.attended_pairs for speed in speeds) + more.attended_pairs
    targets = sum(speed.sampled_tokens for speed in speeds) + more.targets
    size = dimensions(load_config(str(folder)))
    return Done(
        dimensions=size,
        weights=None if isinstance(size, str) else size.num_weights,
        observed=Work(tokens, pairs, targets),
        precision=precision,
        device=default_device(),
    )
