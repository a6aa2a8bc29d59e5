"""The sigmoid contrastive loss of paired embeddings, which is a sum over pairs of rows.

Shape legend: B rows, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from align.registry import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional as F
else:
    torch = LazyModule("torch")
    F = LazyModule("torch.nn.functional")

INITIAL_SCALE, INITIAL_BIAS = 10.0, -10.0  # Zhai et al. 2023 (SigLIP), sec. 3.2


def sigmoid_losses(anchor_BD: Tensor, positive_BD: Tensor, scale: Tensor | float, bias: Tensor | float) -> Tensor:
    """Return -log σ(y_ij (scale · cos(a_i, p_j) + bias)) with y = 1 on the diagonal and -1 elsewhere, [B, B].

    The loss of a batch is the sum over all elements divided by B (Zhai et al. 2023, SigLIP, eq. in sec. 3.2). Because
    each element depends on two rows only, the loss of any part of a batch is a sum over elements of this matrix: joint
    selection of examples builds on that (Evans et al. 2024, JEST, sec. 3). Embeddings need no unit length.
    """
    cosine_BB = F.normalize(anchor_BD, dim=1) @ F.normalize(positive_BD, dim=1).T
    sign_BB = 2 * torch.eye(len(cosine_BB), dtype=cosine_BB.dtype, device=cosine_BB.device) - 1
    return -F.logsigmoid(sign_BB * (scale * cosine_BB + bias))
