"""The estimated time of steps that answer prompts or score given text."""

from small_runs import RATE, SMALL_POLICY, written

from align.stages.costs import measured
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
