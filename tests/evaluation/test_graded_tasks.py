import json
from itertools import combinations
from pathlib import Path
from statistics import fmean

import pytest

from align.data.rows import read_rows
from align.errors import InputError
from align.evaluation.answers import answers_from_file
from align.evaluation.sampled_task import SampledTask
from align.evaluation.task import Answer
from align.evaluation.tasks import TASKS

MBPP = Path(__file__).parents[3] / "shared" / "data" / "mbpp" / "mbpp_train.jsonl"

IFEVAL = {
    "key": 7,
    "prompt": "Say it in small letters and without commas.",
    "instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase"],
    "kwargs": [{}, {}],
}
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def add(a, b):\n    """The sum."""\n',
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\n",
    "entry_point": "add",
}
CODE = {"task_id": 3, "text": "Write a function add that adds.", "test_list": ["assert add(1, 2) == 3"]}
SUM = {"question": "What is 6 times 7?", "answer": "It is 6*7.\n#### 42"}
ADDED = {"prompt": "Write Python for a list x.", "kind": "code", "examples": [["[1, 2]", "[3, 4]"], ["[]", "[]"]]}
OWN = {"prompt": "List two animals.", "kind": "general"}

# In the form of evalplus/mbppplus: what the tests take from NumPy must be there
EVALPLUS = """
import numpy as np

def assertion(out, exp, atol):
    if isinstance(exp, float) or isinstance(out, np.ndarray):
        assert np.allclose(out, exp, rtol=1e-07, atol=1e-6)
    else:
        assert out == exp

inputs = [[1, 2], [0.1, 0.2], [[1.0], [2.0]]]
results = [3, 0.3, [1.0, 2.0]]
for i, (inp, exp) in enumerate(zip(inputs, results)):
    assertion(add(*inp), exp, 0)
"""
SUM_WORDS = {
    "ID": "chal-1",
    "Body": "Ann has 3 pens. She buys 4 more",
    "Question": "How many are there?",
    "Answer": 7.0,
}
PROBLEM = {"problem": "Halve one.", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "level": "Level 1", "type": "Algebra"}

# task -> (row, a response that is right, one that is wrong)
CASES = {
    "ifeval": (IFEVAL, "all of this is written in small letters", "Here, now"),
    "gsm8k": (SUM, "6 * 7 = 42, so the answer is 42.", "The answer is 41."),
    "humaneval": (HUMANEVAL, "    return a + b\n", "    return a - b\n"),
    "mbpp": (CODE, "```python\ndef add(a, b):\n    return a + b\n```", "def add(a, b):\n    return 4"),
    "mbpp_plus": ({**CODE, "test": EVALPLUS}, "def add(a, b): return a + b", "def add(a, b): return int(a + b)"),
    "svamp": (SUM_WORDS, "3 + 4 = 7, so #### 7", "#### 12"),
    "math": (PROBLEM, "Half of it is \\boxed{0.5}", "It is \\boxed{2}"),
    "code": (ADDED, "lambda x: [v + 2 for v in x]", "lambda x: [v * 3 for v in x]"),
}


def graded(task, rows, answers):
    return list(TASKS[task].grade_answers(rows, [Answer(*answer) for answer in answers]))


def scores(task, answers, grades):
    return TASKS[task].scores([Answer(*answer) for answer in answers], grades)


@pytest.mark.parametrize("task", CASES)
def test_right_and_wrong_responses_are_distinguished(task):
    row, right, wrong = CASES[task]
    answers = [(0, right), (1, wrong)]
    grades = graded(task, [row, row], answers)
    assert {
        name: found.value for name, found in scores(task, answers, grades).items() if "instruction" not in name
    } in (
        {"correct": 0.5},
        {"pass@1": 0.5},
        {"prompt_strict": 0.5, "prompt_loose": 0.5},
    )
    json.dumps([dict(grade.line) for grade in grades])


def test_every_sampled_task_has_a_case():
    with_own_tests = {"general", "dialogues", "mmlu", "topic_following"}
    assert set(CASES) == {name for name, task in TASKS.items() if isinstance(task, SampledTask)} - with_own_tests


def test_verdicts_have_the_published_form():
    (grade,) = graded("ifeval", [IFEVAL], [(0, "all, of this is in small letters")])
    assert grade.line == {"strict": [False, True], "loose": [False, True]}
    (grade,) = graded("mbpp", [CODE], [(0, CASES["mbpp"][1])])
    assert grade.line["correct"] is True
    (grade,) = graded("mbpp", [CODE], [(0, CASES["mbpp"][2])])
    assert grade.line["correct"] is False
    assert grade.line["why"]


def test_checks_name_what_they_found_in_the_response():
    (grade,) = graded("ifeval", [IFEVAL], [(0, "All, of this")])
    assert grade.checks == [
        ("punctuation:no_comma", False, (",",)), ("change_case:english_lowercase", False, ("All",))
    ]  # fmt: skip
    (grade,) = graded("gsm8k", [SUM], [(0, "So it is 41.")])
    assert grade.checks == [("final answer 41, expected 42", False, ("41",))]


def test_instruction_and_prompt_accuracy_differ():
    single = {**IFEVAL, "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    answers = [(0, "all, of this is in small letters"), (1, "No comma")]
    found = scores("ifeval", answers, graded("ifeval", [IFEVAL, single], answers))
    assert found["prompt_strict"].value == 1 / 2
    assert found["instruction_strict"].value == 2 / 3


def test_several_answers_to_a_question_count_by_their_mean():
    rows = [SUM, SUM]
    answers = [(0, "42"), (0, "41"), (0, "42"), (0, "40"), (1, "42")]
    assert scores("gsm8k", answers, graded("gsm8k", rows, answers))["correct"].value == (0.5 + 1) / 2


def test_pass_at_k_is_reported_up_to_the_fewest_samples_of_a_problem():
    right, wrong = CASES["humaneval"][1:]
    answers = [(0, wrong)] * 9 + [(0, right)]
    found = scores("humaneval", answers, graded("humaneval", [HUMANEVAL], answers))
    assert {name: one.value for name, one in found.items()} == {"pass@1": pytest.approx(0.1), "pass@10": 1.0}


@pytest.mark.parametrize("ids", [("Mbpp/3", "Mbpp/13"), ("MBPP/3", "mbpp/13"), (3, 13), ("3", "13")])
@pytest.mark.parametrize("data_ids", [(3, 13), ("Mbpp/3", "Mbpp/13")])
@pytest.mark.parametrize("column", ["solution", "completion"])
def test_responses_of_evalplus_match_the_rows_of_mbpp(tmp_path, ids, data_ids, column):
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps({"task_id": each, column: f"pass  # {each}"}) + "\n" for each in reversed(ids)))
    rows = [{**CODE, "task_id": each} for each in data_ids]
    answers = answers_from_file(rows, TASKS["mbpp"].next_turn, str(path))
    assert [(answer.row, answer.response) for answer in answers] == [(1, f"pass  # {ids[1]}"), (0, f"pass  # {ids[0]}")]


def test_ids_of_humaneval_stay_as_they_are(tmp_path):
    (tmp_path / "samples.jsonl").write_text(json.dumps({"task_id": "0", "completion": "pass"}))
    with pytest.raises(InputError, match="'0' matches 0 rows"):
        answers_from_file([HUMANEVAL], TASKS["humaneval"].next_turn, str(tmp_path / "samples.jsonl"))


def test_a_row_without_a_required_column_is_rejected():
    with pytest.raises(InputError, match=r"file: row 2 has no test_list"):
        TASKS["mbpp"].check_rows([CODE, {"task_id": 4}], "file")


@pytest.mark.parametrize("answer", ["It is because of that.", "as said above", ""])
def test_a_row_without_a_final_answer_is_rejected(answer):
    with pytest.raises(InputError, match="no final answer"):
        graded("gsm8k", [{"question": "Why?", "answer": answer}], [(0, "42")])


def test_a_row_of_math_has_its_answer_in_a_box_or_a_column():
    (grade,) = graded("math", [{"problem": "Double 4.", "answer": "8"}], [(0, "\\boxed{8}")])
    assert grade.reward == 1
    with pytest.raises(InputError, match="no \\\\boxed answer"):
        graded("math", [{"problem": "Double 4.", "solution": "It is 8."}], [(0, "8")])
    with pytest.raises(InputError, match=r"file: row 1: has neither an answer nor a solution"):
        TASKS["math"].check_rows([{"problem": "Double 4."}], "file")


def test_the_base_tests_of_mbpp_plus_are_those_of_mbpp():
    row, _, only_base = CASES["mbpp_plus"]
    assert [graded(task, [row], [(0, only_base)])[0].reward for task in ("mbpp", "mbpp_plus")] == [1, 0]


def test_tests_that_need_more_of_numpy_are_rejected():
    row = {**CODE, "test": "import numpy as np\nassert np.zeros(2).sum() == add(0, 0)"}
    with pytest.raises(InputError, match=r"numpy\.zeros"):
        graded("mbpp_plus", [row], [(0, "def add(a, b): return a + b")])


def test_pass_at_k_is_the_mean_over_all_choices_of_samples():
    right, wrong = CASES["humaneval"][1:]
    answers = [(0, wrong)] * 8 + [(0, right)] * 4
    found = scores("humaneval", answers, graded("humaneval", [HUMANEVAL], answers))["pass@10"].value
    outcomes = [False] * 8 + [True] * 4
    assert found == pytest.approx(fmean(any(each) for each in combinations(outcomes, 10)))


@pytest.mark.parametrize("answer", [42, 42.0, "42", "forty-two", "#### 42"])
def test_a_known_answer_may_be_a_number_of_json(answer):
    (grade,) = graded("gsm8k", [{"question": "6 * 7?", "answer": answer}], [(0, "It is 42.")])
    assert grade.reward == 1


@pytest.mark.slow
def test_reference_solutions_of_mbpp_pass_and_broken_ones_fail():
    if not MBPP.exists():
        pytest.skip(f"{MBPP.name} is not here")
    rows = list(read_rows(str(MBPP)))
    answers = [(number, row["code"]) for number, row in enumerate(rows)]
    grades = graded("mbpp", rows, answers)
    assert [number for number, grade in enumerate(grades) if not grade.line["correct"]] == []
    assert len(grades) == 474
    broken = [(number, text.replace("return ", "return not ")) for number, text in answers[:40]]
    assert sum(grade.line["correct"] for grade in graded("mbpp", rows, broken)) <= 2
