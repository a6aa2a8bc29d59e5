"""Vectors by content: a text that an encoder has embedded before is read from a file.

Shape legend: N texts, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from align.artifacts import atomic_file, fingerprint_bytes
from align.errors import RunError
from align.storage.checksums import DAMAGED
from align.storage.disk_errors import disk_errors, reading

Vectors: TypeAlias = NDArray[np.float32]
KEY_BYTES = 16  # of a text's SHA-256


def text_key(text: str) -> bytes:
    """Return the key of a text in a cache."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:KEY_BYTES]


class VectorCache:
    """Vectors of texts, in one folder for each encoder.

    Every write is a new file that is named by the SHA-256 of its content, so that processes and runs can share a
    folder, and a damaged file is found.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read = set[Path]()
        self._known: dict[bytes, Vectors] = {}

    def known(self) -> dict[bytes, Vectors]:
        """Return all stored vectors by `text_key`, with those that other processes have added."""
        for path in sorted(set(self.folder.glob("*.safetensors")) - self._read):
            with reading(path):
                content = path.read_bytes()
            if fingerprint_bytes(content) != path.stem:
                raise RunError(f"{path}: {DAMAGED}; delete it")
            try:
                stored = load(content)
                self._known |= {key.tobytes(): row for key, row in zip(stored["keys"], stored["vectors"], strict=True)}
            except (SafetensorError, KeyError) as error:
                raise RunError(f"{path}: not a file of cached embeddings; delete it") from error
            self._read.add(path)
        return self._known

    def store(self, keys: Sequence[bytes], vectors_ND: Vectors) -> None:
        """Store the vectors of texts as one new file."""
        rows = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), KEY_BYTES)
        content = save({"keys": rows, "vectors": np.ascontiguousarray(vectors_ND, np.float32)})
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.folder / f"{fingerprint_bytes(content)}.safetensors") as partial:
            partial.write_bytes(content)
