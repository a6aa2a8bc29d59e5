"""A recipe of middle size that has a step of every stage, for tests that read it and do not run it."""

from align.workflow.recipe.load import load_recipe

MIDDLE = """\
run: middle
runs: {runs}
seed: 3
accounting: {{currency: EUR}}
policy:
  from_config: {{model_type: llama, hidden_size: 16}}
  chat_template: chatml
data:
  programs:
    path: tasks:code
    limit: 10
  shown:
    path: tasks:general
    limit: 10
    seed: 1
  ratings:
    path: tasks:general
    limit: 10
    responses: 3
  prompts:
    path: tasks:general
    split: train
  test:
    path: tasks:general
    split: test
    limit: 5
steps:
  base:
    stage: import
    vocab_size: 300
  code:
    stage: sft
    data: programs
    train:
      learning_rate: 1.0e-3
  general:
    stage: sft
    data:
      shown: 2.0
      ratings: 1.0
    stopping_strategy: all_exhausted
    replay:
      share: 0.02
      step: code
    train:
      learning_rate: 1.0e-3
  rate:
    stage: reward_model
    data: ratings
    loss: bt
    policy: general
    train:
      learning_rate: 1.0e-3
  samples:
    stage: generate
    policies:
      - general
    data: prompts
    prompts:
      prompts: 8
    sampling:
      num_responses: 3
    judges:
      - name: reward_model
        settings:
          path: step:rate
  rescored:
    stage: score
    data: samples
    judges:
      - name: reward_model
        settings:
          path: step:rate
  dpo:
    stage: preference
    policy: general
    data: rescored
    min_chosen: 0.5
    loss:
      name: dpo
      settings:
        beta: 0.2
    train:
      learning_rate: 1.0e-3
  rpo:
    stage: preference
    rounds: 3
    on_policy: true
    data: prompts
    generate:
      prompts:
        prompts: 8
      judges:
        - name: reward_model
          settings:
            path: step:rate
    train:
      learning_rate: 1.0e-3
  evaluate:
    stage: evaluate
    policies: [general, rpo]
    tasks:
      general:
        data: test
        max_new_tokens: 8
"""


def recipe_in(folder, text=MIDDLE, *overrides):
    path = folder / "recipe.yaml"
    path.write_text(text.format(runs=folder / "runs"))
    return load_recipe(path, overrides)
