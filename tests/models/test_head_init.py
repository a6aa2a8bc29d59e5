"""Initialization of the head: ridge regression against brute force, and its error."""

import math

import pytest
import torch
from tiny_models import SMALL, random_sequences

from align.data.token_groups import TokenGroup
from align.models.head_init import PENALTIES, fit_attribute, init_head, ridge_regression
from align.models.reward_model import load_reward_model
from align.models.reward_scoring import last_hidden_states, score_groups
from align.models.settings import LoraSettings, PolicySettings

FRESH = SMALL | {"model_type": "llama", "vocab_size": 300}


def drawn(number, width, *, noise, seed=0):
    """Return rows far from the origin, and labels that depend on them."""
    draw = torch.Generator().manual_seed(seed)
    states = torch.randn(number, width, generator=draw, dtype=torch.float64) + 3
    truth = torch.randn(width, generator=draw, dtype=torch.float64)
    return states, states @ truth + noise * torch.randn(number, generator=draw, dtype=torch.float64)


def by_normal_equations(states, labels, penalty):
    return torch.linalg.solve(states.T @ states + penalty * torch.eye(states.shape[1]).double(), states.T @ labels)


def left_out_error(states, labels, penalty):
    """Return the mean squared error of each row predicted from all others."""
    rows = range(len(states))
    others = [torch.tensor([row != each for each in rows]) for row in rows]
    errors = [
        labels[row] - states[row] @ by_normal_equations(states[kept], labels[kept], penalty)
        for row, kept in zip(rows, others, strict=True)
    ]
    return torch.stack(errors).square().mean().item()


@pytest.mark.parametrize(("number", "width", "noise"), [(30, 6, 1.0), (12, 20, 0.5), (25, 8, 30.0)])
def test_the_penalty_minimizes_the_leave_one_out_error(number, width, noise):
    states, labels = drawn(number, width, noise=noise)
    scale = torch.linalg.svdvals(states).square().mean()
    penalty = min(PENALTIES * scale, key=lambda each: left_out_error(states, labels, each))
    torch.testing.assert_close(
        ridge_regression(states, labels), by_normal_equations(states, labels, penalty), rtol=1e-6, atol=1e-8
    )


def test_noiseless_labels_are_fitted_exactly():
    states, labels = drawn(40, 6, noise=0.0)
    torch.testing.assert_close(states @ ridge_regression(states, labels), labels, rtol=1e-4, atol=1e-3)


def test_pure_noise_labels_cost_little_more_than_predicting_the_mean():
    draw = torch.Generator().manual_seed(0)
    common = 3 * torch.randn(40, generator=draw, dtype=torch.float64)
    spread = torch.logspace(0.5, -1, 40, dtype=torch.float64)
    lost = {"mean": 0.0, "to the mean": 0.0, "to 0": 0.0}
    for _ in range(20):
        states = common + spread * torch.randn(120, 40, generator=draw, dtype=torch.float64)
        labels = 4.5 + 0.4 * torch.randn(120, generator=draw, dtype=torch.float64)
        fits = {
            "to the mean": fit_attribute(states[:60], labels[:60]),
            "to 0": ridge_regression(states[:60], labels[:60]),
        }
        predictions = {name: states[60:] @ weights for name, weights in fits.items()} | {"mean": labels[:60].mean()}
        for name, predicted in predictions.items():
            lost[name] += (labels[60:] - predicted).square().mean().item()
    print(lost)
    assert lost["to the mean"] < 1.1 * lost["mean"]
    assert lost["to 0"] > 1.3 * lost["mean"]


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)])
def test_the_head_is_initialized_with_the_regression_of_its_known_labels(tokenizer_folder, lora):
    model, _ = load_reward_model(PolicySettings(from_config=FRESH, tokenizer=str(tokenizer_folder), lora=lora))
    made = [random_sequences(seed, prompts=1, max_responses=3) for seed in range(30)]
    groups = [TokenGroup(tuple(one), None, None, ({},) * len(one), row) for row, one in enumerate(made)]
    model.use_forward("tree")
    before = torch.cat(score_groups(model, groups))
    states = torch.cat(last_hidden_states(model, groups))
    labels = torch.full((len(states), 5), math.nan, dtype=torch.float64)
    labels[:, 0] = 4.0
    labels[::2, 1] = states[::2, 0].double()
    labels[3, 2] = 2.0
    (weight,) = (value for value in model.head.parameters() if value.requires_grad)
    new = init_head(weight, states, labels)
    assert not torch.equal(new, weight)
    with torch.no_grad():
        weight.copy_(new)
    after = torch.cat(score_groups(model, groups))
    assert after[:, 0].mean() == pytest.approx(4.0, abs=0.2)
    torch.testing.assert_close(after[::2, 1], states[::2, 0], rtol=0, atol=0.1)
    assert after[3, 2] == pytest.approx(2.0, abs=0.1)
    torch.testing.assert_close(after[:, 3:], before[:, 3:])  # attributes without labels


def test_last_hidden_states_are_the_inputs_of_the_head(tokenizer_folder):
    model, _ = load_reward_model(PolicySettings(from_config=FRESH, tokenizer=str(tokenizer_folder)))
    made = [random_sequences(seed, prompts=1, max_responses=4) for seed in range(7)]
    groups = [TokenGroup(tuple(one), None, None, ({},) * len(one), row) for row, one in enumerate(made)]
    states, scores = last_hidden_states(model, groups, token_budget=30), score_groups(model, groups)
    for states_KD, scores_KA in zip(states, scores, strict=True):
        torch.testing.assert_close(states_KD @ model.head.weight.T, scores_KA, rtol=1e-4, atol=1e-5)


def test_hidden_states_of_groups_that_train_in_parts_are_those_of_whole_trees(tokenizer_folder):
    model, _ = load_reward_model(PolicySettings(from_config=FRESH, tokenizer=str(tokenizer_folder)))
    made = [random_sequences(seed, prompts=1, max_responses=4) for seed in range(7)]
    groups = [TokenGroup(tuple(one), None, None, ({},) * len(one), row) for row, one in enumerate(made)]
    model.use_forward("tree")
    expected, model.max_rows = last_hidden_states(model, groups), 8
    found = last_hidden_states(model, groups)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert model.max_rows == 8
