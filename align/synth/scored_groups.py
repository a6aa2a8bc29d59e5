"""Scored groups: sampled responses with a judge's verdicts, as comparisons to train on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from align.config import stable_hash
from align.data.group_choice import best_and_low, most_variance
from align.data.rejections import count_reason
from align.distributed.journal import Journal
from align.distributed.work_split import WorkShard
from align.errors import InputError
from align.inference.samples import GIVEN, REFUSED, TOO_LONG, Sample, prompt_key
from align.records import Comparison, Prompt, Record, Response, is_cut_off
from align.rewards.answers.extraction import final_answer
from align.rewards.thoughts import ResponseText, response_text
from align.rewards.verdicts import Group, Judge, Verdict
from align.synth.group_statistics import GroupStatistics
from align.synth.settings import GroupSettings

PAIR = 2  # responses that a comparison needs
DROPPED_ROWS = "rows:dropped "  # prefix of the counts of rows that are skipped, before the reason
ANSWER_MARKS = ("#### ", "\\boxed{")  # precede the final answer in solutions of GSM8K and of MATH


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """The responses to one prompt, each with its verdict."""

    prompt: Prompt
    samples: tuple[Sample, ...]
    verdicts: tuple[Verdict, ...]


def prompt_of(record: Record) -> Prompt:
    """Return the prompt of a record.

    If a demonstration marks its final answer, as in GSM8K and MATH, the answer is added to the metadata for a judge.
    """
    if isinstance(record, Prompt):
        return record
    if isinstance(record, Comparison):
        return Prompt(record.prompt, record.metadata, record.tools)
    last = max(index for index, message in enumerate(record.messages) if message.role == "assistant")
    metadata = dict(record.metadata)
    solution = record.messages[last].content
    if "answer" not in metadata and any(mark in solution for mark in ANSWER_MARKS):
        metadata["answer"] = final_answer(solution)
    return Prompt(record.messages[:last], metadata, record.tools)


def group_by_prompt(
    prompts: Sequence[Prompt], samples: Iterable[Sample], statistics: GroupStatistics
) -> Iterator[tuple[Prompt, tuple[Sample, ...]]]:
    """Yield each distinct prompt with its responses, ordered by policy and number; drop and count empty responses."""
    by_key: dict[str, Prompt] = {}
    for prompt in prompts:
        key = prompt_key(prompt)
        statistics.counts["prompts:duplicate" if key in by_key else "prompts"] += 1
        by_key.setdefault(key, prompt)
    found: dict[str, list[Sample]] = {key: [] for key in by_key}
    refused: dict[str, str] = {}
    for sample in samples:
        if sample.finish.startswith(REFUSED):
            by_key[sample.key].origin.refuse(sample.finish)
            refused[sample.key] = sample.finish
            continue
        if sample.finish == TOO_LONG:
            statistics.counts["responses:not sampled, prompt too long"] += 1
            continue
        statistics.counts["responses"] += 1
        statistics.counts[f"responses:ended by {sample.finish}"] += 1
        if sample.tool_calls or sample.text.strip():
            found[sample.key].append(sample)
        else:
            statistics.counts["responses:left out, empty"] += 1
    for key, group in found.items():
        if group:
            yield by_key[key], tuple(sorted(group, key=lambda sample: (sample.policy, sample.number)))
        elif key in refused:
            count_reason(statistics.counts, refused[key], prefix=DROPPED_ROWS)
        else:
            statistics.counts["prompts:left out, no response"] += 1


def score_groups(
    prompts: Sequence[Prompt],
    samples: Iterable[Sample],
    judge: Judge,
    *,
    journal: Journal,
    statistics: GroupStatistics,
    shard: WorkShard = WorkShard(),  # noqa: B008 - frozen
) -> Iterator[ScoredGroup]:
    """Yield each prompt of the shard that has responses, with their verdicts.

    Verdicts are appended to the journal; the judge is called only for groups that it does not hold. Raises `InputError`
    if the judge returns another number of verdicts than there are responses.
    """
    groups = shard.select(list(group_by_prompt(prompts, samples, statistics)))
    texts = [[response_text(one.text, one.finish, one.tool_calls) for one in group] for _, group in groups]
    keys = [_verdict_key(prompt, responses) for (prompt, _), responses in zip(groups, texts, strict=True)]
    missing = [index for index, key in enumerate(keys) if key not in journal.done]
    to_judge: list[Group] = [(groups[index][0], texts[index]) for index in missing]
    judged = iter(judge(to_judge)) if to_judge else iter(())
    is_missing = set(missing)
    for index, (prompt, group) in enumerate(groups):
        if index in is_missing:
            verdicts = next(judged, ())
            if len(verdicts) != len(group):
                raise InputError(f"the judge returned {len(verdicts)} verdicts for {len(group)} responses")
            for why in _refusals(verdicts):
                prompt.origin.refuse(why)
            journal.add(keys[index], [asdict(verdict) for verdict in verdicts])
        known = tuple(Verdict(**value) for value in journal.done[keys[index]])
        for why in _refusals(known):  # skipped in an earlier attempt, and perhaps not in this one
            prompt.origin.refuse(why)
        yield ScoredGroup(prompt, group, known)


def _refusals(verdicts: Iterable[Verdict]) -> list[str]:
    """Return why judges refuse the row, if they do."""
    return [verdict.why for verdict in verdicts if verdict.refused]


def _verdict_key(prompt: Prompt, responses: Sequence[ResponseText]) -> str:
    """Return the key of a group's verdicts in the journal: which responses were cut off may decide them."""
    cut = [index for index, response in enumerate(responses) if response.is_cut]
    calls = {index: len(response.tool_calls) for index, response in enumerate(responses) if response.tool_calls}
    return stable_hash([prompt_key(prompt), responses, *([cut] if cut else []), *([calls] if calls else [])])


def comparisons(
    groups: Iterable[ScoredGroup], settings: GroupSettings, statistics: GroupStatistics
) -> Iterator[Comparison]:
    """Yield the groups to train on, best response first; drop the others and count them by reason.

    With `keep: best` a group is one response: the best of n (rejection sampling, Touvron et al. 2023, sec. 3.2.3).
    """
    for group in groups:
        if rewards := tuple(verdict.reward for verdict in group.verdicts if verdict.reward is not None):
            statistics.verdicts.append(rewards)
        if refused := _refusals(group.verdicts):
            count_reason(statistics.counts, refused[0], prefix=DROPPED_ROWS)
            continue
        known = _ranked(group, settings, statistics)
        ranked = [verdict.reward or 0.0 for _, verdict in known]
        reason = _reason_to_drop(ranked, settings)
        if reason:
            statistics.counts[f"groups:left out, {reason}"] += 1
            continue
        kept = [known[index] for index in _kept(ranked, settings)]
        statistics.counts["responses:left out, over the maximum number"] += len(known) - len(kept)
        statistics.counts["groups"] += 1
        statistics.add_group([(len(sample.whole_text), verdict.reward or 0.0) for sample, verdict in kept])
        yield _comparison(group.prompt, kept)


def unscored_comparisons(
    prompts: Sequence[Prompt], samples: Iterable[Sample], statistics: GroupStatistics
) -> Iterator[Comparison]:
    """Yield the responses to each prompt without rewards, for a later judge."""
    for prompt, group in group_by_prompt(prompts, samples, statistics):
        statistics.counts["groups"] += 1
        yield _comparison(prompt, [(sample, Verdict(None, why="not judged")) for sample in group])


def evenly_spaced(size: int, number: int) -> list[int]:
    """Return at most `number` of `size` indices: the first, the last, and evenly spaced ones between.

    >>> evenly_spaced(7, 3)
    [0, 3, 6]
    """
    if number == 1:
        return [0]
    if size <= number:
        return list(range(size))
    return [round(index * (size - 1) / (number - 1)) for index in range(number)]


def _kept(rewards: Sequence[float], settings: GroupSettings) -> list[int]:
    """Return the indices of the responses of a group that are kept; the rewards are sorted, the best first."""
    if settings.keep == "most_variance":
        return most_variance(rewards, settings.max_responses or len(rewards))
    if settings.keep == "best_and_low":
        return best_and_low(rewards)
    number = {"all": settings.max_responses or len(rewards), "best_worst": PAIR, "best": 1}[settings.keep]
    return evenly_spaced(len(rewards), number)


def _ranked(group: ScoredGroup, settings: GroupSettings, statistics: GroupStatistics) -> list[tuple[Sample, Verdict]]:
    """Return the distinct responses that have a reward, best first."""
    found: dict[str, tuple[Sample, Verdict]] = {}
    for sample, verdict in zip(group.samples, group.verdicts, strict=True):
        if settings.cut_reward is not None and is_cut_off(sample.finish) and verdict.reward is not None:
            statistics.counts["responses:truncated, with cut_reward"] += 1
            verdict = replace(verdict, reward=settings.cut_reward, why=f"cut; {verdict.why}".removesuffix("; "))
        if verdict.reward is None:
            statistics.counts["responses:left out, no verdict"] += 1
        elif sample.whole_text in found:
            statistics.counts["responses:left out, duplicate"] += 1
        else:
            found[sample.whole_text] = (sample, verdict)
    return sorted(found.values(), key=lambda each: -(each[1].reward or 0.0))


def _reason_to_drop(rewards: Sequence[float], settings: GroupSettings) -> str | None:
    """Return why a group with these rewards, best first, is dropped; None if it is kept."""
    if settings.keep == "best":
        if not rewards:
            return "no response with a verdict"
    elif len(rewards) < PAIR:
        return "fewer than two responses with a verdict"
    elif rewards[0] == rewards[-1]:
        return "a tie"
    elif rewards[0] - rewards[-1] < settings.min_gap:
        return "gap below min_gap"
    if settings.min_best is not None and rewards[0] < settings.min_best:
        return "best reward below min_best"
    return None


def _comparison(prompt: Prompt, rated: Sequence[tuple[Sample, Verdict]]) -> Comparison:
    """Return the responses with their rewards, and the origin of each in the metadata, in the same order."""
    origins = [
        {name: value for name, value in sample.to_json().items() if name not in ("text", "key", "tool_calls")}
        | {"why": verdict.why, "raw": verdict.raw}
        for sample, verdict in rated
    ]
    responses = tuple(
        Response(
            sample.text,
            verdict.reward,
            dict(verdict.attributes),
            None if sample.finish == GIVEN else sample.finish,
            sample.tool_calls,
        )
        for sample, verdict in rated
    )
    metadata = {**prompt.metadata, "origins": origins}
    return Comparison(prompt.messages, responses, metadata=metadata, tools=prompt.tools)
