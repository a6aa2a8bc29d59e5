"""Mixtures of experts: every objective trains them, and the router loss is that of the distinct tokens of a step."""

import pytest
import torch
from tiny_training import (
    comparisons,
    demonstrations,
    gap,
    group,
    loop,
    mixture,
    mixture_policy,
    preference,
    supervised,
    weights,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from align.errors import RunError
from align.models.adapters.attach import add_adapters
from align.models.policy import Policy
from align.models.router_loss import RouterLoss
from align.models.settings import LoraSettings

KINDS = ("mixtral", "qwen3_moe")
OBJECTIVES = {
    "sft": (supervised(), demonstrations(24)),
    "dpo": (preference("dpo"), comparisons(24)),
    "rpo": (preference("rpo_bwd_kl", beta=0.1, sft_weight=0.02), comparisons(24, sizes=(2, 4))),
}


def adapted(kind):
    return Policy(add_adapters(mixture(kind), LoraSettings(rank=4, alpha=8), seed=3, task="CAUSAL_LM")).train()


def of_transformers(policy, groups):
    """The auxiliary loss by transformers' own function, over the distinct prefixes of each group run as rows."""
    model, config = policy.hf, policy.base.config
    per_layer = []
    for each in groups:
        prefixes = {tuple(one.ids[: end + 1].tolist()) for one in each.sequences for end in range(len(one.ids))}
        for prefix in sorted(prefixes):
            logits = model(torch.tensor([prefix]), use_cache=False, output_router_logits=True).router_logits
            per_layer.append([layer[-1:] for layer in logits])
    layers = tuple(torch.cat(layer) for layer in zip(*per_layer, strict=True))
    return float(load_balancing_loss_func(layers, layers[0].shape[-1], config.num_experts_per_tok))


@pytest.mark.parametrize("forward", ["tree", "plain"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_router_loss_is_that_of_transformers_over_each_distinct_token_once(tmp_path, kind, forward):
    # Two groups share a prompt, and responses share their first tokens
    groups = [
        group([5, 6, 7], [[8, 9, 10], [8, 9, 11], [12]], row=0, chosen=0),
        group([5, 6, 7], [[8, 9, 10, 3], [4]], row=1, chosen=0),
        group([50, 51], [[52] * 4, [53, 54]], row=2, chosen=1),
    ]
    policy = mixture_policy(kind)
    expected = of_transformers(policy, groups)
    made = loop(tmp_path, preference("dpo"), groups, model=policy, job={"forward": forward, "held_out": groups})
    with torch.enable_grad():
        metrics = made.step(0)
    without = metrics["loss"] - metrics["loss/preference"]
    assert metrics["loss/router"] == pytest.approx(expected, abs=1e-5)
    assert without == pytest.approx(0.1 * expected, abs=1e-6)
    held_out = made.evaluator.evaluate()
    copied = mixture_policy(kind)
    copied.hf.load_state_dict(policy.hf.state_dict())
    assert held_out["loss/router"] == pytest.approx(of_transformers(copied, groups), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_router_loss_does_not_depend_on_micro_batches_forward_or_checkpointing(tmp_path, kind):
    def trained(name, job=None, checkpointing=False, **changes):
        policy = mixture_policy(kind)
        if checkpointing:
            policy.base.gradient_checkpointing_enable({"use_reentrant": False})
        made = loop(tmp_path / name, preference("dpo"), comparisons(24), model=policy, job=job, **changes)
        return made.run(), weights(policy)

    whole, expected = trained("whole")
    cut, cut_weights = trained("cut", tokens_per_micro_batch=90)
    others = [
        trained("plain", {"forward": "plain"}, tokens_per_micro_batch=90)[1],
        trained("checkpointed", checkpointing=True, tokens_per_micro_batch=90)[1],
    ]
    assert all(gap(expected, other) < 1e-4 for other in [cut_weights, *others])
    for line, other in zip(whole.metrics, cut.metrics, strict=True):
        assert line["loss/router"] == pytest.approx(other["loss/router"], abs=1e-6)
        assert "routing/tokens_computed" not in line
        assert other["routing/tokens_computed"] == other["tokens_computed"]  # counted in a pass of its own
    assert cut.forward_only.tokens > whole.forward_only.tokens
    without, plain = trained("without", prompts_per_step=8)[0], mixture_policy(kind, output_router_logits=False)
    made = loop(tmp_path / "off", preference("dpo"), comparisons(24), model=plain)
    made.run()
    assert gap(expected, weights(plain)) > 1e-3  # the loss moves the routers
    assert "loss/router" in without.first_metrics
    assert any("output_router_logits is false" in note for note in made.progress.notes)


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "adapters"])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_learns_by_every_objective(tmp_path, kind, name, lora):
    objective, rows = OBJECTIVES[name]
    policy, rate = (adapted(kind), 5e-2) if lora else (mixture_policy(kind), 1e-2)
    made = loop(tmp_path, objective, rows, model=policy, epochs=6, learning_rate=rate, tokens_per_micro_batch=200)
    result = made.run()
    assert made.forward.name == "tree"
    router = 0.1 * result.first_metrics["loss/router"], 0.1 * result.last_metrics["loss/router"]
    assert result.last_metrics["loss"] - router[1] < 0.97 * (result.first_metrics["loss"] - router[0])


def test_the_parts_of_a_router_loss_add_up_and_only_probabilities_have_gradients():
    loss = RouterLoss(coefficient=1.0, num_experts=5, num_chosen=2)
    draw = torch.Generator().manual_seed(0)
    layers = [torch.randn(12, 5, generator=draw, requires_grad=True) for _ in range(3)]
    whole = loss.routing(layers, torch.ones(12))
    parts = [loss.routing([layer[rows] for layer in layers], torch.ones(4)) for rows in torch.arange(12).split(4)]
    expected = load_balancing_loss_func(tuple(layers), 5, 2)
    torch.testing.assert_close(loss.value(whole).float(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(sum(loss.value(whole.detach(), part) for part in parts), loss.value(whole))
    assert not whole.chosen_E.requires_grad and whole.probability_E.requires_grad
    mine = torch.autograd.grad(loss.value(whole), layers, retain_graph=True)
    for one, other in zip(mine, torch.autograd.grad(expected, layers), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-8)


def test_a_router_loss_unlike_that_of_transformers_stops_the_run(tmp_path):
    policy = mixture_policy()
    policy.base.num_experts_per_tok = 1  # the loss of another number of experts than the layers choose
    original = policy.base.forward

    def forward(*arguments, **named):
        policy.base.num_experts_per_tok = 2
        output = original(*arguments, **named)
        policy.base.num_experts_per_tok = 1
        return output

    policy.base.forward = forward
    with pytest.raises(RunError, match="router auxiliary loss is .* in transformers"):
        loop(tmp_path, supervised(), demonstrations(4), model=policy)
