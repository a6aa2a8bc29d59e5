"""The estimated time of steps that answer prompts or score given text."""

from small_runs import RATE, SMALL_POLICY, written

from align.stages.costs import measured
from align.stages.responses import task_sizes
from align.workflow.estimate import estimate
from align.workflow.recipe.load import load_recipe

RECIPE = (
    SMALL_POLICY
    + """\
data:
  shown: {{path: "tasks:general", limit: 8}}
steps:
  base: {{stage: import, vocab_size: 300}}
  scored: {{stage: evaluate, policies: [base], tasks: {{given: {{task: nll, data: shown}}}}}}
  sampled: {{stage: evaluate, policies: [base], tasks: {{general: {{data: shown, max_new_tokens: 6}}}}}}
"""
)


def test_only_sampling_is_estimated_at_less_than_the_rate_of_a_matrix_product(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "matrix_rate", lambda device, precision: RATE)
    found = {each.name.partition("-")[0]: each for each in estimate(load_recipe(written(tmp_path, RECIPE)))}
    assert found["scored"].seconds == found["scored"].flops / RATE
    assert found["sampled"].seconds > 10 * found["sampled"].flops / RATE


MIXED = (
    SMALL_POLICY
    + """\
data:
  rows: {{path: "{runs}/rows.jsonl"}}
  clean: {{path: "step:cleaned/rows.jsonl"}}
  shown: {{path: "tasks:general", limit: 8}}
steps:
  base: {{stage: import, vocab_size: 300}}
  cleaned: {{stage: curate, data: rows}}
  made: {{stage: generate, policies: [base], data: clean, judges: [], sampling: {{max_new_tokens: 6}}}}
  given: {{stage: generate, policies: [base], data: shown, judges: [], sampling: {{max_new_tokens: 6}}}}
  both: {{stage: generate, policies: [base], data: [shown, clean], judges: [], sampling: {{max_new_tokens: 6}}}}
"""
)


def test_prompts_of_a_file_and_of_an_earlier_step_count_together(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "matrix_rate", lambda device, precision: RATE)
    path = written(tmp_path, MIXED)
    (tmp_path / "runs").mkdir(exist_ok=True)
    (tmp_path / "runs/rows.jsonl").write_text("".join(f'{{"prompt": "say {row}"}}\n' for row in range(3)))
    found = {each.name: each for each in estimate(load_recipe(path))}
    made, given, both = (found[name] for name in ("made", "given", "both"))
    assert (made.rows, given.rows, both.rows) == (3, 8, 11)
    assert both.tokens == made.tokens + given.tokens


REPEATED = (
    SMALL_POLICY
    + """\
data:
  shown: {{path: "tasks:general", limit: 8}}
  fewer: {{path: "tasks:general", limit: 3}}
steps:
  base: {{stage: import, vocab_size: 300}}
  first: {{stage: evaluate, policies: [base], tasks: {{general: {{data: shown, max_new_tokens: 6}}}}}}
  again: {{stage: evaluate, policies: [base], tasks: {{general: {{data: shown, max_new_tokens: 6}}}}}}
  longer: {{stage: evaluate, policies: [base], tasks: {{nine: {{data: shown, max_new_tokens: 9}}}}}}
  other: {{stage: evaluate, policies: [base], tasks: {{three: {{data: fewer, max_new_tokens: 6}}}}}}
"""
)


def test_the_rows_of_a_task_are_read_once_for_all_steps_with_its_settings(tmp_path, monkeypatch):
    read, task_rows = [], task_sizes.task_rows
    monkeypatch.setattr(task_sizes, "task_rows", lambda *given: read.append(given[1]) or task_rows(*given))
    steps = {each.name.partition("-")[0]: each for each in estimate(load_recipe(written(tmp_path, REPEATED)))}
    assert read == ["shown", "shown", "fewer"]
    assert steps["again"].tokens == steps["first"].tokens == steps["longer"].tokens - 8 * 3
    assert (steps["other"].rows, steps["again"].rows) == (3, 8)
