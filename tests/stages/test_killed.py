"""A pipeline that is killed at moments of chance ends where an undisturbed one does, to the last bit."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import killed_pipeline
import pytest
from small_runs import Told, skip_page, skip_rate

from align.artifacts import MANIFEST, read_json, working_folder, write_json
from align.workflow.launcher import Command
from align.workflow.runner import run_recipe

SCRIPT = Path(__file__).with_name("killed_pipeline.py")
NUM_KILLS = 10

# What two runs of the same numbers may differ in: clocks and meters, how often a step was begun, and which making it is
OF_TIME = {
    "seconds",
    "peak_memory_bytes",
    "tokens_per_s",
    "ledger",
    "attempts",
    "build_id",
    "input_build_ids",
    "environment",
    "metrics.jsonl",  # its size and hash in a manifest
}
ABOUT_THE_CALL = {"ledger.json", ".spent.json", "report.html", ".lock"}


def timeless(value):
    """A JSON value without what a clock or a meter has put there."""
    if isinstance(value, dict):
        kept = {name: each for name, each in value.items() if name not in OF_TIME and not name.endswith("state.json")}
        return {name: timeless(each) for name, each in kept.items()}
    return [timeless(each) for each in value] if isinstance(value, list) else value


def contents(run):
    """What every file of a run's folder says, by its name; the cached references all together."""
    found, references = {}, {}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name = path.relative_to(run).as_posix()
        if name.startswith("references/"):  # files of unique names, as many as there were lives
            references.setdefault(path.parent.name, {}).update(json.loads(path.read_text()))
        elif path.name in ("manifest.json", "metrics.jsonl", "search.json", "state.json"):
            lines = [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines()
            found[name] = [timeless(json.loads(line)) for line in lines]
        elif name not in ABOUT_THE_CALL:
            found[name] = path.read_bytes()
    return found | {"references": references}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", killed_pipeline.RECIPES)
def test_a_pipeline_killed_at_moments_of_chance_ends_as_one_that_is_not(recipe, tmp_path):
    seed = int(os.environ.get("KILLS", random.randrange(10**6)))  # KILLS=SEED repeats the moments, about
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(SCRIPT), str(tmp_path), str(seed), str(NUM_KILLS), recipe]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    print(f"seed {seed}\n{told.stderr[-3000:]}")
    assert told.returncode == 0
    outcome = json.loads(told.stdout.splitlines()[-1])
    where = Counter(step for kill in outcome["kills"] for step in kill["in"] or ["between"])
    print(f"{len(outcome['kills'])} kills: {dict(where)}")
    assert len(outcome["kills"]) == NUM_KILLS
    assert len(where) >= 3  # steps of several kinds were hit
    assert outcome["twice"] == []
    whole = contents(tmp_path / "whole/runs/small")
    assert len(whole) > 60 and all(whole["references"].values())
    killed = sorted(tmp_path.glob("killed-*"))
    assert killed
    for run in killed:
        found = contents(run / "runs/small")
        assert found.keys() == whole.keys()
        assert [name for name in whole if found[name] != whole[name]] == []
    print(f"compared {len(whole)} files of {len(killed)} runs")


@pytest.mark.slow
def test_files_that_a_killed_attempt_half_wrote_are_not_read_by_the_next(tmp_path, monkeypatch):
    skip_rate(monkeypatch)

    def run(name, until=None):
        folder, told = tmp_path / name, Told()
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            skip_page(patch)
            made = run_recipe(Command(Path("small.yaml"), ()), told, disk=(0, 0), until=until)
        return folder / "runs/small", list(made), told.notes

    killed_pipeline.begin(tmp_path / "whole")
    whole, steps, _ = run("whole", until="dpo")
    halved = killed_pipeline.begin(tmp_path / "halved") / "runs/small"
    for step in steps:
        working = working_folder(halved / step)
        shutil.copytree(whole / step, working)
        for file in (path for path in working.rglob("*") if path.is_file()):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        finished = read_json(whole / step / MANIFEST)
        builds = {name: read_json(halved / name / MANIFEST)["build_id"] for name in finished["inputs"]}
        write_json(working / MANIFEST, {"fingerprint": finished["fingerprint"], "input_build_ids": builds})
        _, _, notes = run("halved", until=step)
        assert f"{step}: resumes where it was interrupted" in notes
    assert contents(halved) == contents(whole)
