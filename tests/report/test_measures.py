"""The section on made data shows what `measures.json` holds, for one run and for two."""

import json
import random
import re
from html import escape

import pytest
from page_parts import Page
from run_folders import make_run

from align.artifacts import MEASURES
from align.report import write_report
from align.synth.measures import write_measures
from align.synth.measures.written import Yields

FAMILIES = ("open_qa", "maths", *(f"family_{number}" for number in range(9)))  # more than there are colours
REASONS = [f"reason {number}" for number in range(8)]
WORDS = [f"word{number}" for number in range(200)]
HOSTILE = "<script>alert(1)</script>"


def made(seed=0):
    draw = random.Random(seed)
    return [
        {
            "id": f"{family}-{number}",
            "family": family,
            "text": f"{HOSTILE} {' '.join(draw.choices(WORDS, k=25))}",
            "topic": f"topic {number % 4}",
            "reward": draw.gauss(place, 1) if family != "maths" else None,
            "ifd": 0.5 + number % 2,
            "parents": [f"topic {number % 4}", "gone"],
        }
        for place, family in enumerate(FAMILIES)
        for number in range(30)
    ]


YIELDS = Yields(
    asked=dict.fromkeys(FAMILIES, 50) | {"empty": 4},
    dropped={
        "open_qa": {reason: number for number, reason in enumerate(REASONS) if number} | {"duplicate": 0},
        "empty": {"refused": 4},
    },
    topics={f"topic {number}": 120 for number in range(5)},
)


def run_with_measures(folder, **changed):
    run = make_run(folder, **changed)
    ancestors = [{"id": f"topic {number}", "family": "subtopics", "text": f"about {number}"} for number in range(4)]
    write_measures(run / "answers1", made(), yields=YIELDS, ancestors=ancestors)
    return run


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    run = run_with_measures(tmp_path_factory.mktemp("run") / "run")
    return run, Page(write_report(run).read_text("utf-8"))


def test_yields_show_what_became_of_the_rows_asked_for(page):
    _, found = page
    header, *rows = found.tables["yields"]
    assert [cell[0] for cell in header] == [
        *("family", "asked for", "kept", "yield", "reason 7", "reason 6", "reason 5"),
        *("reason 4", "refused", "reason 3", "other reasons"),
    ]
    by_family = {row[0][0]: [cell[0] if cell else "" for cell in row[1:]] for row in rows}
    assert by_family["open_qa"] == ["50", "30", "60.0%", "7", "6", "5", "4", "", "3", "3"]
    assert by_family["empty"] == ["4", "0", "0.0%", "", "", "", "", "4", "", ""]
    assert by_family["all families"][:3] == ["554", "330", "59.6%"]
    assert by_family["all families"][-1] == "3"


def test_measures_of_each_family_stand_in_the_table(page):
    run, found = page
    stored = json.loads((run / "answers1" / MEASURES).read_text())
    header, *rows = found.tables["measures"]
    assert [cell[0] for cell in header] == [
        *("family", "rows", "distinct-2", "self-BLEU", "Vendi score", "mean distance", "nearest distance"),
        *("mean reward", "IFD"),
    ], "no row has a pass rate"
    by_family = {row[0][0]: row for row in rows}
    assert set(by_family) == {*FAMILIES, "empty", "all families"}
    one = stored["families"]["open_qa"]
    assert by_family["open_qa"][3] == [f"{one['self_bleu']:.3f}", "of 30 rows"]
    assert by_family["open_qa"][7][1] == f"± {one['reward_deviation']:.3f}"
    assert by_family["open_qa"][8] == ["1.000", "above 1: 50.0%"]
    assert by_family["maths"][7] == [], "no row of the family has a reward"
    assert by_family["all families"][7][-1] == "of 300 rows"


def test_topics_are_summed_up_with_those_that_lost_the_most(page):
    _, found = page
    assert "5 topics, 80.0% of them with rows; evenness 0.8" in found.sections["data"]
    assert "lowest yields: topic 4 0.0%, topic 2 " in found.sections["data"]


def test_rewards_and_points_have_their_family_as_a_tooltip(page):
    run, _ = page
    titles = re.findall("<title>(.*?)</title>", (run / "report.html").read_text("utf-8"))
    one = json.loads((run / "answers1" / MEASURES).read_text())["families"]["family_3"]
    mean, deviation = f"{one['reward_mean']:.4g}", f"{one['reward_deviation']:.4g}"
    assert f"family_3: mean {mean}, standard deviation {deviation}, 30 rows" in titles
    points = [title for title in titles if title.startswith("maths: ")]
    assert len(points) == 30 and all(escape(HOSTILE) in title for title in points)


def test_families_differ_in_colour_or_shape(page):
    run, _ = page
    text = (run / "report.html").read_text("utf-8")
    keys = re.findall(
        r'<span class="key (marked|square|triangle) (c\d)">([\w ]+)</span>', text.partition('id="data"')[2]
    )
    assert [name for *_, name in keys] == list(FAMILIES)
    assert len({(shape, colour) for shape, colour, _ in keys}) == len(FAMILIES)
    assert {shape for shape, *_ in keys} == {"marked", "square"}


def test_examples_show_their_text_reward_and_lineage(page):
    _, found = page
    examples = [sample for sample in found.samples if "made" in sample[0]]
    assert len(examples) == 2 * len(FAMILIES)
    _, texts, labels = examples[0]
    assert texts[0].startswith(HOSTILE) and re.fullmatch(r"about \d", texts[1])
    assert "2 parents, the first is shown" in " ".join(labels[0])


def test_generated_text_is_escaped_everywhere(page):
    run, found = page
    assert "script" not in found.tags


def test_a_run_without_measures_has_no_such_section(tmp_path):
    text = write_report(make_run(tmp_path / "run")).read_text("utf-8")
    assert 'id="data"' not in text and 'href="#data"' not in text


def test_two_runs_show_the_measures_of_both(tmp_path):
    one, two = run_with_measures(tmp_path / "one"), run_with_measures(tmp_path / "two", run="other")
    page = Page(write_report(one, tmp_path / "both.html", compare=[two]).read_text("utf-8"))
    assert "answers1 of run A" in page.sections["data"] and "answers1 of run B" in page.sections["data"]
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_the_tables_are_part_of_the_markdown(page, tmp_path):
    run, _ = page
    text = write_report(run, tmp_path / "report.md", as_markdown=True).read_text("utf-8")
    assert "## Rows asked of answers1" in text and "## Data made by answers1" in text
    assert "| open\\_qa | 50 | 30 |" in text


def test_a_single_family_has_no_row_for_all(tmp_path):
    run = make_run(tmp_path / "run")
    rows = [{"id": str(number), "family": "code", "text": f"write {number}"} for number in range(5)]
    write_measures(run / "answers1", rows)
    page = Page(write_report(run).read_text("utf-8"))
    assert [row[0][0] for row in page.tables["measures"]] == ["family", "code"]
    assert "yields" not in page.tables
