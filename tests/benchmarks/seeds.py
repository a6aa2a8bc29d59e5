"""Several runs of one recipe with different seeds as one table: rates, changes from policy to policy, and their spread.

Usage, from the root of the repository, after the runs:

    for seed in 0 1 2; do align run recipes/quickstart.yaml seed=$seed run=quickstart-$seed; done
    python -m tests.benchmarks.seeds runs/quickstart-0 runs/quickstart-1 runs/quickstart-2

Of each policy and evaluation: the rate over all prompts of all seeds with its 95 % bootstrap interval over prompts, the
half-width of a t interval over the seeds alone, and the paired change against the policy before with its interval over
prompts. The last line is one JSON object.
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


def parts_of(run: Path) -> dict[tuple[str, str], np.ndarray]:
    """(policy, column) -> [prompts, passed or of how many]."""
    found = {}
    for manifest in sorted(run.glob("*/manifest.json")):
        told = json.loads(manifest.read_text())
        for column, (task, part) in told.get("columns", {}).items():
            lines = [json.loads(line)["parts"] for line in (manifest.parent / f"{task}.jsonl").read_text().splitlines()]
            policy = next(iter(told["scores"]))
            found[policy, column] = np.array([line[part] for line in lines if part in line], dtype=np.float64)
    return found


def rate(parts: np.ndarray) -> float:
    passed, of = parts.sum(axis=0)
    return float(passed / of)


def pooled(runs: list[Path]) -> dict[str, dict[str, dict[str, object]]]:
    """{policy: {column: {value, low, high, n, seeds, half_width, change, change_low, change_high, from}}}."""
    of_runs = [parts_of(run) for run in runs]
    before = json.loads((runs[0] / "changes.json").read_text())
    table: dict[str, dict[str, dict[str, object]]] = {}
    for policy, column in of_runs[0]:
        both = np.concatenate([each[policy, column] for each in of_runs])
        low, high = bootstrap_interval(lambda chosen, both=both: rate(both[chosen]), len(both))
        seeds = [rate(each[policy, column]) for each in of_runs]
        cell = {"value": rate(both), "low": low, "high": high, "n": len(both), "seeds": seeds}
        if len(seeds) > 1:
            cell["half_width"] = T_95[len(seeds)] * stdev(seeds) / sqrt(len(seeds))
        earlier = before.get(policy, {}).get(column, {}).get("from")
        if earlier is not None:
            then = np.concatenate([each[earlier, column] for each in of_runs])
            down, up = bootstrap_interval(
                lambda chosen, both=both, then=then: rate(both[chosen]) - rate(then[chosen]), len(both)
            )
            cell |= {"change": rate(both) - rate(then), "change_low": down, "change_high": up, "from": earlier}
        table.setdefault(policy, {})[column] = cell
    return table


def main() -> None:
    """Print the table, its policies in the order of the first run's recipe."""
    runs = [Path(each) for each in sys.argv[1:]]
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
    seconds = [json.loads((run / "ledger.json").read_text())["total"]["seconds"] for run in runs]
    print(f"seconds of the steps: {', '.join(f'{each:.0f}' for each in seconds)}; mean {mean(seconds):.0f}")
    print(json.dumps({policy: table[policy] for policy in order}))


if __name__ == "__main__":
    main()
