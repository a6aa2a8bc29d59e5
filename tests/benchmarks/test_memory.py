"""What is told of memory before a step runs is near what the step takes, on models that hide nothing behind torch."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))  # as `python -m tests.benchmarks.memory` finds it

from tests.benchmarks.memory import in_child  # noqa: E402 - after the line above

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["lora", "checkpointing"])
def test_a_steps_peak_is_within_a_fifth_of_its_estimate(name):
    found = in_child(name, [])
    assert found["estimated"] > 10**9
    assert found["measured"] == pytest.approx(found["estimated"], rel=0.2)
