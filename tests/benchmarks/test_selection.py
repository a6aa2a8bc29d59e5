"""The experiments of selection: small versions with what holds of them, and a longer one, which is slow."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))  # as `python -m tests.benchmarks.selection` finds it

from tests.benchmarks.selection import Task, noisy_sft, two_towers  # noqa: E402 - after the line above

SMALL = Task(symbols=8, skills=4, length=6, pool=6_000, curated=600, held_out=100, steps=30, reference_steps=60)


def test_learnability_leaves_garbage_out_and_hard_prefers_it():
    found = noisy_sft(["hard", "easy", "learnability"], SMALL, filter_share=0.8, seed=0)
    chosen = {score: run.chosen for score, run in found.items()}
    assert chosen["hard"]["garbage"] > 0.5 > 0.15 > chosen["learnability"]["garbage"]
    assert chosen["learnability"]["skill"] > chosen["easy"]["skill"]
    assert found["learnability"].final < found["hard"].final


def test_the_loss_of_independent_choice_grows_with_the_filter_and_that_of_joint_choice_does_not():
    loss = {
        choice: [two_towers(choice, filter_share=share, seed=0, steps=300, size=32)["loss"] for share in (0.5, 0.9)]
        for choice in ("independent", "joint")
    }
    assert loss["independent"][1] > 1.1 * loss["independent"][0]
    assert loss["joint"][1] < 1.05 * loss["joint"][0]


@pytest.mark.slow
def test_learnability_reaches_the_loss_of_uniform_training_in_fewer_steps():
    steps = 80
    task = SMALL._replace(steps=steps, evaluate_every=4)  # the benchmark has 600, of a larger language
    found = noisy_sft(["uniform", "hard", "learnability"], task, filter_share=0.8, seed=0)
    uniform, hard, learnability = found.values()
    assert learnability.steps_to(uniform.final) <= 0.5 * steps and learnability.final < 0.7 * uniform.final
    assert hard.steps_to(uniform.final) is None
    assert learnability.chosen["garbage"] <= 0.15 and hard.chosen["garbage"] >= 0.6
