"""Prompts that a teacher writes like a few seed prompts."""

import json
import re

import pytest
from synthetic_runs import all_rows, check_counts, check_lineage, make

from align.procedural.prompting import instruction
from align.procedural.tasks import demonstrations, grade, prompts, split_of

SEEDS = {"seeds": {"path": "tasks:general", "limit": 12}}
SPLITS = {"sft": 0.5, "preference": 0.5, "test": 0.0}


def family(**settings):
    return {"written": {"family": "self_instruct", "of": "seeds", "requests": 6, "shown": 3, "number": 2, **settings}}


def listing(*texts):
    return "\n".join(f"{number}. {text}" for number, text in enumerate(texts, start=1)), "stop"


def examples(request):
    return re.findall(r"^- (.*)$", request["messages"][-1]["content"], re.MULTILINE)


def instructions(split, number):
    return prompts("general", num_rows=number, seed=5, split=split)


def new_instructions(split, number):
    return [row.messages[0].content for row in instructions(split, number)]


def test_new_instructions_of_the_task_are_kept_with_what_their_verifier_needs(tmp_path):
    texts, asked = iter(new_instructions("train", 12)), []

    def teacher(request):
        asked.append(request)
        return listing(next(texts), next(texts))

    report = make(tmp_path, teacher, family(task="general"), data=SEEDS, splits=SPLITS)
    check_counts(report)
    everything = check_lineage(tmp_path)
    made = all_rows(tmp_path)["prompts"]
    assert report["entries"]["written"]["kept"] == len(made) == 12
    drawn = {row.messages[0].content: row.metadata for row in instructions("train", 12)}
    for row in made:
        expected = {name: value for name, value in drawn[row["prompt"][0]["content"]].items() if name != "origin"}
        assert {name: row["metadata"][name] for name in expected} == expected
    splits = {parent: row["split"] for row in everything.values() for parent in row["parents"]}
    assert len(asked) == 6 and all(len(examples(request)) == 3 for request in asked)
    assert set(splits.values()) == {"sft", "preference"}, "the examples of a request are of one split"


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ("List three planets, in capitals.", "not an instruction of the task"),
        ("List three animals.", "not an instruction of the task"),
        (new_instructions("test", 1)[0], "in the task's test split"),
        ("an example", "repeats its parent"),
    ],
)
def test_other_prompts_are_dropped_with_their_reason(tmp_path, second, reason):
    (first,) = new_instructions("train", 1)

    def teacher(request):
        return listing(first, examples(request)[0] if second == "an example" else second)

    report = make(tmp_path, teacher, family(task="general", requests=1, tries=1), data=SEEDS, splits=SPLITS)
    assert report["entries"]["written"] == {"asked": 2, "kept": 1, f"dropped: {reason}": 1}


def test_without_a_task_any_new_prompt_is_kept(tmp_path):
    report = make(
        tmp_path,
        lambda request: listing("Explain how tides work.", "Name a use of zinc."),
        family(requests=1),
        data=SEEDS,
        splits=SPLITS,
    )
    assert report["entries"]["written"] == {"asked": 2, "kept": 2}


def test_a_model_of_prompting_rows_knows_the_wording_of_the_request(tmp_path):
    asked = []

    def teacher(request):
        asked.append(request["messages"][-1]["content"])
        return listing(*new_instructions("train", 2))

    make(tmp_path, teacher, family(task="general", requests=1, tries=1), data=SEEDS, splits=SPLITS)
    shown = re.findall(r"^- (.*)$", asked[0], re.MULTILINE)
    assert asked[0] == instruction({"examples": shown})


def test_prompting_rows_hold_no_instruction_of_the_test_split():
    for split in ("train", "validation", "test"):
        for row in demonstrations("prompting", num_rows=40, seed=0, split=split):
            texts = examples({"messages": [{"content": row.messages[0].content}]})
            texts += [line[3:] for line in row.messages[1].content.split("\n")]
            assert len(texts) == 5 and {split_of(text) for text in texts} == {"train"}
            assert all(grade(row.metadata, row.messages[1].content)[:2])


def test_a_copy_of_a_seed_of_another_split_is_dropped(tmp_path):
    seeds = tmp_path / "seeds.jsonl"
    texts = [f"Name a city of region {number}." for number in range(12)]
    seeds.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))

    def teacher(request):
        (other,) = [text for text in texts if text not in examples(request)][:1]
        return listing(other, f"Name a river near {len(examples(request)[0])} {examples(request)[0]}")

    data = {"seeds": {"path": str(seeds)}}
    report = make(tmp_path, teacher, family(shown=1, tries=1), data=data, splits=SPLITS)
    assert report["entries"]["written"]["dropped: duplicate"] >= 6
    made = {row["prompt"][0]["content"] for row in all_rows(tmp_path)["prompts"]}
    assert made and not made & set(texts)


def test_equal_requests_are_different_samples(tmp_path):
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text(json.dumps({"prompt": "Name a city."}) + "\n")
    asked = []

    def teacher(request):
        asked.append(request["seed"])
        return listing(f"Name {len(asked)} lakes.", f"Name {len(asked)} hills.")

    data = {"seeds": {"path": str(seeds)}}
    report = make(tmp_path, teacher, family(requests=20, shown=3), data=data, splits=SPLITS)
    assert report["entries"]["written"] == {"asked": 40, "kept": 40}
    assert len(set(asked)) == 20
