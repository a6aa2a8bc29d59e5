"""`kl_from_start` of a step `evaluate`: the divergence of a policy from its training's start, along sampled answers."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from small_runs import run, written
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.artifacts import read_json
from align.errors import InputError
from align.procedural import tasks
from align.report.run_folder import read_run
from align.report.tables import measures_table
from align.rewards.verdicts import Verdict
from align.stages.responses import references
from align.workflow.estimate import estimate
from align.workflow.recipe.load import load_recipe

NUM_ROWS = 6
RECIPE = """
run: small
runs: {runs}
policy:
  from_config: {{model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1,
          num_attention_heads: 2, max_position_embeddings: 512, initializer_range: 0.2}}
  chat_template: chatml
data:
  shown: {{path: "tasks:general", limit: 24}}
  asked: {{path: "tasks:general", split: test, limit: 6}}
  talks: {{path: "tasks:dialogues", split: test, limit: 6}}
steps:
  base: {{stage: import, vocab_size: 300}}
  sft: {{stage: sft, data: shown, train: {{learning_rate: 1.0e-2, prompts_per_step: 8}}}}
  same: {{stage: sft, data: shown, train: {{learning_rate: 1.0e-30, prompts_per_step: 8, max_steps: 1}}}}
  evaluate:
    stage: evaluate
    policies: all
    kl_from_start: true
    tasks:
      general: {{data: asked, max_new_tokens: 8, metrics: [correct, kl_from_start]}}
  talk:
    stage: evaluate
    policies: [sft]
    kl_from_start: true
    tasks:
      talk: {{data: talks, max_new_tokens: 8, num_responses: 2, temperature: 1.0}}
  without:
    stage: evaluate
    policies: [sft]
    tasks: {{plain: {{data: asked, max_new_tokens: 8}}}}
  alone:
    stage: evaluate
    policies: [sft]
    tasks: {{drift: {{task: drift, data: asked, reference: "step:base", max_new_tokens: 8}}}}
"""


GIVEN = """  given:
    stage: evaluate
    policies: [sft]
    kl_from_start: true
    tasks: {{{{given: {{{{data: asked, responses: [{folder}/given.jsonl]}}}}}}}}
"""


BENCH = """  bench:
    stage: evaluate
    policies: [sft]
    kl_from_start: true
    tasks:
      bench: {{task: mt_bench, data: questions, max_new_tokens: 8, judges: [{{name: "test_kl_from_start:all_good"}}]}}
      again: {{data: asked, max_new_tokens: 8}}
"""
QUESTIONS = [
    {"question_id": 81 + number, "category": category, "turns": [f"Write {number}", f"And {number} again"]}
    for number, category in enumerate(("writing", "humanities", "extraction", "writing"))
]


def all_good():
    """A judge that rates every answer with 7."""
    return lambda groups: [(Verdict(7.0),) for _ in groups]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The run's folder, and the manifests of its steps."""
    folder = tmp_path_factory.mktemp("kl")
    asked = tasks.prompts("general", num_rows=NUM_ROWS, seed=0, split="test")
    lines = [json.dumps({"prompt": prompt.messages[-1].content, "response": "Yes."}) + "\n" for prompt in asked]
    (folder / "given.jsonl").write_text("".join(lines))
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    steps = GIVEN.format(folder=folder) + BENCH
    return folder / "runs/small", run(
        folder, f"data.questions={{path: {folder}/questions.jsonl}}", text=RECIPE + steps
    )[0]


def lines_of(folder, step, task):
    return [json.loads(line) for line in (folder / step / f"{task}.jsonl").read_text().splitlines()]


def test_it_is_what_the_task_drift_measures_along_the_same_answers(made):
    folder, manifests = made
    found = manifests["evaluate-sft"]["measures"]["general"]["kl_from_start"]
    assert found == read_json(folder / "table.json")["sft"]["drift kl"]
    assert found["low"] < found["value"] < found["high"] and found["value"] > 1e-3
    of_task = [line["parts"]["kl"] for line in lines_of(folder, "alone-sft", "drift")]
    own = [line["kl_from_start"] for line in lines_of(folder, "evaluate-sft", "general")]
    assert [kl for kl in own if kl is not None] == of_task
    counts = manifests["evaluate-sft"]["counts"]["general"]
    assert (counts["start"], counts["without_kl"]) == ("base", NUM_ROWS - len(of_task))


@cache
def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def by_hand(folder, messages, response, *, is_cut):
    """Return Σ_t Σ_v p log(p / q) along a response and its tokens, by transformers and full softmaxes alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "sft")
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    first = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    ids = tokenizer(prompt + response + ("" if is_cut else "<|im_end|>"), add_special_tokens=False).input_ids
    rows = []
    for step in ("sft", "base"):
        with torch.no_grad():
            rows.append(loaded(folder / step)(torch.tensor([ids])).logits[0, first - 1 : -1].double().softmax(-1))
    ours, starts = rows
    return float((ours * (ours / starts).log()).sum()), len(ids) - first


def test_every_turn_of_every_response_counts(made):
    folder, manifests = made
    rows = tasks.prompts("dialogues", num_rows=NUM_ROWS, seed=0, split="test")
    follow_ups = {prompt.messages[-1].content: prompt.metadata["follow_up"] for prompt in rows}
    lines, nats, num_tokens = lines_of(folder, "talk-sft", "talk"), 0.0, 0
    assert len(lines) == 2 * NUM_ROWS
    for line in lines:
        (earlier,) = line["earlier_responses"]
        asked = [{"role": "user", "content": line["prompt"]}]
        later = [{"role": "assistant", "content": earlier}, {"role": "user", "content": follow_ups[line["prompt"]]}]
        turns = [(asked, earlier, False), (asked + later, line["response"], line["finish"] == "length")]
        parts = [by_hand(folder, *turn[:2], is_cut=turn[2]) for turn in turns if turn[1].strip()]
        expected = tuple(map(sum, zip(*parts, strict=True)))
        assert line["kl_from_start"] == pytest.approx(expected, rel=1e-5)
        nats, num_tokens = nats + expected[0], num_tokens + expected[1]
    value = manifests["talk-sft"]["measures"]["talk"]["kl_from_start"]["value"]
    assert value == pytest.approx(nats / num_tokens, rel=1e-5)


def test_both_turns_of_mt_bench_count(made):
    folder, manifests = made
    lines, nats, num_tokens = lines_of(folder, "bench-sft", "bench"), 0.0, 0
    assert [line["question_id"] for line in lines] == [81, 82, 83, 84]
    for line, row in zip(lines, QUESTIONS, strict=True):
        (earlier,) = line["earlier_responses"]
        asked = [{"role": "user", "content": row["turns"][0]}]
        later = [{"role": "assistant", "content": earlier}, {"role": "user", "content": row["turns"][1]}]
        turns = [(asked, earlier, False), (asked + later, line["response"], line["finish"] == "length")]
        parts = [by_hand(folder, *turn[:2], is_cut=turn[2]) for turn in turns if turn[1].strip()]
        expected = tuple(map(sum, zip(*parts, strict=True)))
        assert line["kl_from_start"] == pytest.approx(expected, rel=1e-5)
        nats, num_tokens = nats + expected[0], num_tokens + expected[1]
    measures = manifests["bench-sft"]["measures"]
    assert measures["bench"]["kl_from_start"]["value"] == pytest.approx(nats / num_tokens, rel=1e-5)
    texts = [text for line in lines for text in (*line["earlier_responses"], line["response"])]
    assert measures["bench"]["length"]["value"] == sum(map(len, texts)) / len(texts)
    # Beside it, the other task measures what it measures in a step of its own
    alone = manifests["evaluate-sft"]["measures"]["general"]["kl_from_start"]
    assert measures["again"]["kl_from_start"] == alone


def test_the_policy_and_its_start_are_loaded_once_for_all_tasks_of_a_step(tmp_path, monkeypatch):
    loaded, load = [], references.load_policy

    def counted(settings):
        loaded.append(Path(settings.path).name)
        return load(settings)

    monkeypatch.setattr(references, "load_policy", counted)
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    steps = RECIPE.partition("  same:")[0] + BENCH
    run(tmp_path, f"data.questions={{path: {tmp_path}/questions.jsonl}}", text=steps)
    assert loaded == ["sft", "base"]


def test_a_policy_that_training_has_not_changed_is_at_exactly_zero(made):
    found = made[1]["evaluate-same"]["measures"]["general"]["kl_from_start"]
    assert (found["value"], found["low"], found["high"]) == (0, 0, 0)


def test_an_imported_policy_and_answers_of_a_file_have_no_value_and_the_reason(made):
    folder, manifests = made
    unknown = {"value": None, "reason": "no step of the recipe trains it"}
    assert manifests["evaluate-base"]["measures"]["general"]["kl_from_start"] == unknown
    assert "kl_from_start" not in manifests["without-sft"]["measures"]["plain"]
    of_file = manifests["given-sft"]["measures"]["given"]["kl_from_start"]
    assert of_file == {"value": None, "reason": "its answers were not sampled by this process"}
    table = read_json(folder / "table.json")
    assert set(table["base"]) == {"general correct"} and "general kl_from_start" in table["sft"]
    assert "general kl_from_start" not in read_json(folder / "changes.json")["sft"]  # it is from another start
    shown = measures_table({"": read_run(folder)})
    at = shown.columns.index("kl from start")
    cells = {row[0].text: row[at] for row in shown.rows}
    assert (cells["base"].text, cells["base"].below) == ("", [(unknown["reason"], "")])
    assert cells["same"].text == "0" and "%" not in cells["sft"].text


def test_the_ledger_counts_a_pass_of_each_policy(made):
    flops = {step: each["ledger"]["flops"] for step, each in made[1].items() if "ledger" in each}
    passes = flops["evaluate-sft"] - flops["without-sft"]
    # Two passes over the answers; `drift` by itself also samples them
    assert passes == pytest.approx(2 / 3 * flops["alone-sft"], rel=1e-9) and passes > 0


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.usefixtures("forked_launches")
def test_two_processes_measure_the_same(made, tmp_path):
    folder, manifests = made
    of_two = ["steps.evaluate.launch=launch/ddp-cpu-2.yaml", "steps.evaluate.policies=[sft]"]
    launched, _ = run(tmp_path, *of_two, text=RECIPE, until="evaluate-sft")
    assert launched["evaluate-sft"]["measures"] == manifests["evaluate-sft"]["measures"]
    name = "evaluate-sft/general.jsonl"
    assert (tmp_path / "runs/small" / name).read_bytes() == (folder / name).read_bytes()


def test_the_start_is_the_recipes_own_policy_where_no_step_makes_it(tmp_path):
    text = RECIPE.replace("  base: {{stage: import, vocab_size: 300}}\n", "").partition("  alone:")[0]
    start = load_recipe(written(tmp_path, text)).resolved("evaluate-sft").training_start
    assert start.lacking == "its training started from random weights"
    text = text.replace("  from_config:", "  path: somebody/model\n#").replace("          num_att", "#")
    recipe = load_recipe(written(tmp_path, text))
    assert recipe.resolved("evaluate-sft").training_start.path == "somebody/model"
    assert recipe.inputs("evaluate-same") == ("same", "sft")
    assert recipe.resolved("without-sft").training_start is None


def test_columns_are_declared_for_policies_that_will_have_a_value(tmp_path):
    recipe = load_recipe(written(tmp_path, RECIPE))
    names = {step: [each.name for each in recipe.steps[step].columns(recipe.resolved(step))] for step in recipe.steps}
    assert names["evaluate-base"] == ["general correct"]
    assert names["evaluate-sft"] == names["evaluate-same"] == ["general correct", "general kl_from_start"]
    kept = load_recipe(written(tmp_path, RECIPE), ["keep={best: general.kl_from_start}"])
    assert not kept.keep.is_greater_better
    alone = load_recipe(written(tmp_path, RECIPE), ["steps.evaluate.tasks.general.metrics=[kl_from_start]"])
    (column,) = alone.steps["evaluate-sft"].columns(alone.resolved("evaluate-sft"))
    assert column.name == "general kl_from_start"  # `general` alone would be taken for a rate


SEARCH = """
search:
  sft: {{space: {{train.learning_rate: {{log: [0.001, 0.1]}}}}, evaluation: evaluate, metric: general.kl_from_start,
    budget: {{trials: 1}}, rungs: [1]}}
"""


def test_a_search_may_rank_trials_by_it_where_they_have_a_start(tmp_path):
    """Whether or not the policies before the search have one."""
    recipe = load_recipe(written(tmp_path, RECIPE + SEARCH))
    assert not recipe.search["sft"].is_greater_better
    fresh = RECIPE.replace("  base: {{stage: import, vocab_size: 300}}\n", "").partition("  alone:")[0]
    with pytest.raises(InputError, match=r"search\.sft\.metric: no metric of step 'evaluate' .* general\.correct"):
        load_recipe(written(tmp_path, fresh + SEARCH))


def test_a_setting_without_effect_is_refused_and_the_default_changes_no_key(tmp_path):
    with pytest.raises(InputError, match=r"kl_from_start is measured only if the step has kl_from_start: true"):
        load_recipe(written(tmp_path, RECIPE.replace("    kl_from_start: true\n", "")))
    with pytest.raises(InputError, match=r"steps\.alone\.kl_from_start: has no effect on drift; remove it$"):
        load_recipe(written(tmp_path, RECIPE), ["steps.alone.kl_from_start=true"])
    with pytest.raises(
        InputError, match=r"kl_from_start: cannot be measured .* evaluate harness:gsm8k in a step without"
    ):
        load_recipe(written(tmp_path, RECIPE), ["steps.talk.tasks.sums={task: harness:gsm8k}"])
    question = {"question": "1 + 1?", "choices": ["1", "2", "3", "4"], "answer": 1, "subject": "sums"}
    (tmp_path / "letters.jsonl").write_text(json.dumps(question) + "\n")
    letters = "steps.without.tasks.plain={task: mmlu, data: letters, metrics: [likelihood]}"
    with pytest.raises(InputError, match=r"kl_from_start: has no effect on mmlu; remove it$"):
        source = f"data.letters={{path: {tmp_path}/letters.jsonl}}"
        load_recipe(written(tmp_path, RECIPE), [source, letters, "steps.without.kl_from_start=true"])
    recipe = load_recipe(written(tmp_path, RECIPE))
    assert recipe.steps["talk-sft"].decisive()["kl_from_start"]
    assert "kl_from_start" not in recipe.steps["without-sft"].decisive()


def test_the_estimate_has_a_pass_of_each_policy_over_prompts_and_answers(tmp_path):
    tokens = {each.name: each.tokens for each in estimate(load_recipe(written(tmp_path, RECIPE)))}
    assert tokens["evaluate-sft"] == 3 * tokens["without-sft"] > 0
    assert tokens["evaluate-base"] == tokens["without-sft"]


def test_answers_of_a_file_add_no_pass_to_the_estimate(tmp_path):
    (tmp_path / "given.jsonl").write_text("{}\n")
    path, tokens = written(tmp_path, RECIPE + GIVEN.format(folder=tmp_path)), []
    for asked in ("true", "false"):
        found = estimate(load_recipe(path, [f"steps.given.kl_from_start={asked}"]))
        tokens.append(next(each.tokens for each in found if each.name == "given-sft"))
    assert tokens[0] == tokens[1] > 0
