"""What servers have charged this process, and what judges have computed in it.

Engines and judges add to it wherever they run in a step, and the step's meter reads it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from threading import Lock
from typing import Any

from align.accounting.flops import Decoder, Work, forward_flops


@dataclass(slots=True)
class ServersAndJudges:
    """Prices of servers' tokens, and forward passes of judges."""

    server_cost: float = 0.0  # in `accounting.currency`, of policies, judges and teachers
    judge_tokens: int = 0
    judge_flops: float = 0.0
    judge_unknown: str = ""  # why the FLOPs are unknown
    served_answers: int = 0  # of judges on servers, whose FLOPs are unknown

    def to_json(self) -> dict[str, Any]:
        """Return the amounts as JSON; `ServersAndJudges(**values)` reads them."""
        return asdict(self)

    def since(self, before: ServersAndJudges) -> ServersAndJudges:
        """Return what was added after `before`."""
        return ServersAndJudges(
            self.server_cost - before.server_cost,
            self.judge_tokens - before.judge_tokens,
            self.judge_flops - before.judge_flops,
            self.judge_unknown,
            self.served_answers - before.served_answers,
        )


def sum_usage(usages: Iterable[ServersAndJudges]) -> ServersAndJudges:
    """Return the sum of amounts."""
    found = list(usages)
    return ServersAndJudges(
        sum(each.server_cost for each in found),
        sum(each.judge_tokens for each in found),
        sum(each.judge_flops for each in found),
        next((each.judge_unknown for each in found if each.judge_unknown), ""),
        sum(each.served_answers for each in found),
    )


class ProcessUsage:
    """The amounts of this process so far. Several threads may add to them."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._now = ServersAndJudges()

    @property
    def now(self) -> ServersAndJudges:
        """A copy of the amounts."""
        with self._lock:
            return sum_usage([self._now])

    def add_cost(self, price: float) -> None:
        """Add the price of a server's answer."""
        with self._lock:
            self._now.server_cost += price

    def add_served_answers(self, number: int) -> None:
        """Add answers of a judge on a server, or in an engine of the user's own."""
        with self._lock:
            self._now.served_answers += number

    def add_judging(self, model: Decoder | str, work: Work) -> None:
        """Add a forward pass of a judge, with the dimensions of its model or why they are unknown."""
        with self._lock:
            self._now.judge_tokens += work.tokens
            if isinstance(model, str):
                self._now.judge_unknown = model
            else:
                self._now.judge_flops += forward_flops(model, work)


PROCESS_USAGE = ProcessUsage()
