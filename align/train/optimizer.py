"""The optimizer of the loop."""

from __future__ import annotations

from torch.optim import AdamW

from align.models.backbone import Backbone
from align.train.settings import TrainSettings


def make_optimizer(model: Backbone, settings: TrainSettings, head_lr_multiplier: float = 1.0) -> AdamW:
    """AdamW over the trainable parameters; a group's `lr_multiplier` multiplies the step's learning rate.

    Matrices decay, the rest does not. With a `head_lr_multiplier` other than 1 the head has its own parameter group.
    """
    trainable = [value for value in model.parameters() if value.requires_grad]
    # A weight that ZeRO-3 has cut as it was read is flat, and remembers what it was.
    matrices = {id(value) for value in trainable if len(getattr(value, "ds_shape", value.shape)) > 1}
    head = {id(value) for value in model.head.parameters()} if head_lr_multiplier != 1 else set[int]()
    parts = [
        {
            "params": [
                value for value in trainable if (id(value) in matrices, id(value) in head) == (is_matrix, is_head)
            ],
            "weight_decay": settings.weight_decay if is_matrix else 0.0,
            "lr_multiplier": head_lr_multiplier if is_head else 1.0,
        }
        for is_head in (False, True)
        for is_matrix in (True, False)
    ]
    return AdamW(
        [part for part in parts if part["params"]],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
        fused=True,
    )
