"""The blinded form, filled in a browser by keys and by the mouse."""

import csv
import io
import json
import re
from html import unescape

import pytest
from browser import dumped, needs_browser

from align.errors import InputError
from align.evaluation.human.sheet import form_csv, form_html, key_json, make_sheet
from align.records import Message, Prompt

HOSTILE = "<script>document.documentElement.dataset.hacked = 1</script>"
MODELS = ("secret-policy", "hidden-baseline", "covert-old")
NUM_PROMPTS = 40

DRIVER = """
<script>
addEventListener("load", () => {
  const root = document.documentElement, Real = Blob
  HTMLAnchorElement.prototype.click = () => {}    // no download, for whose end the browser would wait
  Blob = function (parts, options) { root.dataset.saved = parts[0]; return new Real(parts, options) }
  const send = (target, key) => target.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}))
  const press = (...keys) => keys.forEach(key => send(document.body, key))
  const choose = text => [...document.querySelectorAll(".card:nth-child(2) label")]
    .find(each => each.textContent === text).querySelector("input").click()
  at("annotator").value = "Ann B."
  press("4", "5", "2")                            // response 1: helpfulness, truthfulness, length
  press("f", "1")                                 // response 2: a complete failure, too short
  press("3", "ArrowUp", "2", "9", "4", "3")       // response 3: 3 corrected to 2; there is no level 9
  press("n")
  choose("5"); choose("complete failure"); choose("complete failure"); choose("1")
  send(at("annotator"), "3")                      // is part of a name
  press("s")
  root.dataset.seen = JSON.stringify({
    place: at("place").textContent, progress: at("progress").textContent, wide: root.scrollWidth - innerWidth,
    paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
  })
})
</script></body>"""


def sheet(*, seed=0):
    prompts = [
        Prompt((Message("user", f"Question {n} {HOSTILE}"),), {"category": "open QA"}) for n in range(NUM_PROMPTS)
    ]
    answers = {
        model: {each.messages[0].content: f"={number} {HOSTILE}" for each in prompts}
        for number, model in enumerate(MODELS)
    }
    return make_sheet(prompts, answers, seed=seed)


def filled(tmp_path, *flags):
    page = tmp_path / "form.html"
    page.write_text(form_html(sheet()).replace("</body>", DRIVER), "utf-8")
    dom = dumped(page, tmp_path, flags)
    assert "data-hacked" not in dom
    return [json.loads(unescape(re.search(rf'data-{name}="([^"]*)"', dom)[1])) for name in ("saved", "seen")]


@needs_browser
def test_a_form_is_filled_by_keys_and_by_the_mouse_and_saved_as_json(tmp_path):
    saved, seen = filled(tmp_path)
    assert saved == {
        "sheet": sheet().id,
        "annotator": "Ann B.",
        "ratings": {
            "r1.1": {"helpfulness": 4, "truthfulness": 5, "length": "just right"},
            "r1.2": {"complete_failure": True, "length": "too short"},
            "r1.3": {"helpfulness": 2, "truthfulness": 4, "length": "too long"},
            "r2.2": {"complete_failure": False, "helpfulness": 1},
        },
    }
    assert seen["place"] == f"Prompt 2 of {NUM_PROMPTS}"
    assert seen["progress"] == f"3 of {3 * NUM_PROMPTS} responses rated"
    assert seen["wide"] == 0


@needs_browser
def test_the_form_has_a_dark_theme(tmp_path):
    def brightness(colour):
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

    seen = filled(tmp_path, "--blink-settings=preferredColorScheme=0")[1]
    assert brightness(seen["paper"]) < 60 and brightness(seen["ink"]) > 180


def test_the_form_names_no_model_and_needs_no_network():
    page = form_html(sheet())
    assert not any(model in page or model in form_csv(sheet()) for model in MODELS)
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|\bsrc=|@import", page.replace("\\u003c", "<").replace(HOSTILE, ""))
    assert page.count("</script>") == 2  # a response cannot end the sheet's data


def test_the_order_of_responses_is_random_and_that_of_the_seed():
    def orders(made):
        return [tuple(made.key[name][1] for name, _ in item.responses) for item in made.items]

    assert orders(sheet()) == orders(sheet()) != orders(sheet(seed=1))
    assert len(set(orders(sheet()))) == 6  # every order of three occurs among 40 prompts
    made = sheet()
    for item in made.items:
        for name, text in item.responses:
            assert text.startswith(f"={MODELS.index(made.key[name][1])} ")
    assert key_json(made, {})["responses"]["r1.1"] == {"item": "1", "model": made.key["r1.1"][1]}


def test_a_cell_of_the_csv_is_no_formula():
    rows = list(csv.DictReader(io.StringIO(form_csv(sheet()))))
    assert len(rows) == 3 * NUM_PROMPTS
    assert {row["response"][:2] for row in rows} == {"'="}
    assert {row["helpfulness"] for row in rows} == {""}
    assert {row["response_id"][0] for row in rows} == {"r"}  # neither a date nor a number


def test_a_response_belongs_to_one_prompt():
    dialogues = [(Message("user", first), Message("assistant", "Yes?"), Message("user", "Go on.")) for first in "ab"]
    with pytest.raises(InputError, match="2 prompts end with 'Go on.'"):
        make_sheet([Prompt(each) for each in dialogues], {"a": {"Go on.": "x"}, "b": {"Go on.": "y"}})


def test_only_prompts_that_all_models_answer_are_shown():
    prompts = [Prompt((Message("user", text),)) for text in ("one", "two")]
    made = make_sheet(prompts, {"a": {"one": "x", "two": "y"}, "b": {"two": "z"}})
    assert [item.prompt for item in made.items] == ["two"]
    with pytest.raises(InputError, match="no prompt is answered in all 2 files"):
        make_sheet(prompts, {"a": {"one": "x"}, "b": {"two": "z"}})
    with pytest.raises(InputError, match="at least two files"):
        make_sheet(prompts, {"a": {"one": "x"}})
