"""Likelihoods of rows against transformers' own logits."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from align.data.token_groups import TokenGroup, TokenSequence
from align.distributed.processes import Processes
from align.evaluation.tasks import TASKS
from align.models.policy import Policy
from align.models.reward_model import RewardModel
from align.models.settings import Rating

CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
}


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    return Policy(LlamaForCausalLM(LlamaConfig(**CONFIG, initializer_range=0.2)))


def group(row, prompt, *responses):
    sequences = tuple(
        TokenSequence(np.array([*prompt, *each], np.int32), np.array([False] * len(prompt) + [True] * len(each)))
        for each in responses
    )
    return TokenGroup(sequences, tuple(map(float, range(len(responses)))), None, ({},) * len(responses), row)


GROUPS = [group(0, [1, 2, 3], [4, 5], [6]), group(1, [9], [8, 7, 6, 5], [4, 3], [2, 2, 2])]


@torch.no_grad()
def by_transformers(policy, sequence):
    """Log-probability of the trained tokens, one sequence at a time, from its own logits."""
    ids = torch.from_numpy(sequence.ids.astype("int64"))[None]
    fresh = LlamaForCausalLM(LlamaConfig(**CONFIG))
    fresh.load_state_dict(policy.base.state_dict())
    logps = fresh.eval()(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(dim=-1)
    return sum(float(logps[at - 1, ids[0, at]]) for at in range(1, ids.shape[1]) if sequence.loss_mask[at])


def measured(task, policy, precision):
    parts = TASKS[task].measure(policy, GROUPS, precision=precision, processes=Processes())
    return TASKS[task].scores(list(parts))


@pytest.mark.parametrize(("precision", "near"), [("fp32", 1e-4), ("bf16", 5e-2)])
def test_metrics_equal_those_from_transformers_logits(policy, precision, near):
    summed = [[by_transformers(policy, each) for each in of.sequences] for of in GROUPS]
    lengths = [of.response_lengths for of in GROUPS]
    nll = measured("nll", policy, precision)["nll"]
    assert nll.value == pytest.approx(-sum(map(sum, summed)) / sum(map(sum, lengths)), rel=near)
    found = measured("preference", policy, precision)
    right = [a < b for of in summed for place, a in enumerate(of) for b in of[place + 1 :]]
    assert found["accuracy_summed"].value == sum(right) / len(right)
    assert found["accuracy_summed"].n == len(GROUPS)


@torch.no_grad()
def test_pair_accuracy_is_that_of_rewards_which_transformers_computes_one_by_one():
    torch.manual_seed(0)
    config = LlamaConfig(**CONFIG, initializer_range=0.2, num_labels=2, pad_token_id=0)
    weights = (0.75, -1.5)
    model = RewardModel(LlamaForSequenceClassification(config), Rating(("true", "long"), weights))
    fresh = LlamaForSequenceClassification(config).eval()
    fresh.load_state_dict(model.base.state_dict())
    drawn = np.random.default_rng(3)
    groups = [group(row, drawn.integers(1, 64, 3), *(drawn.integers(1, 64, 4) for _ in range(3))) for row in range(6)]
    groups += [group(6, [1], [2])]  # no pair
    right, number = 0, 0
    for each in groups:
        ids = [torch.from_numpy(one.ids.astype("int64"))[None] for one in each.sequences]
        rewards = [sum(w * float(s) for w, s in zip(weights, fresh(one).logits[0], strict=True)) for one in ids]
        pairs = [(a, b) for a in range(len(rewards)) for b in range(a + 1, len(rewards))]  # the later one is better
        right, number = right + sum(rewards[b] > rewards[a] for a, b in pairs), number + len(pairs)
    parts = TASKS["pair_accuracy"].measure(model, groups, precision="fp32", processes=Processes())
    found = TASKS["pair_accuracy"].scores(list(parts))["accuracy"]
    assert found.value == pytest.approx(right / number) and found.n == 6 and 0 < right < number == 18
