"""Work of the stages `generate` and `score`: sample and judge prompts, or judge given responses."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from align.data.rejections import DROPPED, Rejections
from align.data.writing import write
from align.distributed.journal import run_with_journal
from align.distributed.work_split import WorkShard
from align.errors import InputError, RowOrigin, within
from align.evaluation.measures.reward_bench import RatedRow, reward_bench
from align.evaluation.pair_accuracy import pair_accuracy, preference_pairs
from align.inference.samples import GIVEN, Sample, Throughput, prompt_key
from align.models.loading.config import load_config, max_positions
from align.models.loading.pretrained import silence_transformers
from align.records import Comparison, Prompt, Record, Response
from align.rewards.judges import check_known
from align.rewards.thoughts import response_text
from align.rewards.verdicts import Verdict
from align.stages.costs.measured import Done, sampling_done
from align.stages.inputs.context import RunContext
from align.stages.inputs.sources import rows_of, streamed
from align.stages.responses.engines import engine_identity, engine_report
from align.stages.responses.judging import Judging, judging, need_gpu_alone
from align.stages.responses.sampling import journal_path, not_empty, open_journal, sample_policies, write_judged
from align.stages.responses.settings import (
    GROUPS_FILE,
    GenerationSettings,
    JudgingSettings,
    local_precision,
)
from align.synth.group_statistics import GroupStatistics
from align.synth.scored_groups import prompt_of, unscored_comparisons

OTHER_ANSWER = "the row has the prompt of an earlier row, and another answer, tests or instructions"


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
        engine = engine_identity(settings.engine, context.processes)
    policies = {**folders, **{model: model for model in settings.models}}
    settings = _fitted(settings, list(policies.values()), context)
    made_with = {
        **context.identity,
        "sampling": settings.sampling.model_dump(),
        "engine": engine,
        "models": [context.inputs.content(model) for model in settings.models],
    }
    out = context.folder / GROUPS_FILE
    with ExitStack() as stack:
        # Judges that cannot be loaded are reported before anything is sampled, unless they must wait for the GPU
        waits = settings.engine.managed is not None or need_gpu_alone(settings.judges)
        judges = stack.enter_context(judging(settings, context)) if settings.judges and not waits else None
        with open_journal(journal_path(out, "samples"), made_with, context.processes) as journal:
            samples, speeds = sample_policies(policies, asked, settings, context, journal)
        if settings.judges:
            judges = judges or stack.enter_context(judging(settings, context))
            _judge(asked, samples, judges, context, statistics)
        else:
            context.processes.run_on_main(
                lambda: write(out, not_empty(unscored_comparisons(asked, samples, statistics), statistics)),
                f"writing {out}",
            )
    rates = {name: speed.tokens_per_s for name, speed in speeds.items() if speed.seconds}
    costs = {name: speed.cost for name, speed in speeds.items() if speed.cost}
    return {
        "report": statistics.report(),
        "engine": engine_report(settings.engine, engine, context.processes),
        "tokens_per_s": rates,
        **({"cost": costs} if costs else {}),
        "done": _sampling_work(settings, policies, speeds, context.processes.world_size),
    }


def _fitted(settings: GenerationSettings, policies: Sequence[str], context: RunContext) -> GenerationSettings:
    """Return the settings with the default length of responses cut to half of the smallest policy's positions."""
    sampling = settings.sampling
    if "max_new_tokens" in sampling.model_fields_set or not settings.engine.loads_model:
        return settings
    limits = [limit for path in policies if (limit := max_positions(load_config(path))) is not None]
    half = min(limits, default=2 * sampling.max_new_tokens) // 2
    if half >= sampling.max_new_tokens:
        return settings
    context.progress.note(
        f"sampling.max_new_tokens is {half}, half of the model's context length; set it to change the limit"
    )
    return settings.model_copy(update={"sampling": sampling.model_copy(update={"max_new_tokens": half})})


def score_rows(source: str, settings: JudgingSettings, context: RunContext) -> dict[str, Any]:
    """Judge the responses of the rows and write them as groups to train on."""
    silence_transformers()
    read = _GivenRows.of(source, context)
    statistics = GroupStatistics()
    asked: list[Prompt] = []
    samples: list[Sample] = []
    decisive = sorted({name for judge in settings.judges for name in judge.root.metadata_keys})
    graded_by: dict[str, dict[str, Any]] = {}  # prompt -> what its judges read
    for number, (prompt, given) in enumerate(read.rows):
        key = prompt_key(prompt)
        policy = f"{GIVEN} {number}"
        known = {name: prompt.metadata.get(name) for name in decisive}
        if graded_by.setdefault(key, known) != known:
            prompt.origin.refuse(OTHER_ANSWER)
            statistics.counts[f"rows:dropped {OTHER_ANSWER}"] += 1
            continue
        asked.append(prompt)
        samples += [
            Sample(key, at, policy, one.content, None, one.finish or GIVEN, 0, one.tool_calls)
            for at, one in enumerate(given.responses)
        ]
    with within("steps", context.name):
        check_known(settings.judges, asked, combine=settings.combine)
    statistics.counts.update({f"rows:dropped {reason}": number for reason, number in read.dropped.items()})
    with judging(settings, context) as judges:
        _judge(asked, samples, judges, context, statistics)
    return {"report": statistics.report(), "done": Done(devices=context.processes.world_size)}


def _judge(
    asked: Sequence[Prompt],
    samples: Sequence[Sample],
    judges: Judging,
    context: RunContext,
    statistics: GroupStatistics,
) -> None:
    """Write the groups and report the statistics, which are complete on the main process."""
    write_judged(context.folder / GROUPS_FILE, asked, samples, judges, context, statistics)
    counts = sorted(statistics.counts.items())
    context.progress.note("; ".join(f"{number:,} {name.replace(':', ' ')}" for name, number in counts if number))


def score_every_row(source: str, settings: JudgingSettings, context: RunContext) -> dict[str, Any]:
    """Write each row as it was read, with the judge's rewards; rows that the judge cannot rate are counted."""
    silence_transformers()
    processes = context.processes
    rows, dropped = _GivenRows.of(source, context)
    with within("steps", context.name):
        check_known(settings.judges, [prompt for prompt, _ in rows], combine=settings.combine)
    out = context.folder / GROUPS_FILE
    began = time.monotonic()
    with judging(settings, context) as judges:
        verdicts, num_now = _rate(rows, judges, out, context)
    rated = [row for row, found in enumerate(verdicts) if all(each.reward is not None for each in found)]
    processes.run_on_main(lambda: write(out, (_rated(rows[row][1], verdicts[row]) for row in rated)), f"writing {out}")
    reasons = ([each.why for each in found if each.reward is None] for found in verdicts)
    left_out = Counter(why[0].partition(":")[0] for why in reasons if why)
    rating = getattr(judges.judge.judge, "rating", None)  # of a reward model
    aggregate = {} if rating is None else dict(zip(rating.names, rating.weights, strict=True))
    given = {row: (rows[row][1], _rewards(verdicts[row])) for row in rated}
    pairs = [pair for row in rated for pair in preference_pairs(row, *given[row], weights=aggregate)]
    of_benchmark = [found for row in rated if (found := RatedRow.of(*given[row]))]
    benchmark = {**reward_bench(of_benchmark), "other_rows": len(rated) - len(of_benchmark)} if of_benchmark else {}
    summary = {
        "rows": len(rows),
        "rated": len(rated),
        "rated_now": num_now,
        "left_out": {**dropped, **left_out},
        "responses": sum(len(verdicts[row]) for row in rated),
        **_reward_summary([verdict for row in rated for verdict in verdicts[row]]),
        "agreement": pair_accuracy(pairs),
        **({"reward_bench": benchmark} if benchmark else {}),
        "seconds": time.monotonic() - began,
    }
    return {"ratings": summary, "done": Done(devices=processes.world_size)}


def _rate(
    rows: Sequence[tuple[Prompt, Comparison]], judges: Judging, out: Path, context: RunContext
) -> tuple[list[list[Verdict]], int]:
    """Return the verdicts on each row's responses, and the number of rows that were not rated before."""
    processes, progress = context.processes, context.progress
    made_with = dict(context.identity) or judges.identity  # a command's identity includes its model
    with open_journal(journal_path(out, "ratings"), made_with, processes) as journal:
        missing = [row for row in range(len(rows)) if str(row) not in journal.done]
        own = [row for row in missing if WorkShard.of(processes).contains(row)]
        progress.note(f"{len(rows)} rows to rate, {len(rows) - len(missing)} rated before")
        progress.phase("score", len(own) + len(rows) - len(missing), len(rows) - len(missing))

        def rate() -> None:
            groups = [
                (
                    rows[row][0],
                    [response_text(one.content, one.finish, one.tool_calls) for one in rows[row][1].responses],
                )
                for row in own
            ]
            for row, verdicts in zip(own, judges.judge(groups), strict=True):
                for each in verdicts:
                    if each.refused:
                        rows[row][0].origin.refuse(each.why)
                journal.add(str(row), [[each.reward, dict(each.attributes), each.why] for each in verdicts])
                progress.advance(1)

        run_with_journal(journal, processes, rate, "rating")
        verdicts = [[Verdict(*value) for value in journal.done[str(row)]] for row in range(len(rows))]
    return verdicts, len(missing)


class _GivenRows(NamedTuple):
    """The prompt of each row and its responses; of a demonstration the last assistant message."""

    rows: list[tuple[Prompt, Comparison]]
    dropped: dict[str, int]  # reason -> rows that could not be read or scored

    @classmethod
    def of(cls, name: str, context: RunContext) -> _GivenRows:
        """Return the rows of a source."""
        source = context.inputs.sources[name]
        rows = list[tuple[Prompt, Comparison]]()
        rejections = Rejections(source.on_error)
        with rows_of(name):
            reading = streamed(source, kind=Comparison, seed=context.inputs.seed)
            for located in reading.records:
                with rejections.at(located.place):
                    given = _comparison_of(located.record)
                    origin = RowOrigin(located.place, skips=source.on_error == "skip")
                    rows.append((replace(prompt_of(located.record), origin=origin), given))
        context.inputs.check_unchanged(source)
        dropped = Counter(reading.statistics.dropped)
        dropped.update({reason.removeprefix(DROPPED): number for reason, number in rejections.counts.items()})
        return cls(rows, dropped)


def _comparison_of(record: Record) -> Comparison:
    if isinstance(record, Prompt):
        raise InputError("a prompt without a response cannot be scored")
    if isinstance(record, Comparison):
        return record
    last = max(at for at, message in enumerate(record.messages) if message.role == "assistant")
    response = Response.of(record.messages[last], finish=record.finish)
    return Comparison(record.messages[:last], (response,), None, record.metadata, record.tools)


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


def _sampling_work(
    settings: GenerationSettings, policies: Mapping[str, str], speeds: Mapping[str, Throughput], devices: int
) -> Done:
    """Return what sampling computed, where it ran in these processes."""
    if settings.engine.kind != "local":
        return Done.elsewhere(devices=devices)
    ran = [(policies[name], speed.work) for name, speed in speeds.items()]
    return replace(sampling_done(ran, local_precision(settings.engine)), devices=devices)
