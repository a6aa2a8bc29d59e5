"""The forward of an LM head that returns log-probabilities of given tokens in place of logits."""

from __future__ import annotations

import types

import torch
from torch import Tensor, nn

from align.models.lm_head.logprobs import LogitTransform, token_logps, token_logps_and_collisions
from align.models.lm_head.token_sets import set_logps


def patch_lm_head(head: nn.Linear, transform: LogitTransform) -> None:
    """Make `head(hidden, targets=...)` return log-probabilities from within the LM head's own forward.

    With `collisions=True` it returns both values of `token_logps_and_collisions`, shape [2, N]; with `tokens`, of shape
    [N, K], it returns `set_logps`.

    ZeRO-3 and FSDP gather a module's weight for its forward and backward, so the weight must be used inside it.
    """

    def forward(
        self: nn.Linear,
        hidden: Tensor,
        targets: Tensor | None = None,
        *,
        collisions: bool = False,
        tokens: Tensor | None = None,
    ) -> Tensor:
        if targets is None:
            return nn.functional.linear(hidden, self.weight, self.bias)
        if tokens is not None:
            return set_logps(hidden, self.weight, self.bias, targets, tokens, transform)
        if collisions:
            return torch.stack(token_logps_and_collisions(hidden, self.weight, self.bias, targets, transform))
        return token_logps(hidden, self.weight, self.bias, targets, transform)

    head.forward = types.MethodType(forward, head)
