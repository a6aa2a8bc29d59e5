"""Training with dropout of adapters: the same in any micro-batches, forward and number of attempts."""

import math

import pytest
import torch
from tiny_training import Killed, Recorder, comparisons, gap, loop, preference, same, weights, with_adapters

RATE = 0.2


def nonzero_adapters(dropout=RATE, checkpointing=False):
    """Adapters that change the policy before the first step, as continued ones do."""
    policy = with_adapters(dropout)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in sorted(policy.named_parameters()):
            if "lora_B" in name:
                value.copy_(torch.randn(value.shape, generator=draw) * 0.05)
    if checkpointing:
        policy.base.gradient_checkpointing_enable({"use_reentrant": False})
    return policy


def trained(folder, *, model=None, progress=None, job=None, **changes):
    made = loop(
        folder,
        preference("dpo"),
        comparisons(24),
        model=model or nonzero_adapters(),
        progress=progress,
        job=job,
        **changes,
    )
    return made.run(), weights(made.policy)


def test_dropout_does_not_depend_on_micro_batches_forward_or_checkpointing(tmp_path):
    whole, expected = trained(tmp_path / "whole")
    ways = {
        "cut": {"tokens_per_micro_batch": 90},
        "plain": {"job": {"forward": "plain"}, "tokens_per_micro_batch": 90},
        "checkpointed": {"model": nonzero_adapters(checkpointing=True)},
    }
    for name, way in ways.items():
        result, found = trained(tmp_path / name, **way)
        assert gap(expected, found) < 1e-4, name
        for line, other in zip(whole.metrics, result.metrics, strict=True):
            assert line["loss"] == pytest.approx(other["loss"], abs=2e-6), name
    _, another = trained(tmp_path / "seed", job={"seed": 1})
    _, without = trained(tmp_path / "without", model=nonzero_adapters(dropout=0.0))
    assert gap(expected, another) > 1e-3 and gap(expected, without) > 1e-3


def test_a_killed_run_with_dropout_ends_with_the_same_weights(tmp_path):
    _, expected = trained(tmp_path / "whole", epochs=2)
    with pytest.raises(Killed):
        trained(tmp_path / "killed", epochs=2, checkpoint_steps=2, progress=Recorder(stop_after=3))
    result, found = trained(tmp_path / "killed", epochs=2, checkpoint_steps=2)
    assert same(expected, found) and result.num_steps == 6


def test_references_and_evaluations_have_no_dropout(tmp_path):
    objective, rows = preference("dpo"), comparisons(8)
    made = loop(tmp_path, objective, rows, model=nonzero_adapters(), job={"held_out": rows})
    first = made.run().first_metrics  # before the first update policy and reference are compared
    plain = loop(tmp_path / "plain", objective, rows, model=nonzero_adapters(0.0), job={"held_out": rows})
    assert made.initial_weights == plain.initial_weights
    assert made.reference_cache.values == plain.reference_cache.values
    assert made.evaluator.evaluate() == made.evaluator.evaluate()
    # The loss of DPO is log 2 for a policy that is its own reference, and dropout makes it another one
    assert first["start/held_out/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(first["loss"] - math.log(2)) > 1e-3
