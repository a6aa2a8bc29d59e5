"""The fidelity task: agreement and divergences of two policies, against sums over the vocabulary in plain Python."""

import math

import numpy as np
import pytest
import torch

from align.data.token_groups import TokenGroup, TokenSequence
from align.distributed.processes import Processes
from align.errors import InputError
from align.evaluation.fidelity import _kl, divergences
from align.models.policy import Policy
from align.stages.responses.tasks import TaskSettings
from align.testing import tiny_policy


def groups():
    draw = np.random.default_rng(0)
    for prompt, answer in ((5, 7), (9, 1)):
        ids = draw.integers(3, 300, size=prompt + answer, dtype=np.int32)
        mask = np.arange(prompt + answer) >= prompt
        yield TokenGroup((TokenSequence(ids, mask),), None, None, ({},), 0, 0)


def by_hand(policy, reference, sequence):
    """Return the four sums of an answer."""
    first = int(np.argmax(sequence.loss_mask))
    with torch.no_grad():
        rows = [
            model.hf(input_ids=torch.tensor(sequence.ids.astype("int64"))[None]).logits[0].double().softmax(-1).tolist()
            for model in (reference, policy)
        ]
    sums = [0.0, 0.0, 0.0, 0.0]
    for at in range(first, len(sequence.ids)):
        p, q = rows[0][at - 1], rows[1][at - 1]
        kls = [sum(x * math.log(x / y) for x, y in zip(a, b, strict=True)) for a, b in ((p, q),)]
        middle = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
        js = sum(x * math.log2(x / m) / 2 for a in (p, q) for x, m in zip(a, middle, strict=True))
        token = int(sequence.ids[at])
        sums[0] += p.index(max(p)) == q.index(max(q))
        sums[1] += kls[0]
        sums[2] += 1 - math.sqrt(js)
        sums[3] += math.log(p[token] / q[token])
    return sums


def test_the_sums_are_those_over_the_vocabulary_at_each_token_of_the_answer():
    policy, reference = tiny_policy(seed=1)[0], tiny_policy(seed=2)[0]
    for model in (policy, reference):
        model.hf.lm_head.weight.data *= 5  # away from equal probabilities
    found = divergences(policy, reference, list(groups()), precision="fp32", processes=Processes())
    for parts, group in zip(found, groups(), strict=True):
        expected = by_hand(policy, reference, group.sequences[0])
        assert [value for value, _ in parts.values()] == pytest.approx(expected, rel=1e-6)
        assert {count for _, count in parts.values()} == {int(group.sequences[0].loss_mask.sum())}
    assert found[0]["kl"][0] > 0.1


def test_a_policy_whose_weights_are_nan_is_not_close_to_any():
    policy, reference = tiny_policy(seed=1)[0], tiny_policy(seed=2)[0]
    policy.hf.lm_head.weight.data[7] = math.nan
    found = divergences(policy, reference, list(groups()), precision="fp32", processes=Processes())
    assert all(math.isnan(parts[name][0]) for parts in found for name in ("kl", "js_similarity", "nll_change"))


def test_a_token_that_only_the_reference_excludes_adds_nothing():
    logps = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]], dtype=torch.float64).log()
    assert float(_kl(logps[:1], logps[1:])) == pytest.approx(math.log(2))
    assert float(_kl(logps[1:], logps[:1])) == math.inf


def test_a_policy_agrees_with_itself():
    policy: Policy = tiny_policy()[0]
    for parts in divergences(policy, policy, list(groups()), precision="fp32", processes=Processes()):
        rates = {name: value / count for name, (value, count) in parts.items()}
        assert rates == pytest.approx({"agreement": 1, "kl": 0, "js_similarity": 1, "nll_change": 0}, abs=1e-7)


def test_the_task_needs_a_reference_and_takes_no_temperature():
    task = TaskSettings(data="prompts", task="fidelity")
    with pytest.raises(InputError, match=r"compares with another policy: give step:NAME"):
        task.check_used(task.resolve(None))
    hot = TaskSettings(data="prompts", task="fidelity", reference="step:dpo", temperature=0.5)
    with pytest.raises(InputError, match="has no effect on task fidelity"):
        hot.check_used(hot.resolve(None))
