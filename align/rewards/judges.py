"""Make judges from their settings, and combine several into one: by precedence, or as a weighted sum."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from align.config import build, read_overrides
from align.errors import InputError
from align.records import Prompt
from align.rewards.settings import Combination, JudgeSettings, unique_judges
from align.rewards.thoughts import THINK, ThoughtSettings, visible_text
from align.rewards.verdicts import GROUPS_AT_ONCE, Game, Group, Judge, Verdict


def parse_judge(text: str) -> dict[str, Any]:
    """Return the settings of a judge that a command line gives as `NAME key=value …`; `weight` may be a key.

    >>> parse_judge("verifier reward=all weight=0.5")
    {'name': 'verifier', 'weight': 0.5, 'settings': {'reward': 'all'}}
    """
    try:
        name, *words = shlex.split(text) or [""]
    except ValueError as error:
        raise InputError(f"judge {text!r}: {error}; close it with another quotation mark") from error
    given = read_overrides(words)
    weight = {"weight": given.pop("weight")} if "weight" in given else {}
    return {"name": name, **weight, "settings": given}


def load_judge(name: str, **settings: Any) -> WithoutThoughts:  # noqa: ANN401 - validated as the judge's own settings
    """Return one judge: a row of `JUDGES`, or a user's own as module:name.

    >>> from align.records import Message, Prompt
    >>> judge = load_judge("ground_truth")
    >>> prompt = Prompt((Message("user", "What is 6 * 7?"),), {"answer": "42"})
    >>> [[verdict.reward for verdict in verdicts] for verdicts in judge([(prompt, ["It is 42.", "It is 41."])])]
    [[1.0, 0.0]]
    """
    return WithoutThoughts(build(JudgeSettings, {"name": name, "settings": settings}, (f"judge {name}",)).make(), THINK)


def make_judge(
    judges: Sequence[JudgeSettings], *, combine: Combination = "precedence", thoughts: ThoughtSettings = THINK
) -> WithoutThoughts:
    """Return the judge that the settings describe, of responses without thoughts; several are combined into one."""
    if not judges:
        raise InputError("at least one judge is needed", ("judges",))
    made = [(judge.name, judge.weight, judge.make()) for judge in unique_judges(list(judges))]
    if len(made) == 1 and (combine == "precedence" or made[0][1] == 1):
        return WithoutThoughts(made[0][2], thoughts)
    by_name = {name: judge for name, _, judge in made}
    return WithoutThoughts(Precedence(by_name) if combine == "precedence" else WeightedSum(made), thoughts)


class WithoutThoughts:
    """Shows a judge the responses without their thoughts; one with an unfinished thought is empty."""

    def __init__(self, judge: Judge, thoughts: ThoughtSettings) -> None:
        self.judge, self.thoughts = judge, thoughts

    def __call__(self, groups: Sequence[Group]) -> Iterable[tuple[Verdict, ...]]:
        """Return the judge's verdicts on each group."""
        return self.judge(
            [(prompt, [visible_text(each, self.thoughts) for each in responses]) for prompt, responses in groups]
        )


def check_known(judges: Sequence[JudgeSettings], prompts: Sequence[Prompt], *, combine: Combination) -> None:
    """Raise `InputError` if no prompt has what the judges need to know."""
    enough = all if combine == "weights" else any
    if not judges or any(enough(judge.root.may_know(prompt.metadata) for judge in judges) for prompt in prompts):
        return
    needs = "; ".join(
        f"{judge.name} needs {' or '.join(keys)}" for judge in judges if (keys := judge.root.metadata_keys)
    )
    columns = ", ".join(sorted({name for prompt in prompts for name in prompt.metadata})) or "only the prompt"
    raise InputError(
        f"no judge can score any of the {len(prompts)} prompts: {needs}; columns found: {columns}", ("judges",)
    )


class Precedence:
    """Rate each prompt's responses by the first judge that has a reward for any of them, or refuses the row.

    Judges are never mixed, as in the Nemotron-4 report (sec. 3.2.3): ground truth before verifiers before models.
    """

    def __init__(self, judges: Mapping[str, Judge]) -> None:
        self.judges = judges

    def __call__(self, groups: Sequence[Group]) -> Iterator[tuple[Verdict, ...]]:
        """Yield the verdicts of each group; `raw["judge"]` names the judge that gave them."""
        for start in range(0, len(groups), GROUPS_AT_ONCE):
            part = groups[start : start + GROUPS_AT_ONCE]
            decided: dict[int, tuple[Verdict, ...]] = {}
            reasons: dict[int, list[str]] = {index: [] for index in range(len(part))}
            games: dict[int, list[Sequence[Game]]] = {}  # of the last judge that compares
            for name, judge in self.judges.items():
                open_groups = [index for index in range(len(part)) if index not in decided]
                if not open_groups:
                    break
                for index, verdicts in zip(open_groups, judge([part[index] for index in open_groups]), strict=True):
                    if any(verdict.reward is not None or verdict.refused for verdict in verdicts):
                        decided[index] = tuple(_with_judge(verdict, name) for verdict in verdicts)
                    else:
                        reasons[index].append(f"{name}: {verdicts[0].why}")
                        if any(verdict.games for verdict in verdicts):
                            games[index] = [verdict.games for verdict in verdicts]
            for index, (_, responses) in enumerate(part):
                why = "every judge abstains: " + "; ".join(reasons[index])
                abstained = (Verdict(None, why=why, games=own) for own in games.get(index, [()] * len(responses)))
                yield decided[index] if index in decided else tuple(abstained)


class WeightedSum:
    """Add up the weighted rewards of all judges; a response gets none where any judge abstains."""

    def __init__(self, judges: Sequence[tuple[str, float, Judge]]) -> None:
        self.judges = judges

    def __call__(self, groups: Sequence[Group]) -> Iterator[tuple[Verdict, ...]]:
        """Yield the verdicts of each group; `raw` has the reward and the raw verdict of each judge."""
        for start in range(0, len(groups), GROUPS_AT_ONCE):
            part = groups[start : start + GROUPS_AT_ONCE]
            by_judge = [judge(part) for _, _, judge in self.judges]
            for verdicts_of_group in zip(*by_judge, strict=True):
                yield tuple(map(self._sum, zip(*verdicts_of_group, strict=True)))

    def _sum(self, verdicts: tuple[Verdict, ...]) -> Verdict:
        named = [(name, weight, verdict) for (name, weight, _), verdict in zip(self.judges, verdicts, strict=True)]
        raw = {name: {"reward": verdict.reward, "raw": verdict.raw} for name, _, verdict in named}
        attributes = {key: value for _, _, verdict in named for key, value in verdict.attributes.items()}
        weighted = [weight * verdict.reward for _, weight, verdict in named if verdict.reward is not None]
        if len(weighted) == len(named):
            why = "; ".join(f"{name}: {verdict.why}" for name, _, verdict in named)
            return Verdict(sum(weighted), attributes, why, raw)
        without = [(name, verdict) for name, _, verdict in named if verdict.reward is None]
        abstained = next((each for each in without if each[1].refused), without[0])
        is_refused = any(verdict.refused for verdict in verdicts)
        return Verdict(None, attributes, f"{abstained[0]} abstains: {abstained[1].why}", raw, is_refused)


def _with_judge(verdict: Verdict, judge: str) -> Verdict:
    return replace(verdict, raw={"judge": judge, "raw": verdict.raw})
