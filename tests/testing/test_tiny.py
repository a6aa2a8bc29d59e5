"""The tiny policy and rows: reproducible, in the project's own types, and accepted by its readers and encoders."""

import doctest
import importlib
import json

import pytest
import torch

import align
from align.data.chat_encoder import ChatEncoder
from align.data.writing import write
from align.errors import InputError
from align.models.policy import load_policy, save_policy
from align.models.settings import PolicySettings
from align.testing import tiny_demonstrations, tiny_policy, tiny_preferences
from align.testing.tiny import OPENINGS


def test_a_tiny_policy_depends_on_its_seed_only_and_leaves_the_generator_alone():
    state = torch.get_rng_state()
    (first, _), (same, _), (other, _) = tiny_policy(), tiny_policy(), tiny_policy(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    head = first.head.weight
    assert torch.equal(head, same.head.weight)
    assert not torch.equal(head, other.head.weight)


def test_a_tiny_policy_is_saved_and_loaded_like_any_other(tmp_path):
    policy, tokenizer = tiny_policy()
    save_policy(policy, tokenizer, tmp_path)
    loaded, loaded_tokenizer = load_policy(PolicySettings(path=str(tmp_path)))
    assert torch.equal(loaded.head.weight, policy.head.weight)
    assert loaded_tokenizer.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("num_responses", [2, 3, len(OPENINGS)])
def test_tiny_preferences_have_distinct_rewards_in_random_order(num_responses):
    rows = tiny_preferences(20, num_responses=num_responses)
    assert (
        rows
        == tiny_preferences(20, num_responses=num_responses)
        != tiny_preferences(20, num_responses=num_responses, seed=1)
    )
    rewards = [[response.reward for response in row.responses] for row in rows]
    assert all(len(set(row)) == num_responses for row in rewards)
    assert len({row.index(max(row)) for row in rewards}) > 1
    _, tokenizer = tiny_policy()
    groups = list(ChatEncoder(tokenizer).encode_all(rows))
    assert [list(group.rewards) for group in groups] == rewards


@pytest.mark.parametrize("num_responses", [1, len(OPENINGS) + 1])
def test_too_few_or_too_many_responses_are_rejected(num_responses):
    with pytest.raises(InputError, match=f"num_responses is {num_responses}, not from 2 to 6"):
        tiny_preferences(num_responses=num_responses)


def test_tiny_demonstrations_are_encoded():
    _, tokenizer = tiny_policy()
    groups = list(ChatEncoder(tokenizer).encode_all(tiny_demonstrations(5)))
    assert len(groups) == 5
    assert all(group.response_lengths[0] > 5 for group in groups)


@pytest.mark.parametrize("name", ["tiny", "loss_checks"])
def test_docstring_examples_run(name):
    found = doctest.testmod(importlib.import_module(f"align.testing.{name}"), optionflags=doctest.ELLIPSIS)
    assert found.attempted > 0
    assert found.failed == 0


SMOKE_RECIPE = """
run: smoke
data:
  pairs: {path: pairs.jsonl, held_out: 0.25}
steps:
  dpo:
    stage: preference
    data: pairs
    loss: {name: dpo}
    train: {learning_rate: 5.0e-3, prompts_per_step: 8, epochs: 4}
"""


def test_the_smoke_test_of_the_package_docstring_trains_a_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(SMOKE_RECIPE)
    save_policy(*tiny_policy(), tmp_path / "model")
    write(tmp_path / "pairs.jsonl", tiny_preferences())
    paths = [f"policy.path={tmp_path / 'model'}", f"data.pairs.path={tmp_path / 'pairs.jsonl'}"]
    manifests = align.run(recipe, [f"runs={tmp_path / 'runs'}", *paths])
    assert list(manifests) == ["dpo"]
    lines = (tmp_path / "runs" / "smoke" / "dpo" / "metrics.jsonl").read_text().splitlines()
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    assert last["loss"] < 0.5 < first["loss"]
