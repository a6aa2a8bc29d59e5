"""What a policy and a reward model have in common: a decoder that runs over a tree or its plain twin."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.data.token_groups import TokenSequence
from align.models import tree_attention
from align.models.tree import TokenBatch


class Backbone(nn.Module, ABC):
    """A model of transformers that answers for a whole batch of sequences; what accelerate wraps."""

    unit: ClassVar[str]  # of what `forward` answers, as an error says it

    def __init__(self, hf: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        self.hf = hf
        if getattr(self.base.config.get_text_config(), "attn_logit_softcapping", None) and self._attention == "sdpa":
            self.base.set_attn_implementation("eager")  # transformers 5.20 drops the cap under sdpa, 5.23 refuses it
        self._plain_attention: str = self._attention

    def forward(self, batch: TokenBatch | TokenSequence) -> Tensor:
        """What the model says of a batch, or of one sequence by the forward of transformers itself.

        Both come through this one door: at it sharded weights are gathered.
        """
        return self.stock(batch) if isinstance(batch, TokenSequence) else self.answer(batch)

    @abstractmethod
    def answer(self, batch: TokenBatch) -> Tensor:
        """What the model says of the batch."""

    @abstractmethod
    def stock(self, sequence: TokenSequence) -> Tensor:
        """What it says of one sequence, by the forward of transformers itself."""

    @property
    @abstractmethod
    def head(self) -> nn.Module:
        """What makes answers of hidden states."""

    @property
    def base(self) -> PreTrainedModel:
        """The model itself, under the adapters where there are any."""
        return cast(PreTrainedModel, self.hf.get_base_model() if isinstance(self.hf, PeftModel) else self.hf)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def is_tree(self) -> bool:
        """Whether attention runs over root paths (`use_forward` says)."""
        return self._attention == tree_attention.NAME

    @property
    def _attention(self) -> str:
        return cast(str, self.base.config._attn_implementation)  # pyright: ignore[reportPrivateUsage] - no public name

    def use_forward(self, name: Literal["tree", "plain"]) -> None:
        """Switch between the tree and its plain twin."""
        if self.is_tree != (name == "tree"):
            self.base.set_attn_implementation(tree_attention.NAME if name == "tree" else self._plain_attention)

    def hidden(self, batch: TokenBatch) -> Tensor:
        """Last hidden states [R, L, D], of every token computed."""
        # The model's own attention would swallow the layout and attend to everything before.
        assert self.is_tree == (batch.layout is not None), "a tree batch goes with use_forward('tree')"
        where = {"attention_mask": batch.attention_mask} if batch.layout is None else {"tree": batch.layout}
        decoder = cast(nn.Module, self.base.get_decoder())
        if decoder is self.base:  # Llama 4 names a part that its text model does not have
            decoder = cast(nn.Module, self.base.model)
        output = decoder(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **where)
        return output.last_hidden_state


@contextmanager
def whole(values: Sequence[Tensor]) -> Generator[None]:
    """A block in which parameters that ZeRO-3 has cut are there in full; every process enters it."""
    cut = [value for value in values if hasattr(value, "ds_id")]
    if not cut:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters  # noqa: PLC0415 - optional, and seconds to import

    with GatheredParameters(cut):
        yield


def full(value: Tensor) -> Tensor:
    """All rows of a parameter that FSDP2 has cut, or the value itself; every process asks."""
    return cast(Any, value).full_tensor() if hasattr(value, "full_tensor") else value


def fingerprint(model: Backbone) -> str:
    """Sixteen hex digits that depend on every weight, adapters included, by value, however they lie over processes."""
    digest = hashlib.sha256()
    for name, value in sorted(model.hf.state_dict(keep_vars=True).items()):
        with whole([value]):
            known = full(value.detach()).cpu()
            digest.update(f"{name} {known.dtype} {tuple(known.shape)}".encode())
            digest.update(memoryview(cast(Any, known.flatten().view(torch.uint8).numpy())))
    for name, module in model.hf.named_modules():
        if isinstance(module, LoraLayer):  # the factors of its adapters are no weights
            digest.update(f"{name} {sorted(module.scaling.items())}".encode())
    return digest.hexdigest()[:16]
