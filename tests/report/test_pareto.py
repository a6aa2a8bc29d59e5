"""Fronts against brute force, costs with dependencies, and paired decisions."""

import itertools
import json
import random
import re

import numpy as np
import pytest
from page_parts import Page
from run_folders import write, write_lines

from align.evaluation.statistics import bootstrap_interval
from align.report import write_report
from align.report.pareto.costs import dependencies, policy_costs
from align.report.pareto.front import DOMINATED, FRONT, NO_COST, UNDECIDED, Point, pareto_front, verdicts
from align.report.pareto.paired import Answers, paired_interval
from align.report.run_folder import read_run

TERA = 1e12
NUM_PROMPTS = 100


def brute_force(points):
    """Return the names of the points that no other dominates, by the definition."""

    def is_dominated(point):
        return any(
            other.cost <= point.cost
            and other.quality >= point.quality
            and (other.cost, other.quality) != (point.cost, point.quality)
            for other in points
            if other.cost is not None
        )

    return {point.name for point in points if point.cost is not None and not is_dominated(point)}


@pytest.mark.parametrize("levels", [3, 6, 10**6])  # few levels give many ties
def test_the_front_equals_brute_force(levels):
    draw = random.Random(levels)
    for size in [*range(12)] * 25:
        points = [
            Point(str(name), None if draw.random() < 0.2 else draw.randrange(levels), draw.randrange(levels))
            for name in range(size)
        ]
        front = pareto_front(points)
        assert {point.name for point in front} == brute_force(points)
        assert all(a.cost <= b.cost and a.quality <= b.quality for a, b in itertools.pairwise(front))
        certain = {point.name: point.quality for point in points}
        found = verdicts(points, lambda one, other, of=certain: of[one] < of[other])
        assert {name for name, verdict in found.items() if verdict.status == FRONT} == brute_force(points)
        assert not any(verdict.status == UNDECIDED for verdict in found.values())


def test_a_policy_leaves_the_front_by_the_paired_interval():
    points = [
        Point("free", 0, 0.2),
        Point("good", 1, 0.6),
        Point("slightly better", 2, 0.61),
        Point("worse", 3, 0.5),
        Point("export", 1, 0.59),
        Point("bad export", 1, 0.3),
        Point("lost", None, 0.9),
    ]
    close = {"good", "slightly better", "export"}
    by_name = {point.name: point.quality for point in points}
    found = verdicts(points, lambda one, other: by_name[one] < by_name[other] and not {one, other} <= close)
    assert {name: verdict.status for name, verdict in found.items()} == {
        "free": FRONT,
        "good": FRONT,
        "slightly better": UNDECIDED,
        "worse": DOMINATED,
        "export": UNDECIDED,
        "bad export": DOMINATED,
        "lost": NO_COST,
    }
    assert found["slightly better"].by == ["good", "export"]


def test_the_paired_interval_is_close_to_the_bootstrap():
    rng = np.random.default_rng(3)
    of = rng.integers(1, 9, size=400)
    before = rng.binomial(of, 0.5)
    after = np.minimum(of, before + rng.binomial(of, 0.1))
    prompts = list(range(400))

    def difference(chosen):
        return after[chosen].sum() / of[chosen].sum() - before[chosen].sum() / of[chosen].sum()

    then, now = Answers({}, prompts, list(before), list(of)), Answers({}, prompts, list(after), list(of))
    assert paired_interval(then, now) == pytest.approx(bootstrap_interval(difference, 400), rel=0.1)
    assert paired_interval(then, Answers({}, prompts[::-1], now.passed, now.of)) is None
    assert paired_interval(then, Answers({"seed": 1}, prompts, now.passed, now.of)) is None


def test_equal_responses_to_a_prompt_do_not_narrow_the_paired_interval():
    rng = np.random.default_rng(4)
    once, often = ([Answers({}), Answers({})] for _ in range(2))
    for prompt in range(50):
        for policy, passed in enumerate(rng.random(2)):
            once[policy].add(prompt, passed, 1)
            for _ in range(4):
                often[policy].add(prompt, passed, 1)
    assert often[0].prompts == list(range(50))
    assert paired_interval(*often) == pytest.approx(paired_interval(*once))


STEPS = {  # step -> stage, inputs, TFLOP, seconds, energy, peak memory
    "base": ("import", [], 7, 5, 1, 100),
    "sft": ("sft", ["base"], 1, 10, 0.5, 400),
    "rate": ("reward_model", ["sft"], 2, 10, 0.5, 200),
    "evaluate-sft": ("evaluate", ["sft"], 100, 10, 0.5, 999),
    "samples": ("generate", ["sft", "rate"], 4, 10, 0.5, 300),
    "rpo": ("preference", ["sft", "samples"], 8, 10, None, 350),
    "rpo-2": ("preference", ["rpo"], 16, 10, 0.5, 350),
    "small": ("export", ["rpo"], 0, 10, 0.5, 50),
    "evaluate-base": ("evaluate", ["base"], 100, 10, 0.5, 999),
    "evaluate-rpo": ("evaluate", ["rpo"], 100, 10, 0.5, 999),
    "evaluate-rpo-2": ("evaluate", ["rpo-2"], 100, 10, 0.5, 999),
    "evaluate-small": ("evaluate", ["small"], 100, 10, 0.5, 999),
}
PASSED = {"base": 10, "sft": 50, "rpo": 80, "rpo-2": 81, "small": 20}  # of the first prompts


@pytest.fixture
def folder(tmp_path):
    for name, (stage, inputs, tera, seconds, energy, memory) in STEPS.items():
        ledger = {"flops": tera * TERA, "seconds": seconds, "energy_kwh": energy, "cost": None}
        manifest = {
            "stage": stage,
            "inputs": dict.fromkeys(inputs, "0f"),
            "files": {"model.bin": {"bytes": 10 if name == "small" else 40}, "metrics.jsonl": {"bytes": len(name)}},
            "ledger": {**ledger, "peak_memory_bytes": memory},
        }
        if stage == "evaluate":
            (policy,) = inputs
            rate, nll = PASSED[policy] / NUM_PROMPTS, 3 - PASSED[policy] / NUM_PROMPTS
            scores = {
                "right": {"value": rate, "low": rate - 0.1, "high": rate + 0.1},
                "chat nll": {"value": nll, "low": nll - 0.1, "high": nll + 0.1},
            }
            columns = {"right": ["right", "correct"], "chat nll": ["chat", "nll"]}
            manifest |= {"settings": {"tasks": {"right": {}}}, "scores": {policy: scores}, "columns": columns}
            for task, part, values in (
                ("right", "correct", [float(number < PASSED[policy]) for number in range(NUM_PROMPTS)]),
                ("chat", "nll", [3.0 - (number < PASSED[policy]) for number in range(NUM_PROMPTS)]),
            ):
                lines = [{"row": row, "policy": policy, "parts": {part: [v, 1]}} for row, v in enumerate(values)]
                write_lines(tmp_path / name / f"{task}.jsonl", lines)
        write(tmp_path / name / "manifest.json", {"step": name, **manifest})
    return tmp_path


def test_a_policy_costs_what_its_steps_cost_together(folder):
    run = read_run(folder)
    assert sorted(dependencies(run, "rpo")) == ["base", "rate", "rpo", "samples", "sft"]
    costs = policy_costs(run)
    tera = {name: found["compute"] / TERA for name, found in costs.items()}
    assert tera == {"base": 0, "sft": 1, "rpo": 1 + 2 + 4 + 8, "rpo-2": 1 + 2 + 4 + 8 + 16, "small": 1 + 2 + 4 + 8}
    assert {name: found["energy"] for name, found in costs.items()} == {
        "base": 0, "sft": 500, "rpo": None, "rpo-2": None, "small": None
    }  # fmt: skip
    assert costs["rpo-2"]["time"] == 50 and costs["rpo-2"]["peak memory"] == 400
    assert costs["sft"]["money"] is None
    assert {name: found["size on disk"] for name, found in costs.items()} == dict.fromkeys(costs, 40) | {"small": 10}


def test_the_page_shows_fronts_and_lists_unknown_costs(folder):
    text = write_report(folder).read_text("utf-8")
    page = Page(text)
    head, *rows = page.tables["costs"]
    assert [cell[0] for cell in head] == ["policy", "compute", "time", "energy", "peak memory", "size on disk"]
    assert {row[0][0]: row[3][0] for row in rows}["rpo"] == "unknown"
    of_compute = page.tables["pareto"][1:3]
    # 80 and 81 of 100 do not differ significantly; the export costs as much as rpo and is significantly worse.
    assert [["".join(cell) for cell in row] for row in of_compute] == [
        [task, "base, sft, rpo", "rpo-2", "small", ""] for task in ("right", "chat nll")
    ]
    notes = re.findall(r"Not drawn, as the cost is unknown: ([^<]*)<", text)
    assert notes and {frozenset(note.split(", ")) for note in notes} == {frozenset(("rpo", "rpo-2", "small"))}
    hovers = re.findall(r"<title>(rpo[^<]*; [^<]*)</title>", text)
    assert any("undecided: not significantly different from rpo" in each for each in hovers)
    markdown = write_report(folder, as_markdown=True).read_text("utf-8")
    assert "| right | base, sft, rpo | rpo-2 | small |  |" in markdown


def test_equal_costs_or_none_give_no_section(folder):
    for name in STEPS:
        path = folder / name / "manifest.json"
        manifest = json.loads(path.read_text())
        write(path, {**manifest, "ledger": {}, "files": {}})
    assert 'id="pareto"' not in write_report(folder).read_text("utf-8")


def test_fronts_of_several_runs(folder, tmp_path):
    text = write_report(folder, tmp_path / "both.html", compare=[folder]).read_text("utf-8")
    rows = Page(text).tables["pareto"][1:5]
    assert [row[0] for row in rows] == [[task, f"run {run}"] for task in ("right", "chat nll") for run in "AB"]
    assert {row[1][0] for row in rows} == {"base, sft, rpo"}
