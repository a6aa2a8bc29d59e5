"""The router auxiliary loss over the micro-batches of an optimizer step or an evaluation, on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Literal, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from align.accounting.flops import Work, sum_work
from align.data.token_groups import TokenSequence
from align.distributed.progress import Progress
from align.errors import RunError
from align.models.backbone import Backbone
from align.models.policy import Policy
from align.models.probe import PROBE_LENGTH, Forward
from align.models.router_loss import RouterLoss, Routing, router_loss
from align.models.tree.batch import TokenBatch
from align.train.indexed_groups import GroupView
from align.train.passes.micro_batches import COLLATE, MicroBatch
from align.train.training_run import ROUTING, WORK_METRICS

TOLERANCE = 0.05  # of a loss; routing that rounding decides changes it by about 1%, and a wrong formula by a factor


class RouterPass:
    """Adds up the routing of micro-batches; the loss is that of all their distinct tokens together.

    The loss of a step multiplies the choices of all its tokens with their probabilities. So the choices must be known
    before the first backward pass: of a step with several micro-batches they are counted in a pass of its own.
    """

    def __init__(self, policy: Backbone, loss: RouterLoss, accelerator: Accelerator) -> None:
        self._policy, self._loss, self._accelerator = policy, loss, accelerator
        self._sum: Routing | None = None
        self._whole: Routing | None = None  # of all ranks, once it is known
        self._work = Work(0, 0, 0)  # of the counting pass on this rank, like the next
        self._num_forward_passes = 0

    @torch.no_grad()
    def count(self, model: nn.Module, micro_batches: Iterable[MicroBatch]) -> None:
        """Count the choices of a step; all ranks call it together."""
        for micro in micro_batches:
            tokens = micro.batch.tokens
            without_head = replace(tokens, rows_N=tokens.rows_N[:0], targets_N=tokens.targets_N[:0])
            model(without_head)
            self.add(micro)
            self._work = sum_work([self._work, without_head.work()])
            self._num_forward_passes += 1
        self._whole = self._reduced()
        self._sum = None

    def add(self, micro: MicroBatch) -> Routing:
        """Add the routing of the forward pass that the micro-batch just had, and return it."""
        routing = self._loss.routing(self._policy.take_router_logits(), micro.batch.count_T * micro.weight)
        self._sum = routing.detach() if self._sum is None else self._sum + routing.detach()
        return routing

    def term(self, micro: MicroBatch) -> Tensor:
        """Return what the micro-batch adds to the training loss; all ranks call it after their forward pass."""
        routing = self.add(micro)
        if self._whole is None:
            self._whole = self._reduced()
        return self._loss.coefficient * self._loss.value(self._whole, routing)

    def metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        """Return the metrics with the auxiliary loss, which is also added to the loss; all ranks call it together."""
        value = float(self._loss.value(self._reduced()))
        found = {**metrics, "loss": metrics["loss"] + self._loss.coefficient * value, "loss/router": value}
        if not self._num_forward_passes:
            return found
        own = torch.tensor(self._work, dtype=torch.float64, device=self._accelerator.device)
        work = cast(Tensor, self._accelerator.reduce(own, reduction="sum")).tolist()
        names = [ROUTING + name for name in (*WORK_METRICS, "micro_batches")]
        return {**found, **dict(zip(names, [*map(int, work), self._num_forward_passes], strict=True))}

    def _reduced(self) -> Routing:
        assert self._sum is not None
        return self._sum.each(lambda own: cast(Tensor, self._accelerator.reduce(own, reduction="sum")))


def router_passes(
    policy: Backbone, groups: GroupView, forward: Forward, accelerator: Accelerator, progress: Progress
) -> Callable[[], RouterPass] | None:
    """Return a function that makes the pass of a step; None without an auxiliary loss, which is noted for a mixture."""
    loss = make_router_loss(policy, groups[0].sequences[0], forward.name)
    if loss is not None:
        progress.note(f"router auxiliary loss with the coefficient {loss.coefficient:g} of the model's configuration")
        return lambda: RouterPass(policy, loss, accelerator)
    if getattr(policy.base.config.get_text_config(), "router_aux_loss_coef", None):
        is_policy = isinstance(policy, Policy)
        reason = (
            "output_router_logits is false in the model's configuration" if is_policy else "a reward model has none"
        )
        progress.note(f"no router auxiliary loss: {reason}")
    return None


def make_router_loss(policy: Backbone, sequence: TokenSequence, forward: Literal["tree", "plain"]) -> RouterLoss | None:
    """Return the auxiliary loss of the model's configuration, compared with transformers' own on a sequence.

    From here on the model's forward passes record their routing.
    """
    loss = router_loss(policy)
    if loss is None:
        return None
    policy.records_routing = True
    short = TokenSequence(sequence.ids[:PROBE_LENGTH], sequence.loss_mask[:PROBE_LENGTH])
    batch: TokenBatch = COLLATE[forward]([short]).to(policy.device)
    with torch.no_grad():
        policy.use_forward("plain")
        policy(short)
        expected = float(cast(Tensor, policy.auxiliary_loss))
        policy.use_forward(forward)
        policy(batch)
    rows_T = torch.ones(batch.input_ids.numel(), device=policy.device)
    found = float(loss.value(loss.routing(policy.take_router_logits(), rows_T)))
    if not abs(found - expected) <= TOLERANCE * abs(expected):
        raise RunError(
            f"the router auxiliary loss is {found:.4g}, and {expected:.4g} in transformers; set output_router_logits "
            "to false in the model's configuration to train without it"
        )
    return loss
