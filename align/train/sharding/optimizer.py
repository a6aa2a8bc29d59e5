"""The optimizer of the training loop."""

from __future__ import annotations

from torch import Tensor
from torch.optim import AdamW

from align.models.backbone import Backbone
from align.train.settings import TrainSettings


def make_optimizer(model: Backbone, settings: TrainSettings, head_lr_multiplier: float = 1.0) -> AdamW:
    """Return AdamW over the trainable parameters; weight decay applies to matrices only.

    Each parameter group has an `lr_multiplier` for the step's learning rate. If `head_lr_multiplier` is not 1, the
    head has its own parameter groups.
    """
    head = {id(value) for value in model.head.parameters()} if head_lr_multiplier != 1 else set[int]()
    groups: dict[tuple[bool, bool], list[Tensor]] = {
        (is_head, is_matrix): [] for is_head in (False, True) for is_matrix in (True, False)
    }
    for value in model.parameters():
        if value.requires_grad:
            shape = getattr(value, "ds_shape", value.shape)  # ZeRO-3 flattens parameters and keeps their shape here
            groups[id(value) in head, len(shape) > 1].append(value)
    return AdamW(
        [
            {
                "params": values,
                "weight_decay": settings.weight_decay if is_matrix else 0.0,
                "lr_multiplier": head_lr_multiplier if is_head else 1.0,
            }
            for (is_head, is_matrix), values in groups.items()
            if values
        ],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
        fused=True,
    )
