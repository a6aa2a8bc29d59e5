"""Rows of every format with the records they become."""

import json

from align.records import Comparison, Demonstration, Message, Prompt, Response


def talk(*texts):
    """A dialogue of these texts: a system message if the first starts with `=`, then user and assistant in turn."""
    system = [Message("system", texts[0][1:])] if texts[0].startswith("=") else []
    turns = texts[len(system) :]
    return (
        *system,
        *(Message(role, text) for role, text in zip(("user", "assistant") * len(turns), turns, strict=False)),
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

ONE_ROW = [  # format, row, the record or records of the row
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
        {"message_id": 5, "text": "ask", "role": "prompter", "lang": "en", "replies": REPLIES},
        group(("better", 0.0), ("worse", -1.0), chosen=0, metadata={"message_id": 5, "lang": "en"}),
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
ROW_IDS = [f"{name}-{number}" for number, (name, *_) in enumerate(ONE_ROW)]


EVERYTHING = [record for *_, expected in ONE_ROW for record in (expected if isinstance(expected, list) else [expected])]
