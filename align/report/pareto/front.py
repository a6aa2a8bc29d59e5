"""Find the Pareto front of quality against cost, and say which policies belong on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

FRONT, UNDECIDED, DOMINATED, NO_COST = "on the front", "undecided", "dominated", "cost unknown"


@dataclass(frozen=True, slots=True)
class Point:
    """A policy with its cost and quality."""

    name: str
    cost: float | None  # lower is better; None if it is unknown
    quality: float  # higher is better


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a policy is on the front, and the policies that it was decided by."""

    status: str
    by: Sequence[str] = ()

    @property
    def text(self) -> str:
        """Return the status with its reason."""
        if self.status == UNDECIDED:
            return f"undecided: not significantly different from {', '.join(self.by)}"
        return f"dominated by {', '.join(self.by)}" if self.status == DOMINATED else self.status


IsWorse = Callable[[str, str], bool]  # whether the first policy is significantly worse than the second


def dominates(one: Point, other: Point) -> bool:
    """Return whether a point is no worse than another in cost and quality, and better in one of them."""
    if one.cost is None or other.cost is None:
        return False
    is_no_worse = one.cost <= other.cost and one.quality >= other.quality
    return is_no_worse and (one.cost < other.cost or one.quality > other.quality)


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Return the points of known cost that no other dominates, by rising cost; equal points are all kept."""
    front: list[Point] = []
    known = [(point.cost, -point.quality, point) for point in points if point.cost is not None]
    for _, _, point in sorted(known, key=lambda each: each[:2]):
        is_tie = bool(front) and (front[-1].cost, front[-1].quality) == (point.cost, point.quality)
        if not front or point.quality > front[-1].quality or is_tie:
            front.append(point)
    return front


def verdicts(points: Sequence[Point], is_worse: IsWorse) -> dict[str, Verdict]:
    """Return for each policy whether it is on the front.

    A policy that costs more than another and scores no better is dominated. One that scores better is on the front
    where every cheaper policy is significantly worse, and undecided where one is not. Of policies that cost the same,
    the lower one is dominated where it is significantly worse, and else undecided.
    """
    front = {point.name for point in pareto_front(points)}
    return {point.name: _verdict(point, points, is_worse, is_on_front=point.name in front) for point in points}


def _verdict(point: Point, points: Sequence[Point], is_worse: IsWorse, *, is_on_front: bool) -> Verdict:
    if point.cost is None:
        return Verdict(NO_COST)
    cheaper = [each for each in points if each.cost is not None and each.cost < point.cost]
    if is_on_front:
        rivals = [each.name for each in cheaper if not is_worse(each.name, point.name)]
        return Verdict(UNDECIDED if rivals else FRONT, rivals)
    by = [each.name for each in cheaper if dominates(each, point)]
    if by:
        return Verdict(DOMINATED, by)
    equal = [each.name for each in points if dominates(each, point)]
    better = [name for name in equal if is_worse(point.name, name)]
    return Verdict(DOMINATED, better) if better else Verdict(UNDECIDED, equal)
