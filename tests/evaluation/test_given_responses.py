"""Responses of other tools, in the forms that these write."""

import json

import pytest

from align.errors import InputError
from align.evaluation.answers import answers_from_file, responses_by_prompt
from align.evaluation.tasks import TASKS

ROWS = [{"question": "1 + 1?", "answer": "#### 2", "id": "q1"}, {"question": "2 + 2?", "answer": "#### 4", "id": "q2"}]
GSM8K = TASKS["gsm8k"].next_turn
PROMPT = GSM8K(ROWS[1], ())[0].content
COMPLETION = {
    "id": "chatcmpl-1",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "4"}, "finish_reason": "length"}],
}  # noqa: E501 - as a server writes it

# name -> (a row of a file, that answers the second row of the data with "4", why it ended)
FORMS = {
    "own": ({"prompt": PROMPT, "response": "4", "finish": "length"}, "length"),
    "TGI": ({"id": "q2", "generated_text": "4"}, None),
    "AlpacaEval": ({"instruction": PROMPT, "output": "4", "generator": "m"}, None),
    "OpenAI batch": (
        {"id": "batch_req_1", "custom_id": "q2", "response": {"status_code": 200, "body": COMPLETION}, "error": None},
        "length",
    ),  # noqa: E501
    "vllm run-batch": ({"id": "vllm-1", "custom_id": "q2", "response": COMPLETION}, "length"),
    "completion": ({**COMPLETION, "prompt": PROMPT}, "length"),
    "text completion": ({"prompt": PROMPT, "choices": [{"text": "4", "finish_reason": "stop"}]}, "stop"),
    "vLLM": ({"prompt": PROMPT, "outputs": [{"index": 0, "text": "4", "finish_reason": "stop"}]}, "stop"),
    "FastChat": (
        {"question_id": "q2", "answer_id": "x", "model_id": "m", "choices": [{"index": 0, "turns": ["4"]}]},
        None,
    ),  # noqa: E501
    "Arena-Hard 0.1": (
        {"question_id": "q2", "choices": [{"index": 0, "turns": [{"content": "4", "token_len": 1}]}]},
        None,
    ),  # noqa: E501
    "Arena-Hard 2": (
        {
            "uid": "q2",
            "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": {"answer": "4"}}],
        },
        None,
    ),  # noqa: E501
    "chat list": ({"messages": [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "4"}]}, None),
    "lm-eval": ({"doc_id": 1, "doc": {"question": "2 + 2?"}, "resps": [["4"]], "filtered_resps": ["4"]}, None),
    "lm-eval with ids": ({"doc_id": 7, "doc": {"id": "q2"}, "resps": [["4"]]}, None),
}


def file_of(tmp_path, *rows):
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "given.jsonl")


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_read(tmp_path, form):
    row, finish = FORMS[form]
    assert answers_from_file(ROWS, GSM8K, file_of(tmp_path, row)) == [(1, "4", (), finish)]


def test_samples_of_a_harness_without_ids_count_rows(tmp_path):
    rows = [{"question": row["question"], "answer": row["answer"]} for row in ROWS]
    path = file_of(tmp_path, {"doc_id": 1, "doc": {}, "resps": [["4", "5"]]})
    assert [(each.row, each.response) for each in answers_from_file(rows, GSM8K, path)] == [(1, "4"), (1, "5")]


def test_responses_that_a_harness_repeats_for_each_filter_count_once(tmp_path):
    """Each row of gsm8k, which has two filters, had two responses."""
    sample = {"doc_id": 0, "doc": {"question": ROWS[0]["question"]}, "resps": [["2"]]}
    rows = [{**sample, "filter": name} for name in ("strict-match", "flexible-extract")]
    path = file_of(tmp_path, rows[0], {**rows[0], "doc": {"question": "2 + 2?"}, "resps": [["4"]]}, rows[1])
    assert [(each.row, each.response) for each in answers_from_file(ROWS, GSM8K, path)] == [(0, "2"), (1, "4")]


def test_turns_of_a_dialogue_are_kept(tmp_path):
    path = file_of(tmp_path, {"question_id": "q1", "choices": [{"turns": ["a", "b", "c"]}]})
    assert answers_from_file(ROWS, GSM8K, path) == [(0, "c", ("a", "b"), None)]


def test_a_failed_request_is_no_response(tmp_path):
    failed = {"custom_id": "q1", "response": None, "error": {"message": "timeout"}}
    path = file_of(tmp_path, failed, FORMS["OpenAI batch"][0])
    assert [each.row for each in answers_from_file(ROWS, GSM8K, path)] == [1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"doc_id": 0, "resps": [[[-1.5, False]]]}, "row 1 has .* likelihoods, and no generated text"),
        ({"id": "q1", "score": 1}, "row 1 has no response in a known form"),
        ({"id": "q9", "response": "4"}, "'q9' matches 0 rows"),
        ({"messages": [{"role": "user", "content": PROMPT}]}, "row 1 has no response: its messages end with the user"),
        ({"id": "q1", "choices": [{"message": {"content": None}}]}, "row 1 a response is None; text is needed"),
    ],
)
def test_other_rows_are_rejected(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        answers_from_file(ROWS, GSM8K, file_of(tmp_path, row))


def test_responses_to_compare_are_found_by_id_or_prompt(tmp_path):
    path = file_of(tmp_path, {"id": "q1", "response": "2"}, {"prompt": "2 + 2?", "response": "4"})
    assert responses_by_prompt(path, {"q1": "1 + 1?"}) == {"1 + 1?": "2", "2 + 2?": "4"}
    with pytest.raises(InputError, match="row 1 needs a prompt, or the id"):
        responses_by_prompt(path, {})
