"""The family `genetic_code` with a scripted instructor, coder and judge: counts, lineage, selection, determinism."""

import json
import math
from collections import Counter
from itertools import combinations
from random import Random

import pytest
from scripted_genetics import ScriptedGenetics, draw_steps, solves, steps_of, worded
from scripted_teacher import serving_teacher
from synthetic_runs import all_rows, check_counts, content, lines, make, recipe, stored, write_recipe
from test_synthesize import made_with_kills

from align.config import build
from align.errors import InputError
from align.procedural.code import INPUTS
from align.synth.genetic.family import GeneticCode
from align.synth.genetic.near_duplicates import NEAR_DUPLICATE, KnownTexts, shingles
from align.synth.genetic.parsing import tasks
from align.synth.genetic.settings import HEURISTICS
from align.synth.parsing.lists import CUT, DUPLICATE, TOO_FEW
from align.synth.parsing.programs import program
from align.workflow.recipe.load import load_recipe

# Two tasks that differ in their last step have 17 of 19 shingles in common
SMALL = {"family": "genetic_code", "of": "seeds", "number": 60, "generations": 2, "colonies": 3, "near_duplicate": 0.92}
SMALL |= {"mutation_batch": 8, "crossover_batch": 3, "crossover_children": 3}
EXECUTED = [{"name": "executed_tests"}]
FAULTY = {"exact copy": 0.1, "near copy": 0.1, "refusal": 0.05, "empty": 0.05, "cut": 0.05}


def seeds(folder, number=12):
    """A source of seed tasks."""
    folder.mkdir(exist_ok=True, parents=True)
    rng, path = Random("seeds"), folder / "seeds.jsonl"
    path.write_text("".join(json.dumps({"prompt": worded(draw_steps(rng))}) + "\n" for _ in range(number)))
    return {"seeds": {"path": str(path)}}


def sized(settings):
    """The small family with these settings, without those that they leave without effect."""
    unused = {1.0: "crossover", 0.0: "mutation_batch"}.get(settings.get("mutation_probability"), "-")
    return {name: value for name, value in SMALL.items() if not name.startswith(unused)} | settings


def bred(folder, teacher, *, told=None, judges=(), concurrency=4, **settings):
    """The counts of the family and its rows."""
    step = {"data": seeds(folder), "judges": list(judges), "concurrency": concurrency}
    report = make(folder, teacher, {"code": sized(settings)}, told=told, **step)
    check_counts(report)
    return report["entries"]["code"], all_rows(folder)["demonstrations"]


def pair(row):
    """The task of a row, and its program."""
    task, answer = (message["content"] for message in row["messages"])
    return task, program(answer)


def test_children_have_their_operation_parents_colony_and_generation(tmp_path):
    teacher = ScriptedGenetics(bug_rate=0, tpr=1)
    counts, rows = bred(tmp_path, teacher)
    assert counts["kept"] == len(rows) == SMALL["number"]
    everything = {row["id"]: row for row in lines(tmp_path / "runs/made/prompts/lineage.jsonl")}
    by_place, born = Counter(), {}
    for row in rows:
        lineage = row["metadata"]["lineage"]
        details = lineage["details"]
        born[lineage["id"]] = (details["generation"], details["colony"])
        by_place[details["operation"]] += 1
        if details["operation"] == "mutation":
            assert len(lineage["parents"]) == 1 and details["heuristic"] in HEURISTICS
        else:
            assert 2 <= len(lineage["parents"]) <= 3 and "heuristic" not in details
        assert len(lineage["requests"]) == 3  # instructor, coder, judge
        assert set(lineage["requests"]) <= stored(tmp_path).keys()
        assert lineage == {name: everything[lineage["id"]][name] for name in lineage}
    assert by_place == {name: counts[f"{name}: kept"] for name in ("mutation", "crossover")}
    assert counts["population after generation 1"] == 12 + len(rows)
    same_generation = 0
    for row in rows:
        lineage = row["metadata"]["lineage"]
        for parent in set(lineage["parents"]) & born.keys():
            generation, colony = born[parent]
            own = born[lineage["id"]]
            assert generation < own[0] or (generation, colony) == own
            same_generation += generation == own[0]
    assert same_generation > 0  # children are parents before their generation ends


def test_children_belong_to_the_split_of_all_their_parents(tmp_path):
    _, rows = bred(tmp_path, ScriptedGenetics())
    split_of = {}
    for path in (tmp_path / "runs/made/prompts").glob("*-demonstrations.jsonl"):
        for row in lines(path):
            for seed in row["metadata"]["lineage"]["seeds"]:
                assert split_of.setdefault(seed, path.name) == path.name
    assert len(rows) == SMALL["number"] and len(set(split_of.values())) > 1


def test_a_child_of_a_mutation_differs_from_its_parent_in_one_step(tmp_path):
    _, rows = bred(tmp_path, ScriptedGenetics(bug_rate=0, tpr=1), mutation_probability=1.0)
    by_id = {row["metadata"]["lineage"]["id"]: row for row in rows}
    num_pairs = 0
    for row in rows:
        for parent in set(row["metadata"]["lineage"]["parents"]) & by_id.keys():
            one, other = (steps_of(pair(each)[0]) for each in (row, by_id[parent]))
            assert sum(a != b for a, b in zip(one, other, strict=True)) == 1
            num_pairs += 1
    assert num_pairs > 10


def test_every_candidate_is_kept_or_dropped_for_a_reason_that_the_teacher_gave(tmp_path):
    teacher = ScriptedGenetics(faults=FAULTY, syntax_errors=0.1)
    counts, rows = bred(tmp_path, teacher)
    assert counts["asked"] == counts["mutation: asked"] + counts["crossover: asked"]
    reasons = {"refused", "empty", "cut", "does not compile", "judge: fail", DUPLICATE, NEAR_DUPLICATE}
    assert reasons <= {name.removeprefix("dropped: ") for name in counts}
    assert counts["dropped: judge: fail"] == sum(not passes for _, passes in teacher.judged)
    assert counts["dropped: does not compile"] == sum(
        "lambda x x" in each["text"] for each in stored(tmp_path).values()
    )
    assert all(compile(pair(row)[1], "", "exec") for row in rows)


def test_no_copy_of_a_seed_or_of_another_pair_is_kept(tmp_path):
    counts, rows = bred(tmp_path, ScriptedGenetics(faults={"exact copy": 0.3, "near copy": 0.3}))
    texts = [pair(row)[0] for row in rows] + [row["prompt"] for row in lines(tmp_path / "seeds.jsonl")]
    assert min(counts["dropped: duplicate"], counts["dropped: near duplicate"]) > 5
    assert len({tuple(steps_of(text)) for text in texts}) == len(texts)
    for one, other in combinations([shingles(text) for text in texts], 2):
        assert len(one & other) < SMALL["near_duplicate"] * len(one | other)


def test_near_duplicates_are_those_of_a_comparison_of_all_pairs():
    rng = Random(3)
    words = [f"w{letter}" for letter in "abcdefghijkl"]
    base = [rng.choices(words, k=rng.randint(1, 30)) for _ in range(60)]
    texts = [" ".join(each) for each in base]
    texts += [" ".join([*each[: rng.randint(0, len(each))], *rng.choices(words, k=2)]) for each in base]
    for threshold in (0.5, 0.8, 1.0):
        known, kept = KnownTexts(threshold), list[str]()
        for text in texts:
            jaccard = [len(shingles(text) & shingles(each)) / len(shingles(text) | shingles(each)) for each in kept]
            expected = DUPLICATE if text in kept else NEAR_DUPLICATE if any(j >= threshold for j in jaccard) else ""
            assert known.reason(text) == KnownTexts(threshold, known).reason(text) == expected
            if not expected:
                known.add(text)
                kept.append(text)
        print(f"threshold {threshold}: {len(kept)} of {len(texts)} texts kept")


@pytest.mark.parametrize(
    ("change", "is_near"),
    [
        (("big", "tall"), True),
        (("3", "4"), False),
        (("sum", "product"), False),
        (("is big", "is not big"), False),
        (("any", "every"), False),
        (("x + 1", "x - 1"), False),
    ],
)
def test_a_similar_task_with_another_number_operator_or_quantifier_is_no_copy(change, is_near):
    text = (
        "Write a function that takes a list of the heights of trees in a park and returns the sum of those at 3 m or "
        "more if any tree is big, and in all other cases x + 1 for the tree x that a visitor of the park chose on a map"
    )
    known = KnownTexts(0.6)
    known.add(text)
    assert known.reason(text.replace(*change, 1)) == (NEAR_DUPLICATE if is_near else "")


@pytest.mark.parametrize("fitness", ["execution", "both"])
def test_pairs_that_pass_the_tests_are_right(tmp_path, fitness):
    teacher = ScriptedGenetics(bug_rate=0.5)
    counts, rows = bred(tmp_path, teacher, fitness=fitness, judges=EXECUTED, number=20)
    assert all(solves(*pair(row)) for row in rows)
    assert counts["dropped: tests fail"] > 3
    assert {row["metadata"]["lineage"]["details"]["reward"] for row in rows} == {1.0}
    assert {len(row["metadata"]["tests"]) for row in rows} == {len(INPUTS)}  # without the one that is invalid
    assert all(is_right for is_right, _ in teacher.judged)  # only what passes the tests is judged
    assert bool(teacher.judged) == (fitness == "both")


class NoTests(ScriptedGenetics):
    """Writes no tests."""

    def test(self, text, rng):
        return "I would test small lists first.", "stop"

    def __call__(self, request):
        if "Write five tests" in request["messages"][-1]["content"]:
            return self.test("", None)
        return super().__call__(request)


def test_without_tests_execution_passes_nothing_and_the_judge_decides_alone(tmp_path):
    counts, _ = bred(tmp_path / "both", NoTests(), fitness="both", judges=EXECUTED, number=6)
    assert counts["judged without tests"] == counts["kept"] + counts["dropped: judge: fail"]
    with pytest.raises(Exception, match=r"no row was made: code: (\d+) asked; 0 kept.* dropped: no valid tests"):
        bred(
            tmp_path / "executed", NoTests(faults={}), fitness="execution", judges=EXECUTED, number=9, near_duplicate=1
        )


@pytest.mark.slow
@pytest.mark.parametrize(("bug_rate", "tpr", "fpr"), [(0.3, 0.95, 0.2), (0.6, 0.8, 0.4)])
def test_the_precision_of_a_judge_follows_from_its_rates(tmp_path, bug_rate, tpr, fpr):
    teacher = ScriptedGenetics(bug_rate=bug_rate, tpr=tpr, fpr=fpr, seed=1)
    _, rows = bred(tmp_path, teacher, number=400, mutation_batch=100, near_duplicate=1.0)
    right = sum(solves(*pair(row)) for row in rows)
    share = sum(is_right for is_right, _ in teacher.judged) / len(teacher.judged)
    expected = share * tpr / (share * tpr + (1 - share) * fpr)
    error = math.sqrt(expected * (1 - expected) / len(rows))
    print(f"{right} of {len(rows)} right, {expected:.3f} expected")
    assert len(rows) > 380 and abs(right / len(rows) - expected) < 2.58 * error  # 99 %


@pytest.mark.parametrize(("num_kills", "seed"), [(4, 0), pytest.param(12, 1, marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_same_rows_and_asks_nothing_twice(tmp_path, num_kills, seed):
    once, again = (ScriptedGenetics(seed=seed, faults=FAULTY) for _ in range(2))
    families, data = {"code": SMALL | {"number": 30}}, seeds(tmp_path)
    make(tmp_path / "whole", once, families, data=data)
    made_with_kills(tmp_path / "killed", again, Random(seed), num_kills, families, data=data)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    asked = sorted(map(json.dumps, again.asked))
    assert asked == sorted(map(json.dumps, once.asked)) and len(set(asked)) == len(asked)


@pytest.mark.slow
def test_concurrency_does_not_change_the_rows(tmp_path):
    with serving_teacher(ScriptedGenetics(faults=FAULTY)) as server:
        bred(tmp_path / "one", server.url, concurrency=1, number=6)
        bred(tmp_path / "many", server.url, concurrency=16, number=6)
    assert content(tmp_path / "one") == content(tmp_path / "many")


def test_each_role_has_its_temperature(tmp_path):
    teacher = ScriptedGenetics()
    bred(tmp_path, teacher, temperature=0.3, number=9)
    found = {}
    for request in teacher.asked:
        text = request["messages"][-1]["content"]
        role = "judge" if "You decide" in text else "coder" if "Solve this" in text else "instructor"
        found.setdefault(role, set()).add(request["temperature"])
    assert found == {"instructor": {1.2}, "coder": {0.3}, "judge": {1.0}}


def test_defaults_are_those_of_the_paper():
    family = build(GeneticCode, {"family": "genetic_code", "of": "seeds"})
    assert (family.mutation_probability, family.colonies) == (0.5, 20)
    assert (family.mutation_batch, family.crossover_batch) == (100, 10)
    assert (family.instructor_temperature, family.judge_temperature) == (1.2, 1.0)
    assert len(family.heuristics) == 5 and family.fitness == "judge"


def test_the_estimate_counts_the_requests_of_pairs_that_all_pass():
    settings = {"family": "genetic_code", "of": "seeds", "number": 100}
    for more, requests in (
        ({}, 300),
        ({"fitness": "none"}, 200),
        ({"fitness": "both"}, 400),
        ({"mutation_probability": 0.0, "crossover_children": 5}, 220),
    ):
        found = build(GeneticCode, settings | more).calls(10, 50)
        assert (found.items, found.requests, found.response_tokens) == (100, requests, requests * 50)
    assert found.prompt_tokens > 0 and build(GeneticCode, settings).calls(0, 50).requests == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fitness": "none", "judge_by": "teacher"}, "has no effect with fitness: none; remove it"),
        ({"mutation_probability": 1.0, "crossover_parents": 4}, "has no effect with mutation_probability: 1"),
        ({"min_reward": 0.5}, "has no effect with fitness: judge"),
        ({"judge_by": "nobody"}, "nobody"),
        ({"fitness": "execution"}, "name judges of the step"),
        ({"templates": {"tests": "own.txt"}}, "is never asked for with these settings"),
        ({"templates": {"solution": "missing.txt"}}, "missing.txt cannot be read"),
    ],
)
def test_settings_that_cannot_work_are_reported(tmp_path, changes, message):
    engine = {"server": {"base_url": "http://localhost:1"}}
    path = write_recipe(tmp_path, recipe(tmp_path, {"code": SMALL | changes}, engine=engine, data=seeds(tmp_path)))
    with pytest.raises(InputError, match=message):
        load_recipe(path, ())


@pytest.mark.parametrize(
    ("text", "wanted", "finish", "found", "dropped"),
    [
        ('<task>Return ["a", "b"].</task>', 1, "stop", ['Return ["a", "b"].'], {}),
        ("Sure, here it is:\nTask: Add\n1. this\n2. that", 1, "stop", ["Add\n1. this\n2. that"], {}),
        ("<task>one</task> <task>two</task>", 3, "stop", ["one", "two"], {TOO_FEW: 1}),
        ("<task>one</task> <task>tw", 2, "length", ["one"], {CUT: 1}),
        ("<task>one <task>two</task>", 2, "stop", ["one", "two"], {}),
        ("1. one thing\n2. another", 2, "stop", ["one thing", "another"], {}),
        ("I'm sorry, but I can't do that.", 1, "stop", [], {"refused": 1}),
        ("<task> </task>", 1, "stop", [], {"empty": 1}),
    ],
)
def test_tasks_are_found_in_answers_of_every_form(text, wanted, finish, found, dropped):
    parsed = tasks(text, wanted, finish=finish)
    assert (list(parsed.items), dict(parsed.dropped)) == (found, dropped)
