"""How closely a policy follows another one: agreement and divergence, token by token along the other's answers.

Shapes: T tokens of an answer, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from align.data.token_groups import TokenGroup, TokenSequence
from align.distributed.processes import Processes
from align.evaluation.task import Parts
from align.models.policy import Policy


@torch.no_grad()
def divergences(
    policy: Policy, reference: Policy, groups: Sequence[TokenGroup], *, precision: str, processes: Processes
) -> list[Parts]:
    """Return sums and counts over the tokens of each group's answer, which the reference has given.

    `agreement` counts the tokens at which both models' most likely token is the same. `kl` is KL(reference || policy)
    in nats, `js_similarity` is 1 - sqrt(JS / ln 2) (Xu et al. 2021), and `nll_change` is the policy's negative
    log-likelihood of the token minus the reference's, in nats. Each process computes its share and returns all.
    """
    own = {
        index: _of_answer(policy, reference, groups[index].sequences[0], precision=precision)
        for index in range(processes.rank, len(groups), processes.world_size)
    }
    found = {index: parts for part in processes.all_gather_object(own) for index, parts in part.items()}
    return [found[index] for index in range(len(groups))]


def different_vocabularies(policy: Policy, reference: Policy) -> str | None:
    """Return why the distributions of two policies cannot be compared; None if they can."""
    heads: list[Any] = [policy.head, reference.head]
    own, other = (head.weight.shape[0] for head in heads)
    if own == other:
        return None
    return f"the policy has {own} tokens and the reference {other}, so their distributions cannot be compared"


def _of_answer(policy: Policy, reference: Policy, sequence: TokenSequence, *, precision: str) -> Parts:
    of_reference_TV = _token_logps(reference, sequence, precision)
    of_policy_TV = _token_logps(policy, sequence, precision)
    answer_T = torch.from_numpy(sequence.ids[sequence.loss_mask].astype("int64")).to(of_policy_TV.device)[:, None]
    same_T = of_reference_TV.argmax(dim=-1) == of_policy_TV.argmax(dim=-1)
    kl_T = _kl(of_reference_TV, of_policy_TV)
    mixed_TV = torch.logaddexp(of_reference_TV, of_policy_TV) - math.log(2)
    js_T = (_kl(of_reference_TV, mixed_TV) + _kl(of_policy_TV, mixed_TV)) / 2
    similarity_T = 1 - (js_T.clamp(min=0) / math.log(2)).sqrt()
    change_T = (of_reference_TV - of_policy_TV).gather(1, answer_T)
    values = {"agreement": same_T, "kl": kl_T, "js_similarity": similarity_T, "nll_change": change_T}
    return {name: (float(value.sum()), len(answer_T)) for name, value in values.items()}


def _kl(p_TV: Tensor, q_TV: Tensor) -> Tensor:
    """Return KL(p || q) of log-probabilities, shape [T]."""
    return (p_TV.exp() * (p_TV - q_TV)).masked_fill(p_TV.isneginf(), 0.0).sum(dim=-1)  # 0 where p is 0, never for NaN


def _token_logps(model: Policy, sequence: TokenSequence, precision: str) -> Tensor:
    """Return the log-probabilities of every token at each token of the answer, fp64 [T, V]."""
    ids = torch.from_numpy(sequence.ids.astype("int64")).to(model.device)[None]
    targets_T = torch.from_numpy(sequence.loss_mask[1:]).to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits_TV = model.hf(input_ids=ids, use_cache=False).logits[0, :-1][targets_T]
    return logits_TV.double().log_softmax(dim=-1)
