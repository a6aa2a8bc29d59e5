"""The tree forward of recurrent layers: every branch of the trie continues from the state of its root path.

`tree-recurrence` (extra `recurrent`) replaces the convolutions and recurrences in transformers' modules of such models
by functions that read the trie from two keywords, and that call the original ones if these are not passed. Projections,
convolutions, experts and attention compute each row once. A recurrence without a kernel that takes initial states
(every one on a CPU, and Mamba-2's) recomputes each root path.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor
from transformers import PreTrainedModel

from align.models.tree.layout import TreeLayout

# Model types whose log-probabilities and gradients tests compare with those of transformers' own forward
_MODELS = {
    "bamba",
    "granitemoehybrid",
    "lfm2",
    "lfm2_moe",
    "nemotron_h",
    "olmo_hybrid",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_next",
}


def is_recurrent(hf: PreTrainedModel) -> bool:
    """Return whether the model has recurrent layers that the extra `recurrent` supports."""
    return hf.config.get_text_config().model_type in _MODELS


def follow_tree(hf: PreTrainedModel) -> str | None:
    """Make the recurrent layers of the model follow a tree; return why they cannot, None if they do.

    This replaces functions of transformers' module of the architecture, for all models in this process.
    """
    if find_spec("tree_recurrence") is None:
        return "the tree forward of recurrent layers needs tree-recurrence: pip install 'align[recurrent]'"
    support = import_module("tree_recurrence").install(hf)
    return None if support.mode == "tree" else f"tree-recurrence: {support.reason}"


def trie_keywords(layout: TreeLayout) -> dict[str, Tensor]:
    """Return the forward keywords from which recurrent layers read the trie; on the CPU, where they are read."""
    assert not layout.num_shared and layout.record is None, "a part of a tree does not have the states of its prefix"
    stops = [span.stop for span in layout.spans]
    parents = [span.ancestors[-1] if span.ancestors else -1 for span in layout.spans]
    return {"tree_cu_seqlens_q": torch.tensor([0, *stops]), "tree_segment_parents": torch.tensor(parents)}
