"""A batch whose rows come and go: each row's keys and values begin at position 0 of a slot of its own.

What is computed for a row does not depend on its companions, to the last bit, in fp32 and in bf16: a prompt is computed
by itself, attention sees as many keys as the row's own position asks for, in blocks of WIDTH, and the rows of every
product are a multiple of ROWS and at most HALF_ROWS, with fp32 weights always FP32_ROWS. That this is enough is
measured (tests/synth/test_slots.py), not proven, and on CPUs with one number of threads. It does not hold on a GPU, nor
for models that need transformers' eager attention (soft-capped scores, sinks): there the last bits of a row depend on
the batch, and a near-tie may fall the other way.

Shape legend: S slots, A rows decoded, H query heads, G key heads, L positions, D head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import groupby
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

R = TypeVar("R")

NAME = "align_slots"
WIDTH = 64  # keys; the sum over a row's keys is taken in an order that depends on how many there are
GROWTH = 512  # positions that the storage grows by; each time all of it is copied
ROWS = 4  # MKL takes the last 1 to 3 of a product's fp32 rows with another kernel, and odd buffers with another yet
# Rows of every forward with fp32 weights: MKL picks a kernel by their number, and where it takes another depends on the
# CPU, the widths and the threads (on a Xeon at 11, 14, 16 or 57 rows).
FP32_ROWS = 16
# And the most of a forward with bf16 weights: up to here oneDNN gives a row the same bits before SmolLM2's vocabulary,
# and beyond it others (on a Xeon with AMX).
HALF_ROWS = 32

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of the logits' spread; a wrong mask is off by more
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # what configurations call how many there are
_BY_POSITION = {DynamicLayer, DynamicSlidingWindowLayer}
# The argument that takes keys and values, by the name that `generate` gives it: transformers 5.24 has another
_ARGUMENTS = signature(cast(Any, GenerationMixin).prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _ARGUMENTS else "past_key_values"


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring rows that see equally many keys."""

    rows: slice
    width: int


def prepare(model: PreTrainedModel) -> str:
    """Why the model cannot be decoded in slots; empty where it can, and it is then set to do so."""
    kind = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False):
        return f"{kind} computes attention by itself"
    if odd := {type(layer) for layer in DynamicCache(config=model.config).layers} - _BY_POSITION:
        return f"{kind} has a {odd.pop().__name__}, which is not keys and values by position"
    config = model.config.get_text_config()
    if _is_fp32_on_a_cpu(model) and any((getattr(config, name, None) or 0) > 1 for name in EXPERTS):
        return f"{kind} has experts, each of which computes as many rows at once as have chosen it"
    if model.config._attn_implementation == "sdpa":  # pyright: ignore[reportPrivateUsage] - there is no public name
        model.set_attn_implementation(NAME)
    gap = _measure(model)
    return "" if gap <= TOLERANCE[model.dtype] else f"{kind} is off by {gap:.2g} of its logits' spread in slots"


@torch.no_grad()
def prefill(model: PreTrainedModel, ids: Sequence[int]) -> tuple[DynamicCache, Tensor]:
    """Keys and values of a prompt, by itself, and the logits [1, V] after it."""
    takes: Any = model._supports_logits_to_keep  # pyright: ignore[reportPrivateUsage] - there is no public name
    keep = {"logits_to_keep": 1} if takes() else {}
    cache = DynamicCache()
    output: Any = model(input_ids=torch.tensor([ids], device=model.device), use_cache=True, **{CACHE: cache}, **keep)
    return cache, output.logits[:, -1]


@torch.no_grad()
def _measure(model: PreTrainedModel) -> float:
    """How far the slots' logits are from the model's own, as a share of their spread."""
    generator = torch.Generator().manual_seed(0)
    most = model.config.get_text_config().vocab_size
    sequences = [torch.randint(most, (length,), generator=generator).tolist() for length in (9, 14)]
    work: Slots[int] = Slots(model, len(sequences))
    for row, ids in enumerate(sequences):
        work.add(row, prefill(model, ids[:-2])[0], len(ids) - 2)
    steps = [work.step([sequences[row][place] for row in work.arrange()]) for place in (-2, -1)]
    found = torch.stack(steps, dim=1).float()
    output = [model(input_ids=torch.tensor([ids], device=model.device), use_cache=False) for ids in sequences]
    expected = torch.stack([each.logits[0, -2:] for each in output])[work.rows].float()
    return float((found - expected).square().mean().sqrt() / expected.std())


def _is_fp32_on_a_cpu(model: PreTrainedModel) -> bool:
    return model.device.type == "cpu" and any(value.dtype == torch.float32 for value in model.parameters())


class Slots(Generic[R]):
    """The rows in work, with the keys and values of each, and the step that adds one token to all of them."""

    def __init__(self, model: PreTrainedModel, size: int) -> None:
        self._model = model
        has_fp32 = _is_fp32_on_a_cpu(model)
        self._multiple = FP32_ROWS if has_fp32 else ROWS
        self._size = _up(size, self._multiple)
        halves = HALF_ROWS if model.device.type == "cpu" else self._size
        self._most = FP32_ROWS if has_fp32 else min(halves, self._size)  # rows of a forward
        self._layers: list[_SlotLayer] = []
        self._positions: list[int] = []  # of each row: where its next token goes
        self.rows: list[R] = []

    def add(self, row: R, prefix: DynamicCache, length: int) -> None:
        """Take up a row whose first `length` tokens are computed."""
        if not self._layers:
            self._layers = [_SlotLayer(self._size) for _ in prefix.layers]
        for layer, filled in zip(self._layers, cast("list[DynamicLayer]", prefix.layers), strict=True):
            if filled.is_initialized:  # a layer that uses another's keys has none of its own
                layer.fill(len(self.rows), cast(Tensor, filled.keys), cast(Tensor, filled.values))
        self.rows.append(row)
        self._positions.append(length)

    def remove(self, row: R) -> None:
        """Let a row go."""
        self._swap(self.rows.index(row), len(self.rows) - 1)
        self.rows.pop()
        self._positions.pop()

    def arrange(self) -> list[R]:
        """The rows in the order that the next step takes their tokens in: those that see the most keys first."""
        widths = self._widths()
        for place in range(len(widths)):
            widest = max(range(place, len(widths)), key=widths.__getitem__)
            if widths[widest] > widths[place]:
                self._swap(place, widest)
                widths[place], widths[widest] = widths[widest], widths[place]
        return self.rows

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Logits [A, V] after one more token of each row."""
        spare = -len(tokens) % self._multiple  # rows that are computed for their number only
        device = self._model.device
        tokens_A = torch.tensor([*tokens, *[0] * spare], device=device)
        positions_A = torch.tensor([*self._positions, *[0] * spare], device=device)
        widths = self._widths()
        widths += widths[-1:] * spare
        parts = [slice(start, start + self._most) for start in range(0, len(tokens_A), self._most)]
        logits = [self._forward(tokens_A[part], positions_A[part], widths[part], part.start) for part in parts]
        self._positions = [position + 1 for position in self._positions]
        return torch.cat(logits)[: len(tokens)]

    def _forward(self, tokens_A: Tensor, positions_A: Tensor, widths: Sequence[int], first: int) -> Tensor:
        """Logits [A, V] of the rows from slot `first` on, those that see the most keys first."""
        for layer in self._layers:
            layer.first, layer.positions_A, layer.width = first, positions_A, widths[0]
        output: Any = self._model(
            input_ids=tokens_A[:, None],
            attention_mask=self._masks(positions_A, widths[0]),
            position_ids=positions_A[:, None],
            use_cache=True,
            runs=list(_runs(widths)),
            **{CACHE: Cache(layers=cast("list[Any]", self._layers))},
        )
        return output.logits[:, -1]

    def _widths(self) -> list[int]:
        return [_up(position + 1, WIDTH) for position in self._positions]

    def _swap(self, first: int, second: int) -> None:
        if first == second:
            return
        for layer in self._layers:
            layer.swap(first, second, max(self._positions[first], self._positions[second]))
        self.rows[first], self.rows[second] = self.rows[second], self.rows[first]
        places = self._positions
        places[first], places[second] = places[second], places[first]

    def _masks(self, positions_A: Tensor, width: int) -> Any:  # noqa: ANN401 - transformers takes one or one a kind
        """What each row sees, as numbers added to the scores: [A, 1, 1, L]."""
        config = self._model.config.get_text_config()
        places_L = torch.arange(width, device=positions_A.device)
        seen_AL = places_L <= positions_A[:, None]
        window = getattr(config, "sliding_window", None)
        if window is None or not getattr(config, "use_sliding_window", True):
            return self._additive(seen_AL)
        near_AL = seen_AL & (places_L > positions_A[:, None] - window)
        masks = {"full_attention": seen_AL, "sliding_attention": near_AL}
        kinds = sorted(set(getattr(config, "layer_types", None) or ["sliding_attention"]))
        found = {kind: self._additive(masks[kind]) for kind in kinds}
        return found if len(found) > 1 else found[kinds[0]]

    def _additive(self, seen_AL: Tensor) -> Tensor:
        mask_AL = torch.zeros(seen_AL.shape, dtype=self._model.dtype, device=seen_AL.device)
        return mask_AL.masked_fill_(~seen_AL, -torch.inf)[:, None, None]


class _SlotLayer(DynamicLayer):
    """One layer's keys and values [S, G, L, D], of which `update` writes a token a row and shows a forward's rows."""

    first: int
    positions_A: Tensor
    width: int

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def fill(self, slot: int, keys: Tensor, values: Tensor) -> None:
        """Put the keys and values [1, G, T, D] of a sequence into a slot."""
        length = keys.shape[-2]
        self._reserve(length, keys, values)
        self._keys[slot, :, :length], self._values[slot, :, :length] = keys[0], values[0]

    def swap(self, first: int, second: int, length: int) -> None:
        """Let the first `length` places of two slots change places."""
        if not self.is_initialized:
            return
        for stored in (self._keys, self._values):
            kept = stored[first, :, :length].clone()
            stored[first, :, :length] = stored[second, :, :length]
            stored[second, :, :length] = kept

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        """Keys and values of the rows, the new ones [A, G, 1, D] at their rows' positions."""
        self._reserve(self.width, key_states, value_states)
        used = slice(self.first, self.first + len(self.positions_A))
        rows_A = torch.arange(used.start, used.stop, device=self.positions_A.device)
        for stored, new in ((self._keys, key_states), (self._values, value_states)):
            stored[rows_A, :, self.positions_A] = new[:, :, 0]
        return self._keys[used, :, : self.width], self._values[used, :, : self.width]

    def get_seq_length(self) -> int:
        """No common length: positions and masks are given to the model ready-made."""
        return 0

    def _reserve(self, length: int, keys: Tensor, values: Tensor) -> None:
        if not self.is_initialized:
            self._keys, self._values = (
                each.new_zeros(self._size, each.shape[1], _up(length, GROWTH), each.shape[3]) for each in (keys, values)
            )
            self.is_initialized = True
        if (missing := _up(length, GROWTH) - self._keys.shape[2]) > 0:
            self._keys, self._values = (functional.pad(each, (0, 0, 0, missing)) for each in (self._keys, self._values))


def slot_attention(  # noqa: PLR0913 - the signature is transformers' AttentionInterface
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    runs: Sequence[Run] = (),
    **kwargs: Any,  # noqa: ANN401
) -> tuple[Tensor, None]:
    """PyTorch's attention [A, T, H, D]; each run of slots by itself, with the query heads of a key head as its rows.

    So no key is read that no row of the run has, and none twice.
    """
    if not runs or attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    (num_rows, num_heads, _, width), num_keys = query.shape, key.shape[1]
    grouped = query.reshape(num_rows, num_keys, num_heads // num_keys, width)
    padded = functional.pad(grouped, (0, 0, 0, -grouped.shape[2] % ROWS))
    found = [
        functional.scaled_dot_product_attention(
            padded[run.rows],
            key[run.rows, :, : run.width],
            value[run.rows, :, : run.width],
            attn_mask=attention_mask[run.rows, :, :, : run.width],
            scale=kwargs.get("scaling"),
        )
        for run in runs
    ]
    return torch.cat(found)[:, :, : grouped.shape[2]].reshape(num_rows, 1, num_heads, -1), None


def _runs(widths: Sequence[int]) -> Iterator[Run]:
    """Neighbours of one width."""
    start = 0
    for width, members in groupby(widths):
        stop = start + len(list(members))
        yield Run(slice(start, stop), width)
        start = stop


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


AttentionInterface.register(NAME, cast(Any, slot_attention))
AttentionMaskInterface.register(NAME, sdpa_mask)
