"""MMLU: rows in both forms, letters in answers, and likelihoods of letters against a forward pass of transformers."""

import json
import os

import pytest
import torch
from small_runs import SMALL_POLICY, run
from transformers import AutoTokenizer

from align.data.rows import read_rows
from align.distributed.progress import SilentProgress
from align.errors import InputError
from align.evaluation.choices import choice_groups
from align.evaluation.likelihood import likelihoods
from align.evaluation.task import Answer
from align.evaluation.tasks.mmlu import TASK, letter_in, plain_prompt, prompt, read_question
from align.records import Message
from align.rewards.thoughts import THINK
from align.testing import tiny_policy

HUB = {"question": "What is 1 + 1?", "subject": "abstract_algebra", "choices": ["1", "2", "3", "4"], "answer": 1}
CSV = {
    "question": "What is 1 + 1?",
    "A": "1",
    "B": "2",
    "C": "3",
    "D": "4",
    "answer": "B",
    "subject": "abstract_algebra",
}


def test_both_forms_are_the_same_question():
    assert read_question(HUB) == read_question(CSV) == read_question({**HUB, "choices": "['1', '2', '3', '4']"})
    assert plain_prompt(HUB) == (  # lm-evaluation-harness, mmlu_abstract_algebra, zero-shot
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "What is 1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    )


def test_original_files_have_no_header(tmp_path):
    (tmp_path / "college_physics_test.csv").write_text('"Which, if any?",x,y,z,w,C\nAnd now?,1,2,3,4,A\n')
    rows = list(read_rows(str(tmp_path / "college_physics_test.csv")))
    assert [(row["question"], row["answer"], row["subject"]) for row in rows] == [
        ("Which, if any?", "C", "college_physics"), ("And now?", "A", "college_physics")
    ]  # fmt: skip
    (tmp_path / "with_header.csv").write_text("question,A,B,C,D,answer\nAnd now?,1,2,3,4,A\n")
    assert len(list(read_rows(str(tmp_path / "with_header.csv")))) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**HUB, "choices": ["1"]}, "has 1 choices"),
        ({**HUB, "answer": 4}, "has answer 4"),
        ({"question": "?", "answer": "A"}, "A, B, C and D"),
    ],
)
def test_other_rows_are_rejected(row, message):
    with pytest.raises(InputError, match=f"file: row 1: .*{message}"):
        TASK.check_rows([row], "file")


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        *[
            (text, "B")
            for text in ("B", " (B)", "B. 2", "**B**", "B) two", "b is wrong. The answer is B.", "\\boxed{B}")
        ],
        *[(text, "B") for text in ("Option A fails. So the correct choice is (B).", "B\nbecause", "Answer: B")],
        *[(text, "B") for text in ("B is the correct answer.", "(B) is right", "The answer is B because of it")],
        *[(text, "A") for text in ("The answer is A.", "Answer: A", "The answer is (A) two", "A is correct")],
        *[(text, "A") for text in ("The answer is A because of it", "The best choice is A, not B.", "I pick option A")],
        *[(f"{text}\n\nOption A is too small. Option B is a planet.", "C") for text in ("Answer: C", "**Answer**: C")],
        ("The correct answer is option C. Option D is wrong.", "C"),
        *[(text, None) for text in ("", "A planet of the sun", "I do not know", "2", "E", "The answer is A planet.")],
    ],
)
def test_letters_are_found(response, letter):
    assert letter_in(response) == letter


def test_an_answer_without_a_letter_is_wrong_and_counted():
    answers = [Answer(0, "B"), Answer(1, "C"), Answer(2, "Two"), Answer(3, "Two")]
    found = TASK.scores(answers, list(TASK.grade_answers([HUB] * 4, answers)))
    assert {name: score.value for name, score in found.items()} == {"generated": 0.25, "unparsable": 0.5}


def test_letters_are_one_token_branches_of_one_prompt():
    (policy, tokenizer), (plain, _) = tiny_policy(), tiny_policy()
    letters = [f" {letter}" for letter in "ABCD"]
    (text,) = choice_groups(tokenizer, [plain_prompt(HUB)], letters)
    (chat,) = choice_groups(tokenizer, [(Message("user", prompt(HUB)),)], list("ABCD"))
    for group in (text, chat):
        assert len({tuple(sequence.ids[: group.prompt_length]) for sequence in group.sequences}) == 1
        (found,) = likelihoods(policy, [group])
        for sequence, (logp, length) in zip(group.sequences, found, strict=True):
            ids = torch.from_numpy(sequence.ids).long()
            with torch.no_grad():
                logps = plain.base(ids[None]).logits[0].log_softmax(dim=-1)
            own = range(group.prompt_length, len(ids))
            assert logp == pytest.approx(sum(float(logps[at - 1, ids[at]]) for at in own), abs=1e-4)
            assert length == len(own)


class OnlyAnswers:
    """A policy that answers every question with B, of which a step asks one measure beside the likelihoods."""

    metrics, measures_likelihood, thoughts, progress = ["likelihood", "length"], False, THINK, SilentProgress()

    def rows(self, task):
        return [HUB, HUB]

    def answers(self, rows, next_turn):
        return [Answer(0, "B"), Answer(1, "B ")]

    def split(self, items, work, *, activity):
        return list(work(items))


def test_a_measure_of_answers_is_measured_where_no_metric_of_answers_is_asked_for():
    found = TASK.run(OnlyAnswers())
    assert found.measures["length"].value == 1.5
    assert found.scores == {}


def test_the_flops_of_likelihoods_are_in_the_ledger(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({**HUB, "question": question}) + "\n" for question in ("1 + 1?", "Which one?")))
    text = f"""data:
  letters: {{{{path: {rows}}}}}
steps:
  base: {{{{stage: import, vocab_size: 300}}}}
  ask:
    stage: evaluate
    policies: [base]
    tasks: {{{{task: {{{{task: mmlu, data: letters, metrics: [likelihood]}}}}}}}}
"""
    made, _ = run(tmp_path, text=SMALL_POLICY + text)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "runs/small/base")
    vocab = json.loads((tmp_path / "runs/small/base/config.json").read_text())["vocab_size"]
    tokens = pairs = targets = 0
    for line in rows.read_text().splitlines():
        ids = [tokenizer(plain_prompt(json.loads(line)) + f" {letter}")["input_ids"] for letter in "ABCD"]
        shared = len(os.path.commonprefix(ids))
        lengths = [*range(1, shared + 1), *(at + 1 for each in ids for at in range(shared, len(each)))]
        tokens, pairs = tokens + len(lengths), pairs + sum(lengths)
        targets += sum(len(each) - shared for each in ids)
    weights = 4 * 16 * 16 + 3 * 16 * 32  # of the one layer
    assert made["ask-base"]["ledger"]["tokens_computed"] == tokens
    assert made["ask-base"]["ledger"]["flops"] == 2 * weights * tokens + 4 * 16 * pairs + 2 * 16 * vocab * targets
