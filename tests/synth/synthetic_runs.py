"""Steps `synthesize` that a scripted teacher answers, and what they leave.

`run` runs a whole recipe against a server; `make` only runs the step, with the teacher in this process, one request at
a time.
"""

import json

import scripted_teacher
import yaml
from small_runs import Told

from align.workflow.launcher import Command
from align.workflow.recipe.load import load_recipe
from align.workflow.runner import run_context, run_recipe

FAMILIES = {
    "topics": {"family": "topics", "number": 4, "also": ["Bridges"]},
    "subtopics": {"family": "subtopics", "of": "topics", "number": 2},
    "questions": {"family": "open_qa", "of": ["topics", "subtopics"], "number": 3},
    "longer": {"family": "revise_open_qa", "of": "questions", "number": 2},
}


def recipe(folder, families, *, engine, data=None, **settings):
    """The recipe as plain values."""
    step = {"stage": "synthesize", "models": ["teacher"], "engine": engine, "families": families, **settings}
    return {"run": "made", "runs": str(folder / "runs"), "policy": {}, "data": data or {}, "steps": {"prompts": step}}


def write_recipe(folder, values):
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / "made.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def run(folder, url, families=FAMILIES, *, told=None, concurrency=4, **settings):
    """The manifest of the step after a run in this process, and what the run reported."""
    told = told or Told()
    engine = {"server": {"base_url": url, "concurrency": concurrency, "retries": 0}}
    path = write_recipe(folder, recipe(folder, families, engine=engine, **settings))
    return run_recipe(Command(path, ()), told, disk=(0, 0))["prompts"], told


def make(folder, teacher, families=FAMILIES, *, told=None, concurrency=4, **settings):
    """The report of the step, run by itself in the folder where a run would leave it.

    A teacher may be a URL; None for the one that the settings name.
    """
    engine = {"custom": {"name": "scripted_teacher:Engine"}}
    if teacher is None:
        engine = settings.pop("engine")
    elif isinstance(teacher, str):
        engine = {"server": {"base_url": teacher, "concurrency": concurrency, "retries": 0}}
    else:
        scripted_teacher.CURRENT[:] = [teacher]
    loaded = load_recipe(write_recipe(folder, recipe(folder, families, engine=engine, **settings)), ())
    made = folder / "runs/made/prompts"
    made.mkdir(parents=True, exist_ok=True)
    context = run_context(loaded, "prompts", made, told or Told())
    return loaded.steps["prompts"].run(context)["report"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows(folder, name):
    return lines(folder / "runs/made/prompts" / name)


def all_rows(folder):
    """The rows of every split, by kind."""
    found = {}
    for path in sorted((folder / "runs/made/prompts").glob("*-*.jsonl")):
        found.setdefault(path.stem.partition("-")[2], []).extend(lines(path))
    return found


def stored(folder):
    """Stored answers by request."""
    found = lines(folder / "runs/made/responses/prompts.jsonl")[1:]
    return {key: value for key, value, *_ in found if not key.startswith("work/")}


def content(folder):
    """The bytes of every file of rows and lineage."""
    made = folder / "runs/made/prompts"
    return {path.name: path.read_bytes() for path in sorted(made.glob("*.jsonl"))}


def check_counts(report):
    """Every wanted item of every entry is kept, or dropped for a reason."""
    for entry, counts in report["entries"].items():
        dropped = sum(number for name, number in counts.items() if name.startswith("dropped: "))
        assert counts.get("asked", 0) == counts.get("kept", 0) + dropped, (entry, counts)


def check_lineage(folder):
    """Every row resolves to its ancestors and to stored answers, and the splits share no seed."""
    answers, everything = stored(folder), {row["id"]: row for row in rows(folder, "lineage.jsonl")}
    seeds = {}
    for row in everything.values():
        assert set(row["requests"]) <= answers.keys()
        assert set(row["parents"]) <= everything.keys()
    for path in (folder / "runs/made/prompts").glob("*-*.jsonl"):
        for row in lines(path):
            lineage = row["metadata"]["lineage"]
            assert lineage == {name: everything[lineage["id"]][name] for name in lineage}
            assert lineage["split"] == path.name.partition("-")[0]
            seeds.setdefault(lineage["split"], set()).update(lineage["seeds"])
    splits = list(seeds)
    assert not any(seeds[one] & seeds[other] for one in splits for other in splits if one < other)
    return everything
