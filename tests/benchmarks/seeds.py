"""Several runs of one recipe with different seeds as one table: rates, changes from policy to policy, and their spread.

Usage, from the root of the repository, after the runs:

    for seed in 0 1 2; do align run recipes/quickstart.yaml seed=$seed run=quickstart-$seed; done
    python -m tests.benchmarks.seeds runs/quickstart-0 runs/quickstart-1 runs/quickstart-2 [POLICY:OTHER ...]

Of each policy and evaluation: the rate over all prompts of all seeds with its 95 % bootstrap interval over prompts, the
half-width of a t interval over the seeds alone, and the paired change against the policy before with its interval over
prompts. Each POLICY:OTHER adds the paired difference of two policies for every seed, and over all prompts of all seeds.
A prompt that one of two policies has not answered is left out of their difference. The last line is one JSON object.
"""

from __future__ import annotations

import json
import sys
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

import numpy as np

from align.evaluation.statistics import bootstrap_interval

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t of n - 1 degrees of freedom, two-sided


Parts = dict[int, list[float]]  # row -> passed, of how many


def parts_of(run: Path) -> dict[tuple[str, str], Parts]:
    """(policy, column) -> the parts of each row."""
    found = {}
    for manifest in sorted(run.glob("*/manifest.json")):
        told = json.loads(manifest.read_text())
        for column, (task, part) in told.get("columns", {}).items():
            lines = [json.loads(line) for line in (manifest.parent / f"{task}.jsonl").read_text().splitlines()]
            policy = next(iter(told["scores"]))
            found[policy, column] = {
                line.get("row", number): line["parts"][part]
                for number, line in enumerate(lines)
                if part in line["parts"]
            }
    return found


def joined(parts: list[Parts]) -> np.ndarray:
    """[prompts of all runs, passed or of how many]."""
    return np.array([each for own in parts for each in own.values()], dtype=np.float64)


def paired(ones: list[Parts], others: list[Parts]) -> tuple[float, float, float]:
    """Difference of the rates with its interval, over the rows that both of a run have."""
    rows = [(one[row], two[row]) for one, two in zip(ones, others, strict=True) for row in one if row in two]
    both = np.array(rows, dtype=np.float64)
    low, high = bootstrap_interval(lambda chosen: rate(both[chosen, 0]) - rate(both[chosen, 1]), len(both))
    return rate(both[:, 0]) - rate(both[:, 1]), low, high


def rate(parts: np.ndarray) -> float:
    passed, of = parts.sum(axis=0)
    return float(passed / of)


def pooled(runs: list[Path]) -> dict[str, dict[str, dict[str, object]]]:
    """{policy: {column: {value, low, high, n, seeds, half_width, change, change_low, change_high, from}}}."""
    of_runs = [parts_of(run) for run in runs]
    before = json.loads((runs[0] / "changes.json").read_text())
    table: dict[str, dict[str, dict[str, object]]] = {}
    for policy, column in of_runs[0]:
        own = [each[policy, column] for each in of_runs]
        both = joined(own)
        low, high = bootstrap_interval(lambda chosen, both=both: rate(both[chosen]), len(both))
        seeds = [rate(joined([each])) for each in own]
        cell = {"value": rate(both), "low": low, "high": high, "n": len(both), "seeds": seeds}
        if len(seeds) > 1:
            cell["half_width"] = T_95[len(seeds)] * stdev(seeds) / sqrt(len(seeds))
        earlier = before.get(policy, {}).get(column, {}).get("from")
        if earlier is not None:
            change, down, up = paired(own, [each[earlier, column] for each in of_runs])
            cell |= {"change": change, "change_low": down, "change_high": up, "from": earlier}
        table.setdefault(policy, {})[column] = cell
    return table


def differences(runs: list[Path], policy: str, other: str) -> dict[str, list[tuple[float, float, float]]]:
    """{column: [(difference, low, high) of each run, and of all runs together]}."""
    of_runs = [parts_of(run) for run in runs]
    found: dict[str, list[tuple[float, float, float]]] = {}
    for column in [column for name, column in of_runs[0] if name == policy and (other, column) in of_runs[0]]:
        ones, others = ([each[name, column] for each in of_runs] for name in (policy, other))
        each = [paired([one], [two]) for one, two in zip(ones, others, strict=True)]
        found[column] = [*each, paired(ones, others)]
    return found


def main() -> None:
    """Print the table, its policies in the order of the first run's recipe."""
    runs = [Path(each) for each in sys.argv[1:] if ":" not in each]
    if not runs:
        sys.exit(__doc__)
    table = pooled(runs)
    order = [step for step in json.loads((runs[0] / "recipe.json").read_text())["steps"] if step in table]
    for policy in order:
        for column, cell in table[policy].items():
            text = f"{policy:<10} {column:<20} {cell['value']:7.3f} [{cell['low']:.3f}, {cell['high']:.3f}]"
            if "half_width" in cell:
                text += f"  over {len(runs)} seeds ± {cell['half_width']:.3f}"
            if "change" in cell:
                text += f"  {cell['change']:+.3f} [{cell['change_low']:+.3f}, {cell['change_high']:+.3f}]"
                text += f" from {cell['from']}"
            print(text)
    for policy, other in [each.split(":") for each in sys.argv[1:] if ":" in each]:
        for column, found in differences(runs, policy, other).items():
            texts = [f"{value:+.3f} [{low:+.3f}, {high:+.3f}]" for value, low, high in found]
            print(f"{policy} - {other}, {column}: {', '.join(texts[:-1])}; together {texts[-1]}")
    seconds = [json.loads((run / "ledger.json").read_text())["total"]["seconds"] for run in runs]
    print(f"seconds of the steps: {', '.join(f'{each:.0f}' for each in seconds)}; mean {mean(seconds):.0f}")
    print(json.dumps({policy: table[policy] for policy in order}))


if __name__ == "__main__":
    main()
