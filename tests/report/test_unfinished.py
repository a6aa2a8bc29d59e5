import json

import pytest
from filelock import FileLock
from page_parts import Page
from run_folders import POLICIES, STEPS, make_run, metrics, write, write_lines

from align.errors import InputError
from align.report import write_report
from align.report.run_folder import read_run

EVALUATIONS = [f"evaluate-{name}" for name in POLICIES]
MISSING = {
    "results": "No policy has been evaluated yet.",
    "curves": "No step has trained yet.",
    "rewards": "No step has generated responses yet.",
    "samples": "No evaluation has stored the responses of two policies.",
    "ledger": "This run has no ledger yet.",
    "rows": "No finished step has read rows.",
}


def page(folder):
    return Page(write_report(folder).read_text("utf-8"))


def test_a_run_that_has_just_started_says_what_is_missing(tmp_path):
    found = page(make_run(tmp_path, done=("base",)))
    for section, message in MISSING.items():
        assert message in found.sections[section]
    assert "1 of 14 steps finished" in found.sections["head"]


@pytest.mark.parametrize("last", [2, 5, 6, 10])
def test_an_interrupted_run_has_a_page(tmp_path, last):
    done = list(STEPS)[:last]
    found = page(make_run(tmp_path, done=done))
    states = {name: state for (name,), (state,) in found.column("steps", "state").items()}
    assert states == {name: "finished" if name in done else "not started" for name in STEPS}


def test_an_unfinished_step_has_curves(tmp_path):
    folder = make_run(tmp_path, done=("base", "code_sft", "sft", "rate"))
    lines = list(metrics("preference", 12))
    write(folder / "dpo.partial" / "manifest.json", {"fingerprint": "0f"})
    write_lines(folder / "dpo.partial" / "metrics.jsonl", lines)
    with (folder / "dpo.partial" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 13, "lo')  # a partial line, as a kill leaves it
    found = page(folder)
    assert found.column("steps", "state")["dpo",] == ["unfinished"]
    assert found.column("steps", "optimizer steps")["dpo",] == ["12"]
    first, last = (sum(line["loss"] for line in some) / 2 for some in (lines[:2], lines[-2:]))  # a tenth of 12 steps
    assert found.column("steps", "loss")["dpo",] == [f"{first:.3f} → {last:.3f}"]
    assert found.titles.count("Reward margin") == 1


def test_losses_are_compared_by_epoch_and_a_small_last_step_counts_little(tmp_path):
    folder = make_run(tmp_path, done=("base", "code_sft", "sft"))
    groups, losses = [10, 10, 2] * 3, [3.0, 2.0, 9.0, 2.0, 1.0, 9.0, 1.0, 0.5, 9.0]
    lines = [
        {"step": step, "epoch": step / 3, "groups": num, "loss": loss}
        for step, (num, loss) in enumerate(zip(groups, losses, strict=True), 1)
    ]
    write_lines(folder / "sft" / "metrics.jsonl", lines)
    first, last = (10 * 3.0 + 10 * 2.0 + 2 * 9.0) / 22, (10 * 1.0 + 10 * 0.5 + 2 * 9.0) / 22
    assert page(folder).column("steps", "loss")["sft",] == [f"{first:.3f} → {last:.3f}"]


def test_a_step_is_running_while_its_run_is_locked(tmp_path):
    folder = make_run(tmp_path, done=("base", "code_sft"))
    write(folder / "sft.partial" / "manifest.json", {"fingerprint": "0f"})
    with FileLock(folder / ".lock"):
        found = page(folder)
    assert found.column("steps", "state")["sft",] == ["running"]
    assert "sft is running" in found.sections["head"]
    assert page(folder).column("steps", "state")["sft",] == ["unfinished"]


def test_a_malformed_line_before_the_last_is_an_error(tmp_path):
    folder = make_run(tmp_path, done=("base", "code_sft"))
    path = folder / "code_sft" / "metrics.jsonl"
    path.write_text("{\n" + path.read_text())
    with pytest.raises(InputError, match=r"metrics\.jsonl: line 1 cannot be read as JSON"):
        write_report(folder)


def test_steps_follow_their_inputs_without_a_recipe(tmp_path):
    folder = make_run(tmp_path)
    for name in ("recipe.json", "table.json", "changes.json", "ledger.json"):
        (folder / name).unlink()
    run = read_run(folder)
    names = [step.name for step in run.steps]
    assert sorted(names) == sorted(STEPS)
    chain = ["base", "code_sft", "sft", "dpo", "answers1", "rpo1", "answers2", "rpo2", "evaluate-rpo2"]
    assert [name for name in names if name in chain] == chain
    assert list(run.table) == POLICIES
    found = page(folder)
    assert "This run folder has no recipe." in found.sections["recipe"]
    assert found.column("ledger", "time")["total",] == ["1 h 40 min"]


def test_steps_follow_their_inputs_in_a_sorted_recipe(tmp_path):
    folder = make_run(tmp_path, done=("base", "code_sft"))
    recipe = json.loads((folder / "recipe.json").read_text())
    (folder / "recipe.json").write_text(json.dumps(recipe, sort_keys=True))
    names = [step.name for step in read_run(folder).steps]
    assert [name for name in names if name in ("sft", "dpo", "rpo1", "rpo2")] == ["sft", "dpo", "rpo1", "rpo2"]
    assert names.index("rpo1") > names.index("answers1") > names.index("dpo")


def test_a_grade_of_several_metrics_shows_each(tmp_path):
    folder = make_run(tmp_path, done=EVALUATIONS)
    for name in POLICIES:
        parts = {"prompt_strict": [0, 1], "instruction_strict": [2, 3]}
        line = {"policy": name, "prompt": "Two lines.", "response": name, "parts": parts, "reward": 0.25}
        write_lines(folder / f"evaluate-{name}" / "ifeval.jsonl", [line])
    ((_, _, labels),) = [sample for sample in page(folder).samples if sample[1][0] == "Two lines."]
    assert labels[1] == ["base", "prompt strict 0 of 1, instruction strict 2 of 3", "reward 0.25"]


def test_a_long_response_is_cut_with_the_number_of_characters_left(tmp_path):
    found = page(make_run(tmp_path, done=("base", *EVALUATIONS, "answers1"), response="word " * 1000))
    texts = [text for _, (_, *responses), _ in found.samples for text in responses]
    assert texts and all(len(text) < 2100 for text in texts)
    assert all("more characters)" in text for text in texts)


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        ({}, "not a run folder: it has neither recipe.json nor a step with a manifest.json"),
        ({"notes.txt": "x"}, "not a run folder"),
        ({"manifest.json": "{}"}, "is the folder of a step; give the run folder"),
        ({"recipe.json": "[]"}, "recipe.json: expected a JSON object, not a list"),
        ({"recipe.json": "{"}, "cannot be read as JSON"),
        (None, "no such folder; give the folder of a run"),
    ],
)
def test_a_folder_that_is_not_a_run_is_an_error(tmp_path, inside, message):
    folder = tmp_path / "somewhere"
    if inside is not None:
        folder.mkdir()
        for name, text in inside.items():
            (folder / name).write_text(text)
    with pytest.raises(InputError) as error:
        write_report(folder)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (folder / "report.html").exists()


def test_the_page_does_not_replace_a_folder(tmp_path):
    folder = make_run(tmp_path, done=("base",))
    with pytest.raises(InputError, match="is a folder; give the name of a file"):
        write_report(folder, folder / "base")
