"""Entries whose items are instructions of a built-in task: two-turn prompts, and Genetic-Instruct with its verifier."""

import re
from random import Random

import pytest
from sandbox_mark import needs_sandbox
from synthetic_runs import all_rows, check_counts, check_lineage, make

from align.config import build
from align.errors import InputError
from align.procedural import code, code_prompting, general, user_turns
from align.procedural.tasks import KINDS, demonstrations, grade, prompts, split_of
from align.synth.genetic.family import GeneticCode

SPLITS = {"sft": 0.5, "preference": 0.5, "test": 0.0}
TWO_TURN = {"talks": {"family": "two_turn", "of": "seeds", "task": "general", "tries": 1}}
GENETIC = {"family": "genetic_code", "of": "seeds", "task": "code", "fitness": "execution", "number": 12}
GENETIC |= {"generations": 1, "colonies": 2, "mutation_batch": 4, "crossover_batch": 2, "crossover_parents": 2}
GENETIC |= {"crossover_children": 2, "near_duplicate": 1.0, "max_asked": 3}
VERIFIER = [{"name": "verifier", "settings": {"reward": "both"}}]


def seeds(kind, number):
    return {"seeds": {"path": f"tasks:{kind}", "limit": number}}


def follow_up(instruction, split):
    """A follow-up to an instruction whose revised request is in the split; nothing where there is none."""
    spec = general.parse(instruction)
    phrases = ("three", "four", "in capitals", "separated by stars", "ending with a full stop")
    revised = {f"Now {phrase}.": general.revise(spec, f"Now {phrase}.") for phrase in phrases}
    kept = [text for text, found in revised.items() if found and split_of(general.instruction(found)) == split]
    return kept[0] if kept else ""


def test_follow_ups_of_the_task_are_kept_with_the_revised_request(tmp_path):
    asked = []

    def teacher(request):
        asked.append(request["messages"][-1]["content"])
        found = re.search(r"User: (.*)\n", asked[-1])
        if found is None:
            return "cat, dog", "stop"
        kinds = ("train", "test", "neither")
        kind = kinds[len(asked) % 3]
        return (follow_up(found[1], kind) or "Now sing."), "stop"

    report = make(tmp_path, teacher, TWO_TURN, data=seeds("general", 30), splits=SPLITS)
    check_counts(report)
    check_lineage(tmp_path)
    counts, made = report["entries"]["talks"], all_rows(tmp_path)["prompts"]
    assert counts["kept"] == len(made) > 5
    assert counts["dropped: user's turn: in the task's test split"] > 0
    assert counts["dropped: user's turn: not an instruction of the task"] > 5
    for row in made:
        first, answer, last = (message["content"] for message in row["prompt"])
        assert user_turns.WORDING.format(history=f"User: {first}\n\nAssistant: {answer}") in asked
        requirements = dict(row["metadata"]["constraints"])
        before = dict(general.parse(first)["constraints"])
        assert before.keys() <= requirements.keys()
        assert sum(requirements[name] != value for name, value in before.items()) <= 1
        phrase = last.removeprefix("Now ").removesuffix(".")
        assert phrase in general.instruction(row["metadata"]).lower(), "the revised request asks for it"


@needs_sandbox
def test_bred_tasks_are_kept_where_their_solution_passes_the_examples(tmp_path):
    asked = []

    def teacher(request):
        text = request["messages"][-1]["content"]
        asked.append(text)
        if (spec := code.parse(text)) is not None:
            return (KINDS["code"].answer(spec, Random(2)) if len(asked) % 3 else "lambda x: 0"), "stop"
        parents = [code.parse(line)["steps"] for line in text.split("\n") if code.parse(line)]
        names = {words: name for name, words in code_prompting.HEURISTICS.items()}
        heuristic = names.get(text.partition("\n")[0])
        new = code_prompting.answer({"heuristic": heuristic or "change", "examples": parents}, Random(text))
        return (new if heuristic else f"1. {new}\n2. Write a poem."), "stop"

    report = make(tmp_path, teacher, {"code": GENETIC}, data=seeds("code", 8), splits=SPLITS, judges=VERIFIER)
    check_counts(report)
    check_lineage(tmp_path)
    counts, made = report["entries"]["code"], all_rows(tmp_path)["demonstrations"]
    assert counts["kept"] == len(made) > 3 and counts["dropped: tests fail"] > 0
    assert counts["dropped: not an instruction of the task"] > 0
    for row in made:
        task, solution = (message["content"] for message in row["messages"])
        spec = {name: row["metadata"][name] for name in ("steps", "examples")}
        assert spec == code.parse(task) and split_of(task) != "test"
        assert all(grade({"kind": "code", **spec}, solution))
    assert not any("assert" in text for text in asked), "no tests are asked for"


def test_a_judge_is_refused_for_a_built_in_task():
    with pytest.raises(InputError, match="solutions of a built-in task are run"):
        build(GeneticCode, {**GENETIC, "fitness": "judge"}).check()


@pytest.mark.parametrize("kind", ["code_prompting", "user_turns"])
def test_rows_that_teach_a_teacher_are_right_and_hold_no_instruction_of_the_test_split(kind):
    pattern = re.compile(r"Write Python for[^.]*\.|(?<=User: )[^.]*\.")
    for row in demonstrations(kind, num_rows=150, seed=0):
        texts = [text for message in row.messages for text in pattern.findall(message.content)]
        assert texts and {split_of(text) for text in texts} <= {"train"}
        assert all(grade(row.metadata, row.messages[1].content))


def test_a_dialogue_asks_for_a_revised_request_of_its_own_split():
    for split in ("train", "test"):
        for row in prompts("dialogues", num_rows=40, seed=0, split=split):
            revised = row.metadata["revised"]
            assert split_of(general.instruction(revised)) == split_of(row.messages[0].content) == split
            before = {name: row.metadata[name] for name in general.SPEC}
            changed = {name for name in general.SPEC if revised[name] != before[name]}
            assert len(changed) == 1 and changed <= {"count", "constraints"}


@pytest.mark.parametrize(
    "text", ["", "Now.", "Now seven.", "Now three", "now three.", "In capitals.", "Now in capitals. Thanks."]
)
def test_other_texts_are_no_follow_ups(text):
    assert general.revise(general.parse("List four tools, in alphabetical order."), text) is None
