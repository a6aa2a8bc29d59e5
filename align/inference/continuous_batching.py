"""Continuous batching: rows join and leave a batch while it decodes, with results that do not depend on each other.

On a CPU the logits of a row are bit-identical whatever else is in the batch, in fp32 and bf16: each prompt is computed
alone, attention reads as many keys as the row's position needs, in blocks of WIDTH, and every matrix product has a
fixed multiple of rows (ROWS, FP32_ROWS, BF16_ROWS). This was measured (tests/inference/test_continuous_batching.py) for
a constant number of threads; it is not proven. On a GPU, and for models that need transformers' eager attention
(soft-capped scores, attention sinks), the last bits of a row depend on the batch, so nearly equal probabilities may be
ordered differently.

Shape legend: A active rows, L positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from align.inference.slot_attention import ATTENTION, ROWS, SlotLayer, round_up, runs_of

R = TypeVar("R")

WIDTH = 64  # keys; the order of the sum over a row's keys depends on their number
# Rows of every forward pass with fp32 weights. MKL chooses a kernel by the number of rows, and where it changes depends
# on the CPU, the widths and the threads (on a Xeon at 11, 14, 16 or 57 rows).
FP32_ROWS = 16
# Most rows of a forward pass with bf16 weights on a CPU. Up to here oneDNN gives a row the same bits for SmolLM2's
# vocabulary, and beyond it others (on a Xeon with AMX).
BF16_ROWS = 32

# Largest error as a share of the logits' standard deviation; a wrong mask exceeds it
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # keys of model configurations
POSITIONAL_LAYERS = {DynamicLayer, DynamicSlidingWindowLayer}
# The keyword for the cache, as in the signature of `generate`'s own call; transformers 5.24 renames it
_ARGUMENTS = signature(cast(Any, GenerationMixin).prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _ARGUMENTS else "past_key_values"


def enable_continuous_batching(model: PreTrainedModel) -> str:
    """Set the model up for `ContinuousBatch`; return the reason if it is not supported, else an empty string.

    The logits are compared with the model's own on two short sequences.
    """
    kind = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False):
        return f"{kind} has an attention implementation of its own"
    if other := {type(layer) for layer in DynamicCache(config=model.config).layers} - POSITIONAL_LAYERS:
        return f"{kind} has a {other.pop().__name__}, whose state is not keys and values by position"
    config = model.config.get_text_config()
    if _is_fp32_on_cpu(model) and any((getattr(config, name, None) or 0) > 1 for name in EXPERT_COUNTS):
        return f"{kind} has experts, each of which computes a number of rows that depends on the batch"
    if model.config._attn_implementation == "sdpa":  # pyright: ignore[reportPrivateUsage] - no public name
        model.set_attn_implementation(ATTENTION)
    error = _relative_error(model)
    return "" if error <= TOLERANCE[model.dtype] else f"{kind} is off by {error:.2g} of its logits' spread in a batch"


@torch.no_grad()
def prefill(model: PreTrainedModel, ids: Sequence[int]) -> tuple[DynamicCache, Tensor]:
    """Return the cache of a prompt, computed alone, and the logits [1, V] of the next token."""
    supports_keep: Any = model._supports_logits_to_keep  # pyright: ignore[reportPrivateUsage] - no public name
    keep = {"logits_to_keep": 1} if supports_keep() else {}
    cache = DynamicCache()
    output: Any = model(input_ids=torch.tensor([ids], device=model.device), use_cache=True, **{CACHE: cache}, **keep)
    return cache, output.logits[:, -1]


@torch.no_grad()
def _relative_error(model: PreTrainedModel) -> float:
    """Return the RMS difference of a batch's logits from the model's own, as a share of their standard deviation."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size
    sequences = [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in (9, 14)]
    batch: ContinuousBatch[int] = ContinuousBatch(model, len(sequences))
    for row, ids in enumerate(sequences):
        batch.add(row, prefill(model, ids[:-2])[0], len(ids) - 2)
    steps = [batch.step([sequences[row][place] for row in batch.sort()]) for place in (-2, -1)]
    found = torch.stack(steps, dim=1).float()
    output = [model(input_ids=torch.tensor([ids], device=model.device), use_cache=False) for ids in sequences]
    expected = torch.stack([each.logits[0, -2:] for each in output])[batch.rows].float()
    return float((found - expected).square().mean().sqrt() / expected.std())


def _is_fp32_on_cpu(model: PreTrainedModel) -> bool:
    return model.device.type == "cpu" and any(value.dtype == torch.float32 for value in model.parameters())


class ContinuousBatch(Generic[R]):
    """The active rows with their keys and values, and the step that decodes one token of each.

    `rows` holds the caller's objects. Call `sort` before each `step`, and pass the tokens in its order.
    """

    def __init__(self, model: PreTrainedModel, size: int) -> None:
        self._model = model
        is_fp32 = _is_fp32_on_cpu(model)
        self._multiple = FP32_ROWS if is_fp32 else ROWS
        self._size = round_up(size, self._multiple)
        bf16_rows = BF16_ROWS if model.device.type == "cpu" else self._size
        self._max_rows = FP32_ROWS if is_fp32 else min(bf16_rows, self._size)  # of a forward pass
        self._layers: list[SlotLayer] = []
        self._positions: list[int] = []  # of each row's next token
        self.rows: list[R] = []

    def add(self, row: R, prefix: DynamicCache, length: int) -> None:
        """Add a row whose first `length` tokens are in `prefix`."""
        if not self._layers:
            self._layers = [SlotLayer(self._size) for _ in prefix.layers]
        for layer, filled in zip(self._layers, cast("list[DynamicLayer]", prefix.layers), strict=True):
            if filled.is_initialized:  # a layer that shares another's keys has none
                layer.fill(len(self.rows), cast(Tensor, filled.keys), cast(Tensor, filled.values))
        self.rows.append(row)
        self._positions.append(length)

    def remove(self, row: R) -> None:
        """Remove a row; the last row takes its slot."""
        self._swap(self.rows.index(row), len(self.rows) - 1)
        self.rows.pop()
        self._positions.pop()

    def sort(self) -> list[R]:
        """Sort the rows by the number of keys they attend to, most first, and return them."""
        widths = self._widths()
        for place in range(len(widths)):
            widest = max(range(place, len(widths)), key=widths.__getitem__)
            if widths[widest] > widths[place]:
                self._swap(place, widest)
                widths[place], widths[widest] = widths[widest], widths[place]
        return self.rows

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits [A, V] after one more token of each row."""
        num_padding = -len(tokens) % self._multiple
        device = self._model.device
        tokens_A = torch.tensor([*tokens, *[0] * num_padding], device=device)
        positions_A = torch.tensor([*self._positions, *[0] * num_padding], device=device)
        widths = self._widths()
        widths += widths[-1:] * num_padding
        parts = [slice(start, start + self._max_rows) for start in range(0, len(tokens_A), self._max_rows)]
        logits = [self._forward(tokens_A[part], positions_A[part], widths[part], part.start) for part in parts]
        self._positions = [position + 1 for position in self._positions]
        return torch.cat(logits)[: len(tokens)]

    def _forward(self, tokens_A: Tensor, positions_A: Tensor, widths: Sequence[int], first: int) -> Tensor:
        """Return the logits [A, V] of the rows from slot `first` on, whose widths are in descending order."""
        for layer in self._layers:
            layer.first, layer.positions_A, layer.width = first, positions_A, widths[0]
        output: Any = self._model(
            input_ids=tokens_A[:, None],
            attention_mask=self._masks(positions_A, widths[0]),
            position_ids=positions_A[:, None],
            use_cache=True,
            runs=list(runs_of(widths)),
            **{CACHE: Cache(layers=cast("list[Any]", self._layers))},
        )
        return output.logits[:, -1]

    def _widths(self) -> list[int]:
        """Return the number of keys that each row's next token reads."""
        return [round_up(position + 1, WIDTH) for position in self._positions]

    def _swap(self, first: int, second: int) -> None:
        if first == second:
            return
        for layer in self._layers:
            layer.swap(first, second, max(self._positions[first], self._positions[second]))
        rows, positions = self.rows, self._positions
        rows[first], rows[second] = rows[second], rows[first]
        positions[first], positions[second] = positions[second], positions[first]

    def _masks(self, positions_A: Tensor, width: int) -> Any:  # noqa: ANN401 - transformers takes a mask, or one per layer type
        """Return additive masks [A, 1, 1, L]."""
        config = self._model.config.get_text_config()
        positions_L = torch.arange(width, device=positions_A.device)
        causal_AL = positions_L <= positions_A[:, None]
        window = getattr(config, "sliding_window", None)
        if window is None or not getattr(config, "use_sliding_window", True):
            return self._additive(causal_AL)
        sliding_AL = causal_AL & (positions_L > positions_A[:, None] - window)
        masks = {"full_attention": causal_AL, "sliding_attention": sliding_AL}
        kinds = sorted(set(getattr(config, "layer_types", None) or ["sliding_attention"]))
        found = {kind: self._additive(masks[kind]) for kind in kinds}
        return found if len(found) > 1 else found[kinds[0]]

    def _additive(self, visible_AL: Tensor) -> Tensor:
        mask_AL = torch.zeros(visible_AL.shape, dtype=self._model.dtype, device=visible_AL.device)
        return mask_AL.masked_fill_(~visible_AL, -torch.inf)[:, None, None]
