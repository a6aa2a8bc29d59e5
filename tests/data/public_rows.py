"""Rows in the exact columns of public data sets, with own wording: format, rows, records, and columns not read."""

from typing import NamedTuple

from format_rows import chat, demonstration, talk

from align.data.readers import tool_calls
from align.records import Comparison, Prompt, Record, Response


class Public(NamedTuple):
    """A data set: the format that is detected, sample rows, their records, and the columns and fields not read."""

    format: str
    rows: list[dict]
    records: list[Record]
    unread: set[str] = set()


def two(first, second, chosen, *, prompt=("ask",), rewards=(None, None), metadata=None):
    responses = (Response(first, rewards[0]), Response(second, rewards[1]))
    return Comparison(talk(*prompt), responses, chosen, metadata or {})


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

PUBLIC = {
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
                "tools": '[{"name": "f", "description": "d", "parameters": {}}]',
            }
        ],
        [
            demonstration(
                "=" + tool_calls.system_text("", [{"name": "f", "description": "d", "parameters": {}}]),
                "ask",
                '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n'
                '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
                id=0,
            )
        ],
        {"id"},
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
