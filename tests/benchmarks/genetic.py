"""Genetic-Instruct on the quickstart's code tasks: which operators and which fitness make rows that teach.

Usage, from the root of the repository (minutes for each seed):

    python -m tests.benchmarks.genetic --seeds 0 1 2

A task is a keep step, two changes and a return step (`align.procedural.code`). From the same few seed tasks, each arm
makes equally many rows with `tests/synth/scripted_genetics.py`: a coder that is wrong at a rate of
0.3 and a judge that passes 95 % of right and 20 % of wrong solutions. The quickstart's Llama is trained from scratch on
the rows of each arm, for equally many steps, and answers held-out tasks whose pair of changes occurs in no seed and
which are in no arm. Rates have 95 % bootstrap intervals over prompts; changes are paired by prompt.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests" / name) for name in ("synth", "inference", "stages")]

from scripted_genetics import ScriptedGenetics, draw_steps, solves, steps_of, worded  # noqa: E402 - needs the path
from small_runs import Told  # noqa: E402
from synthetic_runs import all_rows, make  # noqa: E402

from align.evaluation.statistics import bootstrap_interval  # noqa: E402
from align.procedural.code import INPUTS, _program, _result  # noqa: E402
from align.records import Prompt  # noqa: E402
from align.rewards.verdicts import Verdict  # noqa: E402
from align.sandbox.function_calls import Program, run_programs  # noqa: E402
from align.synth.parsing.programs import program  # noqa: E402
from align.workflow.launcher import Command  # noqa: E402
from align.workflow.runner import run_recipe  # noqa: E402
from tests.benchmarks.seeds import parts_of, rate  # noqa: E402

NUM_SEEDS, NUM_MADE, NUM_ROWS, NUM_TEST = 40, 700, 600, 200
SIZES = {"generations": 3, "colonies": 4, "near_duplicate": 0.95, "mutation_batch": 20, "crossover_batch": 4}
JUDGE = [{"name": "tests.benchmarks.genetic:executed"}]
# Arm -> settings of the family; tests are run by JUDGE
ARMS: dict[str, dict[str, Any] | None] = {
    "seeds only": None,
    "mutation": {"mutation_probability": 1.0},
    "crossover": {"mutation_probability": 0.0},
    "both": {},
    "both, no fitness": {"fitness": "none"},
    "both, execution": {"fitness": "execution"},
}
PAIRS = [("both", arm) for arm in ARMS if arm != "both"]
PAIRS += [("both, execution", "both, no fitness"), ("mutation", "crossover")]
PAIRS += [(arm, "seeds only") for arm in ("mutation", "crossover")]


def executed() -> Any:  # noqa: ANN401 - a judge
    """Return a judge that runs the tests in sandboxes, many programs in each."""

    def judge(groups: Sequence[tuple[Prompt, Sequence[str]]]) -> Iterator[tuple[Verdict, ...]]:
        arguments = tuple(repr(values) for values in INPUTS)
        programs = [Program(f"{program(answer)}\nf = solution", arguments) for _, (answer,) in groups]
        outputs = run_programs(programs)
        for each, (prompt, _) in zip(programs, groups, strict=True):
            passed = [f"assert solution({a}) == {found}" for a, found in zip(arguments, outputs[each], strict=True)]
            yield (Verdict(float(passed == prompt.metadata["tests"])),)

    return judge


def sized(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the family of an arm, without sizes that have no effect."""
    unused = {1.0: "crossover", 0.0: "mutation_"}.get(settings.get("mutation_probability"), "-")
    family = {"family": "genetic_code", "of": "seeds", "number": NUM_MADE}
    return {**family, **{name: value for name, value in SIZES.items() if not name.startswith(unused)}, **settings}


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def demonstration(steps: Sequence[str], code: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": worded(list(steps))}, {"role": "assistant", "content": code}]}


def breed(folder: Path, arm: str, seed: int, test: set[tuple[str, ...]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the rows of an arm, and what its family reports of them."""
    settings = ARMS[arm] or {}
    teacher = ScriptedGenetics(seed=seed)
    data = {"seeds": {"path": str(folder / "seeds.jsonl")}}
    judges = JUDGE if settings.get("fitness") == "execution" else []
    splits = {"sft": 1.0, "preference": 0.0, "test": 0.0}
    own = folder / arm.replace(", ", "-").replace(" ", "-")
    report = make(own, teacher, {"code": sized(settings)}, data=data, judges=judges, splits=splits)
    made = [[each["content"] for each in row["messages"]] for row in all_rows(own)["demonstrations"]]
    pairs = [(tuple(steps_of(task)), program(answer)) for task, answer in made]
    counts = dict(report["entries"]["code"])
    counts["right"] = sum(solves(worded(list(steps)), code) for steps, code in pairs)
    counts["judged"], counts["judged right"] = len(teacher.judged), sum(right for right, _ in teacher.judged)
    counts["distinct"] = len({steps for steps, _ in pairs})
    fitting = [(steps, code) for steps, code in pairs if steps not in test]
    rows = [demonstration(steps, code.removeprefix("solution = ")) for steps, code in fitting[:NUM_ROWS]]
    return rows, counts


def recipe(folder: Path, seed: int, num_steps: int) -> dict[str, Any]:
    """Return the recipe that trains and evaluates all arms."""
    quickstart = yaml.safe_load((ROOT / "recipes/quickstart.yaml").read_text())
    train = {**quickstart["steps"]["code"]["train"], "max_steps": num_steps, "epochs": 1000}
    steps = {f"arm-{number}": {"stage": "sft", "policy": "base", "data": f"arm{number}"} for number in range(len(ARMS))}
    return {
        **{"run": "genetic", "runs": str(folder / "runs"), "seed": seed, "policy": quickstart["policy"]},
        "data": {
            **{f"arm{number}": {"path": str(folder / f"arm-{number}.jsonl")} for number in range(len(ARMS))},
            "test": {"path": str(folder / "test.jsonl")},
        },
        "steps": {
            "base": quickstart["steps"]["base"],
            **{name: {**step, "train": train} for name, step in steps.items()},
            "evaluate": {
                "stage": "evaluate",
                "policies": list(steps),
                "tasks": {"code": {"task": "code", "data": "test", "max_new_tokens": 48}},
            },
        },
    }


def measure(folder: Path, seed: int, num_steps: int) -> dict[str, Any]:
    """Return what the families report, the tokens that each arm trains, and which prompts it passes."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = Random(f"genetic {seed}")
    seeds = [draw_steps(rng) for _ in range(NUM_SEEDS)]
    taken = {tuple(steps[1:3]) for steps in seeds}
    test: dict[tuple[str, ...], None] = {}
    while len(test) < NUM_TEST:
        steps = draw_steps(rng)
        if tuple(steps[1:3]) not in taken:
            test[tuple(steps)] = None
    write_rows(folder / "seeds.jsonl", [{"prompt": worded(steps)} for steps in seeds])
    examples = {steps: [[repr(each), repr(_result(list(steps), each))] for each in INPUTS] for steps in test}
    rows = [{"prompt": worded(list(steps)), "kind": "code", "examples": examples[steps]} for steps in test]
    write_rows(folder / "test.jsonl", [{**row, "origin": str(number)} for number, row in enumerate(rows)])
    found: dict[str, Any] = {"counts": {}, "tokens": {}, "passed": {}, "rows": {}, "seconds": {}}
    for number, arm in enumerate(ARMS):
        begun = time.monotonic()
        if ARMS[arm] is None:
            rows = list(islice(cycle(demonstration(steps, _program(steps)) for steps in seeds), NUM_ROWS))
        else:
            rows, found["counts"][arm] = breed(folder, arm, seed, set(test))
        write_rows(folder / f"arm-{number}.jsonl", rows)
        found["rows"][arm] = len(rows)
        found["seconds"][arm] = time.monotonic() - begun
        print(f"seed {seed}, {arm}: {len(rows)} rows, {found['seconds'][arm]:.0f} s", flush=True)
    path = folder / "genetic.yaml"
    path.write_text(yaml.safe_dump(recipe(folder, seed, num_steps), sort_keys=False))
    begun = time.monotonic()
    run_recipe(Command(path, ()), Told(), disk=(0, 0))
    parts = parts_of(folder / "runs/genetic")
    for number, arm in enumerate(ARMS):
        lines = (folder / f"runs/genetic/arm-{number}/metrics.jsonl").read_text().splitlines()
        found["tokens"][arm] = sum(json.loads(line).get("tokens_trained", 0) for line in lines)
        (key,) = (each for each in parts if each[0] == f"arm-{number}")
        found["passed"][arm] = [passed for passed, _ in parts[key].values()]
        print(f"seed {seed}, {arm}: {np.mean(found['passed'][arm]):.3f}", flush=True)
    print(f"seed {seed}: training and evaluation {time.monotonic() - begun:.0f} s", flush=True)
    return found


def report(found: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of arms, the paired changes, and the yields."""
    passed = {arm: np.concatenate([np.array(each["passed"][arm]) for each in found]) for arm in ARMS}
    for arm, of in passed.items():
        low, high = bootstrap_interval(lambda chosen, of=of: float(of[chosen].mean()), len(of))
        seeds = ", ".join(f"{np.mean(each['passed'][arm]):.3f}" for each in found)
        tokens, rows = ([each[name][arm] for each in found] for name in ("tokens", "rows"))
        print(f"{arm:<18} {of.mean():.3f} [{low:.3f}, {high:.3f}]  seeds {seeds}  rows {rows}  tokens {tokens}")
    for one, other in PAIRS:
        change = passed[one] - passed[other]
        low, high = bootstrap_interval(lambda chosen, change=change: float(change[chosen].mean()), len(change))
        mark = "*" if low > 0 or high < 0 else " "
        print(f"{one} - {other:<18} {change.mean():+.3f} [{low:+.3f}, {high:+.3f}] {mark}")
    for arm in found[0]["counts"]:
        counts = [each["counts"][arm] for each in found]
        print(arm, json.dumps(counts))
        parts = np.array([[each["right"], each["kept"]] for each in counts], dtype=float)
        line = f"{arm}: precision {rate(parts):.3f} of {parts[:, 1].sum():.0f}"
        if judged := sum(each["judged"] for each in counts):
            share = sum(each["judged right"] for each in counts) / judged
            precision = share * 0.95 / (share * 0.95 + (1 - share) * 0.2)
            error = 1.96 * (precision * (1 - precision) / parts[:, 1].sum()) ** 0.5
            line += f"; of {judged} judged {share:.3f} right, so {precision:.3f} ± {error:.3f} expected"
        print(line)


def main() -> None:
    """Run all seeds and print the tables."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--steps", type=int, default=200, help="optimizer steps of each arm")
    arguments.add_argument("--folder", type=Path, default=Path("runs/genetic-benchmark"))
    chosen = arguments.parse_args()
    found = []
    for seed in chosen.seeds:
        path = chosen.folder / f"seed-{seed}.json"
        if not path.exists():
            result = measure(chosen.folder / f"seed-{seed}", seed, chosen.steps)
            path.write_text(json.dumps(result))
        found.append(json.loads(path.read_text()))
    report(found)


if __name__ == "__main__":
    main()
