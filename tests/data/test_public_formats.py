"""Public data sets: their format is detected, their rows are read, and what is not read is counted."""

from pathlib import Path

import pytest
from public_rows import ARENA, LMSYS, PKU, PRM_PROBLEM, PUBLIC, REPORT, STEER2, moderation, rated, two

from align.data.readers.cells import MAX_LITERAL
from align.data.readers.table import READERS
from align.data.readers.verdicts import JudgedPair
from align.data.reading import read, stream
from align.errors import InputError
from align.rewards.judges import load_judge
from align.synth.scored_groups import prompt_of


@pytest.mark.parametrize("name", PUBLIC)
def test_public_rows_are_detected_and_read_and_what_is_not_read_is_counted(lines, name):
    expected = PUBLIC[name]
    found = stream(lines(*expected.rows))
    reading = found.read()
    assert found.format == expected.format
    assert reading.records == expected.records
    assert set(found.statistics.unused_columns) == expected.unread


@pytest.mark.parametrize("name", PUBLIC)
def test_public_rows_are_read_by_the_name_of_their_format(lines, name):
    expected = PUBLIC[name]
    assert read(lines(*expected.rows), format=expected.format).records == expected.records


JUDGED = [
    name for name, reader in READERS.items() if isinstance(reader.read, JudgedPair) or name in ("arena_turns", "shp")
]


@pytest.mark.parametrize("name", sorted(JUDGED))
def test_an_incomplete_pair_is_never_read_as_a_bare_prompt(lines, name):
    rows = [row for each in PUBLIC.values() for row in each.rows if each.format == name] or [JUST_EVAL_PAIR]
    for row in rows:
        for column in row:
            try:
                reading = read(lines({key: value for key, value in row.items() if key != column}))
            except InputError:
                continue
            assert reading.format != "prompt", f"without {column}"


def test_a_pair_of_an_unknown_form_is_an_error_unless_its_prompts_are_wanted(lines):
    path = lines({"prompt": "ask", "response_x": "a", "completion_1": "b", "completion_2": "c", "best": 1})
    with pytest.raises(InputError, match="no format matches the columns prompt, response_x, completion_1"):
        read(path)
    assert [record.messages[0].content for record in read(path, format="prompt").records] == ["ask"]


JUST_EVAL_PAIR = {"input": "a", "output_A": "b", "output_B": "c", "parsed_result": {"x": {"preference": "A"}}}


def turns(*texts):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, texts, strict=False)]


WRONG = {
    "an unknown winner": (
        {**ARENA, "winner": "model_c", "conversation_a": turns("ask", "a"), "conversation_b": turns("ask", "b")},
        "winner is 'model_c'; one of model_a, model_b, tie, tie (bothbad), both_bad is needed",
    ),
    "dialogues that differ before the end": (
        {
            **ARENA,
            "winner": "tie",
            "conversation_a": turns("x", "1", "y", "2"),
            "conversation_b": turns("x", "3", "y", "4"),
        },
        "conversation_a and conversation_b have different prompts",
    ),
    "no verdict": ({**PKU, "better_response_id": None}, "better_response_id is None; one of 0, 1 is needed"),
    "a strength that is no number": (
        {**STEER2, "preference_strength": None},
        "preference_strength is None; a number is needed",
    ),
    "a preference beyond the scale": (
        {"instruction": "ask", "output_1": "a", "output_2": "b", "preference": 3},
        "preference is 3; a number from 1 to 2 is needed, or 0 for a tie",
    ),
    "two winners": (
        {
            **{"prompt": '["ask"]', "response_a": '["a"]', "response_b": '["b"]'},
            **{"winner_model_a": 1, "winner_model_b": 1, "winner_tie": 0},
        },
        "2 of winner_model_a, winner_model_b, winner_tie are 1; exactly one is needed",
    ),
    "turns without an answer": (
        {
            **{"prompt": '["x", "y"]', "response_a": '["a"]', "response_b": '["b", "c"]'},
            **{"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0},
        },
        "response_a has 1 turns, and prompt has 2",
    ),
    "moderation of another dialogue": (
        {**LMSYS, "conversation": turns("ask", "a"), "openai_moderation": moderation(False)},
        "openai_moderation has 1 entries, and conversation has 2 messages",
    ),
    "moderation without a verdict": (
        {**LMSYS, "conversation": turns("ask", "a"), "openai_moderation": moderation(False, None)},
        "flagged of openai_moderation is None; true or false is needed",
    ),
    "a distractor without its place": (
        {"conversation": turns("ask", "a"), "distractors": [{"distractor": "x"}]},
        "bot turn of a distractor is None; text is needed",
    ),
    "distractors that are no literal": (
        {"conversation_json": turns("ask", "a"), "distractors": "[open('x')]"},
        "distractors is \"[open('x')]\"; a list is needed, as JSON or as a Python literal",
    ),
    "a table question without an answer": (
        {"question": "ask", "answers": [], "table": {"header": ["a"], "rows": []}},
        "answers is empty; a text is needed",
    ),
    "a report without a question": (
        {**REPORT, "qa": {"question": " ", "exe_ans": 1}},
        "question is empty",
    ),
    "a solution that the labeler gave up": (
        {"question": PRM_PROBLEM, "label": {"finish_reason": "give_up", "steps": []}},
        "finish_reason is 'give_up'; a judged solution has solution or found_error",
    ),
    "a chosen step that is wrong": (
        {
            "question": PRM_PROBLEM,
            "label": {
                "finish_reason": "solution",
                "steps": [{"completions": [rated("a", -1)], "chosen_completion": 0}],
            },
        },
        "the chosen solution has a step that is rated as wrong",
    ),
    "right steps that solve nothing": (
        {"prompt": "ask", "completions": ["a", "b"], "labels": [True, True]},
        "the solution ends before a final answer",
    ),
    "too few ratings": (
        {"instruction": "ask", "generations": ["a", "b"], "ratings": [5]},
        "ratings has 1 items, and generations has 2",
    ),
}


@pytest.mark.parametrize("row, message", WRONG.values(), ids=WRONG.keys())
def test_rows_without_a_clear_verdict_are_rejected_with_their_place(lines, row, message):
    with pytest.raises(InputError) as caught:
        read(lines(row))
    assert f"rows.jsonl: row 1: {message}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("FinQA", ["so it is 0.5", "The answer is 50%."], ["The answer is 5%."]),
        ("WikiTableQuestions", ["The answer is c d and a|b.", "The answer is a|b, c d"], ["The answer is a|b"]),
        ("MATH", ["\\boxed{4}"], ["\\boxed{5}"]),
    ],
)
def test_the_known_answers_of_public_rows_are_those_that_the_judge_expects(lines, name, right, wrong):
    prompt = prompt_of(read(lines(*PUBLIC[name].rows)).records[-1])
    (verdicts,) = load_judge("ground_truth")([(prompt, [*right, *wrong])])
    assert [verdict.reward for verdict in verdicts] == [1.0] * len(right) + [0.0] * len(wrong)


def test_a_long_python_literal_is_refused_before_it_is_parsed(lines):
    row = {"conversation_json": turns("ask", "a"), "distractors": "[" + "'x', " * (MAX_LITERAL // 5 + 1) + "]"}
    with pytest.raises(InputError, match=r"distractors has 1,048,5\d\d characters and is not JSON; a Python"):
        read(lines(row))


def test_a_verdict_in_a_csv_file_is_text(tmp_path):
    (tmp_path / "a.csv").write_text("input,output_1,output_2,label\nask,a,b,2.0\n")
    assert read(str(tmp_path / "a.csv")).records == [two("a", "b", 1)]


def test_not_a_number_is_no_strength(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,response_1,response_2,preference_strength\nask,a,b,nan\n")
    with pytest.raises(InputError, match="preference_strength is nan; a finite number is needed"):
        read(str(tmp_path / "a.csv"))


IDS = {
    "question_id": [
        {"question_id": 1, "text": "a"},
        {"question_id": 2, "text": "b"},
        {"question_id": "1", "text": "a"},
    ],
    "answer_id": [
        {"question_id": 1, "text": "ask"},
        {"question_id": 1, "answer_id": "x", "text": "a"},
        {"question_id": 1, "answer_id": "x", "text": "b"},
    ],
    "review_id": [
        {"question_id": 1, "text": "ask"},
        {"question_id": 1, "review_id": 5, "answer1_id": "x", "answer2_id": "y", "score": [1, 2]},
        {"question_id": 1, "review_id": 5, "answer1_id": "x", "answer2_id": "y", "score": [3, 4]},
    ],
}


@pytest.mark.parametrize("column", IDS)
def test_a_repeated_id_is_an_error_that_names_both_rows(lines, column):
    with pytest.raises(InputError) as caught:
        read(lines(*IDS[column]), format="vicuna_eval")
    assert "rows.jsonl: row 3: " + column in str(caught.value)
    assert "is also that of" in str(caught.value) and f"row {1 if column == 'question_id' else 2};" in str(caught.value)


def test_rows_of_4480_prompts_are_never_reduced_to_80(lines):
    rows = [{"question_id": number % 80, "text": f"ask {number}"} for number in range(4480)]
    with pytest.raises(InputError, match="row 81: question_id 0 is also that of .*row 1; ids must differ"):
        read(lines(*rows))


NEAREST = {
    ("question_text", "answer_text"): "question_answer: question, answer",
    ("instructions", "outputs"): "alpaca: instruction, output",
    ("prompts", "chosen_answer", "rejected_answer"): "preference: ",
    ("Prompt", "Completion"): "prompt_completion: prompt, completion",
    ("conversation_list",): "messages: conversation",
    ("x", "y"): "preference: chosen, rejected; messages: messages; prompt_completion: prompt, completion",
}


@pytest.mark.parametrize("columns", NEAREST)
def test_an_unreadable_file_names_its_columns_and_the_three_nearest_formats(lines, columns):
    with pytest.raises(InputError) as caught:
        read(lines(dict.fromkeys(columns, "text")))
    text = str(caught.value)
    assert f"no format matches the columns {', '.join(columns)}; the nearest formats need " in text
    assert NEAREST[columns] in text
    listed = text.partition("need ")[2].partition("; map your")[0].split("; ")
    assert len(listed) == 3 and all(each.partition(":")[0] in READERS for each in listed)


def test_every_format_is_in_the_table_of_formats():
    page = (Path(__file__).parents[2] / "docs/data.md").read_text()
    assert [name for name in READERS if f"`{name}`" not in page] == []
