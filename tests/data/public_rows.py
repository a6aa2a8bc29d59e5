"""Rows in the exact columns of public data sets, with own wording: format, rows, records, and columns not read."""

import json
from typing import NamedTuple

from format_rows import chat, demonstration, talk

from align.records import Comparison, Demonstration, Message, Prompt, Record, Response, ToolCall


class Public(NamedTuple):
    """A data set: the format that is detected, sample rows, their records, and the columns and fields not read."""

    format: str
    rows: list[dict]
    records: list[Record]
    unread: set[str] = set()


def two(first, second, chosen, *, prompt=("ask",), rewards=(None, None), metadata=None):
    responses = (Response(first, rewards[0]), Response(second, rewards[1]))
    return Comparison(talk(*prompt), responses, chosen, metadata or {})


def tool(name, properties):
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


def liked(text, reward, metadata):
    return Comparison(talk("ask"), (Response(text, reward),), None, {**metadata, "liked": bool(reward)})


PKU = {
    "prompt": "ask",
    "response_0": "a",
    "response_1": "b",
    "is_response_0_safe": False,
    "is_response_1_safe": True,
    "safer_response_id": 1,
}
PKU_METADATA = {key: PKU[key] for key in ("is_response_0_safe", "is_response_1_safe", "safer_response_id")}
STEER2 = {
    "split": "train",
    "prompt": "first\n<extra_id_1>Assistant\nreply\n<extra_id_1>User\nask",
    "response_1": "a",
    "response_2": "b",
    "preference_statement": "One is better.",
    "preference_elaboration": "",
    "three_most_similar_preferences": [],
    "all_preferences_unprocessed": [],
}
STEER2_METADATA = {key: STEER2[key] for key in STEER2 if key not in ("prompt", "response_1", "response_2")}
STEER2_PROMPT = ("first", "reply", "ask")
STEER3 = {"domain": "general", "language": "english", "context": chat("ask")}
STEER3_METADATA = {"domain": "general", "language": "english"}
ARENA = {"question_id": "q", "model_a": "m", "model_b": "n", "language": "English", "turn": 1}
ARENA_140K = [{"role": "user", "content": [{"type": "text", "text": "ask", "image": None, "mimeType": None}]}]
KAGGLE = {"id": 7, "model_a": "m", "model_b": "n", "prompt": '["ask"]', "response_a": '["a"]', "response_b": '["b"]'}
KAGGLE_METADATA = {key: KAGGLE[key] for key in ("id", "model_a", "model_b")}
SHP = {"post_id": "p", "history": "ask", "score_A": 5, "score_B": 12, "human_ref_A": "a", "human_ref_B": "b"}
PANDA = {"idx": 0, "instruction": "ask", "input": "this", "response1": "a", "response2": "b", "cmp_key": "m_n"}
NECTAR = "\n\nHuman: ask\n\nAssistant: "
OPEN_MATH = {"question": "ask", "expected_answer": "4", "predicted_answer": "4", "dataset": "gsm8k"}
OPEN_MATH_METADATA = {key: OPEN_MATH[key] for key in ("expected_answer", "predicted_answer", "dataset")}

LMSYS = {"conversation_id": "c", "model": "m", "turn": 2, "language": "English", "redacted": False}
DISTRACTORS = [{"bot turn": "say", "distractor": "off"}, {"bot turn": "yes", "distractor": "away"}]
TOPIC = {"domain": "d", "scenario": "s", "system_instruction": "stay"}
TOPIC_METADATA = {"domain": "d", "scenario": "s", "distractors": DISTRACTORS}
REPORT = {
    "id": "r",
    "pre_text": ["sales grew .", "all in dollars ."],
    "post_text": ["see note 3 ."],
    "table": [["", "2020", "2019"], ["sales", "150", "100"]],
}
REPORT_TEXT = (
    "sales grew .\nall in dollars .\n\n|  | 2020 | 2019 |\n| --- | --- | --- |\n| sales | 150 | 100 |\n\n"
    "see note 3 .\n\nby how much ?"
)
PRM = {"labeler": "l", "timestamp": "t", "generation": 3}
PRM_PROBLEM = {"problem": "ask", "ground_truth_answer": "4", "pre_generated_answer": "5", "ground_truth_solution": "x"}


def rated(text, rating):
    return {"text": text, "rating": rating, "flagged": None}


def moderation(*flags):
    return [{"categories": {"hate": flag}, "category_scores": {"hate": 0.5}, "flagged": flag} for flag in flags]


PUBLIC = {
    "LMSYS-Chat-1M": Public(
        "moderated",
        [
            {**LMSYS, "conversation": chat("ask", "say", "more", "yes"), "openai_moderation": moderation(*flags)}
            for flags in ((False, True, False, False), (False, False, True, False))
        ],
        [demonstration("ask", "say", "more", "yes", **LMSYS, flagged=flagged) for flagged in (False, True)],
        {"conversation_id", "model", "turn", "language", "redacted"},
    ),
    "WildChat-1M": Public(
        "moderated",
        [
            {
                "model": "m",
                "conversation": [{**turn, "country": "x", "redacted": False} for turn in chat("ask", "say")],
                "openai_moderation": moderation(True, False),
                "toxic": True,
            }
        ],
        [demonstration("ask", "say", model="m", toxic=True, flagged=True)],
        {"model", "toxic", "conversation.country"},
    ),
    "ShareGPT": Public(
        "sharegpt",
        [
            {
                "id": "i_0",
                "conversations": [{"from": who, "value": who} for who in ("human", "gpt", "user", "bing", "human")],
            },
            {"id": "i_1", "conversations": [{"from": "human", "value": "ask"}, {"from": "chatgpt", "value": "say"}]},
        ],
        [Prompt(talk("human", "gpt", "user", "bing", "human"), {"id": "i_0"}), demonstration("ask", "say", id="i_1")],
        {"id"},
    ),
    "CantTalkAboutThis": Public(
        "topic_following",
        [
            {
                **TOPIC,
                "conversation": chat("ask", "say", "more", "yes"),
                "distractors": DISTRACTORS,
                "conversation_with_distractors": [
                    chat("ask", "say", "off", "let us go on", "more", "yes"),
                    chat("ask", "say", "more", "yes", "away", "let us go on"),
                ],
            },
            {**TOPIC, "conversation": chat("ask", "say"), "distractors": DISTRACTORS},
        ],
        [
            demonstration("=stay", "ask", "say", "off", "let us go on", "more", "yes", **TOPIC_METADATA),
            demonstration("=stay", "ask", "say", "more", "yes", "away", "let us go on", **TOPIC_METADATA),
            demonstration("=stay", "ask", "say", **TOPIC_METADATA),
        ],
        {"domain", "scenario", "distractors"},
    ),
    "CantTalkAboutThis as CSV": Public(
        "topic_following",
        [{**TOPIC, "conversation_json": json.dumps(chat("ask", "say")), "distractors": str(DISTRACTORS)}],
        [demonstration("=stay", "ask", "say", **TOPIC_METADATA)],
        {"domain", "scenario", "distractors"},
    ),
    "Open-Platypus": Public(
        "alpaca",
        [{"input": "", "output": "say", "instruction": "ask", "data_source": "scibench"}],
        [demonstration("ask", "say", data_source="scibench")],
        {"data_source"},
    ),
    "FinQA": Public(
        "finqa",
        [
            {
                **REPORT,
                "filename": "f",
                "qa": {
                    **{"question": "by how much ?", "answer": "50%", "program": "subtract(150, 100), divide(#0, 100)"},
                    **{"exe_ans": 0.5, "gold_inds": {"table_1": "the sales"}, "explanation": ""},
                },
            }
        ],
        [
            Prompt(
                talk(REPORT_TEXT),
                {
                    **{"id": "r", "filename": "f", "program": "subtract(150, 100), divide(#0, 100)"},
                    **{"written_answer": "50%", "answer": 0.5},
                },
            )
        ],
        {"id", "filename", "qa.gold_inds"},
    ),
    "FinQA on the Hub": Public(
        "finqa",
        [{**REPORT, "question": "by how much ?", "answer": "50%", "final_result": "0.5", "gold_inds": []}],
        [
            Prompt(
                talk(REPORT_TEXT),
                {"id": "r", "gold_inds": [], "written_answer": "50%", "answer": "0.5"},
            )
        ],
        {"id"},
    ),
    "WikiTableQuestions": Public(
        "wiki_table_questions",
        [
            {
                "id": "nt-0",
                "question": "who won ?",
                "answers": answers,
                "table": {"header": ["year", "winner"], "rows": [["2001", "a|b"], ["2002", "c\nd"]], "name": "t"},
            }
            for answers in (["a|b"], ["a|b", "c d"])
        ],
        [
            Prompt(
                talk("| year | winner |\n| --- | --- |\n| 2001 | a\\|b |\n| 2002 | c d |\n\nwho won ?"),
                {"id": "nt-0", "answer": answer},
            )
            for answer in ("a|b", "{a|b; c d}")
        ],
        {"id"},
    ),
    "MATH": Public(
        "question_answer",
        [{"problem": "ask", "level": "Level 5", "type": "Algebra", "solution": "So it is $\\boxed{4}$."}],
        [demonstration("ask", "So it is $\\boxed{4}$.", level="Level 5", type="Algebra")],
        {"level", "type"},
    ),
    "PRM800K": Public(
        "prm800k",
        [
            {
                **PRM,
                "question": {**PRM_PROBLEM, "pre_generated_steps": ["a", "# Answer\n\n5"]},
                "label": {
                    "finish_reason": "solution",
                    "total_time": 9,
                    "steps": [
                        {
                            "completions": [rated("z", -1), rated("a", 1)],
                            "human_completion": None,
                            "chosen_completion": 1,
                        },
                        {"completions": [rated("y", -1)], "human_completion": {"text": "b"}, "chosen_completion": None},
                        {"completions": [rated("# Answer\n\n4", 0)], "human_completion": None, "chosen_completion": 0},
                    ],
                },
            },
            {
                **PRM,
                "question": {**PRM_PROBLEM, "pre_generated_steps": ["a", "# Answer\n\n5"]},
                "label": {
                    "finish_reason": "found_error",
                    "total_time": 9,
                    "steps": [{"completions": [rated("a", -1)], "human_completion": None, "chosen_completion": None}],
                },
            },
        ],
        [
            liked("a\nb\n# Answer\n\n4", 1.0, {**PRM, "answer": "4"}),
            liked("a\n# Answer\n\n5", 0.0, {**PRM, "answer": "4"}),
        ],
        {*PRM, "question.pre_generated_answer", "question.ground_truth_solution"},
    ),
    "Math-Shepherd in TRL's form": Public(
        "labelled_steps",
        [
            {"prompt": "ask", "completions": ["Step 1: a", "Step 2: The answer is: 4"], "labels": [True, right]}
            for right in (True, False)
        ],
        [liked("Step 1: a\nStep 2: The answer is: 4", float(right), {}) for right in (True, False)],
    ),
    "PKU-SafeRLHF": Public(
        "pku_saferlhf",
        [{**PKU, "better_response_id": 0}, {**PKU, "better_response_id": 1}],
        [two("a", "b", 0, metadata=PKU_METADATA), two("a", "b", 1, metadata=PKU_METADATA)],
        {"is_response_0_safe", "is_response_1_safe", "safer_response_id"},
    ),
    "HelpSteer2-preference": Public(
        "helpsteer2_preference",
        [{**STEER2, "preference_strength": strength} for strength in (-3, 1, 0)],
        [
            two("a", "b", 0, prompt=STEER2_PROMPT, rewards=(3.0, 0.0), metadata=STEER2_METADATA),
            two("a", "b", 1, prompt=STEER2_PROMPT, rewards=(0.0, 1.0), metadata=STEER2_METADATA),
            two("a", "b", None, prompt=STEER2_PROMPT, rewards=(0.0, 0.0), metadata=STEER2_METADATA),
        ],
        {"split", "preference_statement"},
    ),
    "HelpSteer3 preference": Public(
        "helpsteer3_preference",
        [
            {**STEER3, "response1": "a", "response2": "b", "overall_preference": strength, "individual_preference": []}
            for strength in (-2, 3)
        ],
        [
            two("a", "b", 0, rewards=(2.0, 0.0), metadata={**STEER3_METADATA, "individual_preference": []}),
            two("a", "b", 1, rewards=(0.0, 3.0), metadata={**STEER3_METADATA, "individual_preference": []}),
        ],
        {"domain", "language"},
    ),
    "HelpSteer3 edit_quality": Public(
        "helpsteer3_edit",
        [{**STEER3, "original_response": "o", "good_edited_response": "a", "bad_edited_response": "b", "feedback": []}],
        [two("a", "b", 0, metadata={**STEER3_METADATA, "original_response": "o", "feedback": []})],
        {"domain", "language", "original_response"},
    ),
    "HelpSteer3 edit": Public(
        "helpsteer3_edit",
        [{**STEER3, "original_response": "b", "edited_response": "a", "change_summary": "c"}],
        [two("a", "b", 0, metadata={**STEER3_METADATA, "change_summary": "c"})],
        {"domain", "language", "change_summary"},
    ),
    "Auto-J": Public(
        "auto_j",
        [{"scenario": "chitchat", "label": n, "prompt": "ask", "response 1": "a", "response 2": "b"} for n in range(3)],
        [two("a", "b", chosen, metadata={"scenario": "chitchat"}) for chosen in (0, 1, None)],
        {"scenario"},
    ),
    "LLMBar": Public(
        "llmbar",
        [{"input": "ask", "output_1": "a", "output_2": "b", "label": label} for label in (1, 2)],
        [two("a", "b", 0), two("a", "b", 1)],
    ),
    "AlpacaFarm": Public(
        "alpaca_farm",
        [
            {
                "instruction": "ask",
                "input": "this",
                "output_1": "a",
                "output_2": "b",
                "preference": 2,
                "raw_preference": 3,
            },
            {"instruction": "ask", "input": "", "output_1": "a", "output_2": "b", "preference": 1, "raw_preference": 1},
        ],
        [
            two("a", "b", 1, prompt=("ask\n\nthis",), metadata={"raw_preference": 3}),
            two("a", "b", 0, metadata={"raw_preference": 1}),
        ],
        {"raw_preference"},
    ),
    "AlpacaEval annotations": Public(
        "alpaca_farm",
        [
            {"instruction": "ask", "output_1": "a", "output_2": "b", "preference": value, "annotator": "g"}
            for value in (1.02, 1.98, 1.5, 0)
        ],
        [two("a", "b", chosen, metadata={"annotator": "g"}) for chosen in (0, 1, None, None)],
        {"annotator"},
    ),
    "PandaLM": Public(
        "pandalm",
        [
            {**PANDA, **dict(zip(("annotator1", "annotator2", "annotator3"), votes, strict=True))}
            for votes in ((1, 1, 2), (0, 2, 2), (0, 1, 2), (0, 0, 1))
        ],
        [
            two("a", "b", chosen, prompt=("ask\n\nthis",), metadata={"idx": 0, "cmp_key": "m_n"})
            for chosen in (0, 1, None, None)
        ],
        {"idx", "cmp_key"},
    ),
    "Chatbot Arena conversations": Public(
        "arena",
        [
            {**ARENA, "winner": winner, "conversation_a": chat("ask", "a"), "conversation_b": chat("ask", "b")}
            for winner in ("model_a", "model_b", "tie", "tie (bothbad)")
        ],
        [two("a", "b", chosen, metadata=ARENA) for chosen in (0, 1, None, None)],
        {*ARENA},
    ),
    "Arena human preference 140k": Public(
        "arena",
        [
            {
                "winner": "both_bad",
                "conversation_a": [*ARENA_140K, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}],
                "conversation_b": [*ARENA_140K, {"role": "assistant", "content": [{"type": "text", "text": "b"}]}],
            }
        ],
        [two("a", "b", None)],
    ),
    "Arena human preference 55k": Public(
        "arena_turns",
        [
            {**KAGGLE, "winner_model_a": flags[0], "winner_model_b": flags[1], "winner_tie": flags[2]}
            for flags in ((1, 0, 0), ("0", "1", "0"), (0, 0, 1))
        ],
        [two("a", "b", chosen, metadata=KAGGLE_METADATA) for chosen in (0, 1, None)],
        {"id", "model_a", "model_b"},
    ),
    "SHP": Public(
        "shp",
        [{**SHP, "labels": 0}, {**SHP, "labels": 1, "score_A": 40}],
        [
            two("a", "b", 1, rewards=(5.0, 12.0), metadata={"post_id": "p"}),
            two("a", "b", 0, rewards=(40.0, 12.0), metadata={"post_id": "p"}),
        ],
        {"post_id"},
    ),
    "GPT-4-LLM comparison_data": Public(
        "gpt4_llm_pairs", [{"user_input": "ask", "completion_a": "a", "completion_b": "b"}], [two("a", "b", 0)]
    ),
    "GPT-4-LLM comparison_data_v2": Public(
        "gpt4_llm",
        [
            {
                "user_input": "ask",
                "responses_and_scores": [
                    {"response": "a", "source": "gpt4", "score": 9.0},
                    {"response": "b", "source": "davinci", "score": 4.0},
                ],
            }
        ],
        [two("a", "b", None, rewards=(9.0, 4.0), metadata={"models": ["gpt4", "davinci"]})],
    ),
    "Nectar": Public(
        "nectar",
        [
            {
                "prompt": NECTAR,
                "answers": [{"answer": "b", "model": "m", "rank": 2.0}, {"answer": "a", "model": "n", "rank": 1.0}],
                "turns": 1,
                "source": ["sharegpt"],
            }
        ],
        [two("b", "a", 1, rewards=(-2.0, -1.0), metadata={"turns": 1, "source": ["sharegpt"], "models": ["m", "n"]})],
        {"turns", "source"},
    ),
    "right answers to a prompt are no responses": Public(
        "prompt",
        [{"prompt": "ask", "answers": ["4", "four"]}, {"prompt": "ask", "answers": []}],
        [Prompt(talk("ask"), {"answers": answers}) for answers in (["4", "four"], [])],
        {"answers"},
    ),
    "RewardBench": Public(
        "preference",
        [{"prompt": "ask", "chosen": "a", "chosen_model": "m", "rejected": "b", "rejected_model": "n", "subset": "s"}],
        [two("a", "b", 0, metadata={"chosen_model": "m", "rejected_model": "n", "subset": "s"})],
        {"chosen_model", "rejected_model", "subset"},
    ),
    "RewardBench 2": Public(
        "reward_bench_2",
        [
            {
                "id": "1",
                "prompt": "ask",
                "chosen": ["a"],
                "rejected": ["b", "c", "d"],
                "num_correct": 1,
                "subset": "Math",
            },
            {"id": "2", "prompt": "ask", "chosen": ["a", "b"], "rejected": ["c"], "num_correct": 2, "subset": "Ties"},
        ],
        [
            Comparison(
                talk("ask"),
                (Response("a", 1.0), Response("b", 0.0), Response("c", 0.0), Response("d", 0.0)),
                0,
                {"id": "1", "num_correct": 1, "subset": "Math"},
            ),
            Comparison(
                talk("ask"),
                (Response("a", 1.0), Response("b", 1.0), Response("c", 0.0)),
                None,
                {"id": "2", "num_correct": 2, "subset": "Ties"},
            ),
        ],
        {"id", "num_correct", "subset"},
    ),
    "Skywork-Reward-Preference": Public(
        "preference",
        [{"chosen": chat("x", "y", "ask", "a"), "rejected": chat("x", "y", "ask", "b"), "source": "magpie"}],
        [two("a", "b", 0, prompt=("x", "y", "ask"), metadata={"source": "magpie"})],
        {"source"},
    ),
    "distilabel-intel-orca-dpo-pairs": Public(
        "distilabel_pairs",
        [
            {
                "system": "s",
                "input": "ask",
                "chosen": "a",
                "rejected": "b",
                "generations": ["b", "a"],
                "order": ["rejected", "chosen"],
                "rating": [7.0, 9.0],
                "status": "swapped",
                "chosen_score": 9.0,
            }
        ],
        [
            two(
                "a",
                "b",
                0,
                prompt=("=s", "ask"),
                rewards=(9.0, 7.0),
                metadata={"order": ["rejected", "chosen"], "status": "swapped"},
            )
        ],
        {"order", "status"},
    ),
    "distilabel-math-preference-dpo": Public(
        "preference",
        [
            {
                "instruction": "ask",
                "chosen_response": "a",
                "chosen_rating": 9.0,
                "rejected_response": "b",
                "rejected_rating": 7.0,
            }
        ],
        [two("a", "b", 0, rewards=(9.0, 7.0), metadata={"chosen_rating": 9.0, "rejected_rating": 7.0})],
    ),
    "distilabel UltraFeedback task": Public(
        "distilabel",
        [
            {
                "instruction": "ask",
                "generations": ["a", "b"],
                "generation_models": ["m", "n"],
                "ratings": ["5", "3"],
                "rationales": ["good", "bad"],
            },
            {"instruction": "ask", "generations": ["a", "b"], "model_names": ["m", "n"], "ratings": [None, None]},
        ],
        [
            two("a", "b", None, rewards=(5.0, 3.0), metadata={"rationales": ["good", "bad"], "models": ["m", "n"]}),
            two("a", "b", None, metadata={"models": ["m", "n"]}),
        ],
        {"rationales"},
    ),
    "distilabel text generation": Public(
        "alpaca",
        [{"system_prompt": "s", "instruction": "ask", "generation": "a", "model_name": "m"}],
        [demonstration("=s", "ask", "a", model_name="m")],
        {"model_name"},
    ),
    "OpenMathInstruct-1": Public(
        "unpaired",
        [
            {**OPEN_MATH, "generated_solution": "a", "is_correct": True},
            {**OPEN_MATH, "generated_solution": "b", "is_correct": False},
        ],
        [liked("a", 1.0, OPEN_MATH_METADATA), liked("b", 0.0, OPEN_MATH_METADATA)],
        {*OPEN_MATH_METADATA},
    ),
    "OpenMathInstruct-2": Public(
        "open_math_instruct",
        [{"problem": "ask", "generated_solution": "a", "expected_answer": "4", "problem_source": "math"}],
        [demonstration("ask", "a", expected_answer="4", problem_source="math")],
        {"expected_answer", "problem_source"},
    ),
    "UltraFeedback": Public(
        "ultrafeedback",
        [
            {
                "source": "flan",
                "instruction": "ask",
                "models": ["m", "n"],
                "completions": [
                    {"response": "a", "model": "m", "overall_score": 8.0, "critique": "c", "fine-grained_score": 4.5},
                    {"response": "b", "model": "n", "overall_score": 5.0, "critique": "", "custom_system_prompt": "p"},
                ],
            }
        ],
        [two("a", "b", None, rewards=(8.0, 5.0), metadata={"source": "flan", "models": ["m", "n"]})],
        {"source", "completions.critique", "completions.custom_system_prompt", "completions.fine-grained_score"},
    ),
    "a native row with ratings": Public(
        "native",
        [{"prompt": "ask", "responses": [{"content": "a", "rating": 4}, {"content": "b", "rating": 2, "votes": 9}]}],
        [two("a", "b", None, rewards=(4.0, 2.0))],
        {"responses.votes"},
    ),
    "xlam-function-calling-60k": Public(
        "xlam",
        [
            {
                "id": 0,
                "query": "ask",
                "answers": '[{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]',
                "tools": '[{"name": "f", "description": "d", "parameters": '
                '{"x": {"type": "int", "description": "n"}}}]',
            }
        ],
        [
            Demonstration(
                (*talk("ask"), Message("assistant", "", (ToolCall("f", '{"x": 1}'), ToolCall("g")))),
                {"id": 0},
                tools=(tool("f", {"x": {"type": "int", "description": "n"}}),),
            )
        ],
        {"id"},
    ),
    "glaive-function-calling-v2": Public(
        "glaive",
        [
            {
                "system": "SYSTEM: You are a helpful assistant with access to the following functions. "
                'Use them if required -\n{\n    "name": "f",\n    "description": "d",\n    "parameters": '
                '{"type": "object", "properties": {"x": {"type": "string"}}}\n}\n\n{"name": "g", "description": "d", '
                '"parameters": {}}\n',
                "chat": "USER: ask\n\n\nASSISTANT: <functioncall> "
                '{"name": "f", "arguments": \'{"x": "it\\\'s"}\'} <|endoftext|>\n\n\n'
                'FUNCTION RESPONSE: {"y": 1}\n\n\nASSISTANT: say <|endoftext|>\n\n\nUSER: more\n\n\n'
                'ASSISTANT: I will. <functioncall> {"name": "g", "arguments": {}} <|endoftext|>\n\n\n',
            },
            {
                "system": "SYSTEM: You are a helpful assistant, with no access to external functions.\n",
                "chat": "USER: ask\n\n\nASSISTANT: say <|endoftext|>\n\n\n",
            },
        ],
        [
            Demonstration(
                (
                    *talk("=You are a helpful assistant.", "ask"),
                    Message("assistant", "", (ToolCall("f", '{"x": "it\'s"}'),)),
                    Message("tool", '{"y": 1}'),
                    Message("assistant", "say"),
                    Message("user", "more"),
                    Message("assistant", "I will.", (ToolCall("g"),)),
                ),
                tools=(tool("f", {"x": {"type": "string"}}), tool("g", {})),
            ),
            demonstration("=You are a helpful assistant, with no access to external functions.", "ask", "say"),
        ],
    ),
    "glaive_toolcall_en_demo of LLaMA-Factory": Public(
        "sharegpt",
        [
            {
                "conversations": [
                    {"from": "human", "value": "ask"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                    {"from": "observation", "value": '{"y": 1}'},
                    {"from": "gpt", "value": "say"},
                ],
                "tools": '[{"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}]',
            }
        ],
        [
            Demonstration(
                (
                    *talk("ask"),
                    Message("assistant", "", (ToolCall("f", '{"x": 1}'),)),
                    Message("tool", '{"y": 1}'),
                    Message("assistant", "say"),
                ),
                tools=(tool("f", {}),),
            )
        ],
    ),
    "hermes-function-calling-v1": Public(
        "hermes",
        [
            {
                "id": "1",
                "conversations": [
                    {
                        "from": "system",
                        "value": "Be brief. You are a function calling AI model. You are provided with function "
                        "signatures within <tools> </tools> XML tags.\n<tools>\n"
                        "[{'type': 'function', 'function': {'name': 'f', 'description': 'd', 'parameters': "
                        "{'type': 'object', 'properties': {}}}}]\n</tools>\nFor each function call return a JSON "
                        "object, enclosed within tags:\n<tool_call>\n{tool_call}\n</tool_call>\n",
                    },
                    {"from": "human", "value": "ask"},
                    {
                        "from": "gpt",
                        "value": 'Both:\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n'
                        "<tool_call>\n{'name': 'f', 'arguments': {}}\n</tool_call>\n",
                    },
                    {
                        "from": "tool",
                        "value": "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>\n",
                    },
                    {"from": "gpt", "value": "say"},
                ],
                "category": "c",
            }
        ],
        [
            Demonstration(
                (
                    *talk("=Be brief.", "ask"),
                    Message("assistant", "Both:", (ToolCall("f", '{"x": 1}'), ToolCall("f"))),
                    Message("tool", "1"),
                    Message("tool", "2"),
                    Message("assistant", "say"),
                ),
                {"id": "1", "category": "c"},
                tools=(tool("f", {}),),
            )
        ],
        {"id", "category"},
    ),
    "tool rows of TRL": Public(
        "preference",
        [
            {
                "prompt": chat("ask"),
                "chosen": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
                    }
                ],
                "rejected": [{"role": "assistant", "content": "bad"}],
                "tools": [tool("f", {})],
            }
        ],
        [
            Comparison(
                talk("ask"),
                (Response("", tool_calls=(ToolCall("f", '{"x": 1}'),)), Response("bad")),
                0,
                tools=(tool("f", {}),),
            )
        ],
    ),
    "Multilingual-Thinking": Public(
        "messages",
        [
            {
                "reasoning_language": "French",
                "messages": [
                    {"role": "system", "content": "s", "thinking": None},
                    {"role": "user", "content": "ask", "thinking": None},
                    {"role": "assistant", "content": "say", "thinking": "hm"},
                ],
            }
        ],
        [demonstration("=s", "ask", "<think>\nhm\n</think>\n\nsay", reasoning_language="French")],
        {"reasoning_language"},
    ),
    "TRL unpaired preference": Public(
        "unpaired",
        [{"prompt": chat("ask"), "completion": chat("x", "a")[1:], "label": False}],
        [liked("a", 0.0, {})],
    ),
}
