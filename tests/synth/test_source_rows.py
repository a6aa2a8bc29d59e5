"""Rows of sources that entries of a step `synthesize` read: prompts of dialogues, splits, and rows of earlier steps."""

import json

import pytest
from scripted_teacher import CURRENT, FORMS, ScriptedTeacher
from small_runs import run
from synthetic_runs import all_rows, check_counts, make

from align.errors import InputError
from align.synth.items import is_flagged
from align.workflow.estimate import estimate
from align.workflow.recipe.load import load_recipe

HONEST = dict.fromkeys(FORMS, 1)
WORDS = ("amber", "basalt", "cobalt", "dew", "ether", "flint", "gravel", "humus", "ice", "jade")
SPLITS = {"sft": 0.4, "preference": 0.4, "test": 0.2}


def source(folder, lines, name="rows"):
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return {name: {"path": str(path)}}


def chat(word, **more):
    said = [f"What is {word}?", f"{word} is a thing.", f"How much {word} is there?", "There are 12 of it.\n#### 12"]
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, said, strict=True)]
    return {"messages": turns, **more}


def made_rows(folder, name):
    path = folder / "runs/made/prompts" / name
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_dialogue_is_read_as_its_prompt_with_the_answer_that_it_marks(tmp_path):
    data = source(tmp_path, map(chat, WORDS))
    families = {"asked": {"family": "instructions", "of": "rows", "kinds": ["punctuation:no_comma"]}}
    report = make(tmp_path, ScriptedTeacher(HONEST), families, data=data)
    check_counts(report)
    made = all_rows(tmp_path)["prompts"]
    assert len(made) == len(WORDS)
    for row in made:
        assert [message["role"] for message in row["prompt"]] == ["user", "assistant", "user"]
        assert "There are 12" not in row["prompt"][-1]["content"] and "How much" in row["prompt"][-1]["content"]
        assert row["metadata"]["answer"] == "12"


def test_prompts_of_a_source_are_split_by_their_words_and_flagged_ones_leave_sft(tmp_path):
    lines = [chat(word, flagged=word > "f") for word in WORDS]
    families = {"asked": {"family": "prompts", "of": "rows", "first_turn": True}}
    teacher = ScriptedTeacher(HONEST)
    report = make(tmp_path, teacher, families, data=source(tmp_path, [*lines, *lines]), splits=SPLITS)
    check_counts(report)
    assert not teacher.asked
    counts = report["entries"]["asked"]
    assert counts["parents: duplicate"] == len(WORDS) and counts["kept"] == len(WORDS)
    splits = {split: made_rows(tmp_path, f"{split}-prompts.jsonl") for split in SPLITS}
    assert sum(map(len, splits.values())) == len(WORDS)
    assert not any(row["metadata"].get("flagged") for row in splits["sft"])
    for row in [row for each in splits.values() for row in each]:
        assert len(row["prompt"]) == 1 and "answer" not in row["metadata"]


@pytest.mark.parametrize("form", ["single", "persistent"])
def test_a_second_turn_has_the_persistent_instructions_of_the_first_and_not_its_answer(tmp_path, form):
    lines = [{"prompt": f"How much {word} is there?", "answer": "12"} for word in WORDS]
    families = {
        "asked": {"family": "instructions", "of": "rows", "form": form, "kinds": ["punctuation:no_comma"]},
        "next": {"family": "two_turn", "of": "asked"},
    }
    make(tmp_path, ScriptedTeacher(HONEST), families, data=source(tmp_path, lines))
    made = all_rows(tmp_path)["prompts"]
    assert len(made) > 3 and all(len(row["prompt"]) == 3 for row in made)
    for row in made:
        assert "answer" not in row["metadata"]
        assert ("instruction_id_list" in row["metadata"]) == (form == "persistent")


def test_a_later_step_keeps_the_split_and_the_seeds_of_made_rows(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    longer = {
        "asked": {"family": "prompts", "of": "rows"},
        "longer": {"family": "revise_open_qa", "of": "asked", "number": 3},
    }
    lines = [{"prompt": f"What is known about {word}?"} for word in WORDS]
    make(first, ScriptedTeacher(HONEST), longer, data=source(first, lines), splits=SPLITS)
    found = {
        split: {"path": str(first / f"runs/made/prompts/{split}-prompts.jsonl")} for split in ("preference", "test")
    }
    before = {row["prompt"][0]["content"]: row for name in found for row in made_rows(first, f"{name}-prompts.jsonl")}
    # In this step every prompt without a split would be in the split `test`
    families = {"again": {"family": "prompts", "of": ["preference", "test"]}}
    make(second, ScriptedTeacher(HONEST), families, data=found, splits={"sft": 0, "preference": 1e-9, "test": 1 - 1e-9})
    after = all_rows(second)["prompts"]
    assert len(after) == len(before) > 3
    for row in after:
        lineage, old = (each["metadata"]["lineage"] for each in (row, before[row["prompt"][0]["content"]]))
        assert (lineage["split"], lineage["seeds"]) == (old["split"], old["seeds"])
    with pytest.raises(InputError, match="has rows of the split preference, whose share is 0 here"):
        make(
            tmp_path / "third",
            ScriptedTeacher(HONEST),
            families,
            data=found,
            splits={"sft": 0, "preference": 0, "test": 1},
        )


def test_made_sft_rows_that_were_flagged_afterwards_are_in_no_split(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    lines = [{"prompt": f"What is known about {word}?"} for word in WORDS]
    again = {"asked": {"family": "prompts", "of": "rows"}}
    make(first, ScriptedTeacher(HONEST), again, data=source(first, lines), splits=SPLITS)
    made = made_rows(first, "sft-prompts.jsonl")
    assert len(made) > 1
    data = source(second, [{**row, "flagged": row is made[0]} for row in made])
    families = {**again, "longer": {"family": "revise_open_qa", "of": "rows", "number": 1}}
    report = make(second, ScriptedTeacher(HONEST), families, data=data, splits=SPLITS)
    check_counts(report)
    assert report["left_out"] == {"flagged as unsafe": 2}
    left = [row["prompt"][0]["content"] for row in made_rows(second, "sft-prompts.jsonl")]
    assert made[0]["prompt"][0]["content"] not in left and len(left) == 2 * len(made) - 2


@pytest.mark.parametrize("order", [1, -1])
def test_a_prompt_that_one_source_flags_is_flagged_in_all_of_them(tmp_path, order):
    lines = [{"prompt": f"What is known about {word}?"} for word in WORDS]
    marked = [{"prompt": f"what is KNOWN about {word}", "flagged": True} for word in WORDS]
    data = source(tmp_path, [*lines, *lines]) | source(tmp_path, marked, "others")
    families = {
        "asked": {"family": "prompts", "of": ["rows", "others"][::order]},
        "alone": {"family": "prompts", "of": "rows"},
    }
    report = make(tmp_path, ScriptedTeacher(HONEST), families, data=data, splits=SPLITS)
    check_counts(report)
    assert report["rows"]["sft-prompts.jsonl"] == 0 and report["rows"]["preference-prompts.jsonl"] > 4


def test_flags_are_read_from_text_and_other_text_is_an_error(tmp_path):
    for flags, expected in ((("False", "no", "0", "", " false"), False), (("True", "yes", "1", "TRUE "), True)):
        assert {is_flagged({"flagged": flag}) for flag in flags} == {expected}
        assert {is_flagged({"openai_moderation": [{"flagged": flag}]}) for flag in flags} == {expected}
    lines = [{"prompt": "What is amber?", "flagged": "maybe"}]
    families = {"asked": {"family": "prompts", "of": "rows"}}
    with pytest.raises(InputError, match=r"row 1: flagged is 'maybe'; it must be one of true, false"):
        make(tmp_path, ScriptedTeacher(HONEST), families, data=source(tmp_path, lines))


def test_constraints_of_a_source_are_refused(tmp_path):
    data = source(tmp_path, [{"prompt": "Say it."}])
    data["rows"]["constraints"] = {"max_constraints": 1}
    with pytest.raises(InputError, match="rows has constraints: leave them out, and use the family instructions"):
        make(tmp_path, ScriptedTeacher(HONEST), {"asked": {"family": "prompts", "of": "rows"}}, data=data)


CHAIN = """
run: made
runs: {runs}
policy:
  from_config: {{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
          num_attention_heads: 2, max_position_embeddings: 1024}}
  chat_template: chatml
data:
  test: {{path: "step:prompts/test-prompts.jsonl"}}
steps:
  base: {{stage: import, vocab_size: 300}}
  prompts:
    stage: synthesize
    policies: [base]
    families:
      topics: {{family: topics, number: 3}}
      questions: {{family: open_qa, of: topics, number: 4}}
      asked: {{family: instructions, of: questions}}
  evaluate:
    stage: evaluate
    policies: all
    tasks: {{followed: {{data: test, task: ifeval, max_new_tokens: 8}}}}
"""


def test_an_evaluation_of_made_rows_is_estimated_after_the_step_that_makes_them(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(CHAIN.format(runs=tmp_path / "runs"))
    limited = list(estimate(load_recipe(path, ("data.test.limit=5",))))
    assert limited[2].rows == 5
    steps = list(estimate(load_recipe(path, ())))
    assert [each.name for each in steps] == ["base", "prompts", "evaluate-base"]
    assert steps[2].rows == 12 and steps[2].tokens == steps[1].tokens + 12 * 8 and steps[2].bound


@pytest.mark.slow
def test_made_prompts_with_instructions_are_evaluated(tmp_path):
    CURRENT[:] = [ScriptedTeacher(HONEST)]
    engine = '{{custom: {{name: "scripted_teacher:Engine"}}}}'
    asked = f"models: [teacher]\n    splits: {{{{sft: 0, preference: 0.1, test: 0.9}}}}\n    engine: {engine}"
    run(tmp_path, text=CHAIN.replace("policies: [base]", asked))
    rows = made_rows(tmp_path, "test-prompts.jsonl")
    verdicts = (tmp_path / "runs/made/evaluate-base/followed.jsonl").read_text().splitlines()
    assert len(verdicts) == len(rows) > 3


def test_a_made_prompt_that_a_source_flags_is_flagged_with_what_is_made_of_it(tmp_path):
    """The teacher asks again what users have asked: as seeds the prompts are others, so only their words tell."""
    seeds = source(tmp_path, [{"prompt": f"Seed {word}?"} for word in WORDS])
    families = {
        "longer": {"family": "revise_open_qa", "of": "rows", "number": 2, "write": True},
        "answered": {"family": "dialogues", "of": "longer", "turns": 1, "split": "sft"},
        "asked": {"family": "prompts", "of": "others"},
    }
    others = [{"prompt": "Nothing.", "flagged": False}]
    make(tmp_path / "free", ScriptedTeacher(HONEST), families, data=seeds | source(tmp_path, others, "others"))
    made = [
        row
        for row in made_rows(tmp_path / "free", "sft-prompts.jsonl")
        if row["metadata"]["lineage"]["entry"] == "longer"
    ]
    again = [row["prompt"][-1]["content"] for row in made[::2]]
    others += [{"prompt": f"{prompt.upper()}", "flagged": True} for prompt in again]
    report = make(
        tmp_path / "marked", ScriptedTeacher(HONEST), families, data=seeds | source(tmp_path, others, "others")
    )
    check_counts(report)
    kept = {row["prompt"][-1]["content"] for row in made_rows(tmp_path / "marked", "sft-prompts.jsonl")}
    assert len(again) > 2 and not kept & set(again)
    assert {row["prompt"][-1]["content"] for row in made[1::2]} <= kept
    assert report["left_out"]["flagged as unsafe"] >= len(again)
    for row in made_rows(tmp_path / "marked", "sft-demonstrations.jsonl"):
        assert row["messages"][0]["content"] not in again
