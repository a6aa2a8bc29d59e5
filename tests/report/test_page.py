import json
import re

import pytest
import yaml
from page_parts import Page
from run_folders import LEDGER, PASSES, POLICIES, STEPS, make_run, outcomes, row, write

from align.errors import InputError
from align.report import write_report
from align.report.samples import line_value

HOSTILE = '</pre><script>document.body.dataset.hacked = 1</script><img src=x onerror="alert(1)"> & {{ 7 * 7 }}'
EVALUATIONS = tuple(f"evaluate-{name}" for name in POLICIES)
BETTER = {"base": 0.02, "sft": 0.4, "dpo": 0.5, "rpo1": 0.8, "rpo2": 0.9}


def page(folder, **given):
    return Page(write_report(folder, **given).read_text("utf-8"))


def number(text):
    """Return the number in a cell, a percentage as a fraction."""
    bare = text.replace("\N{MINUS SIGN}", "-").replace(",", "").removesuffix(" pp")
    return float(bare.removesuffix("%")) / (100 if bare.endswith("%") else 1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("finished") / "nightly")
    return folder, page(folder)


def test_every_score_has_its_interval_and_its_change(finished):
    folder, found = finished
    table, changes = (json.loads((folder / name).read_text()) for name in ("table.json", "changes.json"))
    covered = 0
    for task in row("base", PASSES):
        column = found.column("results", task)
        assert list(column) == [(name,) for name in POLICIES]
        for policy in POLICIES:
            value, interval, *change = column[policy,]
            unit, rounding = (1, 5e-4) if task == "nll" else (100, 5e-2)
            score = table[policy][task]
            assert number(value) * unit == pytest.approx(score["value"] * unit, abs=rounding)
            ends = [number(end) for end in interval.split(" to ")]
            assert ends == pytest.approx([score["low"] * unit, score["high"] * unit], abs=rounding)
            assert (not change) == (policy == "base")
            if change:
                moved = changes[policy][task]
                assert number(change[0]) == pytest.approx(moved["value"] * unit, abs=rounding)
                ends = [number(end) for end in change[1].split(" to ")]
                assert ends == pytest.approx([moved["low"] * unit, moved["high"] * unit], abs=rounding)
            covered += 1
    assert covered == 15


def test_a_change_is_coloured_when_its_interval_excludes_zero(tmp_path):
    folder = make_run(tmp_path, done=EVALUATIONS)
    change = {"n": 60, "from": "sft"}
    moves = {
        "general": {"value": 0.1, "low": 0.02, "high": 0.2, **change},
        "nll": {"value": 0.1, "low": 0.02, "high": 0.2, **change},
        "ifeval prompt_strict": {"value": -0.1, "low": -0.2, "high": 0.01, **change},
    }
    write(folder / "changes.json", {"dpo": moves})
    text = write_report(folder).read_text()
    changes = ("+10.0 pp", "+0.100", "\N{MINUS SIGN}10.0 pp")
    styles = [text[: text.index(change)].rpartition('<small class="')[2].partition('"')[0] for change in changes]
    assert styles == ["better", "worse", "quiet"]


def test_a_likelihood_is_recognized_by_its_metric(tmp_path):
    folder = make_run(tmp_path, done=EVALUATIONS)
    score = {"low": 0.1, "high": 0.9, "n": 40}
    values = {"base": 0.75, "sft": 0.5, "dpo": 0.5, "rpo1": 0.625, "rpo2": 0.6}
    for name, value in values.items():
        path = folder / f"evaluate-{name}" / "manifest.json"
        manifest = json.loads(path.read_text())
        scores = {
            "chat": {"value": value, **score},
            "same": {"value": 0.5, **score},
            "choice": {"value": value, **score},
        }
        columns = {"chat": ["chat", "nll"], "same": ["same", "correct"], "choice": ["choice", "unparsable"]}
        write(path, {**manifest, "scores": {name: scores}, "columns": columns})
    text = write_report(folder).read_text()
    found = Page(text)
    assert [cell[0] for cell in found.column("results", "chat").values()] == [
        "0.750",
        "0.500",
        "0.500",
        "0.625",
        "0.600",
    ]
    assert [cell[0] for cell in found.column("results", "same").values()] == ["50.0%"] * 5
    best = [part.partition("</span>")[0] for part in text.split('<td class="best"><span>')[1:]]
    assert sorted(best) == ["0.500", "0.500", "50.0%", "50.0%"]  # the lower of both; none where all are equal


def test_a_metric_of_which_less_is_better_is_no_part_of_a_mean_with_others():
    wrong, right = ({"parts": {"generated": [value, 1], "unparsable": [1 - value, 1]}} for value in (0, 1))
    assert (line_value(wrong), line_value(right)) == (0, 1)
    assert line_value({"parts": {"nll": [6, 4]}}) == 1.5


def test_a_change_names_its_baseline_unless_it_is_the_row_above(tmp_path):
    folder = make_run(tmp_path, done=EVALUATIONS)
    moved = {"general": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 60, "from": "base"}}
    write(folder / "changes.json", {"rpo2": moved, "sft": moved})
    column = page(folder).column("results", "general")
    assert column["rpo2",][2] == "+50.0 pp vs. base"
    assert column["sft",][2] == "+50.0 pp"


def test_the_ledger_has_every_step_and_marks_unknown_totals(finished):
    _, found = finished
    seconds = found.column("ledger", "time")
    paid = [name for name, of in STEPS.items() if of["stage"] not in ("import", "evaluate")]
    assert [name for (name,) in seconds] == [*paid, "total"]
    assert seconds["dpo",] == ["12 min 34 s"]
    assert round(LEDGER["seconds"]) == 12 * 60 + 34
    assert seconds["total",] == ["1 h 40 min"]  # 8 x 754.2 s = 6033.6 s
    tokens = found.column("ledger", "tokens trained")
    assert tokens["answers1",] == ["unknown"]
    assert tokens["total",] == ["≥ 7.41 M", "2 of 8 steps unknown"]  # 6 x 1,234,567
    assert found.column("ledger", "energy (kWh)")["dpo",] == ["0.0125", "measured"]
    assert found.column("ledger", "energy (kWh)")["total",] == ["0.1"]
    assert "Not available: cost, cost per parameter" in found.sections["ledger"]
    assert LEDGER["energy_source"] in found.sections["ledger"]


def test_dropped_and_truncated_rows_are_summed_with_their_reasons(finished):
    _, found = finished
    assert found.column("rows", "rows read")["sft",] == ["6,000"]
    assert found.column("rows", "dropped")["sft",] == ["100", "overlong 93", "empty 7"]
    assert found.column("rows", "truncated")["sft",] == ["41", "prompt from the left 41"]


def test_the_recipe_on_the_page_parses_to_the_stored_one(finished):
    folder, found = finished
    recipe = json.loads((folder / "recipe.json").read_text())
    assert [yaml.safe_load(text) for text in found.pres if text.startswith("run:")] == [recipe]


def test_samples_show_and_count_improvements_and_regressions(finished):
    _, found = finished
    pairs = list(zip(outcomes("base", PASSES), outcomes("rpo2", PASSES), strict=True))
    gained, lost = pairs.count((False, True)), pairs.count((True, False))
    assert min(gained, lost) > 0
    assert f"{gained} improved" in found.sections["samples"]
    assert f"{lost} regressed" in found.sections["samples"]
    shown = [sample for sample in found.samples if "group" not in sample[0]]
    outcomes_shown = [classes[1] for classes, *_ in shown]
    assert outcomes_shown == ["improved"] * 3 + ["regressed"] * min(3, lost) + ["unchanged"] * 2
    for (_, outcome), (prompt, *responses), (_, *labels) in shown:
        place = int(prompt.rpartition("(")[2].rstrip(")"))
        verdicts = {policy: verdict == "passed" for policy, verdict in labels}
        assert verdicts == {name: outcomes(name, PASSES)[place] for name in ("base", "dpo", "rpo2")}
        assert [("cow" in text) for text in responses] == list(verdicts.values())
        assert outcome == {1: "improved", -1: "regressed", 0: "unchanged"}[verdicts["rpo2"] - verdicts["base"]]


def test_generated_groups_show_their_best_and_worst_response(finished):
    folder, found = finished
    lines = [json.loads(line) for line in (folder / "answers1" / "groups.jsonl").read_text().splitlines()]
    rewards = {one["content"]: one["reward"] for line in lines for one in line["responses"]}
    groups = [sample for sample in found.samples if "group" in sample[0]][:2]
    for _, (_, best, worst), labels in groups:
        group = next(line for line in lines if best in [one["content"] for one in line["responses"]])
        known = [one["reward"] for one in group["responses"]]
        assert (rewards[best], rewards[worst]) == (max(known), min(known))
        assert [lines[1] for lines in labels] == [f"reward {max(known):.4g}", f"reward {min(known):.4g}"]
    assert len(groups) == 2


def test_every_training_step_has_its_curves(finished):
    _, found = finished
    trained = [of["stage"] for of in STEPS.values() if of["stage"] in ("sft", "reward_model", "preference")]
    assert found.titles.count("Loss") == len(trained) == 6
    for title in ("Implicit rewards", "Reward margin", "Log-probability"):
        assert found.titles.count(title) == trained.count("preference") == 3
    assert [title for title in found.titles if title.startswith("answers")] == ["answers1", "answers2"]


def test_the_top_of_the_page_shows_progress_and_scores(finished):
    _, found = finished
    rate = sum(outcomes("rpo2", PASSES)) / 60
    gain = rate - sum(outcomes("base", PASSES)) / 60
    assert ["general", f"{rate:.1%}", f"rpo2, +{100 * gain:.1f} pp vs. base"] in found.tiles
    assert "seed 7" in found.sections["head"]


def test_generated_text_is_escaped(tmp_path):
    folder = make_run(tmp_path, prompt=HOSTILE, response=HOSTILE, run=HOSTILE, policy={"path": HOSTILE})
    found = page(folder)
    assert not {"script", "img"} & set(found.tags)
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]
    hostile = [text for text in found.pres if HOSTILE in text]
    assert len(hostile) >= 8 + 4  # prompts of the samples and of the groups, and their responses
    assert HOSTILE in found.sections["head"]


def test_the_page_loads_no_external_resources(finished):
    folder, found = finished
    links = [value for _, name, value in found.attributes if name in ("href", "src", "srcset", "action", "data")]
    assert links and all(link.startswith("#") for link in links)
    text = (folder / "report.html").read_text()
    assert "http:" not in text and "https:" not in text and "@import" not in text
    assert "default-src 'none'" in text


def test_ids_are_unique_and_references_resolve(finished):
    folder, found = finished
    ids = [value for _, name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    text = (folder / "report.html").read_text()
    wanted = {part.partition(")")[0] for part in text.split("url(#")[1:]}
    wanted |= {value[1:] for _, name, value in found.attributes if name == "href"}
    assert len(wanted) > 20 and wanted <= set(ids)


def test_the_same_run_gives_the_same_page(tmp_path, drawn):
    folder = make_run(tmp_path, done=("base", "sft", "dpo", "answers1", *EVALUATIONS))
    first = write_report(folder, tmp_path / "one.html").read_bytes()
    drawn.clear()
    assert write_report(folder).read_bytes() == first


def test_two_runs_are_shown_side_by_side(tmp_path):
    one = make_run(tmp_path / "one")
    two = make_run(tmp_path / "two", run="other", seed=8, passes=BETTER)
    found = page(one, out=tmp_path / "new" / "both.html", compare=[two])
    rows = [cells[0] for cells in found.tables["results"][1:]]
    assert [tuple(cell[:2]) for cell in rows] == [(name, f"run {letter}") for name in POLICIES for letter in "AB"]
    by_run = {tuple(cells[0][:2]): cells[1] for cells in found.tables["results"][1:]}
    values = [number(by_run["rpo2", label][0]) for label in ("run A", "run B")]
    assert values == pytest.approx([sum(outcomes("rpo2", of)) / 60 for of in (PASSES, BETTER)], abs=5e-4)
    assert by_run["rpo2", "run B"][-1] == f"B − A +{100 * (values[1] - values[0]):.1f} pp"
    assert [[text for (text,) in cells] for cells in found.tables["differences"][1:]] == [
        ["run", "nightly", "other"],
        ["seed", "7", "8"],
    ]
    assert found.titles.count("Loss") == 6  # both in one chart
    assert all(labels[-1][0] == "rpo2 of run B" for classes, _, labels in found.samples if "group" not in classes)


def test_two_runs_with_different_steps_are_compared(tmp_path):
    one = make_run(tmp_path / "one", done=("base", "sft", *EVALUATIONS))
    two = make_run(tmp_path / "two", done=("base", "sft"))
    found = page(one, out=tmp_path / "both.html", compare=[two])
    assert {cells[0][1] for cells in found.tables["results"][1:]} == {"run A"}
    assert [cells[0][1] for cells in found.tables["rows"][1:]][:2] == ["run A", "run B"]


def test_an_older_page_is_kept_when_rendering_fails(tmp_path):
    folder = make_run(tmp_path, done=("base", "sft"))
    before = write_report(folder).read_text()
    (folder / "table.json").write_text("{")
    with pytest.raises(InputError, match="table.json"):
        write_report(folder)
    assert (folder / "report.html").read_text() == before
    assert [path.name for path in folder.glob(".*")] == []


def test_several_runs_are_shown_side_by_side(tmp_path):
    runs = [
        make_run(tmp_path / name, run=name, seed=at, passes={**PASSES, "rpo2": 0.9 - 0.2 * at})
        for at, name in enumerate("xyz")
    ]
    found = page(runs[0], out=tmp_path / "all.html", compare=runs[1:])
    by_run = {(cells[0][0], cells[0][1]): cells for cells in found.tables["results"][1:]}
    assert {label for _, label in by_run} == {"run A", "run B", "run C"}
    first, last = (number(by_run["rpo2", label][1][0]) for label in ("run A", "run C"))
    assert any(line.startswith("C − A") for line in by_run["rpo2", "run C"][1])
    assert first > last
    header, *rows = found.tables["differences_by_prompt"]
    assert [cell[0] for cell in header] == ["prompt", "run A", "run B", "run C", "change"]
    changes = [number(cells[-1][0]) for cells in rows]
    assert changes == sorted(changes, reverse=True) and changes[-1] < 0
    assert [cell[0] for cell in found.tables["differences"][0]] == ["setting", "run A", "run B", "run C"]
    with pytest.raises(InputError, match="at most 8 runs, not 9"):
        write_report(runs[0], compare=runs[:1] * 8)


def test_measures_stand_beside_the_scores(finished):
    header, *rows = finished[1].tables["answers"]
    assert [cell[0] for cell in header] == ["policy", "repetition", "length"]
    assert [row[1][0] for row in rows] == ["5.0%"] * len(POLICIES)
    assert rows[0][2] == ["123.4", "110 to 130"]


def test_verdicts_are_marked_in_the_text(tmp_path):
    folder = make_run(tmp_path / "run")
    for policy in POLICIES:
        file = folder / f"evaluate-{policy}" / "general.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line in lines:
            line["response"] = "red <b>sea</b>, seas"
            line["checks"] = [
                {"name": "forbidden <words>", "passed": False, "found": ["sea", ","]},
                {"name": "existence", "passed": True, "found": ["red"]},
            ]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = write_report(folder).read_text("utf-8")
    assert '<mark class="passed">red</mark> &lt;b&gt;<mark class="failed">sea</mark>' in text
    assert '<li class="failed">forbidden &lt;words&gt;</li><li class="passed">existence</li>' in text
    assert "<pre>red &lt;b&gt;sea&lt;/b&gt;, seas</pre>" in re.sub(r"</?mark[^>]*>", "", text)
