"""The weights of a saved model, read one tensor at a time: any size fits, as no model is built."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from align.artifacts import check_not_removed, read_json
from align.errors import InputError
from align.models.adapters.files import base_quantization
from align.models.hub import MODEL_FILES, TEMPLATES
from align.models.loading.files import check_weight_index
from align.models.model_card import README
from align.models.policy import load_policy, save_policy
from align.models.settings import PolicySettings, is_adapter

HEADER = "<Q"  # length of a safetensors file's JSON header, at its start
METADATA = "__metadata__"  # key of that header that is no tensor
HEADER_ALIGNMENT = 8  # bytes; the header is padded with spaces
CHUNK = 1 << 24  # bytes of weights copied at a time
WEIGHT_FILES = ("*.safetensors", "*.gguf")


class StoredWeights:
    """The tensors of a folder's safetensors files, by name."""

    def __init__(self, folder: Path) -> None:
        check_not_removed(folder)
        check_weight_index(str(folder))
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [SAFE_WEIGHTS_NAME]
        self.folder = folder
        self.files = [folder / name for name in names]
        for file in self.files:
            if not file.is_file():
                raise InputError(f"{file}: no such file of weights")
        self._file_of = {name: file for file in self.files for name in tensor_names(file)}

    @property
    def names(self) -> list[str]:
        """Names of the tensors, sorted."""
        return sorted(self._file_of)

    @property
    def num_bytes(self) -> int:
        """Bytes of the files of weights."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def num_weights(self) -> int:
        """Number of weights; tied ones are stored once and count once."""
        return sum(math.prod(self.shape(name)) for name in self.names)

    def read(self, name: str) -> Tensor:
        """Return a tensor in the dtype that it is stored in, on the CPU."""
        with cast(Any, safe_open)(self._file_of[name], framework="pt") as tensors:
            return tensors.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        with cast(Any, safe_open)(self._file_of[name], framework="pt") as tensors:
            return tuple(tensors.get_slice(name).get_shape())


def tensor_names(file: Path) -> list[str]:
    """Return the names of the tensors of a safetensors file, in the order of their data."""
    header = _header(file)[1]
    return sorted((name for name in header if name != METADATA), key=lambda name: header[name]["data_offsets"][0])


def write_like(file: Path, target: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write a safetensors file with the header of `file` and other values; `tensors` come in the order of its data.

    Values are rounded to the dtypes of `file`. One tensor is in memory at a time.
    """
    raw, header = _header(file)
    with target.open("wb") as out:
        out.write(struct.pack(HEADER, len(raw)) + raw)
        began = out.tell()
        for name, value in tensors:
            start, end = header[name]["data_offsets"]
            assert out.tell() - began == start, f"{name} is out of order"
            rounded = value.to(dtype_of(header[name]["dtype"])).contiguous()
            out.write(memoryview(cast(Any, rounded.flatten().view(torch.uint8).numpy())))
            assert out.tell() - began == end, f"{name} has another shape"


def write_renamed(file: Path, target: Path, names: Mapping[str, str]) -> int:
    """Write those tensors of a safetensors file that have a new name in `names`; return the bytes of their values."""
    raw, header = _header(file)
    kept = [name for name in tensor_names(file) if name in names]
    described: dict[str, Any] = {METADATA: header[METADATA]} if METADATA in header else {}
    spans = [header[name]["data_offsets"] for name in kept]
    position = 0
    for name, (start, end) in zip(kept, spans, strict=True):
        described[names[name]] = {**header[name], "data_offsets": [position, position + end - start]}
        position += end - start
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    with file.open("rb") as source, target.open("wb") as out:
        out.write(struct.pack(HEADER, len(text)) + text)
        for start, end in spans:
            source.seek(struct.calcsize(HEADER) + len(raw) + start)
            for place in range(start, end, CHUNK):
                out.write(source.read(min(CHUNK, end - place)))
    return position


def copy_other_files(folder: Path, target: Path) -> None:
    """Copy a model's configuration, tokenizer, templates and index of weights, not the weights and the model card."""
    patterns = [*(each for each in MODEL_FILES if each not in (*WEIGHT_FILES, README)), SAFE_WEIGHTS_INDEX_NAME]
    for path in folder.iterdir():
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in patterns):
            shutil.copyfile(path, target / path.name)
    if (folder / TEMPLATES).is_dir():
        shutil.copytree(folder / TEMPLATES, target / TEMPLATES, dirs_exist_ok=True)


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype of safetensors' name for it; raise `InputError` for weights that are not floating point."""
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if name not in kinds:
        raise InputError(f"weights of dtype {name} are quantized; give the model in full precision", ("policy",))
    return kinds[name]


def plain_folder(path: str, work: Path) -> Path:
    """Return a folder with all weights of a policy: its own, or one written to `work` for adapters and GGUF files.

    Adapters are merged into their base. Raises `InputError` for adapters on a quantized base and for quantized
    weights.
    """
    if is_adapter(path) and (kind := base_quantization(path)) is not None:
        raise InputError(
            f"the base of {path} is quantized ({kind}), and adapters are never merged into quantized weights; import "
            f"it first: a step with `stage: import` and `path: {path}` dequantizes the base to full precision",
            ("policy",),
        )
    folder = Path(path)
    if any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        config = read_json(folder / CONFIG_NAME)
        if config.get("quantization_config"):
            raise InputError(f"the weights in {path!r} are quantized; give the model in full precision", ("policy",))
        return folder
    policy, tokenizer = load_policy(PolicySettings(path=path))
    save_policy(policy, tokenizer, work)
    return work


def _header(file: Path) -> tuple[bytes, dict[str, Any]]:
    """Return the header of a safetensors file, as bytes and parsed."""
    with file.open("rb") as source:
        (length,) = struct.unpack(HEADER, source.read(struct.calcsize(HEADER)))
        raw = source.read(length)
    return raw, json.loads(raw)
