"""Readers: every format becomes the right records, and invalid rows are rejected with their place."""

import csv
import dataclasses
import json

import pytest
from format_rows import ONE_ROW, REPLIES, ROW_IDS, STEERLM, chat, demonstration, pair, sharegpt
from public_rows import PUBLIC

from align.data.readers.table import READERS
from align.data.reading import read
from align.errors import InputError


@pytest.mark.parametrize("name, row, expected", ONE_ROW, ids=ROW_IDS)
def test_the_format_of_a_row_is_detected_and_the_row_is_read(lines, name, row, expected):
    found = read(lines(row))
    assert (found.format, found.num_rows, found.dropped) == (name, 1, {})
    assert found.records == (expected if isinstance(expected, list) else [expected])
    assert read(lines(row), format=name) == found


def test_every_reader_has_a_test_row():
    assert {name for name, *_ in ONE_ROW} | {each.format for each in PUBLIC.values()} == set(READERS)


def test_a_tied_verdict_has_no_chosen_response(lines):
    row = {"input": "ask", "output_A": "a", "output_B": "b", "parsed_result": {"x": {"preference": "same"}}}
    (found,) = read(lines(row)).records
    assert found.chosen is None and [response.content for response in found.responses] == ["a", "b"]


@pytest.mark.parametrize(
    "answers",
    [
        {"chosen": "a", "rejected": "b"},
        {"responses": [{"content": "a", "reward": 1}, {"content": "b", "reward": 0}]},
        {"completions": ["a", "b"]},
        {"completion": "a", "label": True},
    ],
)
def test_a_response_does_not_continue_a_message_of_the_assistant(lines, answers):
    turns = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "Sure: "}]
    with pytest.raises(InputError, match="prompt ends with a message of the assistant"):
        read(lines({"prompt": turns, **answers}))


JUNK = (
    None,
    "",
    "text",
    3,
    True,
    float("nan"),
    [],
    [3],
    ["a"],
    [None],
    [[]],
    {},
    {"a": 1},
    [{}],
    [{"a": {}}],
    [{"content": None}],
)


def with_junk(value):
    """Yield `value` with each of its parts replaced by each invalid value."""
    yield from JUNK
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(parts):
        for replaced in with_junk(part):
            copy = value.copy()
            copy[key] = replaced
            yield copy


EVERY_ROW = [
    *((name, row) for name, row, _ in ONE_ROW),
    *((each.format, each.rows[0]) for each in PUBLIC.values()),
]


@pytest.mark.parametrize("name, row", EVERY_ROW, ids=[*ROW_IDS, *PUBLIC])
def test_invalid_values_are_read_or_rejected_in_one_line(lines, name, row):
    tried = [{**row, column: junk} for column in row for junk in with_junk(row[column])]
    outcomes = set()
    for broken in tried:
        try:
            outcomes.add(type(read(lines(broken), format=name)))
        except InputError as error:
            assert "rows.jsonl" in str(error) and "\n" not in str(error) and len(str(error)) < 400
            outcomes.add(InputError)
    assert InputError in outcomes and len(tried) >= len(JUNK)


@pytest.mark.parametrize(
    "columns",
    [
        {"score_chosen": 8, "score_rejected": 3.5},
        {"chosen_score": "8", "rejected_score": "3.5"},
        {"chosen_rating": 8, "rejected_rating": 3.5},
        {"chosen-rating": 8, "rejected-rating": 3.5},
        {"chosen_reward": 8, "rejected_reward": 3.5, "margin": 1},
        {"metadata": {"score_chosen": 8.0, "score_rejected": 3.5}},
        {"score_chosen": None, "score_rejected": None, "metadata": {"chosen_rating": 8, "rejected_rating": 3.5}},
    ],
)
def test_rewards_of_a_pair_are_read_from_any_known_columns(lines, columns):
    (found,) = read(lines({"prompt": "ask", "chosen": "good", "rejected": "bad", **columns})).records
    assert [response.reward for response in found.responses] == [8.0, 3.5] and found.chosen == 0


def test_a_margin_becomes_the_reward_of_the_chosen_response(lines):
    (found,) = read(lines({"prompt": "ask", "chosen": "good", "rejected": "bad", "margin": 2})).records
    assert [response.reward for response in found.responses] == [2.0, 0.0]


def test_rewards_can_disagree_with_the_label(lines):
    (found,) = read(
        lines({"prompt": "a", "chosen": "good", "rejected": "bad", "score_chosen": 1, "score_rejected": 2})
    ).records
    assert (found.chosen, found.responses[0].content, found.responses[0].reward) == (0, "good", 1.0)


def test_a_review_scores_both_answers_unless_the_score_is_negative(lines):
    rows = [
        {"question_id": 1, "answer_id": "x", "model": "m", "text": "a"},
        {"question_id": 1, "answer_id": "y", "model": "n", "text": "b"},
        {"question_id": 1, "text": "ask"},
        *(
            {"question_id": 1, "answer1_id": "x", "answer2_id": "y", "score": score}
            for score in ([8, 5], [6, 10], [-1, -1])
        ),
    ]
    (found,) = read(lines(*rows), format="vicuna_eval").records
    assert [(response.content, response.reward) for response in found.responses] == [("a", 7.0), ("b", 7.5)]


@pytest.mark.parametrize(
    "mark", [{"loss_weight": 0.0}, {"loss_weight": 0.5}, {"weight": 0}, {"train": False}, {"loss": False}]
)
@pytest.mark.parametrize("turn", [1, 3])
def test_an_assistant_message_with_partial_loss_weight_is_rejected(lines, mark, turn):
    turns = chat("ask", "say", "more", "yes")
    turns[turn] |= mark
    with pytest.raises(
        InputError, match=r"row 1: an assistant message has (loss_weight|weight|train|loss) (0|0.5|0.0|False),"
    ):
        read(lines({"messages": turns}))
    turns[turn] |= {name: 1 for name in mark}
    turns[0] |= {name: 0 for name in mark}
    assert read(lines({"messages": turns})).records == [demonstration("ask", "say", "more", "yes")]


ASKED, SAID = ({"role": role, "content": role} for role in ("user", "assistant"))


@pytest.mark.parametrize("mark", [{"train": True}, {"training": "yes"}, {"weight": 1}, {"loss": 0.5}])
@pytest.mark.parametrize("role", ["system", "user", "human", "tool"])
@pytest.mark.parametrize(
    "row",
    [
        lambda marked: {"messages": [marked, ASKED, SAID]},
        lambda marked: {"prompt": [marked, ASKED], "completion": "say"},
        lambda marked: {"prompt": [marked, ASKED], "chosen": "good", "rejected": "bad"},
        lambda marked: {"chosen": [marked, ASKED, SAID], "rejected": [marked, ASKED, {**SAID, "content": "bad"}]},
    ],
)
def test_a_message_to_train_that_is_not_the_assistants_is_rejected(lines, row, role, mark):
    marked = {"role": role, "content": "text"}
    read(lines(row(marked)))
    with pytest.raises(InputError, match=r"row 1: a message of the (system|user|tool) has (train|weight|loss)"):
        read(lines(row({**marked, **mark})))


def test_a_response_as_a_chat_list_with_partial_loss_weight_is_rejected(lines):
    responses = [{"content": [{**SAID, "weight": 0}]}, {"content": [SAID]}]
    with pytest.raises(InputError, match="row 1: an assistant message has weight 0"):
        read(lines({"prompt": "ask", "responses": responses}))


@pytest.mark.parametrize("written", [json.dumps, str])
def test_chat_lists_in_cells_of_a_csv_file_are_read_as_in_json(lines, tmp_path, written):
    row = {"prompt": chat("=rule", "ask"), "chosen": chat("ask", "go\nod")[1:], "rejected": sharegpt("ask", "bad")[1:]}
    with (tmp_path / "rows.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([row.keys(), map(written, row.values())])
    assert read(str(tmp_path / "rows.csv")).records == read(lines(row)).records


@pytest.mark.parametrize("text", ['[{"role": "user"}] begins a list', '[{"id": 1}, {"id": 2}]', '[{"role": "user"}]'])
def test_text_that_is_no_chat_list_stays_text(lines, text):
    (found,) = read(lines({"prompt": text, "completion": text})).records
    assert [message.content for message in found.messages] == [text, text]


WRONG = {
    "half a pair": ({"prompt": "a", "chosen": "b"}, "the row has chosen without its counterpart"),
    "unknown columns": (
        {"premise": "a"},
        "no format matches the columns premise; the nearest formats need ",
    ),
    "too few columns": (
        {"question": "a"},
        "no format matches the columns question; the nearest formats need ",
    ),
    "an empty response": ({"prompt": "a", "chosen": "b", "rejected": " "}, "a response is empty"),
    "an empty answer": ({"instruction": "a", "output": ""}, "an assistant message is empty"),
    "an empty prompt": ({"instruction": "", "output": "b"}, "instruction is empty"),
    "no prompt": ({"chosen": "a", "rejected": "b"}, "no prompt, neither in a column nor in chosen"),
    "two prompts": (
        {"chosen": chat("a", "b"), "rejected": chat("c", "d")},
        "chosen and rejected have different prompts",
    ),
    "a reward that is not a number": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "wide"},
        "margin is 'wide'; a number is needed",
    ),
    "a NaN reward": (
        {"prompt": "a", "responses": [{"content": "b", "reward": "nan"}]},
        "reward is nan; a finite number is needed; omit a missing one",
    ),
    "a reward that overflows": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 10**400},
        "margin is 1000",
    ),
    "one reward of two": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 1},
        "some responses of a comparison have a reward",
    ),
    "a short label": ({"text": STEERLM + "b", "label": [1, 2]}, "label has 2 numbers; 9 are needed: quality, toxicity"),
    "a tool call without a name": (
        {"messages": [*chat("a"), {"role": "assistant", "content": None, "tool_calls": [{}]}]},
        "a tool call has the name None; text is needed",
    ),
    "a tool call of the user": (
        {"messages": [{"role": "user", "content": "a", "tool_calls": [{"name": "f"}]}, *chat("", "b")[1:]]},
        "a message of the user has tool_calls besides its content",
    ),
    "arguments that are no JSON": (
        {"messages": [*chat("a"), {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{x"}]}]},
        "a tool call contains '{x', which is not JSON",
    ),
    "a thought of the user": (
        {"messages": [{"role": "user", "content": "a", "reasoning_content": "hm"}, *chat("", "b")[1:]]},
        "a message of the user has reasoning_content besides its content; move it into the content, or remove it",
    ),
    "two thoughts": (
        {"messages": [*chat("a"), {"role": "assistant", "content": "b", "reasoning": "hm", "thinking": "ha"}]},
        "a message has two different thoughts; keep one",
    ),
    "a thought in the content and another beside it": (
        {"messages": [*chat("a"), {"role": "assistant", "content": "<think>x</think>b", "reasoning": "y"}]},
        "a message has a thought in its content and another one beside it; keep one",
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "the content of a user message has a part that is not text",
    ),
    "a refusal": (
        {"messages": [*chat("a"), {"role": "assistant", "content": "b", "refusal": "no"}]},
        "a message of the assistant has refusal besides its content",
    ),
    "a list of images": (
        {"conversations": [sharegpt("a")[0] | {"images": ["a.png"]}, *sharegpt("a", "b")[1:]]},
        "a message of the user has images besides its content",
    ),
    "two system messages": ({"system": "s", "messages": chat("=t", "a", "b")}, "the row has two system messages"),
    "two system columns": (
        {"system": "s", "system_prompt": "t", "instruction": "a", "output": "b"},
        "the row has two system messages",
    ),
    "a system message in the answer": (
        {"system": "s", "prompt": "a", "chosen": chat("=t", "a", "b"), "rejected": chat("=t", "a", "c")},
        "chosen has another system message than the row",
    ),
    "a rating without its score": (
        {"prompt": "a", "responses": [{"content": "b", "attributes": {"helpfulness": {"Score": 3}}}]},
        "helpfulness is {'Score': 3}; a number is needed, or an object with a score or a Rating",
    ),
    "chosen is a Boolean": (
        {"prompt": "a", "responses": ["b", "c"], "chosen": True},
        "chosen is True; the index of a response is needed",
    ),
    "an unknown role": (
        {"messages": [{"role": "narrator", "content": "a"}]},
        "unknown role 'narrator'; known roles are: system,",
    ),
    "a masked assistant": (
        {"conversations": sharegpt("a", "b"), "mask": "Assistant"},
        "mask 'Assistant' is not supported",
    ),
    "a trained user": (
        {"conversations": sharegpt("a", "b"), "mask": "System"},
        "mask 'System' is not supported",
    ),
    "answers in the prompt": (
        {"prompt": chat("a", "b", "c"), "completion": "d"},
        "the prompt contains assistant messages",
    ),
    "code in place of a list": (
        {"messages": "__import__('os').getcwd()"},
        "messages is \"__import__('os').getcwd()\"; a list is needed",
    ),
    "answers without questions": ({"question_id": 1, "answer_id": 2, "text": "a"}, "no row is a question"),
    "unranked replies": (
        {"message_tree_id": 1, "prompt": {"text": "a", "role": "prompter", "replies": REPLIES[1:2]}},
        "two ranked replies",
    ),
}


@pytest.mark.parametrize("row, message", WRONG.values(), ids=WRONG.keys())
def test_invalid_rows_are_rejected_with_their_place(lines, row, message):
    with pytest.raises(InputError) as caught:
        read(lines(row))
    assert f"rows.jsonl: row 1: {message}" in str(caught.value) or message in str(caught.value).partition("row 1: ")[2]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"system": "s", "messages": chat("=s", "ask", "say")}, demonstration("=s", "ask", "say")),
        ({"system": "s", "system_prompt": "s", "prompt": "ask", "output": "say"}, demonstration("=s", "ask", "say")),
        ({"system": "", "messages": chat("=t", "ask", "say")}, demonstration("=t", "ask", "say")),
        ({"system": "s", "chosen": chat("=s", "ask", "good"), "rejected": chat("=s", "ask", "bad")}, pair("=s", "ask")),
        (
            {
                "messages": [
                    *chat("ask"),
                    {**chat("", "say")[1], "reasoning_content": "", "images": [], "thinking": None},
                ]
            },
            demonstration("ask", "say"),
        ),
    ],
)
def test_repeated_or_empty_values_are_no_conflict(lines, row, expected):
    (found,) = read(lines(row)).records
    assert dataclasses.replace(found, metadata={}) == expected
