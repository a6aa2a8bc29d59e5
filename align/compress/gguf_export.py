"""Export of a policy as a GGUF file, which llama.cpp, Ollama, LM Studio and transformers read."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from align.compress.gguf_architectures import (
    ROPE_FREQS,
    Architecture,
    add_metadata,
    architecture_of,
    rope_factors,
    stored_form,
)
from align.compress.gguf_tokenizer import add_special_tokens, add_vocabulary, vocabulary
from align.compress.settings import GgufSettings
from align.compress.sizes import Compression
from align.compress.weights import StoredWeights, plain_folder
from align.errors import InputError, RunError
from align.models.loading.files import load_generation_config
from align.models.loading.pretrained import load_base
from align.models.loading.tokenizer import load_tokenizer
from align.models.saving.folder import write_tokenizer
from align.models.settings import PolicySettings

QuantizationType = gguf.GGMLQuantizationType
FLOAT = QuantizationType.F32  # of vectors: norms and biases
FALLBACK = QuantizationType.F16  # of matrices whose rows do not divide into blocks
# Of a tensor's norm, which the rounding of no type exceeds (0.12 for Q4_0), and any misplaced tensor does (1.4)
MAX_ERROR = 0.5
HEADS = ("token_embd.weight", "output.weight")


class StoredTensor(NamedTuple):
    """A tensor of a GGUF file before it is read."""

    name: str  # of llama.cpp
    source: str  # of transformers
    shape: tuple[int, ...]
    kind: QuantizationType


def export_policy(path: str, file: Path, settings: GgufSettings) -> dict[str, Any]:
    """Export the policy of a folder, Hub ID or GGUF file; see `export_gguf`. Adapters are merged first.

    Raises `InputError` for adapters on a quantized base, which are never merged into it.
    """
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".merged.partial-") as work:
        return export_gguf(plain_folder(path, Path(work)), file, settings)


def export_gguf(source: Path, file: Path, settings: GgufSettings) -> dict[str, Any]:
    """Write the policy of a plain folder as a GGUF file, with its configuration and tokenizer beside it.

    The file is loaded back and each weight is compared. Returns sizes and notes. Raises `InputError` for a policy that
    a GGUF file cannot hold.
    """
    weights = StoredWeights(source)
    config: PretrainedConfig = AutoConfig.from_pretrained(str(source), trust_remote_code=False)
    found = architecture_of(config)
    tensors = _planned(weights, config, found, settings)
    tokenizer = load_tokenizer(PolicySettings(path=str(source)))
    writer = gguf.GGUFWriter(str(file), found.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(file.stem)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{settings.gguf}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_metadata(writer, found, config)
    add_vocabulary(writer, vocabulary(tokenizer, size=config.vocab_size, pre=settings.pre_tokenizer))
    notes = add_special_tokens(writer, tokenizer, load_generation_config(str(source)))
    notes += _window_notes(found, config)
    _write_tensors(writer, weights, config, found, tensors)
    for name in (CONFIG_NAME, GENERATION_CONFIG_NAME):
        if (source / name).is_file():
            shutil.copyfile(source / name, file.with_name(name))
    write_tokenizer(tokenizer, file.parent)
    _check(file, weights, tensors)
    kinds = Counter(tensor.kind.name for tensor in tensors)
    asked = {settings.gguf, settings.embeddings}
    if kinds[FALLBACK.name] and FALLBACK.name not in asked:
        notes.append(f"{kinds[FALLBACK.name]} matrices are F16: their rows do not divide into blocks of 32 weights")
    count = sum(math.prod(tensor.shape) for tensor in tensors)
    size = Compression(bytes=file.stat().st_size, bytes_before=weights.num_bytes, weights=count)
    return {"compression": size.to_json(), "tensors": dict(kinds), "notes": notes}


def _window_notes(found: Architecture, config: PretrainedConfig) -> list[str]:
    """Return a note where the policy has a sliding window that the file cannot hold."""
    window = getattr(config, "sliding_window", None)
    if found.pattern or window is None or window >= config.max_position_embeddings:
        return []
    return [f"attention is not limited to a window of {window} tokens, unlike the policy's own"]


def _write_tensors(
    writer: gguf.GGUFWriter,
    weights: StoredWeights,
    config: PretrainedConfig,
    found: Architecture,
    tensors: Sequence[StoredTensor],
) -> None:
    """Write the file, one tensor in memory at a time."""
    factors = rope_factors(config)
    if factors is not None:
        writer.add_tensor_info(ROPE_FREQS, factors.shape, np.dtype(np.float32), factors.nbytes, FLOAT)
    for tensor in tensors:
        num_bytes = math.prod(gguf.quant_shape_to_byte_shape(tensor.shape, tensor.kind))
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), num_bytes, tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    for tensor in tensors:
        value = stored_form(found, config, tensor.source, weights.read(tensor.source)).float().contiguous().numpy()
        writer.write_tensor_data(gguf.quantize(value, tensor.kind))
    writer.close()


def _planned(
    weights: StoredWeights, config: PretrainedConfig, found: Architecture, settings: GgufSettings
) -> list[StoredTensor]:
    """Return the tensors of the file in order; raise `InputError` for one that llama.cpp has no name for."""
    names = gguf.get_tensor_name_map(_arch(found), config.num_hidden_layers)
    is_tied = bool(getattr(config, "tie_word_embeddings", False))
    planned: list[StoredTensor] = []
    for source in weights.names:
        if is_tied and source == "lm_head.weight":
            continue
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise InputError(f"the architecture {found.name} of GGUF files has no tensor for {source}", ("policy",))
        shape = weights.shape(source)
        planned.append(StoredTensor(name, source, shape, _kind(name, shape, settings)))
    return planned


def _kind(name: str, shape: tuple[int, ...], settings: GgufSettings) -> QuantizationType:
    """Return the type that a tensor is stored in."""
    if len(shape) == 1:
        return FLOAT
    kind = QuantizationType[settings.gguf]
    if name in HEADS and settings.embeddings is not None:
        kind = QuantizationType[settings.embeddings]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if shape[-1] % block == 0 else FALLBACK


def _arch(found: Architecture) -> gguf.MODEL_ARCH:
    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == found.name)


def _check(file: Path, weights: StoredWeights, tensors: Sequence[StoredTensor]) -> None:
    """Load the file back and raise `RunError` for a weight that is not the policy's, up to rounding."""
    loaded = load_base(PolicySettings(path=str(file.parent))).state_dict()
    for tensor in tensors:
        expected = weights.read(tensor.source).float()
        error = torch.linalg.vector_norm(loaded[tensor.source] - expected)
        norm = torch.linalg.vector_norm(expected)
        if not error <= MAX_ERROR * norm:  # also of NaN
            raise RunError(
                f"{file}: {tensor.source} differs from the policy's by {error / norm:.2f} of its norm when loaded"
            )
