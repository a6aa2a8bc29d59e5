import numpy as np
import pytest

from align.accounting.formulas import WIRE, wire_bytes
from align.config import InputError


class Ring:
    """Devices that pass chunks to their neighbour, and count what leaves the first of them."""

    def __init__(self, devices):
        self.devices, self.sent = devices, 0

    def pass_on(self, held, first, *, add):
        """Each device sends chunk `first(device)` to the next one."""
        moving = [(device, first(device) % self.devices) for device in range(self.devices)]
        chunks = [held[device][chunk].copy() for device, chunk in moving]
        self.sent += chunks[0].nbytes
        for (device, chunk), values in zip(moving, chunks, strict=True):
            there = held[(device + 1) % self.devices][chunk]
            there[:] = there + values if add else values

    def reduce_scatter(self, held):
        for turn in range(self.devices - 1):
            self.pass_on(held, lambda device, turn=turn: device - turn, add=True)

    def all_gather(self, held):
        for turn in range(self.devices - 1):
            self.pass_on(held, lambda device, turn=turn: device + 1 - turn, add=False)

    def all_reduce(self, held):
        self.reduce_scatter(held)
        self.all_gather(held)


def tensors(devices, size):
    """A tensor on each device, in as many chunks as there are devices."""
    whole = np.arange(devices * size, dtype=np.float32).reshape(devices, devices, size // devices)
    return [each.copy() for each in whole]


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_an_all_reduce_around_a_ring_leaves_the_sum_everywhere(devices):
    held = tensors(devices, 48)
    expected = sum(held)
    Ring(devices).all_reduce(held)
    for each in held:
        np.testing.assert_array_equal(each, expected)


def simulated(strategy, devices, *, weights, trained, micro_batches):
    """Bytes that leave a device in optimizer steps with these numbers of micro-batches."""
    ring = Ring(devices)
    for in_step in micro_batches:
        for _ in range(in_step):
            if strategy == "zero2":
                ring.all_reduce(tensors(devices, trained))
            if strategy == "zero3":
                ring.all_gather(tensors(devices, weights))  # forward
                ring.all_gather(tensors(devices, weights))  # backward
                ring.reduce_scatter(tensors(devices, trained))
        if strategy in ("ddp", "zero1"):
            ring.all_reduce(tensors(devices, trained))
        if strategy in ("zero1", "zero2"):
            ring.all_gather(tensors(devices, trained))
    return ring.sent


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
@pytest.mark.parametrize("strategy", WIRE)
def test_the_bytes_by_formula_are_those_that_a_ring_sends(strategy, devices):
    sent = simulated(strategy, devices, weights=96, trained=48, micro_batches=[3, 1, 2])
    assert wire_bytes(strategy, devices, weights=96, trained=48, steps=3, micro_batches=6) == sent
    assert (sent == 0) == (devices == 1)


def test_a_large_models_step_sends_what_the_paper_says():
    """Rajbhandari et al. 2020, sec. 7: 2 of the model's size for data parallelism, 3 with stage 3."""
    size = 2 * 7_000_000_000
    many = {name: wire_bytes(name, 1024, weights=7_000_000_000, weight_bytes=2) / size for name in ("ddp", "zero3")}
    assert many == pytest.approx({"ddp": 2, "zero3": 3}, rel=2e-3)


def test_what_is_spread_no_known_way_is_refused():
    with pytest.raises(InputError, match="did you mean 'zero3'"):
        wire_bytes("zero_3", 2, weights=1)
    with pytest.raises(InputError, match="not 0"):
        wire_bytes("ddp", 0, weights=1)
