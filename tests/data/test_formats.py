import dataclasses
import datetime
import json
import sys

import pytest

from align.data.readers.table import READERS
from align.data.reading import read, stream
from align.data.writing import write
from align.errors import InputError, RunError
from align.records import Comparison, Demonstration, Message, Prompt, Response


def talk(*texts):
    """A dialogue from its texts: `=` opens the system's, then the user and the assistant take turns."""
    system = [Message("system", texts[0][1:])] if texts[0].startswith("=") else []
    said = texts[len(system) :]
    return (
        *system,
        *(Message(role, text) for role, text in zip(("user", "assistant") * len(said), said, strict=False)),
    )


def chat(*texts):
    return [{"role": message.role, "content": message.content} for message in talk(*texts)]


def sharegpt(*texts):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return [{"from": names[message.role], "value": message.content} for message in talk(*texts)]


def pair(*prompt, rewards=(None, None), metadata=None):
    return Comparison(talk(*prompt), (Response("good", rewards[0]), Response("bad", rewards[1])), 0, metadata or {})


def group(*responses, chosen=None, metadata=None):
    return Comparison(talk("ask"), tuple(Response(*response) for response in responses), chosen, metadata or {})


def demonstration(*texts, **metadata):
    return Demonstration(talk(*texts), metadata)


PARTS = [{"type": "text", "text": "sa"}, {"type": "text", "value": "y"}]
STEERLM = "<extra_id_0>System\n\n<extra_id_1>User\nask\n<extra_id_1>Assistant\n"
REPLIES = [
    {"text": "worse", "role": "assistant", "rank": 1, "replies": []},
    {"text": "unranked", "role": "assistant", "rank": None},
    {"text": "gone", "role": "assistant", "rank": 2, "deleted": True},
    {
        "text": "better",
        "role": "assistant",
        "rank": 0,
        "replies": [{"text": "more", "role": "prompter", "replies": []}],
    },
]
FINE = {"helpfulness": {"Rating": "4", "Rationale": "r"}, "honesty": {"Rating": "N/A"}}
ULTRA = [
    {"response": "a", "overall_score": 8, "annotations": FINE, "model": "m"},
    {"response": "b", "overall_score": 7.5},
]

ONE_ROW = [  # reader, row, the records that the row is
    (
        "messages",
        {"messages": chat("=be brief", "ask", "say"), "id": 7},
        demonstration("=be brief", "ask", "say", id=7),
    ),
    ("messages", {"messages": [*chat("ask"), {"role": "assistant", "content": PARTS}]}, demonstration("ask", "say")),
    ("messages", {"messages": json.dumps(chat("ask", "say"))}, demonstration("ask", "say")),
    ("messages", {"messages": chat("ask", "say", "again")}, Prompt(talk("ask", "say", "again"))),
    ("messages", {"messages": chat("ask"), "ground_truth": "3"}, Prompt(talk("ask"), {"ground_truth": "3"})),
    ("messages", {"conversation": chat("ask", "say")}, demonstration("ask", "say")),
    (
        "sharegpt",
        {"conversations": sharegpt("ask", "say", "more", "yes"), "mask": "User", "system": "s"},
        demonstration("=s", "ask", "say", "more", "yes"),
    ),
    (
        "topic_following",
        {
            "conversation_json": json.dumps(
                "[{'role': 'user', 'content': \"it's\"}\n {'role': 'assistant', 'content': 'ok'}]"
            ),
            "system_instruction": "stay",
        },
        demonstration("=stay", "it's", "ok"),
    ),
    ("alpaca", {"instruction": "ask", "input": "", "output": "say"}, demonstration("ask", "say")),
    (
        "alpaca",
        {"instruction": "ask", "input": "of this", "output": "say", "system": "s", "history": [["a", "b"]]},
        demonstration("=s", "a", "b", "ask\n\nof this", "say"),
    ),
    (
        "alpaca",
        {"instruction": "ask", "context": "of this", "response": "say", "category": "qa"},
        demonstration("ask\n\nof this", "say", category="qa"),
    ),
    (
        "self_instruct",
        {"instruction": "ask", "instances": [{"input": "1", "output": "a"}, {"input": "", "output": "b"}], "id": 1},
        [demonstration("ask\n\n1", "a", id=1), demonstration("ask", "b", id=1)],
    ),
    ("prompt_completion", {"prompt": "ask", "completion": "say"}, demonstration("ask", "say")),
    (
        "prompt_completion",
        {"prompt": chat("=s", "ask"), "completion": chat("x", "say")[1:]},
        demonstration("=s", "ask", "say"),
    ),
    ("prompt_completion", {"input": "1 2", "output": "2 1"}, demonstration("1 2", "2 1")),
    ("question_answer", {"question": "ask", "answer": "say"}, demonstration("ask", "say")),
    ("mbpp", {"text": "ask", "code": "def", "test_list": ["t"]}, demonstration("ask", "def", test_list=["t"])),
    ("prompt", {"prompt": "ask", "tests": ["t"]}, Prompt(talk("ask"), {"tests": ["t"]})),
    ("prompt", {"prompt": chat("ask", "say", "more")}, Prompt(talk("ask", "say", "more"))),
    ("preference", {"prompt": "ask", "chosen": "good", "rejected": "bad"}, pair("ask")),
    (
        "preference",
        {"prompt": chat("ask"), "chosen": chat("x", "good")[1:], "rejected": chat("x", "bad")[1:]},
        pair("ask"),
    ),
    ("preference", {"chosen": chat("=s", "ask", "good"), "rejected": chat("=s", "ask", "bad")}, pair("=s", "ask")),
    ("preference", {"prompt": "ask", "chosen": chat("ask", "good"), "rejected": chat("ask", "bad")}, pair("ask")),
    (
        "preference",
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: ask\n\nAssistant: good",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: ask\n\nAssistant: bad",
        },
        pair("a", "b", "ask"),
    ),
    ("preference", {"prompt": "\n\nHuman: ask\n\nAssistant:", "chosen": "good", "rejected": "bad"}, pair("ask")),
    (
        "preference",
        {"conversations": sharegpt("ask"), "chosen": sharegpt("x", "good")[1], "rejected": sharegpt("x", "bad")[1]},
        pair("ask"),
    ),
    ("preference", {"chosen_messages": chat("ask", "good"), "rejected_messages": chat("ask", "bad")}, pair("ask")),
    ("preference", {"system": "s", "question": "ask", "chosen": "good", "rejected": "bad"}, pair("=s", "ask")),
    (
        "nemo_aligner",
        {
            "prompt": STEERLM,
            "chosen_response": "good\n<extra_id_1>",
            "rejected_response": "bad\n<extra_id_1>",
            "chosen_reward": 3,
            "rejected_reward": 1,
        },
        pair("ask", rewards=(3.0, 1.0), metadata={"chosen_reward": 3, "rejected_reward": 1}),
    ),
    (
        "nemo_rl",
        {
            "context": chat("ask"),
            "completions": [{"rank": 1, "completion": chat("x", "b")[1:]}, {"rank": 0, "completion": "a"}],
        },
        group(("b", -1.0), ("a", 0.0), chosen=1),
    ),
    (
        "nemo_rl",
        {
            "context": "ask",
            "completions": [{"rank": 0, "completion": "a", "reward": 2.5}, {"rank": 0, "completion": "b", "reward": 2}],
        },
        group(("a", 2.5), ("b", 2.0)),
    ),
    (
        "unpaired",
        {"messages": chat("ask", "say", "more", "good"), "label": True},
        Comparison(talk("ask", "say", "more"), (Response("good", 1.0),), None, {"liked": True}),
    ),
    (
        "unpaired",
        {"prompt": "ask", "completion": "bad", "label": 0},
        Comparison(talk("ask"), (Response("bad", 0.0),), None, {"liked": False}),
    ),
    (
        "unpaired",
        {"instruction": "ask", "input": "", "output": "good", "kto_tag": "true"},
        Comparison(talk("ask"), (Response("good", 1.0),), None, {"liked": True}),
    ),
    (
        "unpaired",
        {"conversations": sharegpt("ask", "bad"), "system": "s", "kto_tag": False},
        Comparison(talk("=s", "ask"), (Response("bad", 0.0),), None, {"liked": False}),
    ),
    (
        "helpsteer",
        {
            "prompt": "a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nask",
            "response": "x",
            "helpfulness": 4,
            "verbosity": None,
        },
        Comparison(talk("a", "b", "ask"), (Response("x", None, {"helpfulness": 4.0}),)),
    ),
    (
        "steerlm",
        {"text": f"{STEERLM}x\n<extra_id_2>", "label": [-100, 1, -100, -100, 4, 3, -100, 2, 0]},
        group(
            ("x", None, {"toxicity": 1.0, "helpfulness": 4.0, "correctness": 3.0, "complexity": 2.0, "verbosity": 0.0})
        ),
    ),
    (
        "just_eval",
        {"prompt": "ask", "response": "x", "ratings": {"depth": {"score": "5"}, "clarity": {"score": "N/A"}}},
        group(("x", None, {"depth": 5.0})),
    ),
    (
        "just_eval",
        {"input": "ask", "output_cand": "x", "prompt": "judge this", "parsed_result": {"depth": {"score": 2}}},
        group(("x", None, {"depth": 2.0}), metadata={"prompt": "judge this"}),
    ),
    (
        "just_eval_pairs",
        {
            "input": "ask",
            "output_A": "a",
            "output_B": "b",
            "parsed_result": {name: {"preference": side} for name, side in zip("xyz", ("A", "B", "B"), strict=True)},
        },
        group(
            ("a",),
            ("b",),
            chosen=1,
            metadata={"parsed_result": {"x": {"preference": "A"}, "y": {"preference": "B"}, "z": {"preference": "B"}}},
        ),
    ),
    (
        "ultrafeedback",
        {"instruction": "ask", "completions": ULTRA},
        group(("a", 8.0, {"helpfulness": 4.0}), ("b", 7.5), metadata={"models": ["m", None]}),
    ),
    (
        "alpaca_eval",
        {"instruction": "ask", "responses": [{"output": "a", "preference": 1.5}, {"output": "b", "preference": 1}]},
        group(("a", 1.5), ("b", 1.0)),
    ),
    (
        "acecode",
        {"question": "ask", "inferences": [{"completion": "a", "pass_rate": 0.5}], "test_cases": ["t"]},
        group(("a", 0.5), metadata={"test_cases": ["t"]}),
    ),
    (
        "completions",
        {"raw_text": "ask", "completions": ["a", "b"], "aspect": "x"},
        group(("a",), ("b",), metadata={"aspect": "x"}),
    ),
    (
        "completions",
        {"prompt": "ask", "completions": [{"model": "m", "completion": "a"}]},
        group(("a",), metadata={"models": ["m"]}),
    ),
    (
        "sampling_report",
        {"prompt": "ask", "results": [{"sampling_config": "k", "outputs": ["a", "b"]}, {"outputs": ["c"]}]},
        group(("a",), ("b",), ("c",), metadata={"models": ["k", "k", None]}),
    ),
    (
        "openassistant",
        {"message_tree_id": 1, "prompt": {"text": "ask", "role": "prompter", "message_id": 5, "replies": REPLIES}},
        group(("better", 0.0), ("worse", -1.0), chosen=0, metadata={"message_id": 5}),
    ),
    (
        "openassistant",
        {"message_id": 5, "text": "ask", "role": "prompter", "replies": REPLIES},
        group(("better", 0.0), ("worse", -1.0), chosen=0, metadata={"message_id": 5}),
    ),
    (
        "vicuna_eval",
        {"question_id": 1, "text": "ask", "category": "c"},
        Prompt(talk("ask"), {"question_id": 1, "category": "c"}),
    ),
    (
        "native",
        {
            "prompt": "ask",
            "responses": [{"content": "a", "reward": 1, "attributes": {"depth": 2}}, {"content": "b", "reward": 0}],
            "chosen": 1,
        },
        group(("a", 1.0, {"depth": 2.0}), ("b", 0.0), chosen=1),
    ),
]
IDS = [f"{name}-{number}" for number, (name, *_) in enumerate(ONE_ROW)]


@pytest.fixture
def lines(tmp_path):
    def written(*rows):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / "rows.jsonl")

    return written


@pytest.mark.parametrize("name, row, expected", ONE_ROW, ids=IDS)
def test_a_row_is_recognised_and_read(lines, name, row, expected):
    found = read(lines(row))
    assert (found.format, found.num_rows, found.dropped) == (name, 1, {})
    assert found.records == (expected if isinstance(expected, list) else [expected])
    assert read(lines(row), format=name) == found


def test_every_reader_has_a_row():
    assert {name for name, *_ in ONE_ROW} == set(READERS)


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
    """`value` with each of its parts in turn replaced by each piece of junk."""
    yield from JUNK
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(parts):
        for replaced in with_junk(part):
            copy = value.copy()
            copy[key] = replaced
            yield copy


@pytest.mark.parametrize("name, row, _", ONE_ROW, ids=IDS)
def test_junk_in_any_cell_is_read_or_refused_in_one_line(lines, name, row, _):
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
def test_a_pair_takes_its_rewards_from_whichever_columns_hold_them(lines, columns):
    (found,) = read(lines({"prompt": "ask", "chosen": "good", "rejected": "bad", **columns})).records
    assert [response.reward for response in found.responses] == [8.0, 3.5] and found.chosen == 0


def test_a_margin_alone_is_the_reward_of_the_chosen_response(lines):
    (found,) = read(lines({"prompt": "ask", "chosen": "good", "rejected": "bad", "margin": 2})).records
    assert [response.reward for response in found.responses] == [2.0, 0.0]


def test_rewards_may_disagree_with_the_label_which_stays_first(lines):
    (found,) = read(
        lines({"prompt": "a", "chosen": "good", "rejected": "bad", "score_chosen": 1, "score_rejected": 2})
    ).records
    assert (found.chosen, found.responses[0].content, found.responses[0].reward) == (0, "good", 1.0)


def test_neighbouring_rows_of_one_prompt_are_one_comparison(lines):
    rows = [{"prompt": prompt, "response": text, "helpfulness": 1} for prompt, text in ("aw", "ax", "by", "az")]
    found = read(lines(*rows))
    groups = [(one.prompt[0].content, [response.content for response in one.responses]) for one in found.records]
    assert groups == [("a", ["w", "x"]), ("b", ["y"]), ("a", ["z"])] and found.num_rows == 4


def test_a_record_knows_the_row_it_came_from_also_where_rows_are_joined(lines):
    rated = [{"prompt": prompt, "response": "a", "helpfulness": 3} for prompt in "aabbbc"]
    spoilt = {**rated[0], "response": ""}
    path = lines(rated[0], spoilt, *rated[1:], {"prompt": "d"})
    found = stream(path, on_error="skip")
    assert [(located.record.prompt[0].content, located.place) for located in found.records] == [
        (prompt, f"{path}: row {row}") for prompt, row in [("a", 1), ("b", 4), ("c", 7)]
    ]


def test_a_review_counts_for_both_answers_and_minus_one_for_none(lines):
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


@pytest.mark.parametrize("mark", [{"loss_weight": 0.0}, {"loss_weight": 0.5}, {"weight": 0}, {"train": False}])
@pytest.mark.parametrize("turn", [1, 3])
def test_an_answer_marked_as_not_trained_is_not_trained(lines, mark, turn):
    turns = chat("ask", "say", "more", "yes")
    turns[turn] |= mark
    with pytest.raises(
        InputError, match=r"row 1: an assistant message has (loss_weight|weight|train) (0|0.5|0.0|False),"
    ):
        read(lines({"messages": turns}))
    turns[turn] |= {name: 1 for name in mark}
    turns[0] |= mark
    assert read(lines({"messages": turns})).records == [demonstration("ask", "say", "more", "yes")]


WRONG = {
    "half a pair": ({"prompt": "a", "chosen": "b"}, "the row has chosen without its counterpart"),
    "unknown columns": ({"premise": "a"}, "no format has the columns premise; there are openassistant, nemo_aligner, "),
    "too few columns": (
        {"question": "a"},
        "no format has the columns question; there are acecode (question inferences), question_answer (",
    ),
    "an empty response": ({"prompt": "a", "chosen": "b", "rejected": " "}, "a response is empty"),
    "an empty answer": ({"instruction": "a", "output": ""}, "an assistant message is empty"),
    "an empty prompt": ({"instruction": "", "output": "b"}, "instruction is empty"),
    "no prompt": ({"chosen": "a", "rejected": "b"}, "no prompt, neither in a column nor in chosen"),
    "two prompts": (
        {"chosen": chat("a", "b"), "rejected": chat("c", "d")},
        "chosen and rejected have different prompts",
    ),
    "a reward that is no number": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "wide"},
        "margin is 'wide'; a number is needed",
    ),
    "a NaN reward": (
        {"prompt": "a", "responses": [{"content": "b", "reward": float("nan")}]},
        "reward is nan; a finite number is needed",
    ),
    "a reward beyond all numbers": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 10**400},
        "margin is 1000",
    ),
    "one reward of two": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 1},
        "some responses of a comparison have a reward",
    ),
    "a short label": ({"text": STEERLM + "b", "label": [1, 2]}, "label has 2 numbers; 9 are needed: quality, toxicity"),
    "a tool call": (
        {"messages": [*chat("a"), {"role": "assistant", "content": None, "tool_calls": [{}]}]},
        "a message contains a tool call",
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "the content of a user message has a part that is not text",
    ),
    "a thought": (
        {"messages": [*chat("a"), {"role": "assistant", "content": "b", "reasoning_content": "hm"}]},
        "a message has reasoning_content besides its content; move it into the content, or remove it",
    ),
    "a picture": (
        {"conversations": [sharegpt("a")[0] | {"images": ["a.png"]}, *sharegpt("a", "b")[1:]]},
        "a message has images besides its content",
    ),
    "two system messages": ({"system": "s", "messages": chat("=t", "a", "b")}, "the row has two system messages"),
    "two system columns": (
        {"system": "s", "system_prompt": "t", "instruction": "a", "output": "b"},
        "the row has two system messages",
    ),
    "a system message in either dialogue": (
        {"system": "s", "prompt": "a", "chosen": chat("=t", "a", "b"), "rejected": chat("=t", "a", "c")},
        "chosen has another system message than the row",
    ),
    "a rating without its score": (
        {"prompt": "a", "responses": [{"content": "b", "attributes": {"helpfulness": {"Score": 3}}}]},
        "helpfulness is {'Score': 3}; a number is needed, or an object with a score or a Rating",
    ),
    "a choice by yes": (
        {"prompt": "a", "responses": ["b", "c"], "chosen": True},
        "chosen is True; the index of a response is needed",
    ),
    "an unpaired surrogate": (
        {"prompt": "a", "completion": "\ud800 hi"},
        r"a text contains '\ud800', an unpaired surrogate",
    ),
    "a stranger": (
        {"messages": [{"role": "narrator", "content": "a"}]},
        "unknown role 'narrator'; known roles are: system,",
    ),
    "a masked assistant": ({"conversations": sharegpt("a", "b"), "mask": "Assistant"}, "mask is 'Assistant'"),
    "answers in the prompt": (
        {"prompt": chat("a", "b", "c"), "completion": "d"},
        "the prompt contains assistant messages",
    ),
    "code for a list": (
        {"messages": "__import__('os').getcwd()"},
        "messages is \"__import__('os').getcwd()\"; a list is needed",
    ),
    "a tied verdict": (
        {"input": "a", "output_A": "b", "output_B": "c", "parsed_result": {"x": {"preference": "same"}}},
        "prefers neither",
    ),
    "answers without questions": ({"question_id": 1, "answer_id": 2, "text": "a"}, "no row is a question"),
    "unranked replies": (
        {"message_tree_id": 1, "prompt": {"text": "a", "role": "prompter", "replies": REPLIES[1:2]}},
        "two ranked replies",
    ),
}


@pytest.mark.parametrize("row, message", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_row_is_named_with_its_place(lines, row, message):
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
def test_what_is_said_twice_or_holds_nothing_is_no_contradiction(lines, row, expected):
    (found,) = read(lines(row)).records
    assert dataclasses.replace(found, metadata={}) == expected


@pytest.mark.parametrize(
    ("row", "unused"),
    [
        ({"prompt": "a", "output": "b", "response": "c"}, {"output"}),
        ({"instruction": "a", "input": "", "context": "b", "output": "c"}, set()),
        ({"instruction": "a", "input": "b", "context": "c", "output": "d"}, {"context"}),
        ({"prompt": "a", "completion": "b", "metadata": {"id": 1}, "id": 2, "tags": [], "note": ""}, {"id"}),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 2, "score_rejected": 1, "margin": 1}, set()),
        ({"prompt": "a", "response": "b", "helpfulness": 3, "verbosity": 1, "split": "train"}, {"split"}),
        ({"input": "a", "output_A": "b", "output_B": "c", "parsed_result": {"x": {"preference": "A"}}}, set()),
    ],
)
def test_columns_that_no_reader_used_are_counted(lines, row, unused):
    found = stream(lines(row, row))
    list(found.records)
    assert found.statistics.unused_columns == dict.fromkeys(unused, 2)


def test_dropped_rows_are_counted_by_reason(lines):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = lines(good, {**good, "chosen": ""}, {**good, "rejected": " "}, {"prompt": "a"}, good)
    found = read(path, on_error="skip")
    needs = "preference needs chosen rejected or chosen_messages rejected_messages; there are the columns prompt"
    assert (len(found.records), found.num_rows, found.dropped) == (2, 5, {"a response is empty": 2, needs: 1})
    with pytest.raises(InputError, match="row 2: a response is empty"):
        read(path)
    with pytest.raises(InputError, match="none of the 1 rows can be read: a response is empty"):
        read(lines({**good, "chosen": ""}), on_error="skip")


def test_a_group_loses_only_its_empty_responses(lines):
    path = lines({"prompt": "ask", "responses": [{"content": text, "reward": 1} for text in ("a", " ", "b")]})
    assert read(path, on_error="skip").records == [group(("a", 1.0), ("b", 1.0))]
    assert read(path, on_error="skip").dropped == {"a response is empty": 1}
    with pytest.raises(InputError, match="row 1: a response is empty"):
        read(path)


def test_a_limit_stops_the_reading(lines):
    path = lines(*({"prompt": str(number)} for number in range(9)))
    found = read(path, limit=3)
    assert (found.num_rows, found.records) == (3, read(path).records[:3])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"format": "alpacca"}, "no format is called 'alpacca'; did you mean 'alpaca'?"),
        (
            {"format": "alpaca"},
            "row 1: alpaca needs instruction output or instruction response; there are the columns prompt",
        ),
        ({"format": "json:loads"}, "reader 'json:loads' is of type function; a Reader is needed"),
        ({"on_error": "skpi"}, "on_error is 'skpi'; did you mean 'skip'?"),
        ({"limit": 0}, "limit is 0"),
    ],
)
def test_a_wrong_setting_is_answered_with_a_right_one(lines, settings, message):
    with pytest.raises(InputError) as caught:
        read(lines({"prompt": "a"}), **settings)
    assert message in str(caught.value)


def test_an_empty_file_is_refused(tmp_path):
    for name in ("a.json", "a.jsonl", "a.csv"):
        (tmp_path / name).write_text("")
        with pytest.raises(InputError, match=f"{name}: contains no rows"):
            read(str(tmp_path / name))


def test_a_reader_of_ones_own_comes_in_by_dotted_path(lines, tmp_path, monkeypatch):
    (tmp_path / "their_format.py").write_text(
        "from align.data.readers.table import Reader\n"
        "from align.records import Message, Prompt\n"
        "reader = Reader(('q',), lambda row: iter([Prompt((Message('user', row['q']),))]))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert read(lines({"q": "ask"}), format="their_format:reader").records == [Prompt(talk("ask"))]
    del sys.modules["their_format"]


EVERYTHING = [record for *_, expected in ONE_ROW for record in (expected if isinstance(expected, list) else [expected])]


@pytest.mark.parametrize("turned", [1, -1])
def test_what_is_written_reads_back_equal(tmp_path, turned):
    odd = Demonstration(
        talk("=\u2028 \U0001f600", "\r\n\0", "<s>{{x}}"), {"metadata": {"prompt": [1.5, None]}, "responses": []}
    )
    records = [*EVERYTHING, odd][::turned]
    write(tmp_path / "all.jsonl", records)
    found = read(str(tmp_path / "all.jsonl"), format="native")
    assert found.records == records and len(records) > len(ONE_ROW)


@pytest.mark.parametrize("record", EVERYTHING, ids=lambda record: type(record).__name__)
def test_a_written_record_is_recognised_alone(tmp_path, record):
    write(tmp_path / "one.jsonl", [record])
    assert read(str(tmp_path / "one.jsonl")).records == [record]


@pytest.mark.parametrize(
    "record, message",
    [
        (Prompt(talk("a"), {"x": float("inf")}), "Out of range float"),
        (Prompt(talk("a"), {"x": object()}), "metadata contains a value of type object, which JSON cannot represent"),
        (Demonstration(talk("a", "b", "c")), "ends with a prompt"),
    ],
)
def test_a_failed_write_leaves_what_was_there(tmp_path, record, message):
    target = tmp_path / "records.jsonl"
    write(target, EVERYTHING[:2])
    before = target.read_bytes()
    with pytest.raises(InputError, match=message):
        write(target, [*EVERYTHING, record])
    assert target.read_bytes() == before and list(tmp_path.iterdir()) == [target]


def test_a_date_from_a_table_is_written_as_text(tmp_path):
    write(tmp_path / "a.jsonl", [Prompt(talk("a"), {"day": datetime.date(2024, 6, 17)})])
    assert read(str(tmp_path / "a.jsonl")).records[0].metadata == {"day": "2024-06-17"}


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(RunError, match="missing/a.jsonl: No such file or directory"):
        write(tmp_path / "missing" / "a.jsonl", EVERYTHING)
    with pytest.raises(InputError, match=r"a.json: records are written as .jsonl, not as .json"):
        write(tmp_path / "a.json", EVERYTHING)
