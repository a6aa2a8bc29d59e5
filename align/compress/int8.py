"""Copies of a policy in int8, as folders that transformers loads."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from align.compress.sizes import Compression
from align.compress.weights import StoredWeights, plain_folder
from align.errors import InputError, RunError
from align.models.loading.int8 import LIBRARY, Int8Method, int8_options
from align.models.loading.tokenizer import load_tokenizer
from align.models.saving.folder import write_tokenizer
from align.models.settings import PolicySettings

PROBE_TOKENS = 32
PROBE_STRIDE = 7919  # a prime, so that the tokens are spread over the vocabulary


def quantize_policy(path: str, folder: Path, method: Int8Method) -> dict[str, Any]:
    """Write the policy of a folder or Hub ID with its linear layers in int8; adapters are merged first.

    The embeddings, the LM head, norms and biases keep their dtype. The folder is loaded back, and its logits are
    compared. Returns the sizes. Raises `InputError` for adapters on a quantized base and for quantized weights.
    """
    options = int8_options(method)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".merged.partial-") as work:
        source = plain_folder(path, Path(work))
        stored = StoredWeights(source)
        model = _load(source, **options)
        if not (layers := [name for name, value in model.named_parameters() if LIBRARY in type(value).__module__]):
            raise InputError(f"{path} has no linear layers besides its LM head", ("policy",))
        expected = _logits(model)
        model.save_pretrained(str(folder))
        write_tokenizer(load_tokenizer(PolicySettings(path=str(source))), folder)
        if (source / GENERATION_CONFIG_NAME).is_file():
            shutil.copyfile(source / GENERATION_CONFIG_NAME, folder / GENERATION_CONFIG_NAME)
        before, count = stored.num_bytes, stored.num_weights
    if not torch.equal(_logits(_load(folder)), expected):
        raise RunError(f"{folder}: the logits differ once the policy has been saved and loaded")
    size = Compression(StoredWeights(folder).num_bytes, before, count)
    return {"compression": size.to_json(), "layers": len(layers), "method": method}


def _load(folder: Path, **options: object) -> PreTrainedModel:
    """Load a policy in the dtype that it was saved in."""
    from_pretrained: Any = AutoModelForCausalLM.from_pretrained
    return from_pretrained(str(folder), dtype="auto", trust_remote_code=False, use_safetensors=True, **options).eval()


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    """Return the logits for some tokens of the vocabulary."""
    vocabulary: int = model.config.get_text_config().vocab_size
    ids = torch.arange(PROBE_TOKENS, device=model.device) * PROBE_STRIDE % vocabulary
    return model(input_ids=ids[None], use_cache=False).logits
