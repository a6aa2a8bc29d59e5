"""Rows that a task cannot ask or grade are an error with their place, before sampling; no score is 0 / 0."""

import json
import math

import numpy as np
import pytest

from align.commands.evaluate import EvaluateSettings, Request, evaluate
from align.distributed.progress import SilentProgress
from align.errors import InputError
from align.evaluation.statistics import score, stratified_score
from align.evaluation.tasks import TASKS
from align.evaluation.tasks.embeddings import uniformity
from align.rewards.settings import JudgeSettings
from align.rewards.verdicts import Verdict

IFEVAL = {"key": 1, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
HUMANEVAL = {"task_id": "HumanEval/0", "prompt": "def f(x):\n", "entry_point": "f", "test": "def check(f): pass"}
MBPP = {"task_id": 2, "text": "Write f.", "test_list": ["assert f(1) == 1"], "test": "assert f(2) == 2"}
SAID = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, this is your bank."}]
TALK = {"system_instruction": "Be a bank.", "conversation": [*SAID, *SAID], "distractors": []}
DISTRACTED = {**TALK, "distractors": [{"bot turn": 1, "distractor": "Do you like cats?"}]}
FASTCHAT = {"question_id": 1, "model_1": "ours", "model_2": "b", "g1_winner": "model_1", "g2_winner": "model_1"}
ARENA = {"uid": "1", "model": "ours", "games": [{"score": "A>B", "judgment": ""}] * 2}
GAME = {"id": "1", "prompt": "p", "a": "x", "b": "yy", "verdict": "A>B", "order": "a first"}
PREFERENCE = {"instruction": "q", "output_1": "a", "output_2": "b", "preference": 1.5}


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("gsm8k", {"question": "q", "answer": "as above"}, "holds no final answer"),
        ("math", {"problem": "q", "solution": "none"}, "has no .boxed answer"),
        ("ifeval", {**IFEVAL, "instruction_id_list": ["no:such"]}, "no verifier is called 'no:such'"),
        ("ifeval", {**IFEVAL, "kwargs": []}, "two lists of equal length"),
        ("humaneval", {**HUMANEVAL, "test": " "}, "has an empty test"),
        ("mbpp", {**MBPP, "text": None}, "has no text and no prompt"),
        ("mbpp", {**MBPP, "test_list": []}, r"has test_list \[\]"),
        ("mbpp", {**MBPP, "test_list": ["assert f(1) == 1", " "]}, r"has test_list \['assert"),
        ("math", {"problem": "q", "answer": " "}, "has neither an answer nor a solution"),
        ("topic_following", {**TALK, "conversation_with_distractors": "[]"}, "has no turn of the user"),
        ("mbpp_plus", {**MBPP, "test": ""}, "has an empty test"),
        ("topic_following", {**TALK, "conversation": []}, "has no conversation"),
        ("topic_following", {**TALK, "conversation": SAID[1:]}, "has no turn of the user"),
        ("topic_following", {**TALK, "distractors": ["cats"]}, "a distractor is 'cats'"),
    ],
)
def test_a_row_that_cannot_be_graded_is_found_before_sampling(task, row, message):
    with pytest.raises(InputError, match=f"^file: row 7: .*{message}"):
        TASKS[task].check_rows([row], "file", skipped=6)


def scored(tmp_path, task, rows, responses=None, **settings):
    files = []
    for name, each in (("rows", rows), ("responses", responses)):
        if each is not None:
            files.append(tmp_path / f"{name}.jsonl")
            files[-1].write_text("".join(json.dumps(row) + "\n" for row in each))
    request = Request(task, str(files[0]), responses=tuple(map(str, files[1:])))
    return evaluate(request, None, settings=EvaluateSettings(**settings), progress=SilentProgress())


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("judged_pairs", {**FASTCHAT, "turn": "first"}, "is not in the form of its columns"),
        ("judged_pairs", {**FASTCHAT, "question_id": None}, "has question_id null"),
        ("arena_hard", {**ARENA, "uid": None}, "has uid null"),
        ("judged_pairs", {**GAME, "id": None}, "has id null"),
        ("judged_pairs", {**GAME, "a": 5}, "has a 5; a response is a text"),
        ("alpaca_eval", {**PREFERENCE, "preference": True}, "has preference True"),
    ],
)
def test_a_judged_row_that_cannot_be_read_is_an_error_with_its_place(tmp_path, task, row, message):
    with pytest.raises(InputError, match=f"{task}: row 1: {message}"):
        scored(tmp_path, task, [row])


def void():
    """A judge without verdicts."""
    return lambda groups: [(Verdict(None, why="refusal"),) for _ in groups]


def test_a_class_without_turns_or_verdicts_has_no_scores(tmp_path):
    """It was 0: the score of a policy that takes every turn for one of the other class."""
    answered = [{"id": 0, "choices": [{"turns": ["yes", "yes"]}]}]
    found = scored(tmp_path, "topic_following", [TALK], answered)["scores"]
    assert set(found) == {"on_topic_precision", "on_topic_recall", "on_topic_f1"}
    answered = [{"id": 0, "choices": [{"turns": ["yes", "I am sorry", "yes"]}]}]
    judges = [JudgeSettings(name="test_odd_rows:void")]
    found = scored(tmp_path, "topic_following", [DISTRACTED], answered, judges=judges)
    assert len(found["scores"]) == 6 and found["scores"]["distractor_f1"]["value"] == 1
    assert found["void"] == 3


def test_a_response_whose_id_and_prompt_name_different_rows_is_an_error(tmp_path):
    """Numbers of rows are those of the whole file in other tools' files, and a source can skip some."""
    rows = [{"question": f"{number} + 1?", "answer": f"#### {number + 1}"} for number in (5, 6)]
    said = {"prompt": "6 + 1?", "response": "7"}
    assert scored(tmp_path, "gsm8k", rows, [{**said, "id": 1}])["scores"]["correct"]["value"] == 1
    with pytest.raises(InputError, match="row 1: '0' is row 1 of the data, whose prompt is another"):
        scored(tmp_path, "gsm8k", rows, [{**said, "id": 0}])


def test_strata_of_one_prompt_each_have_an_interval():
    """It had no width, as a prompt was drawn from one."""
    values = [0.0, 1.0] * 20
    found, plain = stratified_score({str(at): [value] for at, value in enumerate(values)}), score(values)
    assert found.value == pytest.approx(plain.value)
    assert found.high - found.low == pytest.approx(plain.high - plain.low, rel=0.1)
    # With weights: 3 of 4 parts are known exactly, so that the rest varies by a quarter of what it does alone
    weighted = stratified_score({"large": [1.0] * 10, "one": [0.0], "other": [1.0]}, {"large": 6, "one": 1, "other": 1})
    assert weighted[:3] == pytest.approx((7 / 8, 6 / 8, 1.0))


@pytest.mark.filterwarnings("error")
def test_uniformity_of_few_vectors_has_an_interval_of_numbers():
    """A draw of one vector alone has no pair: it was 0 / 0, and the order of the draws undefined."""
    three = np.eye(3, dtype=np.float32)
    found = uniformity(three[:2], three[1:], np.ones(2)).score
    assert found.value == pytest.approx(-4)  # log exp(-2 * 2) of every pair at right angles
    assert -math.inf < found.low <= found.value <= found.high < 0
