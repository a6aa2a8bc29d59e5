"""IFEval: verifiable instructions (Zhou et al. 2023), per prompt and per instruction, strict and loose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from align.evaluation.sampled_task import Check, Grade, Graded, SampledTask, single_turn
from align.evaluation.task import Row
from align.records import at_place
from align.rewards.verifiers.evidence import evidence
from align.rewards.verifiers.instructions import follows, instructions
from align.rewards.verifiers.patterns import shared_limit


def prompt(row: Row) -> str:
    """Return the row's prompt."""
    return str(row["prompt"])


def grade(items: Sequence[Graded]) -> Iterator[Grade]:
    """Yield which instructions each response follows."""
    for row, response, _ in items:
        with at_place(f"row {row.get('key', str(row['prompt'])[:40])!r}"), shared_limit():
            strict, loose = follows(row, response), follows(row, response, loose=True)
        parts: dict[str, tuple[float, float]] = {}
        for name, followed in (("strict", strict), ("loose", loose)):
            parts[f"prompt_{name}"] = (float(all(followed)), 1)
            parts[f"instruction_{name}"] = (sum(followed), len(followed))
        asked = zip(row["instruction_id_list"], row["kwargs"], strict=True)
        checks = [
            Check(name, followed, evidence(name, kwargs or {}, response))
            for (name, kwargs), followed in zip(asked, strict, strict=True)
        ]
        yield Grade({"strict": strict, "loose": loose}, parts, checks)


TASK = SampledTask(
    name="ifeval",
    metrics=("prompt_strict", "instruction_strict", "prompt_loose", "instruction_loose"),
    columns=("prompt", "instruction_id_list", "kwargs"),
    check_row=instructions,
    next_turn=single_turn(prompt),
    grade=grade,
)
