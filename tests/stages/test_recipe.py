"""A recipe as it is written becomes the steps that are run; an edit of it runs what depends on it, and no more."""

import json
import sys

import pytest
from middle_recipe import MIDDLE, recipe_in
from pydantic import ValidationError

from align.accounting.budget import BudgetSettings
from align.accounting.settings import AccountingSettings
from align.content_hash import content_of
from align.pipeline import fingerprints
from align.rewards.judges import JudgeSettings
from align.stages.evaluate import Evaluate as EvaluateStep


def needs(recipe):
    return {name: set(recipe.inputs(name)) for name in recipe.steps}


def test_rounds_of_fresh_samples_become_steps_each_from_the_policy_of_the_one_before(tmp_path):
    recipe = recipe_in(tmp_path)
    assert list(recipe.steps) == [
        *("base", "code", "general", "evaluate-general", "rate", "samples", "rescored", "dpo"),
        *("rpo-1-samples", "rpo-1", "rpo-2-samples", "rpo-2", "rpo-3-samples", "rpo-3", "evaluate-rpo-3"),
    ]
    assert needs(recipe) == {
        "base": set(),
        "code": {"base"},
        "general": {"code"},
        "evaluate-general": {"general"},
        "rate": {"general"},
        "samples": {"general", "rate"},
        "rescored": {"samples", "rate"},
        "dpo": {"general", "rescored"},
        "rpo-1-samples": {"dpo", "rate"},
        "rpo-1": {"dpo", "rpo-1-samples"},
        "rpo-2-samples": {"rpo-1", "rate"},
        "rpo-2": {"rpo-1", "rpo-2-samples"},
        "rpo-3-samples": {"rpo-2", "rate"},
        "rpo-3": {"rpo-2", "rpo-3-samples"},
        "evaluate-rpo-3": {"rpo-3"},
    }
    assert [recipe.steps[f"rpo-{number}-samples"].round for number in (1, 2, 3)] == [0, 1, 2]
    assert recipe.expanded("rpo") == [name for name in recipe.steps if name.startswith("rpo-")]
    assert recipe.expanded("evaluate") == ["evaluate-general", "evaluate-rpo-3"]


def test_rounds_over_given_rows_take_the_same_rows_each_time(tmp_path):
    text = MIDDLE[: MIDDLE.index("    on_policy: true")] + (
        "    data: ratings\n    train: {{learning_rate: 1.0e-3}}\n"
        "  more: {{stage: preference, data: ratings, train: {{learning_rate: 1.0e-3}}}}\n"
    )
    recipe = recipe_in(tmp_path, text)
    assert list(recipe.steps)[-5:] == ["dpo", "rpo-1", "rpo-2", "rpo-3", "more"]
    assert [recipe.steps[name].policy for name in list(recipe.steps)[-4:]] == ["dpo", "rpo-1", "rpo-2", "rpo-3"]
    assert {tuple(recipe.steps[f"rpo-{number}"].shares()) for number in (1, 2, 3)} == {("ratings",)}


def test_one_round_keeps_its_name_and_the_policy_that_it_is_given(tmp_path):
    recipe = recipe_in(tmp_path, MIDDLE, "steps.rpo.rounds=1", "steps.rpo.policy=general")
    assert list(recipe.steps)[-3:] == ["rpo-samples", "rpo", "evaluate-rpo"]
    assert needs(recipe)["rpo-samples"] == {"general", "rate"} and needs(recipe)["rpo"] == {"general", "rpo-samples"}


@pytest.mark.parametrize("key", ["policy: rpo", "data: rpo-1-samples\n    policy: rpo"])
def test_by_the_name_of_a_step_in_rounds_others_mean_the_last(tmp_path, key):
    text = MIDDLE.replace(
        "  evaluate:\n",
        f"  after:\n    stage: preference\n    {key}\n    train: {{{{learning_rate: 1.0}}}}\n  evaluate:\n",
    )
    text = text if "data: rpo" in key else text.replace(key, f"{key}\n    data: ratings")
    assert recipe_in(tmp_path, text).steps["after"].policy == "rpo-3"


def test_an_evaluation_of_all_policies_follows_each_of_them(tmp_path):
    recipe = recipe_in(tmp_path, MIDDLE, "steps.evaluate.policies=all")
    names = list(recipe.steps)
    evaluated = ["base", "code", "general", "dpo", "rpo-1", "rpo-2", "rpo-3"]
    assert [name for name in names if name.startswith("evaluate")] == [f"evaluate-{policy}" for policy in evaluated]
    for policy in evaluated:
        assert names[names.index(policy) + 1] == f"evaluate-{policy}"
        step = recipe.steps[f"evaluate-{policy}"]
        assert isinstance(step, EvaluateStep) and list(step.policies) == [policy]


def test_replay_adds_the_share_of_the_earlier_steps_rows(tmp_path):
    shares = recipe_in(tmp_path).steps["general"].shares()
    assert shares == pytest.approx({"shown": 0.98 * 2 / 3, "ratings": 0.98 / 3, "programs": 0.02})


# For every step of MIDDLE those that read it, found by hand
READ_BY = {
    "base": ["code"],
    "code": ["general"],
    "general": ["evaluate-general", "rate", "samples", "dpo"],
    "rate": ["samples", "rescored", "rpo-1-samples", "rpo-2-samples", "rpo-3-samples"],
    "samples": ["rescored"],
    "rescored": ["dpo"],
    "dpo": ["rpo-1-samples", "rpo-1"],
    "rpo-1-samples": ["rpo-1"],
    "rpo-1": ["rpo-2-samples", "rpo-2"],
    "rpo-2-samples": ["rpo-2"],
    "rpo-2": ["rpo-3-samples", "rpo-3"],
    "rpo-3-samples": ["rpo-3"],
    "rpo-3": ["evaluate-rpo-3"],
    "evaluate-general": [],
    "evaluate-rpo-3": [],
}
ROWS_READ_BY = {
    "programs": ["code", "general"],  # which replays them
    "shown": ["general"],
    "ratings": ["general", "rate"],
    "prompts": ["samples", "rpo-1-samples", "rpo-2-samples", "rpo-3-samples"],
    "test": ["evaluate-general", "evaluate-rpo-3"],
}
# Where and in what portions a step is computed, and who looks on: no number depends on it
NO_NUMBER = {
    "launch",
    "tokens_per_micro_batch",
    "sequence_parallel",
    "checkpoint_steps",
    "checkpoint_minutes",
    "trackers",
    "evaluate_every",
}
NO_NUMBER |= {"gradient_checkpointing", "batch_size"}
OTHERS = [
    7,
    0.25,
    True,
    "all_exhausted",
    "skip",
    "cosine",
    "bf16",
    "best",
    "bt_margin",
    "weights",
    "best_worst",
    "ipo",
    "drop",
]
OTHERS += ["cut_prompt", "verifier", "launch/cpu-1.yaml", "nll", [0.5, 0.5], ["x"], {"x": 1}, ["prompt_strict"]]
NAMES = {"policy": ["base"], "policies": ["base"], "step": [], "models": [["some/model"]], "data": ["test", "prompts"]}


def after(names):
    """The steps and all that depends on them."""
    found, waiting = set(), list(names)
    while waiting:
        found.add(name := waiting.pop())
        waiting += READ_BY[name]
    return found


def leaves(value, place=()):
    """Every value at the end of a path through mappings and lists; an empty one is a value, too."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not inner or not value:
        yield place, value
        return
    for key, each in inner:
        yield from leaves(each, (*place, key))


def edited(settings, place):
    """The settings with another value at the place, or None where none of the others is allowed."""
    key = [part for part in place if isinstance(part, str)][-1]
    for other in NAMES.get(key, OTHERS):
        values = json.loads(settings.model_dump_json())
        at = values
        for key in place[:-1]:
            at = at[key]
        at[place[-1]] = other
        try:
            found = type(settings).model_validate_json(json.dumps(values))
        except ValidationError:
            continue
        if found != settings:
            return found
    return None


def edits(recipe):
    """(what was edited, the recipe after it, the steps that must run again) for every value of a recipe."""
    for name, step in recipe.steps.items():
        for place, _ in leaves(json.loads(step.model_dump_json())):
            if place[-1] not in ("stage", "path", "round"):  # another step, the judge's own, and made by expansion
                changed = edited(step, place)
                again = set() if NO_NUMBER & set(place) else after([name])
                steps = {**recipe.steps, name: changed}
                yield (name, *place), changed and recipe.model_copy(update={"steps": steps}), again
    for name, source in recipe.data.items():
        for place, _ in leaves(json.loads(source.model_dump_json())):
            changed = edited(source, place)
            data = {**recipe.data, name: changed}
            again = after(ROWS_READ_BY[name])
            yield (name, *place), changed and recipe.model_copy(update={"data": data}), again
    for place, _ in leaves(json.loads(recipe.policy.model_dump_json())):
        changed = edited(recipe.policy, place)
        again = set() if NO_NUMBER & set(place) else set(READ_BY)
        yield ("policy", *place), changed and recipe.model_copy(update={"policy": changed}), again
    yield ("seed",), recipe.model_copy(update={"seed": 4}), set(READ_BY)
    yield ("accounting",), recipe.model_copy(update={"accounting": AccountingSettings(currency="USD")}), set()
    yield ("budget",), recipe.model_copy(update={"budget": BudgetSettings(hours=1)}), set()
    yield ("run",), recipe.model_copy(update={"run": "other"}), set()


def test_editing_one_field_runs_exactly_that_step_and_its_dependents_again(tmp_path):
    recipe = recipe_in(tmp_path)
    before, count, unchanged, without = fingerprints(recipe.pipeline()), 0, 0, set()
    assert set(before) == set(READ_BY)
    for place, other, again in edits(recipe):
        if other is None:
            without.add(place[-1])
            continue
        now = fingerprints(other.pipeline())
        assert {name for name in before if now[name] != before[name]} == again, place
        count, unchanged = count + 1, unchanged + (not again)
    print(f"edited {count} fields, {unchanged} of which change nothing; no other value for {sorted(without)}")
    assert count > 300 and unchanged > 40


OWN = """
run: r
policy: {{from_config: {{model_type: llama}}, tokenizer: {0}/tok, chat_template: {0}/t.jinja}}
data:
  pairs: {{path: {0}/pairs.jsonl}}
  asked: {{path: "tasks:general", limit: 4}}
steps:
  base: {{stage: import}}
  dpo: {{stage: preference, data: pairs, loss: {{name: "own_loss:make"}}, train: {{learning_rate: 0.1}}}}
  samples:
    stage: generate
    data: asked
    judges: [{{name: "own_judge:make"}}, {{name: verifier, settings: {{verifiers: {{mine: "own_check:made"}}}}}}]
    engine: {{server: {{base_url: "http://node17:8000/v1"}}}}
  rpo: {{stage: preference, data: samples, train: {{learning_rate: 0.1}}}}
"""
EVERY = ["base", "dpo", "samples", "rpo"]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """What a recipe's owner has written besides it; then the recipe's marks, under overrides."""
    (tmp_path / "tok").mkdir()
    for name in ("own_loss.py", "own_judge.py", "own_check.py", "t.jinja", "tok/tokenizer.json", "pairs.jsonl"):
        (tmp_path / name).write_text("made = make = lambda: lambda *given: None\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("own_loss", "own_judge", "own_check"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return lambda *overrides: fingerprints(
        recipe_in(tmp_path, OWN.replace("{0}", str(tmp_path)), *overrides).pipeline()
    )


@pytest.mark.parametrize(
    ("edited", "again"),
    [
        ("own_loss.py", ["dpo", "samples", "rpo"]),
        ("own_judge.py", ["samples", "rpo"]),
        ("own_check.py", ["samples", "rpo"]),
        ("pairs.jsonl", ["dpo", "samples", "rpo"]),
        ("t.jinja", EVERY),
        ("tok/tokenizer.json", EVERY),
    ],
)
def test_editing_what_a_recipe_names_runs_the_steps_again_that_use_it(own, tmp_path, edited, again):
    before = own()
    (tmp_path / edited).write_text("made = make = lambda: lambda *given: 1\n")
    after = own()
    assert [name for name in before if before[name] != after[name]] == again


TASKS = """
run: r
policy: {{from_config: {{model_type: llama}}}}
data:
  asked: {{path: {0}/asked.jsonl}}
steps:
  base: {{stage: import, vocab_size: 300}}
  sft: {{stage: sft, data: asked, train: {{learning_rate: 0.1}}}}
  soup: {{stage: average, of: [base, sft], how: greedy, task: {{task: "own_task:TASK", data: asked}}}}
  scores: {{stage: evaluate, policies: [sft], tasks: {{own: {{task: "harness:own", tasks_folder: {0}/own}}}}}}
"""


@pytest.mark.parametrize(("edited", "again"), [("own/own.yaml", ["scores-sft"]), ("own_task.py", ["soup"])])
def test_editing_a_task_of_ones_own_runs_the_steps_again_that_ask_it(tmp_path, monkeypatch, edited, again):
    (tmp_path / "own").mkdir()
    module = "from align.evaluation.tasks.mathematics.gsm8k import TASK"
    texts = {"asked.jsonl": "{}", "own/own.yaml": "", "own_task.py": module}
    for name, text in texts.items():
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_task", raising=False)
    text, found = TASKS.replace("{0}", str(tmp_path)), []
    for added in ("", "# edited\n"):
        (tmp_path / edited).write_text(texts[edited] + "\n" + added)
        found.append(fingerprints(recipe_in(tmp_path, text).pipeline()))
    assert [name for name in found[0] if found[0][name] != found[1][name]] == again


@pytest.mark.parametrize(
    "how",
    [
        "policy.gradient_checkpointing=true",
        "steps.samples.engine.server.base_url=http://node18:8000/v1",
        "steps.samples.engine.server.concurrency=8",
        "steps.dpo.train.tokens_per_micro_batch=512",
    ],
)
def test_what_says_only_how_a_step_is_computed_runs_none_again(own, how):
    assert own(how) == own()


def test_names_of_built_ins_rows_and_steps_are_no_files(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = own()
    for name in ("verifier", "rpo_bwd_kl", "auto", "share"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("changes")
    (tmp_path / "tasks.py").write_text("somebody = 'else'")
    assert own() == before


@pytest.mark.parametrize(
    "text", ["", "a word", "x" * 300, "~nobody9 is it", "step:rate", "tasks:general", "no_module:at"]
)
def test_a_text_that_names_no_file_stands_for_itself(text):
    assert content_of(text) == text


def test_a_judge_of_ones_own_may_call_its_settings_as_it_likes(tmp_path, monkeypatch):
    (tmp_path / "free_judge.py").write_text("def make(engine, batch_size):\n    return lambda groups: []\n")
    monkeypatch.syspath_prepend(tmp_path)
    settings = {"engine": {"local": {"batch_size": 3}}, "batch_size": 4}
    judge = JudgeSettings(name="free_judge:make", settings=settings)
    assert judge.cache_key()["settings"] == settings
    chat = {"model": "m", "engine": {"server": {"base_url": "http://a/v1", "retries": 2}}}
    other = {"model": "m", "engine": {"server": {"base_url": "http://b/v1"}}}
    first, second = (JudgeSettings(name="llm", settings=each).cache_key() for each in (chat, other))
    assert first == second


def test_another_round_runs_alone(tmp_path):
    before, now = (
        fingerprints(recipe_in(tmp_path, MIDDLE, f"steps.rpo.rounds={number}").pipeline()) for number in (3, 4)
    )
    assert {name for name in now if now[name] != before.get(name)} == {"rpo-4-samples", "rpo-4", "evaluate-rpo-4"}
