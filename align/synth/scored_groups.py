"""Scored groups: what policies answered and what a judge said of it, as comparisons to train on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from statistics import correlation, fmean, stdev
from typing import Any, Literal

from pydantic import Field

from align.config import Settings, stable_hash
from align.distributed.journal import Journal
from align.distributed.work_split import WorkShard
from align.errors import InputError
from align.inference.samples import TOO_LONG, Sample, prompt_key
from align.records import Comparison, Prompt, Record, Response
from align.rewards.final_answers import final_answer
from align.rewards.verdicts import Group, Judge, Verdict

CUT = "length"  # how a sample ended that was cut
PAIR = 2  # responses that a comparison needs
FINAL_MARKS = ("#### ", "\\boxed{")  # how solutions of GSM8K and of MATH say which answer is the final one


class GroupSettings(Settings):
    """Which responses of a prompt become a comparison, and which prompts are left out."""

    keep: Literal["all", "best_worst"] = "all"
    max_responses: int | None = Field(default=None, ge=2)  # of a prompt: the best, the worst, and between them evenly
    min_gap: float = Field(default=0.0, ge=0)  # between the best and the worst reward; a tie is always left out
    min_best: float | None = None  # reward of the best response
    cut_reward: float | None = None  # of a response that was cut at max_new_tokens; the judge's where left out


@dataclass(frozen=True, slots=True)
class Scored:
    """The responses to one prompt, each with its verdict, as they came from the policies."""

    prompt: Prompt
    samples: tuple[Sample, ...]
    verdicts: tuple[Verdict, ...]


@dataclass(slots=True)
class GroupStatistics:
    """What became of the prompts and responses, and how the rewards lie."""

    counts: Counter[str] = field(default_factory=Counter[str])
    rewards: list[float] = field(default_factory=list[float])
    gaps: list[float] = field(default_factory=list[float])  # best less worst reward, of each group
    longer_wins: list[float] = field(default_factory=list[float])  # 1, 0 or 0.5 (as long), of each unequal pair
    lengths: list[float] = field(default_factory=list[float])  # characters less the group's mean
    centred: list[float] = field(default_factory=list[float])  # rewards less the group's mean

    def report(self) -> dict[str, Any]:
        """The account as JSON: counts, and for what was kept mean reward, gap, and how much length goes with reward."""
        spread = len(set(self.lengths)) > 1 and len(set(self.centred)) > 1
        return {
            "counts": dict(sorted(self.counts.items())),
            "reward_mean": fmean(self.rewards) if self.rewards else None,
            "reward_deviation": stdev(self.rewards) if len(self.rewards) > 1 else None,
            "gap_mean": fmean(self.gaps) if self.gaps else None,
            "longer_wins": fmean(self.longer_wins) if self.longer_wins else None,
            "length_correlation": correlation(self.lengths, self.centred) if spread else None,
        }


def prompt_of(record: Record) -> Prompt:
    """What the record asks; where a demonstration marks its final answer (GSM8K, MATH), it is the one to be found."""
    if isinstance(record, Prompt):
        return record
    if isinstance(record, Comparison):
        return Prompt(record.prompt, record.metadata)
    last = max(index for index, message in enumerate(record.messages) if message.role == "assistant")
    metadata, said = dict(record.metadata), record.messages[last].content
    if "answer" not in metadata and any(mark in said for mark in FINAL_MARKS):
        metadata["answer"] = final_answer(said)
    return Prompt(record.messages[:last], metadata)


def answered(
    prompts: Sequence[Prompt], samples: Iterable[Sample], account: GroupStatistics
) -> Iterator[tuple[Prompt, tuple[Sample, ...]]]:
    """Each different prompt with its responses, by policy and number; empty responses are counted and left out."""
    wanted: dict[str, Prompt] = {}
    for prompt in prompts:
        key = prompt_key(prompt)
        account.counts["prompts:given twice" if key in wanted else "prompts"] += 1
        wanted.setdefault(key, prompt)
    found: dict[str, list[Sample]] = {key: [] for key in wanted}
    for sample in samples:
        if sample.finish == TOO_LONG:
            account.counts["responses:not asked for, the prompt is too long"] += 1
            continue
        account.counts["responses"] += 1
        account.counts[f"responses:ended by {sample.finish}"] += 1
        if sample.text.strip():
            found[sample.key].append(sample)
        else:
            account.counts["responses:left out, empty"] += 1
    for key, of in found.items():
        if of:
            yield wanted[key], tuple(sorted(of, key=lambda one: (one.policy, one.number)))
        else:
            account.counts["prompts:left out, no response"] += 1


def judged(
    prompts: Sequence[Prompt],
    samples: Iterable[Sample],
    judge: Judge,
    *,
    journal: Journal,
    account: GroupStatistics,
    shard: WorkShard = WorkShard(),  # noqa: B008 - frozen
) -> Iterator[Scored]:
    """Each prompt that has responses, with their verdicts; the judge is asked nothing that the journal knows.

    Of several processes each has a share of them.
    """
    groups = shard.select(list(answered(prompts, samples, account)))
    texts = [[one.text for one in of] for _, of in groups]
    marks = [stable_hash([prompt_key(prompt), said]) for (prompt, _), said in zip(groups, texts, strict=True)]
    missing = [index for index, mark in enumerate(marks) if mark not in journal.done]
    asked: list[Group] = [(groups[index][0], texts[index]) for index in missing]
    verdicts = iter(judge(asked)) if asked else iter(())
    waiting = set(missing)
    for index, (prompt, of) in enumerate(groups):
        if index in waiting:
            said = next(verdicts, ())
            if len(said) != len(of):
                raise InputError(f"the judge gave {len(said)} verdicts for {len(of)} responses")
            journal.add(marks[index], [asdict(verdict) for verdict in said])
        yield Scored(prompt, of, tuple(Verdict(**each) for each in journal.done[marks[index]]))


def comparisons(scored: Iterable[Scored], settings: GroupSettings, account: GroupStatistics) -> Iterator[Comparison]:
    """The groups to train on, best response first; what is left out is counted by its reason."""
    for one in scored:
        known = _distinct(one, settings, account)
        reason = _unfit([verdict.reward or 0.0 for _, verdict in known], settings)
        if reason:
            account.counts[f"groups:left out, {reason}"] += 1
            continue
        most = PAIR if settings.keep == "best_worst" else settings.max_responses or len(known)
        kept = [known[index] for index in spread(len(known), most)]
        account.counts["responses:left out, over the number to keep"] += len(known) - len(kept)
        account.counts["groups"] += 1
        _observe([(len(sample.text), verdict.reward or 0.0) for sample, verdict in kept], account)
        yield _comparison(one.prompt, kept)


def _distinct(one: Scored, settings: GroupSettings, account: GroupStatistics) -> list[tuple[Sample, Verdict]]:
    """The responses that have a reward, the best first, each text once."""
    found: dict[str, tuple[Sample, Verdict]] = {}
    for sample, verdict in zip(one.samples, one.verdicts, strict=True):
        if settings.cut_reward is not None and sample.finish == CUT and verdict.reward is not None:
            account.counts["responses:cut, with the reward for it"] += 1
            verdict = replace(verdict, reward=settings.cut_reward, why=f"cut; {verdict.why}".removesuffix("; "))
        if verdict.reward is None:
            account.counts["responses:left out, no verdict"] += 1
        elif sample.text in found:
            account.counts["responses:left out, said before"] += 1
        else:
            found[sample.text] = (sample, verdict)
    return sorted(found.values(), key=lambda each: -(each[1].reward or 0.0))


def _unfit(rewards: Sequence[float], settings: GroupSettings) -> str | None:
    """Why responses with these rewards, the best first, are no comparison; None where they are one."""
    if len(rewards) < PAIR:
        return "fewer than two responses with a verdict"
    if rewards[0] == rewards[-1]:
        return "a tie"
    if rewards[0] - rewards[-1] < settings.min_gap:
        return "gap too small"
    if settings.min_best is not None and rewards[0] < settings.min_best:
        return "best response too bad"
    return None


def spread(size: int, most: int) -> list[int]:
    """At most `most` of `size` places: the first, the last, and others evenly between them."""
    if size <= most:
        return list(range(size))
    return [round(place * (size - 1) / (most - 1)) for place in range(most)]


def _observe(rated: Sequence[tuple[int, float]], account: GroupStatistics) -> None:
    """Take the group into the account: (characters, reward) of each response, the best first."""
    rewards = [reward for _, reward in rated]
    mean_length, mean_reward = fmean(length for length, _ in rated), fmean(rewards)
    account.rewards += rewards
    account.gaps.append(rewards[0] - rewards[-1])
    account.lengths += [length - mean_length for length, _ in rated]
    account.centred += [reward - mean_reward for reward in rewards]
    for (length, reward), (other_length, other_reward) in combinations(rated, 2):
        if reward == other_reward:
            account.counts["pairs:tied"] += 1
        else:
            account.counts["pairs"] += 1
            account.longer_wins.append(0.5 if length == other_length else float(length > other_length))


def _comparison(prompt: Prompt, rated: Sequence[tuple[Sample, Verdict]]) -> Comparison:
    """The responses with their rewards; where each came from stands in the metadata, in the same order."""
    origins = [
        {name: value for name, value in asdict(sample).items() if name not in ("text", "key")}
        | {"why": verdict.why, "raw": verdict.raw}
        for sample, verdict in rated
    ]
    responses = tuple(Response(sample.text, verdict.reward, dict(verdict.attributes)) for sample, verdict in rated)
    return Comparison(prompt.messages, responses, metadata={**prompt.metadata, "origins": origins})


def unjudged(prompts: Sequence[Prompt], samples: Iterable[Sample], account: GroupStatistics) -> Iterator[Comparison]:
    """The responses to each prompt without rewards, for a judge to come."""
    for prompt, of in answered(prompts, samples, account):
        account.counts["groups"] += 1
        yield _comparison(prompt, [(sample, Verdict(None, why="not judged")) for sample in of])
