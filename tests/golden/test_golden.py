"""Training reproduces the recorded golden traces, bit for bit on the machine that recorded them.

A change that claims not to alter training leaves `trace.json` unchanged. A change that alters training on purpose runs
`python -m tests.golden` and explains the difference in its commit message.
"""

import importlib.util
import json

import pytest

from .trace import COLUMNS, TRACE, VARIANTS, machine, record

GOLDEN = json.loads(TRACE.read_text())
ZERO2 = pytest.param(
    "zero2",
    marks=[
        pytest.mark.slow,
        pytest.mark.distributed,
        pytest.mark.skipif(
            importlib.util.find_spec("deepspeed") is None,
            reason="deepspeed is not installed: pip install align[deepspeed]",
        ),
    ],
)


def machine_changes() -> str:
    """Describe how this machine differs from the one that recorded the traces; empty if it does not."""
    present = machine()
    changed = [key for key, recorded in GOLDEN["machine"].items() if recorded != present[key]]
    return ", ".join(f"{key} is {present[key]!r}, not {GOLDEN['machine'][key]!r}" for key in changed)


@pytest.fixture(scope="module", params=["full", "lora", ZERO2])
def traces(request, tmp_path_factory):
    """The steps of a variant as trained now, and as recorded."""
    return record(request.param, tmp_path_factory.mktemp("runs")), GOLDEN["runs"][request.param]


def test_losses_and_gradient_norms_match_the_golden_trace(traces):
    found, golden = traces
    rel = 1e-4 if machine_changes() else 1e-6
    assert found.keys() == golden.keys()
    for step in golden:
        for column in COLUMNS:
            assert found[step][column] == pytest.approx(golden[step][column], rel=rel), f"{step}: {column}"


def test_trained_weights_are_those_of_the_golden_trace(traces):
    if changes := machine_changes():
        pytest.skip(f"weights are compared only on the CPU and torch version that recorded them: {changes}")
    found, golden = ({step: each["weights"] for step, each in steps.items()} for steps in traces)
    assert found == golden


def test_the_golden_traces_cover_every_variant_and_trained_stage():
    assert GOLDEN["runs"].keys() == VARIANTS.keys()
    assert list(GOLDEN["runs"]["full"]) == ["code", "sft", "dpo", "rpo", "reward"]
    assert list(GOLDEN["runs"]["lora"]) == list(GOLDEN["runs"]["zero2"]) == ["code", "sft", "dpo"]
    steps = [step for run in GOLDEN["runs"].values() for step in run.values()]
    assert sum(len(step["loss"]) for step in steps) == sum(len(step["grad_norm"]) for step in steps) >= 100
