"""Verdicts of a step's judges on responses, each asked once: a verdict is stored under judge, prompt and responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from align.config import stable_hash
from align.distributed.journal import Journal, run_with_journal
from align.distributed.processes import Processes
from align.distributed.progress import Progress
from align.distributed.work_split import WorkShard
from align.errors import InputError
from align.inference.samples import prompt_key
from align.records import Prompt
from align.rewards.verdicts import Group, Judge, Verdict

STORE_FORMAT = {"verdicts": 1}  # what the first line of a store says of its items


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratings:
    """A judge, and the store of its verdicts."""

    judge: Judge
    identity: Any  # JSON of everything that decides a verdict
    store: Journal
    processes: Processes
    progress: Progress

    def rate(self, groups: Sequence[Group], *, activity: str) -> list[tuple[Verdict, ...]]:
        """Return the verdicts on each group of responses to a prompt, in order. Every process must ask the same."""
        keys = [self._key(prompt, responses) for prompt, responses in groups]
        missing = {key: group for key, group in zip(keys, groups, strict=True) if key not in self.store.done}
        self.progress.phase(activity, len(set(keys)), len(set(keys)) - len(missing))
        own = WorkShard.of(self.processes).select(list(missing.items()))

        def work() -> None:
            for (key, (_, responses)), verdicts in zip(own, self.judge([group for _, group in own]), strict=True):
                if len(verdicts) != len(responses):
                    raise InputError(f"the judge returned {len(verdicts)} verdicts for {len(responses)} responses")
                self.store.add(key, [asdict(verdict) for verdict in verdicts])
                self.progress.advance(1)

        if missing:
            run_with_journal(self.store, self.processes, work, "judging")
        return [tuple(Verdict(**value) for value in self.store.done[key]) for key in keys]

    def _key(self, prompt: Prompt, responses: Sequence[str]) -> str:
        metadata = {name: value for name, value in prompt.metadata.items() if name != "lineage"}
        return stable_hash([self.identity, prompt_key(prompt), metadata, list(responses)])
