"""MT-Bench: what the policy and the judge are asked, and the scores."""

import json
import re

import pytest

from align.errors import InputError
from align.evaluation.task import Answer
from align.evaluation.tasks.judged.mt_bench import TASK, TEMPERATURES, next_turn
from align.inference.samples import Sample, Throughput, prompt_key
from align.records import Message, Prompt
from align.rewards.builtin_judges import LlmSettings
from align.rewards.judge_prompts.parsing import parse_first_preference, parse_first_rating
from align.rewards.judges import WithoutThoughts
from align.rewards.llm_judge import LlmJudge
from align.rewards.thoughts import THINK, response_text
from align.rewards.verdicts import Verdict

CATEGORIES = list(TEMPERATURES)
ROWS = [
    {
        "question_id": 81 + n,
        "category": CATEGORIES[n % 8],
        "turns": [f"first of {n}", f"second of {n}"],
        "reference": ["x"],
    }
    for n in range(16)
]
# Templates of this test, in the form of FastChat's judge_prompts.jsonl
TEMPLATES = [
    ("single-v1", "Be fair.", "{question} | {answer}", "[[rating]]"),
    ("single-math-v1", "Be fair.", "{question} | {ref_answer_1} | {answer}", "[[rating]]"),
    ("single-v1-multi-turn", "Rate the second.", "{question_1} | {answer_1} | {question_2} | {answer_2}", "[[rating]]"),
    (
        "single-math-v1-multi-turn",
        "Rate the second.",
        "{question_1} | {ref_answer_1} | {question_2} | {ref_answer_2} || {answer_1} | {answer_2}",
        "[[rating]]",
    ),
]


class Inputs:
    """A policy that says at which temperature it is asked, and a judge."""

    response_files, judge_name, policy_path, thoughts = (), "judge", "models/ours", THINK

    def __init__(self, rows, judge, references=None):
        self._rows, self._judge, self.reference_answers = rows, judge, references

    def rows(self, task):
        return self._rows

    def answers(self, rows, next_turn, *, temperature=None):
        assert len(next_turn(rows[0], ["x"])) == 3 and next_turn(rows[0], ["x", "y"]) is None
        return [
            Answer(n, f"<think>t</think>two at {temperature}", (f"one at {temperature}",)) for n in range(len(rows))
        ]

    def judge(self):
        return WithoutThoughts(self._judge, THINK)

    def split(self, items, work, *, activity):
        return list(work(items))


class Echo:
    """An engine that remembers what it is asked and gives scripted answers."""

    name, throughput = "echo", Throughput()

    def __init__(self, answer):
        self.asked, self.answer = [], answer

    def sample(self, prompts, settings, *, finished=frozenset()):
        for prompt in prompts:
            self.asked.append([message.content for message in prompt.messages])
            text, finish = self.answer(prompt.messages[-1].content)
            yield Sample(prompt_key(prompt), 0, self.name, text, 1, finish, 0)


@pytest.fixture
def files(tmp_path):
    names = ("name", "system_prompt", "prompt_template", "output_format")
    rows = [dict(zip(names, each, strict=True)) for each in TEMPLATES]
    (tmp_path / "judge_prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    references = [
        {"question_id": row["question_id"], "choices": [{"turns": [f"ref 1 of {n}", f"ref 2 of {n}"]}]}
        for n, row in enumerate(ROWS)
        if row["category"] in ("math", "coding", "reasoning")
    ]
    (tmp_path / "references.jsonl").write_text("".join(json.dumps(row) + "\n" for row in references))
    return tmp_path


def judge_of(files, engine, **settings):
    prompts = str(files / "judge_prompts.jsonl")
    return LlmJudge(engine, LlmSettings(model="m", mode="rating", prompts=prompts, attempts=1, **settings))


def test_the_judge_is_asked_with_the_four_prompts_of_the_file(files):
    engine = Echo(lambda _: ("Good. Rating: [[7]]", "stop"))
    result = TASK.run(Inputs(ROWS, judge_of(files, engine), str(files / "references.jsonl")))
    asked = {tuple(each) for each in engine.asked}
    writing, math = CATEGORIES.index("writing"), CATEGORIES.index("math")
    assert len(asked) == 32
    assert {
        ("Be fair.", f"first of {writing} | one at 0.7"),
        ("Rate the second.", f"first of {writing} | one at 0.7 | second of {writing} | two at 0.7"),
        ("Be fair.", f"first of {math} | ref 1 of {math} | one at 0.0"),
        (
            "Rate the second.",
            f"first of {math} | ref 1 of {math} | second of {math} | ref 2 of {math} || one at 0.0 | two at 0.0",
        ),
    } <= asked
    assert sum("ref" in text for _, text in asked) == 12  # two questions of three categories, in two turns
    assert not any("think" in text for _, text in asked)
    temperatures = {re.search(r"first of (\d+) .*one at ([\d.]+)", text).groups() for _, text in asked}
    assert temperatures == {(str(n), str(TEMPERATURES[row["category"]])) for n, row in enumerate(ROWS)}
    assert result.scores["score"].value == 7


def test_scores_are_means_by_turn_and_category_without_what_cannot_be_read(files):
    """The rating is the number of the question in turn 1, 10 in turn 2; two answers have none."""

    def answer(text):
        number = int(re.search(r"first of (\d+)", text)[1])
        if number == 3:
            return "I'm sorry, I cannot rate this.", "stop"
        rating = f"[[{number % 10}]]" if "two" not in text else "[10]"
        return (rating, "length") if number == 4 and "two" in text else (rating, "stop")

    engine = Echo(answer)
    result = TASK.run(Inputs(ROWS, judge_of(files, engine), str(files / "references.jsonl")))
    first = [n % 10 for n in range(16) if n != 3]
    second = [10] * 14
    found = {name: score.value for name, score in result.scores.items()}
    assert found["turn_1"] == pytest.approx(sum(first) / 15)
    assert found["turn_2"] == 10
    assert found["score"] == pytest.approx((sum(first) + sum(second)) / 29)
    for place, category in enumerate(CATEGORIES):
        own = [n % 10 for n in (place, place + 8) if n != 3] + [10 for n in (place, place + 8) if n not in (3, 4)]
        assert found[category] == pytest.approx(sum(own) / len(own))
    assert result.scores["score"].n == 15  # questions with a rating
    counts = result.counts
    assert (counts["judgments"], counts["unparsed"]) == (32, 3)
    assert {reason.rpartition(": ")[2]: number for reason, number in counts["void"].items()} == {
        "refusal": 2,
        "cut off": 1,
    }
    total = sum(first) + sum(second)
    assert counts["score_bounds"] == ((total + 3) / 32, (total + 30) / 32)
    assert (counts["single_brackets"], counts["out_of_range"]) == (14, 2)  # rated 0: questions 0 and 10
    assert result.verdicts[6]["question_id"] == 84 and result.verdicts[6]["score"] == -1
    assert [each["turn"] for each in result.verdicts[:2]] == [1, 2]


def test_the_interval_is_over_questions_and_not_over_turns():
    """A judge that gives both turns of a question the same rating has half as many observations."""
    rows = [{"question_id": n, "category": "writing", "turns": ["a", "b"]} for n in range(80)]

    def judge(groups):
        for prompt, _ in groups:
            yield (Verdict(4.0 + 4 * (prompt.metadata["question_id"] % 2)),)

    found = TASK.run(Inputs(rows, judge)).scores["score"]
    assert found.value == 6
    assert found.high - found.low == pytest.approx(2 * 1.96 * 2 / 80**0.5, rel=0.15)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**ROWS[0], "turns": ["one"]}], "row 1 has turns"),
        ([ROWS[0], {**ROWS[1], "category": "Math"}], "row 2 has category 'Math'"),
        ([ROWS[CATEGORIES.index("math")]], "are judged with reference answers: name their file"),
    ],
)
def test_rows_that_are_no_questions_are_errors(rows, message):
    with pytest.raises(InputError, match=message):
        TASK.run(Inputs(rows, lambda _: []))


def test_a_question_without_its_reference_is_an_error(files):
    with pytest.raises(InputError, match="no reference answers for both turns of question 900"):
        row = {**ROWS[CATEGORIES.index("math")], "question_id": 900}
        TASK.run(Inputs([row], lambda _: [], str(files / "references.jsonl")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "other"}, "no judge prompt is called 'single-v1'; mode rating needs single-v1, single-math-v1"),
        ({"output_format": "[[A]]"}, r"single-v1 has output_format '\[\[A\]\]'"),
        ({"prompt_template": "{question} {response}"}, "single-v1: the template cannot use 'response'"),
    ],
)
def test_a_file_of_judge_prompts_is_checked_when_it_is_read(files, change, message):
    file = files / "judge_prompts.jsonl"
    first, *others = map(json.loads, file.read_text().splitlines())
    file.write_text("".join(json.dumps(row) + "\n" for row in [{**first, **change}, *others]))
    with pytest.raises(InputError, match=message):
        judge_of(files, Echo(None))


def test_the_pairwise_prompts_of_a_file_are_used_in_both_orders(tmp_path):
    fields = {
        "pair-v2": "{question} | {answer_a} | {answer_b}",
        "pair-math-v1": "{question} | {ref_answer_1} | {answer_a} | {answer_b}",
        "pair-v2-multi-turn": "{question_1} {answer_a_1} {answer_b_1} {question_2} {answer_a_2} {answer_b_2}",
        "pair-math-v1-multi-turn": "{question_1} {ref_answer_1} {question_2} {ref_answer_2} {answer_a_2} {answer_b_2}",
    }
    rows = [{"name": name, "prompt_template": text, "output_format": "[[A>>B]]"} for name, text in fields.items()]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    engine = Echo(lambda text: ("[[A>>B]]" if text.endswith("good | bad") else "[[B>A]]", "stop"))
    judge = LlmJudge(engine, LlmSettings(model="m", prompts=str(tmp_path / "p.jsonl")))
    (verdicts,) = judge([(Prompt((Message("user", "q"),)), ("good", "bad"))])
    assert engine.asked == [["q | good | bad"], ["q | bad | good"]]
    assert [(game.win, game.is_clear) for game in verdicts[0].games] == [(1, True), (1, False)]


def test_ratings_are_read_as_fastchat_reads_them():
    texts = ("[[5]] and [[6]]", "[4.5]", "As in [2], it is good. [[8]]", "As in [2], it is good.", "8/10", "[[ 8 ]]")
    assert [found and found.value for found in map(parse_first_rating, texts)] == [5, 4.5, 8, 2, None, None]
    assert parse_first_rating(response_text("[[5]] but", "length")) is None
    texts = ("[[B]] no, [[A]]", "[[C]]", "A")
    assert [found and found.value for found in map(parse_first_preference, texts)] == [1, 0.5, None]


def test_the_second_turn_follows_the_answer_to_the_first():
    assert [message.content for message in next_turn(ROWS[0], ["mine"])] == ["first of 0", "mine", "second of 0"]
