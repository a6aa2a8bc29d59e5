"""The stage `synthesize` with a scripted teacher: rows, counts, lineage, splits, and requests answered once."""

import json
import re
from random import Random

import pytest
from scripted_teacher import CURRENT, FAULTS, FORMS, ScriptedTeacher, serving_teacher
from small_runs import Told
from small_runs import run as small_run
from synthetic_runs import FAMILIES as SHAPE
from synthetic_runs import all_rows, check_counts, check_lineage, content, make, recipe, rows, run, stored, write_recipe

from align.config import build
from align.errors import InputError, RunError
from align.synth.families.table import FAMILIES
from align.synth.order import planned_calls
from align.workflow.estimate import estimate
from align.workflow.recipe.load import load_recipe
from align.workflow.runner import run_context

FEW = {
    "topics": {"family": "topics", "number": 3},
    "questions": {"family": "open_qa", "of": "topics", "number": 3},
    "longer": {"family": "revise_open_qa", "of": "questions", "number": 2},
}
HONEST = dict.fromkeys(FORMS, 1)


def test_topics_become_questions_and_longer_ones_with_their_lineage(tmp_path):
    teacher = ScriptedTeacher(HONEST)
    report = make(tmp_path, teacher)
    entries = report["entries"]
    assert {name: (each["asked"], each["kept"]) for name, each in entries.items()}["topics"] == (5, 5)
    check_counts(report)
    everything = check_lineage(tmp_path)
    kinds = {row["entry"]: row["kind"] for row in everything.values()}
    assert kinds == {"topics": "topic", "subtopics": "topic", "questions": "prompt", "longer": "prompt"}
    made = all_rows(tmp_path)["prompts"]
    assert len(made) == entries["longer"]["kept"]
    for row in made:
        assert row["prompt"][0]["content"] in teacher.told
        lineage = row["metadata"]["lineage"]
        (question,) = (everything[parent] for parent in lineage["parents"])
        assert question["entry"] == "questions" and lineage["seeds"] == [question["id"]]
        assert everything[question["parents"][0]]["kind"] == "topic"
    measures = json.loads((tmp_path / "runs/made/prompts/measures.json").read_text())
    assert measures["families"]["longer"]["rows"] == len(made)
    assert len(teacher.asked) == len(stored(tmp_path)) == report["requests"]["asked"]


@pytest.mark.slow
def test_a_run_again_asks_nothing_and_a_changed_entry_only_its_own(tmp_path):
    with serving_teacher(ScriptedTeacher(HONEST)) as server:
        run(tmp_path, server.url, FEW)
        first, asked = content(tmp_path), len(server.requests)
        run(tmp_path, server.url, FEW, splits={"sft": 0.5, "preference": 0.4, "test": 0.1})
        assert len(server.requests) == asked and content(tmp_path) == first
        manifest, _ = run(tmp_path, server.url, FEW, language="en")
        assert len(server.requests) == asked
        assert manifest["report"]["requests"]["answered_before"] == asked


@pytest.mark.parametrize("seed", [0, 1])
def test_order_and_concurrency_do_not_change_the_rows(tmp_path, seed):
    with serving_teacher(ScriptedTeacher(HONEST, seed=seed)) as server:
        make(tmp_path / "one", server.url, FEW, concurrency=1)
        make(tmp_path / "many", server.url, FEW, concurrency=16)
    assert content(tmp_path / "one") == content(tmp_path / "many")


class Killed(Told):
    """A reporter that ends the run after a number of answers, as an interrupt does."""

    def __init__(self, after):
        super().__init__()
        self.left = after

    def advance(self, units, metrics=None):
        self.left -= units
        if self.left < 0:
            raise KeyboardInterrupt


def made_with_kills(folder, teacher, rng, num_kills, families=SHAPE, **settings):
    """Make the rows with kills after random answers, each of which leaves half of a line in the store."""
    for _ in range(num_kills):
        with pytest.raises(KeyboardInterrupt):
            make(folder, teacher, families, told=Killed(rng.randint(1, 9)), **settings)
        with (folder / "runs/made/responses/prompts.jsonl").open("ab") as store:
            store.write(b'["half of a line')
    make(folder, teacher, families, **settings)


@pytest.mark.parametrize(("num_kills", "seeds"), [(5, 1), pytest.param(10, 6, marks=pytest.mark.slow)])
def test_no_request_is_asked_twice_whatever_kills_the_run(tmp_path, num_kills, seeds):
    modes = {**HONEST, "fewer": 3, "refusal": 2, "cut": 2, "empty": 1}
    for seed in range(seeds):
        once, again = ScriptedTeacher(modes, seed=seed), ScriptedTeacher(modes, seed=seed)
        make(tmp_path / f"whole-{seed}", once)
        made_with_kills(tmp_path / f"killed-{seed}", again, Random(seed), num_kills)
        assert content(tmp_path / f"killed-{seed}") == content(tmp_path / f"whole-{seed}")
        asked = sorted(map(json.dumps, again.asked))
        assert asked == sorted(map(json.dumps, once.asked)) and len(set(asked)) == len(asked)
    print(f"covered {num_kills * seeds} kills, {len(asked)} requests of the last run")


BAD = ["refusal", "empty", "blank", "endless", "prose", "german"]


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_teacher_ends_in_counts_and_one_line(tmp_path, fault):
    families = {
        "topics": {"family": "topics", "also": ["Bridges"], "number": 1, "tries": 2},
        "questions": {"family": "open_qa", "of": "topics", "number": 3, "tries": 2},
    }
    with pytest.raises(RunError) as failed:
        make(tmp_path, ScriptedTeacher({fault: 1}), families, language="en")
    assert "\n" not in str(failed.value)
    found = re.search(r"no row was made: questions: (\d+) asked; 0 kept; (\d+) dropped: ([\w ]+)$", str(failed.value))
    assert found[1] == found[2]
    assert found[3] == {"german": "another language", "refusal": "refused", "prose": "not a list"}.get(fault, found[3])


def test_a_server_that_fails_ends_in_one_line_and_a_rerun_resumes(tmp_path):
    with serving_teacher(ScriptedTeacher(HONEST), ["ok"] * 3, always=(500,)) as server:
        with pytest.raises(RunError, match="a request failed 1 times, last with: HTTP 500") as failed:
            make(tmp_path, server.url, concurrency=1)
        assert "\n" not in str(failed.value)
        server.always = "ok"
        report = make(tmp_path, server.url, concurrency=1)
    assert report["requests"]["answered_before"] == 3


def test_a_refused_request_is_dropped_and_counted_and_not_asked_again(tmp_path):
    families = {**FEW, "talks": {"family": "dialogues", "of": "questions", "turns": 1}}
    with serving_teacher(ScriptedTeacher(HONEST)) as server:
        make(tmp_path / "whole", server.url, families)
        topic = next(row["text"] for row in rows(tmp_path / "whole", "lineage.jsonl") if row["kind"] == "topic")
        server.refuses = topic
        report = make(tmp_path / "made", server.url, families)
        check_counts(report)
        asked = len(server.requests)
        assert make(tmp_path / "made", server.url, families)["entries"] == report["entries"]
        assert len(server.requests) == asked
    dropped = {name: counts.get("dropped: refused by the server", 0) for name, counts in report["entries"].items()}
    assert dropped["topics"] == 0 and dropped["questions"] >= 3
    assert {row["finish"][:17] for row in stored(tmp_path / "made").values() if not row["text"]} == {
        "refused: HTTP 400"
    }


def test_a_server_that_refuses_every_request_ends_the_step_and_nothing_is_stored(tmp_path):
    with serving_teacher(ScriptedTeacher(HONEST), always=(422,)) as server:
        with pytest.raises(InputError, match="teacher: the server refused every request, first with refused: HTTP 422"):
            make(tmp_path, server.url, FEW)
        assert not stored(tmp_path)
        server.always = "ok"
        report = make(tmp_path, server.url, FEW)
    assert report["requests"]["answered_before"] == 0 and sum(report["rows"].values()) > 0


def test_a_faulty_teacher_gives_no_row_that_it_did_not_write_and_the_counts_add_up(tmp_path):
    teacher = ScriptedTeacher({**HONEST, **dict.fromkeys(FAULTS, 2)})
    report = make(tmp_path, teacher, language="en")
    check_counts(report)
    everything = check_lineage(tmp_path)
    texts = {row["text"] for row in everything.values() if row["kind"] == "topic" and row["requests"]}
    prompts = {row["prompt"][0]["content"] for row in all_rows(tmp_path)["prompts"]}
    assert len(prompts) > 20 and texts | prompts <= teacher.told
    reasons = {name for counts in report["entries"].values() for name in counts}
    assert {"dropped: refused", "dropped: empty", "dropped: cut", "dropped: another language"} <= reasons


def test_the_estimate_of_the_report_s_sizes_has_as_many_requests_as_they_take():
    sizes = {"topics": 20, "subtopics": 5, "questions": 10, "longer": 5}
    written = {name: {**each, "number": sizes[name]} for name, each in SHAPE.items()}
    del written["topics"]["also"]
    families = {name: build(FAMILIES[each["family"]], each) for name, each in written.items()}
    calls = planned_calls(families, {}, 100)
    assert [each.items for each in calls.values()] == [20, 20 * 5, 120 * 10, 1200 * 5]
    assert sum(each.requests for each in calls.values()) == 1 + 20 + 120 + 1200


CHAIN = """
run: made
runs: {runs}
policy:
  from_config: {{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
          num_attention_heads: 2, max_position_embeddings: 1024, initializer_range: 0.05}}
  chat_template: chatml
data:
  dialogues: {{path: "step:prompts/sft-demonstrations.jsonl", held_out: 0.1}}
  asked: {{path: "step:prompts/preference-demonstrations.jsonl", limit: 3}}
steps:
  base: {{stage: import, vocab_size: 300}}
  prompts:
    stage: synthesize
    models: [teacher]
    engine: {{custom: {{name: "scripted_teacher:Engine"}}}}
    families:
      topics: {{family: topics, number: 3}}
      questions: {{family: open_qa, of: topics, number: 4}}
      dialogues: {{family: dialogues, of: questions, turns: 2}}
  sft: {{stage: sft, data: dialogues, policy: base, train: {{learning_rate: 1.0e-3, prompts_per_step: 4}}}}
  samples: {{stage: generate, data: asked, policies: [sft], judges: [], sampling: {{max_new_tokens: 8}}}}
"""


@pytest.mark.slow
def test_later_steps_read_the_files_of_a_split_and_kind(tmp_path):
    CURRENT[:] = [ScriptedTeacher(HONEST)]
    made, told = small_run(tmp_path, text=CHAIN)
    assert made["sft"]["ledger"]["tokens_trained"] > 0
    groups = (tmp_path / "runs/made/samples/groups.jsonl").read_text().splitlines()
    assert len(groups) == 3
    last = [json.loads(line)["prompt"][-1]["role"] for line in groups]
    assert last == ["user"] * 3
    asked = len(CURRENT[0].asked)
    _, told = small_run(tmp_path, text=CHAIN)
    assert len(CURRENT[0].asked) == asked
    assert {step for step, state in told.states if state == "running"} == set()
    estimates = {each.name: each for each in estimate(load_recipe(tmp_path / "small.yaml", ()))}
    assert estimates["prompts"].rows == 12 and estimates["sft"].rows == 12 and estimates["sft"].bound


@pytest.mark.parametrize("stage", ["synthesize", "generate"])
def test_the_key_of_a_step_covers_the_content_of_its_chat_template(tmp_path, stage):
    template = tmp_path / "chat.jinja"
    (tmp_path / "rows.jsonl").write_text('{"prompt": "What is amber?"}\n')

    def key(**local):
        values = recipe(tmp_path, FEW, engine={"local": local}, data={"rows": {"path": str(tmp_path / "rows.jsonl")}})
        if stage == "generate":
            values["steps"]["prompts"] = {"stage": stage, "models": ["teacher"], "data": "rows", "judges": []}
            values["steps"]["prompts"]["engine"] = {"local": local}
        loaded = load_recipe(write_recipe(tmp_path, values), ())
        step, inputs = loaded.steps["prompts"], run_context(loaded, "prompts", tmp_path, Told()).inputs
        return step.cache_key(inputs)

    plain, keys = key(), []
    for text in ("{{ messages }}", "{{ messages }}!"):
        template.write_text(text)
        keys.append(key(chat_template=str(template)))
    assert keys[0] != keys[1] and plain == key()
    assert all(len(each) == len(plain) + 1 for each in keys)  # nothing is added for what is not set
