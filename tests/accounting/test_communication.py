import numpy as np
import pytest

from align.accounting.communication import Sharding, Traffic, communication_bytes
from align.errors import InputError


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


WEIGHTS, SMALL, TRAINED = 96, 24, 48
MICRO_BATCHES = [3, 1, 2]  # of each optimizer step


def simulated(ways):
    """Bytes that leave a device in optimizer steps with these numbers of micro-batches, after 5 forward passes."""
    ring, devices, cut = Ring(ways.processes), ways.processes, WEIGHTS - SMALL
    for _ in range(5 if ways.stage == 3 else 0):
        ring.all_gather(tensors(devices, cut))
    for step, in_step in enumerate(MICRO_BATCHES):
        for micro in range(in_step):
            if ways.stage == 3:
                ring.all_gather(tensors(devices, cut))
                kept = min(cut, ways.reuse // 2) if step > 0 else 0
                ring.all_gather(tensors(devices, cut - kept))
            if ways.reduce == "each" or micro == in_step - 1:
                reduce(ring, ways, micro == in_step - 1)
        if ways.stage:
            ring.all_gather(tensors(devices, SMALL if ways.stage == 3 else TRAINED))
    return ring.sent


def reduce(ring, ways, final):
    """Each device has the sum of its share of the gradient, or all of it."""
    held = tensors(ways.processes, TRAINED)
    if ways.stage == 3 and not ways.cpu:
        ring.reduce_scatter(held)
    elif ways.stage != 1 or final:
        ring.all_reduce(held)


@pytest.mark.parametrize("cpu", [True, False])
@pytest.mark.parametrize("reuse", [0, 48, 10**9])
@pytest.mark.parametrize("when", ["once", "each"])
@pytest.mark.parametrize("devices", [1, 2, 3, 8])
@pytest.mark.parametrize("stage", range(4))
def test_the_bytes_by_formula_are_those_that_a_ring_sends(stage, devices, when, reuse, cpu):
    ways = Sharding(stage=stage, processes=devices, reduce=when, reuse=reuse, cpu=cpu)
    counts = {"steps": len(MICRO_BATCHES), "micro_batches": sum(MICRO_BATCHES), "regathered": MICRO_BATCHES[0]}
    traffic = Traffic(weights=WEIGHTS, trained=TRAINED, unpartitioned=SMALL, forward_only=5, **counts)
    sent = simulated(ways)
    assert communication_bytes(ways, traffic) == sent
    assert (sent == 0) == (devices == 1)


# What two processes under DeepSpeed 0.19.8 and gloo sent each other in one step of 3 micro-batches, counted on the
# loopback device of a network namespace of their own, as a multiple of the weights' bytes, of both together. The model
# had 2,492,160 weights, of which 788,224 in tensors of at most 100,000. Headers of packets are in it.
COUNTED = [
    (1, "once", {}, 3.00),
    (1, "each", {}, 3.02),
    (2, "once", {}, 3.00),
    (2, "each", {}, 7.01),
    (3, "once", {}, 4.38),
    (3, "each", {}, 8.38),
    (3, "once", {"regathered": 3}, 6.44),
]


@pytest.mark.parametrize(("stage", "when", "counts", "counted"), COUNTED)
def test_the_bytes_by_formula_are_those_that_deepspeed_sent(stage, when, counts, counted):
    traffic = Traffic(weights=2_492_160, unpartitioned=788_224, steps=1, micro_batches=3, **counts)
    sent = communication_bytes(Sharding(stage=stage, processes=2, reduce=when), traffic)
    assert 2 * sent / (4 * traffic.weights) == pytest.approx(counted, rel=0.01)


def test_a_large_models_step_sends_what_the_paper_says():
    """Rajbhandari et al. 2020, sec. 7: 2 of the model's size for data parallelism, 3 with stage 3."""
    traffic = Traffic(weights=7_000_000_000, weight_bytes=2)
    ways = {stage: Sharding(stage=stage, processes=1024, reuse=0, cpu=False) for stage in (0, 3)}
    many = {stage: communication_bytes(way, traffic) / (2 * traffic.weights) for stage, way in ways.items()}
    assert many == pytest.approx({0: 2, 3: 3}, rel=2e-3)


def test_what_is_spread_in_no_known_way_is_refused():
    with pytest.raises(InputError, match="not 4"):
        Sharding(stage=4, processes=2)
    with pytest.raises(InputError, match="not 0"):
        Sharding(processes=0)
