"""Encoders: texts in, vectors out.

Shape legend: N texts, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from align.accounting.flops import Decoder, Work
from align.config import stable_hash
from align.content_hash import content_of
from align.curate.embeddings.cache import VectorCache, Vectors, text_key
from align.curate.embeddings.pipelines import WORD_VECTORS, Pipeline, is_pipeline, load_pipeline, word_vectors
from align.curate.embeddings.policy_states import PolicyStates
from align.curate.embeddings.poolings import POOLINGS
from align.curate.embeddings.settings import EncoderSettings
from align.curate.embeddings.whitening import Whitening, fit_whitening
from align.errors import InputError
from align.models.loading.config import dimensions
from align.models.loading.pretrained import default_device
from align.models.policy import load_policy
from align.models.settings import PolicySettings

CHUNK = 1024  # texts between writes to the cache: how much computation a kill may lose
DEFAULT_POOLING = "first_last"


class Encoder(Protocol):
    """Turns texts into vectors."""

    @property
    def name(self) -> str:
        """What the vectors are, in a few words for a report."""
        ...

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Return a vector of unit length for each text, fp32 [N, D]; a dot product is then a cosine."""
        ...


class TextEncoder:
    """An encoder with a cache and, after `whitened`, a whitening.

    `embed` returns fp32 [N, D] for distinct texts, of any length. Equal texts are embedded once.
    """

    def __init__(
        self,
        embed: Callable[[Sequence[str]], Tensor],
        *,
        name: str,
        cache: VectorCache | None = None,
        whitening: Whitening | None = None,
    ) -> None:
        self.name, self.whitening = name, whitening
        self._embed, self._cache = embed, cache

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Return a vector of unit length for each text, fp32 [N, D]. A vector of length 0 stays as it is."""
        vectors_ND = self.raw(texts)
        if self.whitening is not None:
            vectors_ND = self.whitening.apply(vectors_ND)
        return nn.functional.normalize(torch.from_numpy(vectors_ND), dim=1).numpy()

    def raw(self, texts: Sequence[str]) -> Vectors:
        """Return the vectors before whitening and before they get unit length, fp32 [N, D]."""
        if not texts:
            raise InputError("no texts to embed")
        by_key = {text_key(text): text for text in texts}
        known = dict(self._cache.known()) if self._cache is not None else {}
        missing = [key for key in by_key if key not in known]
        for start in range(0, len(missing), CHUNK):
            keys = missing[start : start + CHUNK]
            vectors_ND = self._embed([by_key[key] for key in keys]).numpy()
            if self._cache is not None:
                self._cache.store(keys, vectors_ND)
            known |= dict(zip(keys, vectors_ND, strict=True))
        return np.stack([known[text_key(text)] for text in texts])

    @property
    def computed(self) -> tuple[Decoder | str, Work]:
        """The dimensions of the model, or why they are unknown, and the work of the texts that were not cached."""
        embed: Any = self._embed
        if isinstance(embed, PolicyStates):
            return dimensions(embed.policy.base.config), embed.work
        if isinstance(embed, Pipeline) and embed.work.tokens:
            first: Any = embed.model[0]
            return dimensions(first.model.config), embed.work
        return "no model embeds", Work(0, 0, 0)

    def whitened(self, texts: Sequence[str], size: int | None = None) -> TextEncoder:
        """Return this encoder with a whitening that is fitted on distinct texts and keeps `size` dimensions."""
        whitening = fit_whitening(self.raw(list(dict.fromkeys(texts))), size)
        name = f"{self.name}, whitened to {whitening.weights_DK.shape[1]}"
        return TextEncoder(self._embed, name=name, cache=self._cache, whitening=whitening)


def make_encoder(
    settings: EncoderSettings,
    *,
    policy: PolicySettings | None = None,
    texts: Sequence[str] = (),
    cache: Path | None = None,
    content: Callable[[str], str] = content_of,
) -> TextEncoder:
    """Return the encoder of the settings; `policy` stands in where they name no model.

    `texts` are those that a whitening is fitted on. Vectors are kept below the folder `cache`, by the content of the
    model (as `content` returns it for a path), the settings and the text.
    """
    model = settings.model or (policy.path if policy is not None else None)
    if model is None:
        raise InputError("names no model, and there is no policy to embed with", ("model",))
    own = policy if settings.model is None else None
    embed, name = _embedder(model, settings, own)
    key = stable_hash([content(model), settings.model_dump(exclude={"model", "whiten"}), *_policy_key(own, content)])
    encoder = TextEncoder(embed, name=name, cache=None if cache is None else VectorCache(cache / key))
    return encoder if settings.whiten is None else encoder.whitened(texts, settings.whiten)


def _policy_key(policy: PolicySettings | None, content: Callable[[str], str]) -> list[object]:
    """Return what decides the vectors of a policy besides the content of its folder: other tokens, or 4 bits."""
    if policy is None:
        return []
    return [policy.quantize, content(policy.tokenizer) if policy.tokenizer else None]


def _embedder(
    model: str, settings: EncoderSettings, policy: PolicySettings | None
) -> tuple[Callable[[Sequence[str]], Tensor], str]:
    """Return what embeds texts, and its name in reports."""
    if not model.endswith(WORD_VECTORS) and not is_pipeline(model):
        pooling = settings.pooling or DEFAULT_POOLING
        loaded, tokenizer = load_policy(policy or PolicySettings(path=model))
        states = PolicyStates(
            loaded.to(default_device()).eval(), tokenizer, POOLINGS[pooling], max_tokens=settings.max_tokens
        )
        return states, f"{pooling} states of {Path(model).name}"
    if settings.pooling is not None:
        raise InputError(f"{model} has a pooling of its own; leave this setting out", ("pooling",))
    pipeline = (
        word_vectors(Path(model))
        if model.endswith(WORD_VECTORS)
        else load_pipeline(model, max_tokens=settings.max_tokens)
    )
    return pipeline, Path(model).name
