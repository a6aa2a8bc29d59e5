"""Continuous batching: rows join and leave a batch while it decodes, with results that do not depend on each other.

On a CPU the logits of a row are bit-identical whatever else is in the batch, in fp32 and bf16: each prompt is computed
alone, attention reads as many keys as the row's position needs, in blocks of WIDTH, and every forward pass has a
number of rows of CPU_ROWS, up to the last for which this model's logits were found not to depend on it
(`forward_sizes`; in bf16 at most MAX_BF16_ROWS). This was measured (tests/inference/test_continuous_batching.py) for a
constant number of threads; it is not proven. On a GPU, and for models that need transformers' eager attention
(soft-capped scores, attention sinks), the last bits of a row depend on the batch, so nearly equal probabilities may be
ordered differently.

Shape legend: A active rows, L positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from itertools import takewhile
from operator import itemgetter
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from align.inference.slot_attention import ATTENTION, ROWS, SlotLayer, round_up, runs_of

R = TypeVar("R")

WIDTH = 64  # keys; the order of the sum over a row's keys depends on their number
# Rows that a forward pass on a CPU may have, if those of the model at hand leave its logits as the first does. MKL and
# oneDNN choose a kernel by the number of rows, and where it changes depends on the CPU, the widths, the data type and
# the threads (on a Xeon at 11, 14, 16 or 57 rows in fp32).
CPU_ROWS = (16, 32, 48, 64, 128, 192, 256)
# Most rows with bf16 weights: more were seen to change the last bits of a few rows on one machine, which the trial with
# random tokens did not find, and of SmolLM2's logits on a Xeon with AMX.
MAX_BF16_ROWS = CPU_ROWS[1]

MAX_PADDED_PROMPT = CPU_ROWS[3]  # longer ones fill a forward pass by themselves
PROBE_LENGTH = 16  # tokens of the prompt with which they are tried
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
def prefill(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> list[tuple[DynamicCache, Tensor]]:
    """Return the cache of each prompt, and the logits [1, V] of the next token.

    Prompts of one `padded_length` may be computed together, if this and its sum are among the model's `forward_sizes`.
    """
    length = padded_length(model, len(prompts[0]))
    ids = torch.tensor([[*each, *[0] * (length - len(each))] for each in prompts], device=model.device)
    supports_keep: Any = model._supports_logits_to_keep  # pyright: ignore[reportPrivateUsage] - no public name
    # The LM head of padded prompts has as many rows as the other products; that of a long prompt has one. An index
    # makes the last state contiguous: for a slice in bf16, PyTorch copies the weights of the LM head.
    keeps_one = supports_keep() and (length > MAX_PADDED_PROMPT or length % CPU_ROWS[0] > 0)
    keep = {"logits_to_keep": torch.tensor([length - 1], device=model.device)} if keeps_one else {}
    cache = DynamicCache()
    output: Any = model(input_ids=ids, use_cache=True, **{CACHE: cache}, **keep)
    return [
        (_part(cache, row, len(each)), output.logits[row : row + 1, -1 if keeps_one else len(each) - 1])
        for row, each in enumerate(prompts)
    ]


def padded_length(model: PreTrainedModel, length: int) -> int:
    """Return the rows of a forward pass over a prompt; on a CPU, short ones are padded to be computed together."""
    padded = round_up(length, CPU_ROWS[0])
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or padded
    is_padded = model.device.type == "cpu" and padded <= min(limit, MAX_PADDED_PROMPT)
    return padded if is_padded else length


def _part(cache: DynamicCache, row: int, length: int) -> DynamicCache:
    """Return the first positions of one row of a cache."""
    part = DynamicCache()
    for index, layer in enumerate(cast("list[DynamicLayer]", cache.layers)):
        if layer.is_initialized:  # a layer that shares another's keys has none
            keys, values = (cast(Tensor, each)[row : row + 1, :, :length] for each in (layer.keys, layer.values))
            part.update(keys, values, index)
        else:
            part.layers.append(DynamicLayer())
    return part


@torch.no_grad()
def _relative_error(model: PreTrainedModel) -> float:
    """Return the RMS difference of a batch's logits from the model's own, as a share of their standard deviation."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size
    sequences = [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in (9, 14)]
    batch: ContinuousBatch[int] = ContinuousBatch(model, len(sequences))
    for row, ids in enumerate(sequences):
        batch.add([row], prefill(model, [ids[:-2]])[0][0], len(ids) - 2)
    steps = [batch.step([sequences[row][place] for row in batch.sort()]) for place in (-2, -1)]
    found = torch.stack(steps, dim=1).float()
    output = [model(input_ids=torch.tensor([ids], device=model.device), use_cache=False) for ids in sequences]
    expected = torch.stack([each.logits[0, -2:] for each in output])[batch.rows].float()
    return float((found - expected).square().mean().sqrt() / expected.std())


@torch.no_grad()
def forward_sizes(model: PreTrainedModel, size: int) -> Sequence[int]:
    """Return how many rows of a batch of `size` a forward pass may have without changing the last bits of their logits.

    On a CPU each of CPU_ROWS below `size` and the batch itself are tried with random tokens, up to the first that
    changes them. The answer is empty for a GPU, where every number may change them.
    """
    if model.device.type != "cpu":
        return []
    most = CPU_ROWS[-1] if model.dtype == torch.float32 else MAX_BF16_ROWS
    whole = round_up(min(size, most), CPU_ROWS[0])
    sizes = [*(rows for rows in CPU_ROWS if rows < whole), whole]
    if len(sizes) == 1:
        return sizes
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size
    tokens = torch.randint(vocab_size, (sizes[-1],), generator=generator).tolist()
    ((prefix, _),) = prefill(model, [tokens[:PROBE_LENGTH]])
    batch: ContinuousBatch[int] = ContinuousBatch(model, sizes[-1])
    batch.add(range(sizes[-1]), prefix, PROBE_LENGTH)
    expected = batch.logits(tokens, sizes[:1])
    is_same = (torch.equal(batch.logits(tokens[:rows], [rows]), expected[:rows]) for rows in sizes)
    return [rows for rows, _ in takewhile(itemgetter(1), zip(sizes, is_same, strict=True))]


def _is_fp32_on_cpu(model: PreTrainedModel) -> bool:
    return model.device.type == "cpu" and any(value.dtype == torch.float32 for value in model.parameters())


class ContinuousBatch(Generic[R]):
    """The active rows with their keys and values, and the step that decodes one token of each.

    `rows` holds the caller's objects. Call `sort` before each `step`, and pass the tokens in its order. `sizes` are
    the `forward_sizes` of the model, by default the smallest on a CPU.
    """

    def __init__(self, model: PreTrainedModel, size: int, sizes: Sequence[int] = ()) -> None:
        self._device, self._dtype = model.device, model.dtype  # each of these properties searches the parameters
        is_on_cpu = self._device.type == "cpu"
        self._model = model
        self._multiple = CPU_ROWS[0] if is_on_cpu else ROWS
        self._size = round_up(size, self._multiple)
        self._sizes = sizes or (CPU_ROWS[:1] if is_on_cpu else ())
        config = model.config.get_text_config()
        has_window = getattr(config, "use_sliding_window", True)
        self._window: int | None = getattr(config, "sliding_window", None) if has_window else None
        self._kinds = sorted(set(getattr(config, "layer_types", None) or ["sliding_attention"]))  # of layers
        self._layers: list[SlotLayer] = []
        self._positions = np.empty(0, dtype=np.int64)  # of each row's next token
        self.rows: list[R] = []

    def add(self, rows: Sequence[R], prefix: DynamicCache, length: int) -> None:
        """Add rows whose first `length` tokens are in `prefix`."""
        if not self._layers:
            self._layers = [SlotLayer(self._size) for _ in prefix.layers]
        for layer, filled in zip(self._layers, cast("list[DynamicLayer]", prefix.layers), strict=True):
            if filled.is_initialized:  # a layer that shares another's keys has none
                keys, values = cast(Tensor, filled.keys), cast(Tensor, filled.values)
                layer.fill(slice(len(self.rows), len(self.rows) + len(rows)), keys, values)
        self.rows += rows
        self._positions = np.append(self._positions, np.full(len(rows), length))

    def remove(self, rows: Sequence[R]) -> None:
        """Remove rows; others take their slots."""
        self._arrange([slot for slot, row in enumerate(self.rows) if row not in rows])

    def sort(self) -> list[R]:
        """Sort the rows by the number of keys they attend to, most first, and return them."""
        if (np.diff(self._widths()) > 0).any():
            self._arrange(range(len(self.rows)))
        return self.rows

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits [A, V] after one more token of each row."""
        logits_AV = self.logits(tokens, self._sizes)
        self._positions += 1
        return logits_AV

    @torch.no_grad()
    def logits(self, tokens: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Return the logits [A, V] after one more token of each of the first rows, which stay where they are."""
        padding = [0] * (-len(tokens) % self._multiple)
        tokens_A = torch.tensor([*tokens, *padding], device=self._device)
        positions_A = torch.tensor([*self._positions[: len(tokens)].tolist(), *padding], device=self._device)
        widths: list[int] = self._widths()[: len(tokens)].tolist()
        widths += widths[-1:] * len(padding)
        logits: list[Tensor] = []
        start = 0
        while start < len(tokens_A):
            left = len(tokens_A) - start
            part = slice(start, start + max((rows for rows in sizes if rows <= left), default=left))
            logits.append(self._forward(tokens_A[part], positions_A[part], widths[part], start))
            start = part.stop
        return torch.cat(logits)[: len(tokens)]

    def _forward(self, tokens_A: Tensor, positions_A: Tensor, widths: Sequence[int], first: int) -> Tensor:
        """Return the logits [A, V] of the rows from slot `first` on, whose widths are in descending order."""
        for layer in self._layers:
            layer.first = first
            layer.positions_A = positions_A
            layer.width = widths[0]
        output: Any = self._model(
            input_ids=tokens_A[:, None],
            attention_mask=self._masks(positions_A, widths[0]),
            position_ids=positions_A[:, None],
            use_cache=True,
            runs=list(runs_of(widths)),
            **{CACHE: Cache(layers=cast("list[Any]", self._layers))},
        )
        return output.logits[:, -1]

    def _widths(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Return the number of keys that each row's next token reads."""
        return (self._positions // WIDTH + 1) * WIDTH

    def _arrange(self, kept: Sequence[int]) -> None:
        """Keep the rows of some slots and sort them by the number of keys, most first; move as few as possible."""
        widths: list[int] = self._widths().tolist()
        wanted = sorted((widths[slot] for slot in kept), reverse=True)
        staying = {slot for slot in kept if slot < len(wanted) and widths[slot] == wanted[slot]}
        moving = sorted((slot for slot in kept if slot not in staying), key=lambda slot: -widths[slot])
        others = iter(moving)
        sources = [slot if slot in staying else next(others) for slot in range(len(wanted))]
        targets = [slot for slot in range(len(wanted)) if slot not in staying]
        if moving:
            length = int(self._positions[moving].max())
            for layer in self._layers:
                layer.move(torch.tensor(moving), torch.tensor(targets), length)
        self.rows = [self.rows[slot] for slot in sources]
        self._positions = self._positions[sources]

    def _masks(self, positions_A: Tensor, width: int) -> Any:  # noqa: ANN401 - transformers takes a mask, or one per layer type
        """Return additive masks [A, 1, 1, L]."""
        positions_L = torch.arange(width, device=positions_A.device)
        causal_AL = positions_L <= positions_A[:, None]
        if self._window is None:
            return self._additive(causal_AL)
        sliding_AL = causal_AL & (positions_L > positions_A[:, None] - self._window)
        masks = {"full_attention": causal_AL, "sliding_attention": sliding_AL}
        found = {kind: self._additive(masks[kind]) for kind in self._kinds}
        return found if len(found) > 1 else found[self._kinds[0]]

    def _additive(self, visible_AL: Tensor) -> Tensor:
        mask_AL = torch.zeros(visible_AL.shape, dtype=self._dtype, device=visible_AL.device)
        return mask_AL.masked_fill_(~visible_AL, -torch.inf)[:, None, None]
