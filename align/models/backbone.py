"""What a policy and a reward model share: a decoder that runs over a tree batch or a padded batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar, Literal, cast

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.data.token_groups import TokenSequence
from align.errors import InputError
from align.models.adapters.dropout import TokenDropout, install_dropout
from align.models.tree import attention, recurrence
from align.models.tree.batch import EarlyExit, TokenBatch
from align.models.tree.layout import TreeLayout
from align.models.tree.parts import cut_batch, run_parts
from align.models.tree.sequence_group import SequenceGroup


class Backbone(nn.Module, ABC):
    """A transformers model with a forward pass over a whole batch of sequences. Accelerate wraps this module."""

    output_unit: ClassVar[str]  # unit of what `forward` returns, for error messages
    outputs_are_of: ClassVar[Literal["targets", "sequences"]]  # in the last dimension, or in the first one
    has_fp32_head: ClassVar[bool] = False  # whether the head stays in fp32 where the other weights are in bf16

    def __init__(self, hf: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        self.hf = hf
        self.dropout = install_dropout(hf)  # of adapters; active only where a training step says so
        if getattr(self.base.config.get_text_config(), "attn_logit_softcapping", None) and self._attention == "sdpa":
            # Under sdpa transformers 5.20 ignores soft-capping and 5.23 raises
            self.base.set_attn_implementation("eager")
        self._plain_attention: str = self._attention
        # Before any sharding, which changes the layers' classes
        self.is_recurrent = recurrence.is_recurrent(self.base)
        self.recurrence_error = recurrence.follow_tree(self.base) if self.is_recurrent else None
        self.max_rows: int | None = None  # rows of a forward pass over a tree; a larger one runs in parts
        self.sequence_group: SequenceGroup | None = None  # of processes that split the rows of each tree
        self.records_routing = False  # whether a forward pass keeps the logits of the routers, which it then returns
        self._router_logits: tuple[Tensor, ...] | None = None
        self.auxiliary_loss: Tensor | None = None  # transformers' own, of the last forward pass over one sequence

    def forward(self, batch: TokenBatch | TokenSequence, **options: bool) -> Tensor:
        """Return the outputs for a batch, or those of transformers' own forward for one sequence.

        Both run inside the module's forward, because that is where sharded weights are gathered. `options` are those of
        `forward_batch`.
        """
        if isinstance(batch, TokenSequence):
            return self.forward_sequence(batch)
        parts = cut_batch(batch, self.max_rows) if self.max_rows is not None and not self.records_routing else []
        if not parts:
            return self.forward_batch(batch, **options)
        outputs = run_parts(parts, partial(self.forward_batch, **options))
        place = torch.cat([part.targets if self.outputs_are_of == "targets" else part.sequences for part in parts])
        dim = -1 if self.outputs_are_of == "targets" else 0
        return torch.cat(outputs, dim=dim).index_select(dim, place.argsort())

    @abstractmethod
    def forward_batch(self, batch: TokenBatch) -> Tensor:
        """Return the outputs for a batch."""

    @abstractmethod
    def forward_sequence(self, sequence: TokenSequence) -> Tensor:
        """Return the outputs for one sequence, computed by transformers' own forward."""

    @property
    @abstractmethod
    def head(self) -> nn.Module:
        """Return the module that maps hidden states to outputs."""

    @property
    def linear_head(self) -> nn.Module:
        """Return the layer of the head itself; peft wraps a trained copy of the head."""
        head = self.head
        return head.modules_to_save[head.active_adapters[0]] if isinstance(head, ModulesToSaveWrapper) else head

    @property
    def base(self) -> PreTrainedModel:
        """Return the transformers model, without the adapters around it."""
        return cast(PreTrainedModel, self.hf.get_base_model() if isinstance(self.hf, PeftModel) else self.hf)

    @property
    def dropout_rates(self) -> list[float]:
        """Return the distinct rates of the adapters' dropout."""
        return sorted({module.rate for module in self.modules() if isinstance(module, TokenDropout)})

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return next(self.parameters()).device

    @property
    def is_tree(self) -> bool:
        """Return whether the forward takes tree batches; `use_forward` sets it."""
        return self._attention == attention.NAME

    @property
    def _attention(self) -> str:
        return cast(str, self.base.config._attn_implementation)  # pyright: ignore[reportPrivateUsage] - no public name

    def use_forward(self, name: Literal["tree", "plain"]) -> None:
        """Switch between the tree forward and the padded forward."""
        if self.is_tree != (name == "tree"):
            self.base.set_attn_implementation(attention.NAME if name == "tree" else self._plain_attention)

    @contextmanager
    def whole_trees(self) -> Generator[None]:
        """Run every tree in one forward pass within the block, which calls the head once for each batch."""
        max_rows = self.max_rows
        self.max_rows = None
        try:
            yield
        finally:
            self.max_rows = max_rows

    def hidden_states(self, batch: TokenBatch) -> Tensor:
        """Return the last hidden states of all rows of the batch, shape [R, L, D]."""
        output = self._decode(batch)
        self._router_logits = output.router_logits if self.records_routing else None
        return output.last_hidden_state

    def layer_states(self, batch: TokenBatch, layers: Sequence[int]) -> Tensor:
        """Return the mean of the hidden states after some layers, shape [R, L, D].

        0 stands for the token embeddings, -1 for the last layer with the final norm.
        """
        states = self._decode(batch, output_hidden_states=True).hidden_states
        return torch.stack([states[layer] for layer in layers]).mean(dim=0)

    def _decode(self, batch: TokenBatch, **options: bool) -> Any:  # noqa: ANN401 - each architecture has its own type
        """Return the decoder's output for all rows of the batch."""
        # The model's own attention would ignore the layout, and every token would attend to all earlier ones
        assert self.is_tree == (batch.layout is not None), "a tree batch needs use_forward('tree')"
        structure = {"attention_mask": batch.attention_mask} if batch.layout is None else self._tree(batch.layout)
        if self.dropout is not None:
            self.dropout.key_T = batch.key_T
        ids, positions = batch.input_ids, batch.position_ids
        with nullcontext() if batch.exit is None else self._first_layers(batch.exit.layers):
            return self._decoder(input_ids=ids, position_ids=positions, use_cache=False, **structure, **options)

    @property
    def _decoder(self) -> nn.Module:
        """The transformers model without its head."""
        decoder = cast(nn.Module, self.base.get_decoder())
        return cast(nn.Module, self.base.model) if decoder is self.base else decoder  # Llama 4 returns the model itself

    def early_exit(self, layers: int) -> EarlyExit:
        """Return the exit after the first layers; raise `InputError` if the decoder has no list of layers to cut."""
        _, all_layers = self.decoder_layers()
        return EarlyExit(layers, len(all_layers))

    def decoder_layers(self) -> tuple[str, nn.ModuleList]:
        """Return the decoder's layers, and their name in `base`; raise `InputError` for another structure."""
        number = self.base.config.get_text_config().num_hidden_layers
        (prefix,) = (name for name, module in self.base.named_modules() if module is self._decoder)
        lists = [
            (f"{prefix}.{name}", module)
            for name, module in self._decoder.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == number
        ]
        depth = min((name.count(".") for name, _ in lists), default=0)
        outer = [(name, module) for name, module in lists if name.count(".") == depth]
        if len(outer) != 1:
            raise InputError(f"{type(self._decoder).__name__} does not have one list of {number} layers")
        return outer[0]

    @contextmanager
    def _first_layers(self, number: int) -> Generator[None]:
        """Leave only the first layers in the decoder within the block."""
        name, layers = self.decoder_layers()
        self.base.set_submodule(name, nn.ModuleList(list(layers)[:number]))
        try:
            yield
        finally:
            self.base.set_submodule(name, layers)

    def _tree(self, layout: TreeLayout) -> dict[str, Any]:
        """Return the keywords that pass the tree on to attention, and to recurrent layers if there are any."""
        return {"tree": layout, **(recurrence.trie_keywords(layout) if self.is_recurrent else {})}

    def take_router_logits(self) -> tuple[Tensor, ...]:
        """Return the logits of each layer's router in the last forward pass over a batch, [R * L, E], and drop them."""
        logits = self._router_logits
        self._router_logits = None
        assert logits, "the forward pass has recorded no router"
        return logits
