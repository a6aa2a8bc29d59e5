import numpy as np
import pytest

from align.accounting.communication import Sharding, Traffic, communication_bytes
from align.errors import InputError


class Ring:
    """A simulated ring of devices that counts the bytes sent by the first one."""

    def __init__(self, devices):
        self.devices, self.sent = devices, 0

    def pass_on(self, held, first, *, add):
        """Send chunk `first(device)` from each device to the next."""
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
    """Return one tensor for each device, in as many chunks as there are devices."""
    whole = np.arange(devices * size, dtype=np.float32).reshape(devices, devices, size // devices)
    return [each.copy() for each in whole]


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_the_simulated_all_reduce_sums(devices):
    held = tensors(devices, 48)
    expected = sum(held)
    Ring(devices).all_reduce(held)
    for each in held:
        np.testing.assert_array_equal(each, expected)


WEIGHTS, SMALL, TRAINED = 96, 24, 48
MICRO_BATCHES = [3, 1, 2]  # in each optimizer step


def simulated(sharding):
    """Return the bytes that a device sends in these optimizer steps, after 5 forward passes."""
    ring, devices, cut = Ring(sharding.processes), sharding.processes, WEIGHTS - SMALL
    for _ in range(5 if sharding.stage == 3 else 0):
        ring.all_gather(tensors(devices, cut))
    for step, in_step in enumerate(MICRO_BATCHES):
        for micro in range(in_step):
            if sharding.stage == 3:
                ring.all_gather(tensors(devices, cut))
                kept = min(cut, sharding.reuse // 2) if step > 0 else 0
                ring.all_gather(tensors(devices, cut - kept))
            if sharding.reduce == "each" or micro == in_step - 1:
                reduce(ring, sharding, micro == in_step - 1)
        if sharding.stage:
            ring.all_gather(tensors(devices, SMALL if sharding.stage == 3 else TRAINED))
    return ring.sent


def reduce(ring, sharding, final):
    """Reduce the gradient: each device gets the sum of its shard, or of the full gradient."""
    held = tensors(sharding.processes, TRAINED)
    if sharding.stage == 3 and not sharding.cpu:
        ring.reduce_scatter(held)
    elif sharding.stage != 1 or final:
        ring.all_reduce(held)


@pytest.mark.parametrize("cpu", [True, False])
@pytest.mark.parametrize("reuse", [0, 48, 10**9])
@pytest.mark.parametrize("when", ["once", "each"])
@pytest.mark.parametrize("devices", [1, 2, 3, 8])
@pytest.mark.parametrize("stage", range(4))
def test_the_formula_equals_the_bytes_of_a_simulated_ring(stage, devices, when, reuse, cpu):
    sharding = Sharding(stage=stage, processes=devices, reduce=when, reuse=reuse, cpu=cpu)
    counts = {"steps": len(MICRO_BATCHES), "micro_batches": sum(MICRO_BATCHES), "regathered": MICRO_BATCHES[0]}
    traffic = Traffic(weights=WEIGHTS, trained=TRAINED, unpartitioned=SMALL, forward_only=5, **counts)
    sent = simulated(sharding)
    assert communication_bytes(sharding, traffic) == sent
    assert (sent == 0) == (devices == 1)


# Bytes that two processes with DeepSpeed 0.19.8 and gloo sent in one step of 3 micro-batches, counted on the loopback
# device of a separate network namespace, both processes together, as a multiple of the weights' bytes. The model had
# 2,492,160 weights, of which 788,224 in tensors of at most 100,000. Packet headers are included.
MEASURED = [
    (1, "once", {}, 3.00),
    (1, "each", {}, 3.02),
    (2, "once", {}, 3.00),
    (2, "each", {}, 7.01),
    (3, "once", {}, 4.38),
    (3, "each", {}, 8.38),
    (3, "once", {"regathered": 3}, 6.44),
]


@pytest.mark.parametrize(("stage", "when", "counts", "counted"), MEASURED)
def test_the_formula_equals_the_bytes_that_deepspeed_sent(stage, when, counts, counted):
    traffic = Traffic(weights=2_492_160, unpartitioned=788_224, steps=1, micro_batches=3, **counts)
    sent = communication_bytes(Sharding(stage=stage, processes=2, reduce=when), traffic)
    assert 2 * sent / (4 * traffic.weights) == pytest.approx(counted, rel=0.01)


def test_large_models_send_what_the_zero_paper_states():
    """Rajbhandari et al. 2020, sec. 7: 2 of the model's size for data parallelism, 3 with stage 3."""
    traffic = Traffic(weights=7_000_000_000, weight_bytes=2)
    shardings = {stage: Sharding(stage=stage, processes=1024, reuse=0, cpu=False) for stage in (0, 3)}
    many = {stage: communication_bytes(way, traffic) / (2 * traffic.weights) for stage, way in shardings.items()}
    assert many == pytest.approx({0: 2, 3: 3}, rel=2e-3)


def test_weights_that_are_gathered_in_bf16_send_half_of_their_bytes():
    """An fp32 gradient is reduced once, and bf16 weights are gathered in the forward and in the backward pass."""
    traffic = Traffic(weights=7_000_000_000, gathered_in_bf16=7_000_000_000)
    sent = communication_bytes(Sharding(stage=3, processes=1024, reuse=0, cpu=False), traffic)
    assert sent / traffic.weights == pytest.approx(4 + 2 * 2, rel=2e-3)


def test_some_weights_gathered_and_all_gradients_reduced_in_bf16_send_half_of_their_bytes():
    """Nine tenths of the weights in bf16 and one in fp32, twice, and a gradient in bf16."""
    traffic = Traffic(weights=7_000_000_000, gathered_in_bf16=6_300_000_000, reduced_bytes=2)
    sent = communication_bytes(Sharding(stage=3, processes=1024, reuse=0, cpu=False), traffic)
    assert sent / traffic.weights == pytest.approx(2 + 2 * (0.9 * 2 + 0.1 * 4), rel=2e-3)
    sent = communication_bytes(Sharding(stage=2, processes=1024, cpu=False), traffic)
    assert sent / traffic.weights == pytest.approx(2 * 2 + 4, rel=2e-3)  # updated weights are gathered in fp32


def test_invalid_sharding_is_rejected():
    with pytest.raises(InputError, match="not 4"):
        Sharding(stage=4, processes=2)
    with pytest.raises(InputError, match="not 0"):
        Sharding(processes=0)
