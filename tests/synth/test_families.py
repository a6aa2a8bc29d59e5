"""The families of `synthesize` with a scripted teacher: what each makes, drops and verifies."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from pages import ROOT
from scripted_teacher import FORMS, POLITENESS, REFUSAL, USER_FORMS, ScriptedTeacher
from synthetic_runs import all_rows, check_counts, check_lineage, content, make, rows, stored

from align.config import build
from align.data.reading import read
from align.errors import InputError
from align.models.policy import save_policy
from align.rewards.verifiers.instructions import follows
from align.synth.families.dialogues import PERSONAS
from align.synth.families.documents import JOINS
from align.synth.families.table import FAMILIES
from align.synth.order import check_families
from align.testing import tiny_policy

HONEST = dict.fromkeys(FORMS, 1)
NO_COMMA = {"kinds": ["punctuation:no_comma"]}
MINERALS = ("amber", "basalt", "cobalt", "dew", "ether", "flint", "gravel", "humus", "ice", "jade")
SEEDS = [f"What is known about {word}?" for word in MINERALS]
EVERY_SPLIT = {"sft": 0.4, "preference": 0.4, "test": 0.2}


def source(folder, rows, name="seeds"):
    """A source of rows, in the `data` of a recipe."""
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: {"path": str(path)}}


def prompts(texts=SEEDS, **more):
    return [{"prompt": text, **more} for text in texts]


def dialogue(messages):
    return [(message["role"], message["content"]) for message in messages]


def test_writing_tasks_are_asked_for_each_topic_and_drawn_type_of_document(tmp_path):
    families = {
        "topics": {"family": "topics", "number": 3},
        "tasks": {"family": "writing", "of": "topics", "number": 2, "types": 4},
        "longer": {"family": "revise_writing", "of": "tasks", "number": 2},
    }
    teacher = ScriptedTeacher(HONEST)
    report = make(tmp_path, teacher, families)
    check_counts(report)
    everything = check_lineage(tmp_path)
    assert report["entries"]["tasks"]["asked"] >= 3 * 4 * 2
    asked = [text for each in teacher.asked if "Think of" in (text := each["messages"][0]["content"])]
    types = Counter(re.search(r'of the type "([^"]+)" that has to do\s+with "([^"]+)"', text)[1] for text in asked)
    assert len(types) > 4
    assert {row["entry"] for row in everything.values()} == {"topics", "tasks", "longer"}


def test_tasks_about_a_document_are_joined_with_it(tmp_path):
    documents = [
        f"Document {number}. It speaks of {word} at length." for number, word in enumerate(["salt", "tar", "wax"])
    ]
    families = {"tasks": {"family": "closed_qa", "of": "seeds", "number": 4, "max_characters": 200}}
    data = source(tmp_path, prompts([*documents, "long " * 50]))
    teacher = ScriptedTeacher(HONEST)
    report = make(tmp_path, teacher, families, data=data)
    check_counts(report)
    check_lineage(tmp_path)
    made = all_rows(tmp_path)["prompts"]
    assert len(made) == 12 == report["entries"]["tasks"]["kept"]
    assert report["entries"]["tasks"]["parents: document too long"] == 1
    by_document = {}
    for row in made:
        text, task = row["prompt"][0]["content"], row["metadata"]["task"]
        (document,) = (each for each in documents if each in text)
        assert task in text and task in teacher.told
        assert text in {join.format(document=document, task=task) for join in JOINS}
        by_document.setdefault(document, set()).add(row["metadata"]["lineage"]["split"])
    assert all(len(splits) == 1 for splits in by_document.values())


def test_keywords_are_the_concepts_with_a_yes_and_problems_are_asked_at_every_level(tmp_path):
    concepts = ["recursion", "blueberry pie", "generators", "Napoleon", "decorators"]
    families = {
        "python": {"family": "keywords", "of": "concepts", "subject": "python"},
        "problems": {"family": "code_problems", "of": "python", "number": 2},
        "sums": {"family": "maths_problems", "of": "python", "number": 1, "levels": ["school"]},
    }
    teacher = ScriptedTeacher(HONEST, keywords={"recursion", "generators", "decorators"})
    report = make(tmp_path, teacher, families, data=source(tmp_path, prompts(concepts), "concepts"))
    check_counts(report)
    assert report["entries"]["python"] == {"asked": 5, "kept": 3, "dropped: no": 2}
    assert report["entries"]["problems"]["kept"] == 3 * 3 * 2
    levels = Counter(row["metadata"].get("level") for row in all_rows(tmp_path)["prompts"])
    assert levels == {"beginner": 6, "intermediate": 6, "advanced": 6, "school": 3}


@pytest.mark.parametrize("form", ["single", "persistent", "revision"])
def test_instructions_of_every_form_are_verifiable(tmp_path, form):
    families = {"asked": {"family": "instructions", "of": "seeds", "form": form, "max_constraints": 2}}
    report = make(tmp_path, ScriptedTeacher(), families, data=source(tmp_path, prompts()), splits=EVERY_SPLIT)
    check_counts(report)
    made = all_rows(tmp_path)["prompts"]
    assert len(made) == len(SEEDS)
    for row in made:
        roles = [role for role, _ in dialogue(row["prompt"])]
        assert roles == (["user", "assistant", "user"] if form == "revision" else ["user"])
        assert row["prompt"][0]["content"] in SEEDS if form == "revision" else True
        assert any(seed in row["prompt"][0]["content"] for seed in SEEDS)
        assert row["metadata"]["form"] == form
        assert len(follows(row["metadata"], "Some answer.")) == len(row["metadata"]["instruction_id_list"])
        if form != "single":
            assert "combination:repeat_prompt" not in row["metadata"]["instruction_id_list"]


@pytest.mark.parametrize("form", ["persistent", "single"])
def test_persistent_instructions_hold_at_every_assistant_turn_of_a_dialogue(tmp_path, form):
    families = {
        "asked": {"family": "instructions", "of": "seeds", "form": form, **NO_COMMA},
        "talks": {"family": "dialogues", "of": "asked", "turns": 3},
    }
    many = [f"{seed} Part {number}." for seed in SEEDS for number in range(6)]
    report = make(tmp_path, ScriptedTeacher(), families, data=source(tmp_path, prompts(many)))
    check_counts(report)
    talks = all_rows(tmp_path)["demonstrations"]
    assert report["entries"]["talks"]["dropped: instruction not followed"] > 5
    commas = [[("," in text) for role, text in dialogue(row["messages"]) if role == "assistant"] for row in talks]
    assert commas and all(len(each) == 3 for each in commas)
    if form == "persistent":
        assert not any(map(any, commas))
    else:
        assert not any(each[0] for each in commas) and any(map(any, commas))


def test_politeness_is_stripped_from_user_turns_only_and_bad_turns_are_asked_again(tmp_path):
    families = {"talks": {"family": "dialogues", "of": "seeds", "turns": 3, "tries": 4}}
    teacher = ScriptedTeacher(user_forms=list(USER_FORMS))
    teacher.prose = lambda rng: f"{rng.choice(POLITENESS)} {ScriptedTeacher.prose(teacher, rng)}"
    many = [f"{seed} Part {number}." for seed in SEEDS for number in range(6)]
    report = make(tmp_path, teacher, families, data=source(tmp_path, prompts(many)))
    check_counts(report)
    check_lineage(tmp_path)
    counts = report["entries"]["talks"]
    talks = all_rows(tmp_path)["demonstrations"]
    assert counts["kept"] == len(talks) > 20 and counts["politeness removed"] > 5
    for row in talks:
        said = dialogue(row["messages"])
        assert [role for role, _ in said] == ["user", "assistant"] * 3
        first, *turns = [text for role, text in said if role == "user"]
        assert first in many and set(turns) <= teacher.told
        assert all(any(text.startswith(words) for words in POLITENESS) for role, text in said if role == "assistant")
    temperatures = {
        each["temperature"] for each in teacher.asked if "user's next message" not in each["messages"][-1]["content"]
    }
    assert temperatures == {0}
    assert {
        re.search(r"The user: (.*)", each["messages"][-1]["content"])[1]
        for each in teacher.asked
        if "The user: " in each["messages"][-1]["content"]
    } <= set(PERSONAS)
    print(counts)


def test_a_teacher_that_cannot_play_the_user_is_told_by_reason(tmp_path):
    families = {"talks": {"family": "dialogues", "of": "seeds"}, "asked": {"family": "two_turn", "of": "seeds"}}
    teacher = ScriptedTeacher(user_forms=["as assistant"])
    with pytest.raises(Exception, match="no row was made: talks: 10 asked; 0 kept; 10 dropped: user's turn: speaks as"):
        make(tmp_path, teacher, families, data=source(tmp_path, prompts()))


def test_two_turn_prompts_begin_with_the_first_message_of_a_dialogue(tmp_path):
    families = {"asked": {"family": "two_turn", "of": "seeds"}}
    chats = [
        {"messages": [{"role": "user", "content": seed}, {"role": "assistant", "content": "It is old."}]}
        for seed in SEEDS
    ]
    report = make(tmp_path, ScriptedTeacher(), families, data=source(tmp_path, chats))
    check_counts(report)
    for row in all_rows(tmp_path)["prompts"]:
        said = dialogue(row["prompt"])
        assert [role for role, _ in said] == ["user", "assistant", "user"]
        assert said[0][1] in SEEDS and said[1][1] != "It is old."


def test_dialogues_are_filtered_by_the_reward_of_the_judges(tmp_path):
    families = {"talks": {"family": "dialogues", "of": "seeds", "turns": 2, "min_reward": 165}}
    judged = {"judges": [{"name": "synthetic_judge:by_length"}], "data": source(tmp_path, prompts())}
    report = make(tmp_path, ScriptedTeacher(), families, **judged)
    check_counts(report)
    kept = all_rows(tmp_path)["demonstrations"]
    lengths = [len(row["messages"][-1]["content"]) for row in kept]
    assert min(lengths) >= 165 and [row["metadata"]["reward"] for row in kept] == lengths
    assert report["entries"]["talks"]["dropped: low reward"] == len(SEEDS) - len(kept) > 0
    with pytest.raises(InputError, match=r"families.talks: dialogues filters by a reward: name judges of the step"):
        make(tmp_path / "other", ScriptedTeacher(), families, data=judged["data"])


def test_the_known_answer_to_a_first_message_is_not_that_of_a_later_one(tmp_path):
    families = {f"talks_{turns}": {"family": "dialogues", "of": "seeds", "turns": turns} for turns in (1, 2)}
    rows = [{"prompt": seed, "answer": "42", "topic": "age"} for seed in SEEDS]
    make(tmp_path, ScriptedTeacher(HONEST), families, data=source(tmp_path, rows))
    found = Counter(
        (len(row["messages"]), row["metadata"].get("answer"), row["metadata"]["topic"])
        for row in all_rows(tmp_path)["demonstrations"]
    )
    assert found.keys() == {(2, "42", "age"), (4, None, "age")}


def test_incapable_tasks_are_declined_and_their_twins_answered_in_the_same_split(tmp_path):
    families = {"tasks": {"family": "incapable", "number": 8, "lacks": ["cannot see", "has no clock"]}}
    report = make(tmp_path, ScriptedTeacher(HONEST), families, splits=EVERY_SPLIT)
    check_counts(report)
    everything = check_lineage(tmp_path)
    rows = all_rows(tmp_path)["demonstrations"]
    assert report["entries"]["tasks"]["dropped: not declined"] > 0
    tasks = {}
    for row in rows:
        lineage, answer = row["metadata"]["lineage"], row["messages"][-1]["content"]
        assert (answer == REFUSAL) == (row["metadata"]["capable"] is False)
        (task,) = lineage["parents"]
        assert everything[task]["kind"] == "prompt"
        tasks.setdefault(task, []).append((row["metadata"]["capable"], lineage["split"]))
    assert all(len({split for _, split in pair}) == 1 for pair in tasks.values())
    assert sum(len(pair) == 2 for pair in tasks.values()) > 5


def test_distractors_stand_after_their_turns_and_are_turned_down(tmp_path):
    families = {
        "fields": {"family": "topics", "number": 4},
        "talks": {"family": "topic_following", "of": "fields", "turns": 3, "distractors": 2},
    }
    report = make(tmp_path, ScriptedTeacher(), families)
    check_counts(report)
    check_lineage(tmp_path)
    talks = all_rows(tmp_path)["demonstrations"]
    assert len(talks) == 4
    for row in talks:
        said = dialogue(row["messages"])
        assert [role for role, _ in said] == ["system", *["user", "assistant"] * 5]
        expected, users = [], [text for role, text in said[1::2]]
        for turn in (1, 2, 3):
            expected += [
                None,
                *(each["distractor"] for each in row["metadata"]["distractors"] if each["bot turn"] == turn),
            ]
        assert all(want in (None, text) for want, text in zip(expected, users, strict=True))


def test_relaxed_pairs_have_a_verified_chosen_answer_and_a_rejected_one_that_violates(tmp_path):
    families = {"pairs": {"family": "relaxed_constraint", "of": "seeds", "tries": 8, **NO_COMMA}}
    report = make(tmp_path, ScriptedTeacher(), families, data=source(tmp_path, prompts()))
    check_counts(report)
    pairs = all_rows(tmp_path)["pairs"]
    assert len(pairs) > 5
    for row in pairs:
        chosen, rejected = (each["content"] for each in row["responses"])
        assert "," not in chosen and "," in rejected and row["chosen"] == 0
        assert "comma" in row["prompt"][-1]["content"]
    files = sorted((tmp_path / "runs/made/prompts").glob("*-pairs.jsonl"))
    found = [record for file in files if file.stat().st_size for record in read(str(file)).records]
    assert [record.responses[record.chosen].content for record in found] == [
        row["responses"][0]["content"] for row in pairs
    ]


def test_flagged_prompts_leave_the_sft_split_and_stay_in_the_preference_data(tmp_path):
    flags = [{"openai_moderation": [{"flagged": number % 3 == 0}]} for number in range(60)]
    rows = [{"prompt": f"Seed number {number}?", **flag} for number, flag in enumerate(flags)]
    families = {
        "longer": {"family": "revise_open_qa", "of": "seeds", "number": 2},
        "talks": {"family": "dialogues", "of": "longer", "turns": 1, "split": "sft"},
        "two": {"family": "two_turn", "of": "longer", "split": "preference"},
    }
    report = make(tmp_path, ScriptedTeacher(HONEST), families, data=source(tmp_path, rows))
    check_counts(report)
    check_lineage(tmp_path)
    flagged = Counter()
    for kind, found in all_rows(tmp_path).items():
        for row in found:
            flagged[kind, row["metadata"]["lineage"]["split"], row["metadata"]["lineage"]["flagged"]] += 1
    assert not any(is_flagged and split == "sft" for _, split, is_flagged in flagged)
    assert flagged["prompts", "preference", True] > 10 and flagged["demonstrations", "sft", False] > 10
    only = make(
        tmp_path / "only",
        ScriptedTeacher(HONEST),
        {"longer": families["longer"]},
        data=source(tmp_path, rows),
        splits={"sft": 1, "preference": 0, "test": 0},
    )
    assert only["left_out"] == {"flagged as unsafe": sum(each["openai_moderation"][0]["flagged"] for each in flags) * 2}


def test_two_models_may_play_the_two_sides(tmp_path):
    families = {"asked": {"family": "two_turn", "of": "seeds", "by": "one", "user_by": "two"}}
    data, teacher = source(tmp_path, prompts()), ScriptedTeacher()
    make(tmp_path, teacher, families, data=data, models=["one", "two"])
    told = Counter(("user's next message" in each["messages"][-1]["content"], each["model"]) for each in teacher.asked)
    assert told.keys() == {(False, "one"), (True, "two")}
    families["asked"]["user_by"] = "too"
    with pytest.raises(InputError, match=r"families.asked.user_by: no model of the step is called 'too'; did you mean"):
        make(tmp_path, teacher, families, data=data, models=["one", "two"])


def test_skipped_rows_and_unused_parents_are_counted(tmp_path):
    systems = [{"prompt": [{"role": "system", "content": "Nothing but this."}]}]
    data = source(tmp_path, [*prompts(["One text.", "Another.", "One text."]), *systems])
    data["seeds"]["on_error"] = "skip"
    families = {"tasks": {"family": "closed_qa", "of": "seeds", "number": 2, "limit": 1}}
    counts = make(tmp_path, ScriptedTeacher(), families, data=data)["entries"]["tasks"]
    assert counts["parents: duplicate"] == counts["parents: over the limit"] == 1
    assert [number for name, number in counts.items() if name.startswith("rows: ")] == [1]


def test_the_page_lists_every_family():
    page = (ROOT / "docs/synthetic-data.md").read_text("utf-8")
    assert [name for name in FAMILIES if f"`{name}`" not in page] == []


def test_every_family_is_made_by_a_test():
    text = "".join(path.read_text() for path in Path(__file__).parent.rglob("*.py"))
    assert [name for name in FAMILIES if f'"family": "{name}"' not in text and f"family: {name}" not in text] == []


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_policy(*tiny_policy(), folder / "tiny")
    return folder


@pytest.fixture
def small_model(model_folder, monkeypatch):
    """Settings of a step that asks a small random model in this process, by a name on which its samples depend."""
    monkeypatch.chdir(model_folder)
    ends = ["a", "e", "i", "o", "t", "n", "s", "7", "é", ","]  # a random model hardly ever ends a turn
    sampling = {"max_new_tokens": 128, "stop": ends}
    return {"models": ["tiny"], "engine": {"local": {"precision": "fp32"}}, "sampling": sampling}


def test_a_model_writes_prompts_in_the_user_s_place_and_is_asked_once(tmp_path, small_model):
    families = {"own": {"family": "magpie", "number": 12, "systems": ["Be odd.", "Be even."]}}
    families["own"]["one_line"] = False
    first = make(tmp_path, None, families, **small_model)
    check_counts(first)
    check_lineage(tmp_path)
    assert first["entries"]["own"]["asked"] == 24
    made = content(tmp_path)
    second = make(tmp_path, None, families, **small_model)
    assert content(tmp_path) == made
    assert second["requests"] == {"asked": 24, "answered_before": 24}
    texts = {value["text"] for value in stored(tmp_path).values()}
    assert len(texts) > 12
    print(first["entries"]["own"])


def test_a_family_that_needs_the_model_itself_refuses_a_server(tmp_path):
    with pytest.raises(InputError, match="families.own: magpie needs the engine local, not custom"):
        make(tmp_path, ScriptedTeacher(), {"own": {"family": "magpie", "number": 2}})


def test_keywords_by_likelihood_are_those_above_the_threshold_of_labelled_ones(tmp_path, small_model):
    concepts = [f"concept {letter}" for letter in "abcdefgh"]
    labelled = {"yes": ["recursion", "a list"], "no": ["Napoleon", "a blueberry pie"]}
    families = {
        "python": {"family": "keywords", "of": "concepts", "subject": "python", "labelled": labelled},
        "tasks": {"family": "magpie", "number": 12, "one_line": False},
    }
    data = source(tmp_path, prompts(concepts), "concepts")
    report = make(tmp_path, None, families, data=data, **small_model)
    check_counts(report)
    counts = report["entries"]["python"]
    assert counts["asked"] == 8 and counts["labelled concepts"] == 4 and counts["labelled concepts: right"] >= 2
    scores = [yes - no for yes, no in (value["logps"] for value in stored(tmp_path).values() if "logps" in value)]
    kept = [row["text"] for row in rows(tmp_path, "lineage.jsonl") if row["entry"] == "python"]
    yes, no, rest = scores[:2], scores[2:4], scores[4:]
    assert len(rest) == 8
    by_score = [text for _, text in sorted(zip(rest, concepts, strict=True), reverse=True)]
    assert set(kept) == set(by_score[: len(kept)])  # a threshold separates them

    def right(at):
        return sum(score > at for score in yes) + sum(score <= at for score in no)

    assert counts["labelled concepts: right"] == max(map(right, [*scores[:4], min(scores[:4]) - 1]))


def test_magpie_ends_a_prompt_at_the_first_line_break():
    asked = []

    class Bench:
        language = None

        def want(self, number):
            pass

        def open_turn(self, before, number, *, stop):
            asked.append(stop)

        def ask(self, requests):
            return []

    with pytest.raises(ValueError, match="zip"):  # no answers
        list(build(FAMILIES["magpie"], {"family": "magpie", "number": 2}).make([], Bench()))
    assert asked == [["\n"], ["\n"]]


@pytest.mark.parametrize(
    ("families", "message"),
    [
        ({"a": {"family": "magpie", "number": 1, "split": "sft"}}, "split: has no effect: magpie has no parents"),
        ({"a": {"family": "topics", "write": True}}, "write: has no effect: topics are no rows"),
    ],
)
def test_settings_without_effect_on_a_family_are_refused(families, message):
    built = {name: build(FAMILIES[each["family"]], each) for name, each in families.items()}
    with pytest.raises(InputError, match=message):
        check_families(built, [])


def test_a_request_that_is_to_be_repeated_stands_above_the_instruction(tmp_path):
    families = {"asked": {"family": "instructions", "of": "seeds", "kinds": ["combination:repeat_prompt"]}}
    make(tmp_path, ScriptedTeacher(HONEST), families, data=source(tmp_path, prompts()))
    asked = [row["prompt"][0]["content"] for row in all_rows(tmp_path)["prompts"]]
    assert len(asked) == len(SEEDS) and all(text.startswith(tuple(SEEDS)) for text in asked)


@pytest.mark.parametrize("form", ["persistent", "revision"])
def test_a_form_without_a_kind_to_draw_is_an_error(tmp_path, form):
    repeat = "combination:repeat_prompt"
    families = {"asked": {"family": "instructions", "of": "seeds", "form": form, "kinds": [repeat]}}
    data = source(tmp_path, prompts())
    message = rf"families.asked.kinds: no answer after the first can follow {repeat}: add a kind, or use form: single"
    with pytest.raises(InputError, match=message):
        make(tmp_path, ScriptedTeacher(HONEST), families, data=data)
    families["asked"]["kinds"] = [repeat, "punctuation:no_comma"]
    make(tmp_path, ScriptedTeacher(HONEST), families, data=data)
    kinds = [row["metadata"]["instruction_id_list"] for row in all_rows(tmp_path)["prompts"]]
    assert kinds and all(each == ["punctuation:no_comma"] for each in kinds)
