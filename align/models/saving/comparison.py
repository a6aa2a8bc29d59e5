"""Load a saved model back and compare it with the trained one.

Two comparisons, because neither suffices alone: a digest covers every weight, also those that a few rows do not reach,
and outputs on a few rows cover everything between the weights and the result (merged adapters, tied weights,
configuration). Both cost as much as one micro-batch and two passes over the weights, for models of any size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from align.data.token_groups import TokenSequence
from align.errors import RunError
from align.models.adapters.files import adapter_weights
from align.models.backbone import Backbone
from align.models.tree.batch import plain_batch, tree_batch
from align.models.weights import WrittenWeights, written_weights

NUM_SEQUENCES, MAX_LENGTH = 4, 64  # compared sequences, and tokens of each
# In fp32, in the model's output unit. The forward passes agree to 5e-4 (align.models.probe), and merging adapters
# rounds once more; a tied weight that was merged twice moves outputs by more than 1.
TOLERANCE = 1e-3
# For weights that were trained or saved in bf16, whose eight bits of precision move outputs by 0.01
ROUNDED_TOLERANCE = 0.1
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # fields of configurations


@dataclass(frozen=True, slots=True)
class ModelOutputs:
    """Outputs of a model for a few sequences, in fp32 on the CPU."""

    sequences: tuple[TokenSequence, ...]
    values: Tensor
    is_rounded: bool = False  # whether the forward pass ran in bf16


@torch.no_grad()
def model_outputs(model: Backbone, groups: Iterable[Sequence[TokenSequence]]) -> ModelOutputs:
    """Return the outputs for a few sequences of the groups, in the forward pass that the model is set to.

    If the weights are sharded, all processes call it together.
    """
    some = islice((sequence for group in groups for sequence in group[:2]), NUM_SEQUENCES)
    sequences = tuple(_shortened(sequence) for sequence in some)
    batch = (tree_batch if model.is_tree else plain_batch)(sequences).to(model.device)
    is_training = model.training
    model.eval()  # adapters may have dropout
    values = model(batch).float().cpu()
    model.train(is_training)
    return ModelOutputs(sequences, values)


def random_groups(num_tokens: int) -> list[list[TokenSequence]]:
    """Return groups of random tokens, for a model that has no rows."""
    draw = np.random.default_rng(0)
    ids = [draw.integers(num_tokens, size=MAX_LENGTH // 4, dtype=np.int32) for _ in range(NUM_SEQUENCES)]
    return [[TokenSequence(each, np.ones(len(each), dtype=bool))] for each in ids]


def compare_saved(saved: Backbone, expected: ModelOutputs, *, written: WrittenWeights, folder: Path) -> float:
    """Compare a model that was loaded from `folder` with what was saved, and return the largest difference of outputs.

    `expected` are the outputs of the trained model, and `written` are the weights that were saved. Raises
    `RunError` if weights differ at all, or outputs by more than rounding.
    """
    weights = adapter_weights(saved.hf) if isinstance(saved.hf, PeftModel) else saved.hf.state_dict()
    if written_weights(weights).digest != written.digest:
        raise RunError(f"{folder}: the weights that were loaded back are not those that were saved")
    saved.use_forward("plain")
    difference = (
        (model_outputs(saved, [[each] for each in expected.sequences]).values - expected.values).abs().flatten()
    )
    largest = difference.max().item() if len(difference) else 0.0
    # Rounding may send a token to other experts, which changes its output and slightly those of later tokens
    config = saved.base.config.get_text_config()
    has_experts = any(getattr(config, name, None) for name in EXPERTS)
    error = difference.quantile(0.9).item() if has_experts and len(difference) else largest
    limit = TOLERANCE
    if written.dtype != torch.float32 or expected.is_rounded:
        # The root mean square, as single tokens may differ by more
        error = difference.square().mean().sqrt().item()
        limit = ROUNDED_TOLERANCE
    if not error <= limit:
        raise RunError(
            f"{folder}: the saved model differs from the trained one by up to {largest:.3g} {saved.output_unit}, which "
            f"is more than rounding ({limit:g}); please report this with the recipe"
        )
    return largest


def _shortened(sequence: TokenSequence) -> TokenSequence:
    """Return the first tokens of a sequence, with all of them as targets but the first."""
    ids = sequence.ids[:MAX_LENGTH]
    return TokenSequence(ids, np.arange(len(ids)) > 0)
