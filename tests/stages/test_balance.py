"""How evenly `align check` says that a step would be dealt to ranks."""

from statistics import mean

import pytest
from planned import step_rows, tokenizer_of

from align.data.batching import plan_step
from align.models.tree.batch import count_tokens
from align.workflow.estimate import estimate as check
from align.workflow.recipe.load import load_recipe

RECIPE = """
run: dealt
runs: {runs}
policy:
  from_config: {{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,
           num_attention_heads: 2, max_position_embeddings: 256}}
  chat_template: chatml
data:
  words: {{path: "tasks:general", limit: 90}}
  code: {{path: "tasks:code", limit: 60}}
steps:
  base: {{stage: import, vocab_size: 512}}
  sft:
    stage: sft
    data: {{words: 1, code: 2}}
    stopping_strategy: all_exhausted
    launch: {launch}
    train: {{learning_rate: 1.0e-3, prompts_per_step: {per_step}, tokens_per_micro_batch: 512}}
"""


def checked(folder, per_step, ranks):
    """(balance as told, sizes of the mixture's rows, the mixture) of the step."""
    path, launch = folder / "recipe.yaml", folder / "launch.yaml"
    launch.write_text(f"distributed_type: MULTI_CPU\nnum_processes: {ranks}\nuse_cpu: true\n")
    path.write_text(RECIPE.format(runs=folder / "runs", per_step=per_step, launch=launch))
    recipe = load_recipe(path, ())
    estimate = {each.name: each for each in check(recipe)}["sft"]
    data = step_rows(recipe, "sft", tokenizer_of(recipe, "sft", folder), folder, model_limit=256)
    return estimate.training.balance, [count_tokens(group.sequences) for group in data.train], data.mixture


@pytest.mark.parametrize(("per_step", "ranks"), [(40, 8), (80, 64), (5, 8)])
def test_balance_is_told_of_the_steps_that_the_mixture_will_take(tmp_path, per_step, ranks):
    told, sizes, mixture = checked(tmp_path, per_step, ranks)
    assert told.num_ranks == ranks
    epoch = list(mixture.epoch(0))
    steps = [epoch[start : start + per_step] for start in range(0, len(epoch), per_step)][:16]
    steps = [step for step in steps if len(step) == per_step]
    assert len(steps) > 1
    shares = []
    for step in steps:
        plan = plan_step(step, sizes, token_budget=512, num_ranks=ranks)
        loads = [sum(sizes[group] for micro in rank for group in micro) for rank in plan.ranks]
        assert sum(loads) == sum(sizes[group] for group in step)
        shares.append(max(loads) / mean(loads))
    assert (told.mean, told.worst) == (pytest.approx(mean(shares)), pytest.approx(max(shares)))
    assert 1 <= told.lower_bound <= told.mean <= told.worst


def test_one_process_has_no_balance(tmp_path):
    assert checked(tmp_path, 40, 1)[0] is None
