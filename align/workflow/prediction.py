"""Prediction of what a recipe will use, from its estimates and the ledgers of earlier steps on this machine."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from statistics import median
from typing import NamedTuple, Self

from align.accounting.budget import WH_PER_KWH
from align.accounting.ledger import SECONDS_PER_HOUR, Ledger
from align.artifacts import read_manifest
from align.errors import InputError
from align.stages.costs.estimates import Estimate
from align.stages.training.footprint import sharding_of
from align.workflow.environment import device_name, hardware
from align.workflow.recipe.schema import Recipe

SAME_SIZE = 0.01  # relative difference of the numbers of weights of one model
# Largest ratios of steps that use about as much for each FLOP. On a Xeon with AMX, half a million weights were
# evaluated at 2 GFLOP/s in fp32, and 135 million at 113 in bf16, of which a matrix product had 6 times the rate.
SIMILAR_SIZE = 2.0  # of the numbers of weights
SIMILAR_RATE = 3.0  # of the rates of a matrix product, which depends on precision and threads; load halves it


class Interval(NamedTuple):
    """A value predicted from earlier steps: their lowest, median and highest."""

    low: float
    typical: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self | None:
        """Return the range and the median of the values; None if there are none."""
        return cls(min(values), median(values), max(values)) if values else None

    def plus(self, other: Interval) -> Interval:
        """Return the interval of the sum where both are low or high together."""
        return Interval(*(one + another for one, another in zip(self, other, strict=True)))

    def highest(self, other: Interval) -> Interval:
        """Return the interval of the maximum."""
        return Interval(*(max(pair) for pair in zip(self, other, strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The predicted use of a step; None where no earlier step has a value. An upper bound if the estimate is one."""

    name: str
    stage: str
    earlier: Sequence[Ledger]  # of comparable steps on this machine, which the prediction is learned from
    num_other: int  # steps of the stage whose models are not comparable
    seconds: Interval | None  # by formula for one process and no comparable step
    money: Interval | None
    energy_wh: Interval | None
    wire_bytes: Interval | None  # sent by each device
    peak_memory_bytes: Interval | None  # of a process; by formula for a training step

    @property
    def num_earlier(self) -> int:
        """Number of comparable steps."""
        return len(self.earlier)


class Total(NamedTuple):
    """A resource over the steps of a recipe."""

    value: Interval | None
    unknown: list[str]  # steps of which it is unknown, which the value leaves out


def earlier_ledgers(runs: Path) -> dict[str, list[Ledger]]:
    """Return the ledgers of the finished steps below a folder of runs, by stage.

    Those of other hardware are left out, and those that another version wrote with other fields. Manifests that do not
    record the hardware count if they have this host's name and device.
    """
    here = {"host": platform.node(), "device": device_name()}
    own = hardware()
    found = dict[str, list[Ledger]]()
    for path in sorted(runs.glob("*/*/manifest.json")):
        manifest = read_manifest(path.parent) or {}
        environment = manifest.get("environment") or {}
        ledger = manifest.get("ledger")
        known = environment.get("hardware")
        is_own = known == own if known is not None else here.items() <= environment.items()
        if ledger is not None and is_own:
            with suppress(InputError):
                found.setdefault(str(manifest["stage"]), []).append(Ledger.from_json(ledger))
    return found


def predict(recipe: Recipe, estimate: Estimate, earlier: Sequence[Ledger]) -> Prediction:
    """Predict what a step uses from its FLOPs and what comparable steps of its stage used for each of theirs.

    Steps in which no model runs count as equally long.
    """
    launch, price = recipe.steps[estimate.name].launch, recipe.accounting.price_per_device_hour
    devices = sharding_of(launch).processes
    work = estimate.flops or 1.0
    alike = [each for each in earlier if _is_comparable(each, estimate)]

    def learned(value: Callable[[Ledger], float | None], ledgers: Iterable[Ledger], scale: float) -> Interval | None:
        known = [(each.flops or 1.0, value(each)) for each in ledgers]
        return Interval.of([scale * used / flops for flops, used in known if used is not None])

    device_hours = learned(lambda each: each.seconds * each.devices / SECONDS_PER_HOUR, alike, work)
    same_devices = [each for each in alike if each.devices == devices]
    formula = estimate.training.memory if estimate.training is not None else None
    of_weights = [each.peak_memory_bytes for each in same_devices if _is_same_size(each.weights, estimate.weights)]
    peaks = [float(peak) for peak in of_weights if peak is not None] if formula is None else [float(formula.peak)]
    by_formula = None if estimate.seconds is None or devices > 1 else Interval.of([estimate.seconds])
    return Prediction(
        name=estimate.name,
        stage=estimate.stage,
        earlier=alike,
        num_other=sum(bool(each.flops) for each in earlier) - sum(bool(each.flops) for each in alike),
        seconds=by_formula if device_hours is None else _scaled(device_hours, SECONDS_PER_HOUR / devices),
        money=None if price is None or device_hours is None else _scaled(device_hours, price),
        energy_wh=learned(lambda each: each.energy_kwh, alike, work * WH_PER_KWH),
        wire_bytes=learned(lambda each: each.wire_bytes, same_devices, work) if devices > 1 else Interval(0, 0, 0),
        peak_memory_bytes=Interval.of(peaks),
    )


def total(predictions: Sequence[Prediction], resource: str) -> Total:
    """Return the sum of a resource over the steps of a recipe; of the peak memory, the maximum."""
    values = {each.name: getattr(each, resource) for each in predictions}
    known = [value for value in values.values() if value is not None]
    together = Interval.highest if resource == "peak_memory_bytes" else Interval.plus
    unknown = [name for name, value in values.items() if value is None]
    return Total(reduce(together, known) if known else None, unknown)


def _is_comparable(earlier: Ledger, estimate: Estimate) -> bool:
    """Return whether a step uses about as much for each FLOP as an earlier one of its stage, as far as that is known.

    Small models and slow precisions reach a small share of the FLOP/s of others.
    """
    if not estimate.flops or not earlier.flops:
        return estimate.flops is not None and bool(estimate.flops) == bool(earlier.flops)
    return _within(SIMILAR_SIZE, earlier.weights, estimate.weights) and _within(
        SIMILAR_RATE, earlier.peak_flops, estimate.peak_flops
    )


def _within(ratio: float, one: float | None, other: float | None) -> bool:
    return one is None or other is None or max(one, other) <= ratio * min(one, other)


def _is_same_size(one: int | None, other: int | None) -> bool:
    """Return whether two numbers of weights are those of one model; estimates leave out norms and biases."""
    return one == other if one is None or other is None else abs(one - other) <= SAME_SIZE * one


def _scaled(interval: Interval, factor: float) -> Interval:
    return Interval(*(factor * each for each in interval))
