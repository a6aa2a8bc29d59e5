"""The features that couple rows, against gradients of autograd and hidden states of transformers."""

import numpy as np
import pytest
import torch
from tiny_rewards import NAMES, WEIGHTS, rated
from tiny_rewards import model as reward_model
from tiny_training import comparisons, demonstrations, policy, preference, supervised

from align.models.tree.batch import plain_batch, tree_batch
from align.train.objectives.batch import group_batch
from align.train.objectives.reward import reward_objective
from align.train.selection import features as module
from align.train.selection.features import HeadFeatures, mean_cosine, similarities

CASES = {
    "sft": (supervised(), lambda: demonstrations(10), policy),
    "capped": (supervised(), lambda: demonstrations(10), lambda: capped(policy())),
    "dpo": (preference("dpo"), lambda: comparisons(10, sizes=(2, 3)), policy),
    "rpo": (preference("rpo_bwd_kl"), lambda: comparisons(10, sizes=(2, 4)), policy),
    "bt": (reward_objective("bt", NAMES, WEIGHTS), lambda: rated(10), reward_model),
    "regression": (reward_objective("regression", NAMES, WEIGHTS), lambda: rated(10), reward_model),
}


def capped(model):
    """Return the policy with scaled and capped logits."""
    model.base.config.logit_scale, model.base.config.final_logit_softcapping = 0.5, 2.0
    return type(model)(model.hf)


def features(name, kind, forward="tree", max_rows=None):
    objective, groups, make = CASES[name]
    model, groups = make(), groups()
    model.max_rows = max_rows
    model.use_forward(forward)
    references = [[-3.0 - number for number in range(len(group.sequences))] for group in groups]
    batch = group_batch(groups, references, tree_batch if forward == "tree" else plain_batch)
    made = HeadFeatures(model, objective, kind, seed=3)
    with torch.no_grad(), made.recording():
        found = made.of(objective.outputs(model, batch.tokens), batch)
    assert not model.linear_head._forward_pre_hooks
    return found, model, objective, batch


def exact_gradients(model, objective, batch):
    """Return the gradient of each group's loss with respect to the head's weight, flattened."""
    losses_B = objective.group_losses(objective.outputs(model, batch.tokens), batch)
    weight = model.linear_head.weight
    return torch.stack([torch.autograd.grad(loss, weight, retain_graph=True)[0].flatten() for loss in losses_B])


@pytest.mark.parametrize("name", CASES)
def test_without_a_projection_a_feature_is_the_gradient_of_the_head(name, monkeypatch):
    monkeypatch.setattr(HeadFeatures, "_signs", lambda self, rows, name: torch.eye(rows))
    found, model, objective, batch = features(name, "gradient")
    exact = exact_gradients(model, objective, batch)
    if name == "bt":  # the loss knows the outputs only as one reward
        exact = exact.reshape(len(found), len(WEIGHTS), -1)
        used = [place for place, weight in enumerate(WEIGHTS) if weight]
        exact = exact[:, used[0]] / WEIGHTS[used[0]]
    torch.testing.assert_close(found, exact.float().reshape(found.shape), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["sft", "dpo", "regression"])
def test_random_projections_keep_the_cosines(name):
    found, model, objective, batch = features(name, "gradient")
    exact = similarities(exact_gradients(model, objective, batch).double().numpy(), centered=False)
    error = np.abs(similarities(found.double().numpy(), centered=False) - exact)
    assert error.mean() < 0.12  # sqrt(2 / 64) = 0.18 at most for a product of rank one, times 0.8 for a mean
    assert np.abs(exact).max() > 0.2


@pytest.mark.parametrize("name", ["sft", "dpo", "regression"])
def test_an_embedding_is_the_mean_of_the_states_that_predict_the_response(name):
    _, groups, _ = CASES[name]
    for forward in ("tree", "plain"):
        found, model, *_ = features(name, "embedding", forward)
        model.use_forward("plain")
        for vector, group in zip(found, groups(), strict=True):
            states = []
            for sequence in group.sequences:
                ids = torch.from_numpy(sequence.ids.astype(np.int64))[None]
                states_TD = model.base.model(input_ids=ids).last_hidden_state[0]
                before = torch.from_numpy(np.flatnonzero(sequence.loss_mask) - 1)
                states.append(states_TD[-1:] if name == "regression" else states_TD[before])
            torch.testing.assert_close(vector, torch.cat(states).mean(dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["embedding", "gradient"])
def test_groups_above_the_token_budget_have_the_same_features(kind):
    found, model, *_ = features("rpo", kind, max_rows=1)
    assert model.max_rows == 1
    assert torch.equal(found, features("rpo", kind)[0])


def test_cosines_of_centered_and_of_empty_features():
    rows = np.array([[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [0.0, 0.0]])
    found = similarities(rows, centered=False)
    np.testing.assert_allclose(found, [[1, 0, -1, 0], [0, 1, 0, 0], [-1, 0, 1, 0], [0, 0, 0, 0]])
    assert mean_cosine(found) == pytest.approx(-2 / 12)
    shifted = similarities(rows[:3] + 100, centered=True)
    np.testing.assert_allclose(shifted, similarities(rows[:3] - rows[:3].mean(axis=0), centered=False), atol=1e-9)
    assert mean_cosine(similarities(rows[:3] + 100, centered=False)) > 0.99 > mean_cosine(shifted)
    assert mean_cosine(np.ones((1, 1))) == 0


def test_the_projection_depends_on_the_seed_only():
    objective, groups, make = CASES["sft"]
    first, second, other = (HeadFeatures(make(), objective, "gradient", seed=seed) for seed in (1, 1, 2))
    width = first._signs(200, "width")
    assert torch.equal(width, second._signs(200, "width"))
    for different in (other._signs(200, "width"), first._signs(200, "vocabulary")):
        assert not torch.equal(width, different)
    gram = width.T @ width * module.PROJECTED / 200
    torch.testing.assert_close(gram, torch.eye(module.PROJECTED), atol=0.35, rtol=0)
