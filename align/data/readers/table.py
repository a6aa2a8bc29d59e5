"""The table of row formats."""

from __future__ import annotations

from align.data.readers import steps, verdicts
from align.data.readers.conversations import moderated, topic_following, unread_in_topic_following
from align.data.readers.demonstrations import demonstration, dialogue, function_calls, seed_tasks, unread_in_dialogue
from align.data.readers.documents import finqa, unread_in_finqa, wiki_table_questions
from align.data.readers.glaive import glaive
from align.data.readers.hermes import hermes, is_hermes
from align.data.readers.native import native, unread_in_native
from align.data.readers.openassistant import openassistant
from align.data.readers.pairs import (
    LIKED,
    REWARD_COLUMNS,
    best_of,
    distilabel_pair,
    has_lists_of_answers,
    preference,
    unpaired,
)
from align.data.readers.prompts import has_no_responses, prompt_only
from align.data.readers.ratings import helpsteer, rated, steerlm
from align.data.readers.reader import Reader
from align.data.readers.response_groups import distilabel, group, has_answer_objects, sampling_report, unread_fields
from align.data.readers.vicuna_eval import reviewed_answers

__all__ = ["READERS", "Reader"]

# The first format whose columns a row has is used, so special formats come before general ones.
READERS = {
    "openassistant": Reader(("message_tree_id prompt", "message_id text role replies"), openassistant),
    "nemo_aligner": Reader(("prompt chosen_response rejected_response",), preference, keeps=REWARD_COLUMNS),
    "nemo_rl": Reader(("context completions",), group, unread=unread_fields),
    "reward_bench_2": Reader(("prompt chosen rejected",), best_of, detects=has_lists_of_answers),
    "distilabel_pairs": Reader(("chosen rejected generations rating",), distilabel_pair),
    "preference": Reader(
        ("chosen rejected", "chosen_messages rejected_messages", "chosen_response rejected_response"),
        preference,
        keeps=REWARD_COLUMNS,
    ),
    "pku_saferlhf": Reader(("prompt response_0 response_1 better_response_id",), verdicts.pku_saferlhf),
    "helpsteer2_preference": Reader(
        ("prompt response_1 response_2 preference_strength",), verdicts.helpsteer2_preference
    ),
    "helpsteer3_preference": Reader(
        ("context response1 response2 overall_preference",), verdicts.helpsteer3_preference
    ),
    "helpsteer3_edit": Reader(
        ("context good_edited_response bad_edited_response", "context edited_response original_response"), preference
    ),
    "auto_j": Reader((("prompt", "response 1", "response 2", "label"),), verdicts.auto_j),
    "llmbar": Reader(("input output_1 output_2 label",), verdicts.llmbar),
    "alpaca_farm": Reader(("instruction output_1 output_2 preference",), verdicts.alpaca_farm),
    "pandalm": Reader((" ".join(("instruction response1 response2", *verdicts.ANNOTATORS)),), verdicts.pandalm),
    "arena": Reader(("conversation_a conversation_b winner",), verdicts.arena),
    "arena_turns": Reader((" ".join(("prompt response_a response_b", *verdicts.FLAGS)),), verdicts.arena_turns),
    "shp": Reader(("history human_ref_A human_ref_B labels",), verdicts.shp),
    "gpt4_llm_pairs": Reader(("user_input completion_a completion_b",), preference),
    "gpt4_llm": Reader(("user_input responses_and_scores",), group, unread=unread_fields),
    "nectar": Reader(("prompt answers",), group, detects=has_answer_objects, unread=unread_fields),
    "unpaired": Reader(
        (
            *("messages label", "prompt completion label", "conversations kto_tag", "instruction output kto_tag"),
            *("question generated_solution is_correct", "problem generated_solution is_correct"),
        ),
        unpaired,
        keeps=frozenset({LIKED}),
    ),
    "xlam": Reader(("query tools answers",), function_calls),
    "prm800k": Reader(
        ("question label",),
        steps.prm800k,
        keeps=frozenset({LIKED}),
        detects=steps.has_judged_solution,
        unread=steps.unread_in_prm800k,
    ),
    "labelled_steps": Reader(
        ("prompt completions labels",),
        steps.labelled_steps,
        keeps=frozenset({LIKED}),
        detects=steps.has_labelled_steps,
    ),
    "steerlm": Reader(("text label",), steerlm, merge=True),
    "helpsteer": Reader(("prompt response helpfulness",), helpsteer, merge=True),
    "just_eval": Reader(("prompt response ratings", "input output_cand parsed_result"), rated),
    "just_eval_pairs": Reader(
        ("input output_A output_B parsed_result",), verdicts.just_eval_pairs, keeps=frozenset({"parsed_result"})
    ),
    "ultrafeedback": Reader(("instruction completions",), group, keeps=frozenset({"models"}), unread=unread_fields),
    "alpaca_eval": Reader(("instruction responses",), group, unread=unread_fields),
    "acecode": Reader(("question inferences",), group, unread=unread_fields),
    "completions": Reader(("prompt completions", "raw_text completions"), group, unread=unread_fields),
    "distilabel": Reader(("instruction generations", "input generations"), distilabel),
    "sampling_report": Reader(("prompt results",), sampling_report),
    "vicuna_eval": Reader(("question_id text", "question_id answer1_id score"), native, join=reviewed_answers),
    "self_instruct": Reader(("instruction instances",), seed_tasks),
    "open_math_instruct": Reader(("problem generated_solution", "question generated_solution"), demonstration),
    "alpaca": Reader(("instruction output", "instruction response", "instruction generation"), demonstration),
    "mbpp": Reader(("text code", "prompt code"), demonstration),
    "finqa": Reader(
        ("pre_text post_text table qa", "pre_text post_text table question"),
        finqa,
        keeps=frozenset({"answer"}),
        unread=unread_in_finqa,
    ),
    "wiki_table_questions": Reader(("question answers table",), wiki_table_questions),
    "question_answer": Reader(("question answer", "problem solution"), demonstration),
    "prompt_completion": Reader(
        ("prompt completion", "prompt response", "prompt output", "input output", "query response"), demonstration
    ),
    "native": Reader(("prompt responses", "messages metadata", "prompt metadata"), native, unread=unread_in_native),
    "moderated": Reader(("conversation openai_moderation",), moderated, unread=unread_in_dialogue),
    "topic_following": Reader(
        ("conversation_json", "conversation distractors"), topic_following, unread=unread_in_topic_following
    ),
    "messages": Reader(("messages", "conversation"), dialogue, unread=unread_in_dialogue),
    "glaive": Reader(("system chat",), glaive),
    "hermes": Reader(("conversations",), hermes, detects=is_hermes, unread=unread_in_dialogue),
    "sharegpt": Reader(("conversations",), dialogue, unread=unread_in_dialogue),
    "prompt": Reader(("prompt",), prompt_only, detects=has_no_responses),
}
