"""The table of tasks: light import, custom tasks, and tasks with several turns."""

import subprocess
import sys

import pytest

from align.distributed.processes import Processes
from align.distributed.progress import SilentProgress
from align.errors import InputError
from align.evaluation.answers import answers_from_policy
from align.evaluation.sampled_task import SampledTask, correct
from align.evaluation.task import Answer
from align.evaluation.tasks import TASKS, pick_task
from align.inference.samples import Sample, Throughput, prompt_key, unique_prompts
from align.inference.settings import SamplingSettings
from align.records import Message


def test_the_table_is_imported_without_torch():
    code = "import sys, align.evaluation.tasks; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "align" in loaded
    assert not {"torch", "transformers", "datasets", "accelerate", "lm_eval"} & set(loaded)


def next_turn(row, responses):
    """Two questions, the second about the first response."""
    if len(responses) == 2:
        return None
    first = Message("user", row["first"])
    return (first,) if not responses else (first, Message("assistant", responses[0]), Message("user", row["second"]))


TWO_TURNS = SampledTask(
    name="two_turns",
    metrics=("correct",),
    columns=("first", "second"),
    next_turn=next_turn,
    grade=lambda items: (correct(item.response == "".join(item.earlier).upper()) for item in items),
)
NO_TASK = "neither"


class Echo:
    """Answers with the sample's number and the last message, then repeats itself in capitals."""

    name, throughput = "echo", Throughput()

    def sample(self, prompts, settings, *, finished=()):
        for prompt in unique_prompts(prompts):
            for number in range(settings.num_responses):
                messages = prompt.messages
                text = messages[1].content.upper() if len(messages) == 3 else f"{number} {messages[-1].content}"
                yield Sample(prompt_key(prompt), number, self.name, text, 1, "stop", 0)


def test_a_task_may_have_several_turns():
    rows = [{"first": "one?", "second": "Louder."}, {"first": "two?", "second": "Louder."}]
    answers = answers_from_policy(
        rows,
        TWO_TURNS.next_turn,
        Echo(),
        sampling=SamplingSettings(num_responses=2),
        journal=None,
        processes=Processes(),
        progress=SilentProgress(),
    )
    assert answers == [
        Answer(row, f"{number} {said}".upper(), (f"{number} {said}",), "stop")
        for row, said in ((0, "one?"), (1, "two?"))
        for number in (0, 1)
    ]
    grades = list(TWO_TURNS.grade_answers(rows, answers))
    assert TWO_TURNS.scores(answers, grades)["correct"].value == 1


def test_turns_that_do_not_depend_on_the_responses_are_sampled_for_each_dialogue():
    def fixed(row, responses):
        return (Message("user", row["asked"][len(responses)]),) if len(responses) < 2 else None

    found = answers_from_policy(
        [{"asked": ["one?", "two?"]}, {"asked": ["two?", "three?"]}],
        fixed,
        Echo(),
        sampling=SamplingSettings(num_responses=3),
        journal=None,
        processes=Processes(),
        progress=SilentProgress(),
    )
    said = [(answer.row, *answer.earlier, answer.response) for answer in found]
    assert said == [(0, f"{number} one?", f"{number} two?") for number in range(3)] + [
        (1, f"{number} two?", f"{number} three?") for number in range(3)
    ]


def test_a_custom_task_is_loaded_by_its_dotted_path():
    assert pick_task(f"{__name__}:TWO_TURNS") is sys.modules[__name__].TWO_TURNS


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ifevil", "did you mean 'ifeval'"),
        ("nowhere:TASK", "cannot be imported"),
        (f"{__name__}:NO_TASK", "is a str, not an align.evaluation.tasks.Task"),
    ],
)
def test_an_unknown_task_is_rejected(name, said):
    with pytest.raises(InputError, match=said):
        pick_task(name)


def test_options_depend_on_the_origin_of_the_responses():
    task = TASKS["gsm8k"]
    assert "responses" not in task.used_with({"policy"})
    assert not {"policy", "sampling", "engine"} & task.used_with({"responses"})


def test_pass_at_k_is_a_metric_for_enough_responses():
    assert TASKS["mbpp"].metrics_of(1) == TASKS["mbpp"].metrics == ("pass@1",)
    assert TASKS["mbpp"].metrics_of(12) == ("pass@1", "pass@10")
    # Its verdicts decide pass@1 only: not the measures beside it, nor pass@10, whose paired change was that of pass@1
    assert [TASKS["mbpp"].part(name) for name in ("pass@1", "pass@10", "length", "kl_from_start")] == [
        "correct", "pass@10", "length", "kl_from_start"
    ]  # fmt: skip
    assert TASKS["gsm8k"].metrics_of(12) == ("correct",)
