"""Texts embedded by the hidden states of a policy; prefixes that texts share are computed once.

Shape legend: N texts, D width, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.accounting.flops import Work, sum_work
from align.curate.embeddings.poolings import TEXT, Pooling
from align.data.token_groups import TokenSequence, common_prefix
from align.errors import InputError
from align.models.policy import Policy
from align.models.probe import choose_forward
from align.models.tree.batch import plain_batch, tree_batch

TOKEN_BUDGET = 4096  # tokens of a micro-batch


class Tokens(NamedTuple):
    """The tokens of a text in its template, and the positions of those that are pooled."""

    sequence: TokenSequence
    pooled: NDArray[np.int64]


class PolicyStates:
    """Embeds texts by pooled hidden states of a policy.

    The forward is the tree where the architecture supports it. Neither padding nor the other texts change a vector
    beyond rounding. A pooling `whole` counts all tokens; others leave special tokens out, which say nothing of a text.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        pooling: Pooling,
        *,
        max_tokens: int = 512,
        token_budget: int = TOKEN_BUDGET,
    ) -> None:
        self.policy, self.tokenizer, self.pooling = policy, tokenizer, pooling
        self.max_tokens, self.token_budget = max_tokens, token_budget
        self.work = Work(0, 0, 0)  # of all texts so far, without the LM head
        self._probed_length = 0  # tokens of the longest text on which the forward was compared with transformers' own

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return fp32 [N, D] on the CPU. Raise `InputError` for a text without a token."""
        tokens = [self._tokens(text) for text in texts]
        sequences = [each.sequence for each in tokens]
        self._probe(sequences)
        make = tree_batch if self.policy.is_tree else plain_batch
        found: dict[int, Tensor] = {}
        for micro in micro_batches(sequences, token_budget=self.token_budget, is_tree=self.policy.is_tree):
            batch = make([sequences[index] for index in micro]).to(self.policy.device)
            self.work = sum_work([self.work, batch.work()])
            states = self.policy.layer_states(batch, self.pooling.layers).flatten(0, 1)
            for index, path in zip(micro, batch.paths, strict=True):
                rows = torch.from_numpy(path[tokens[index].pooled]).to(states.device)
                found[index] = self.pooling.reduce(states[rows].float()).cpu()
        return torch.stack([found[index] for index in range(len(texts))])

    def _probe(self, sequences: Sequence[TokenSequence]) -> None:
        """Choose the forward, again for longer texts: the tree does not support those over a sliding window."""
        longest = max(sequences, key=lambda sequence: len(sequence.ids), default=None)
        if longest is not None and len(longest.ids) > self._probed_length:
            choose_forward(self.policy, [[longest], [sequences[0]]], "auto")
            self._probed_length = len(longest.ids)

    def _tokens(self, text: str) -> Tokens:
        """Return the tokens of a text, which is cut to `max_tokens`, in the template."""
        own = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if not own["input_ids"]:
            raise InputError(f"the text {text[:40]!r} has no token, so it cannot be embedded")
        if len(own["input_ids"]) > self.max_tokens:
            text = text[: own["offset_mapping"][self.max_tokens - 1][1]]
        before, _, after = self.pooling.template.rpartition(TEXT)
        start = len(before.replace(TEXT, text))
        encoded = self.tokenizer(
            before.replace(TEXT, text) + text + after, return_offsets_mapping=True, return_special_tokens_mask=True
        )
        spans = np.array(encoded["offset_mapping"])
        inside = (spans[:, 1] > start) & (spans[:, 0] < start + len(text)) & (spans[:, 1] > spans[:, 0])
        inside &= np.array(encoded["special_tokens_mask"]) == 0
        ids = np.array(encoded["input_ids"], np.int32)
        pooled = np.arange(len(ids)) if self.pooling.whole else np.flatnonzero(inside)
        return Tokens(TokenSequence(ids, np.zeros(len(ids), np.bool_)), pooled)


def micro_batches(sequences: Sequence[TokenSequence], *, token_budget: int, is_tree: bool) -> Iterator[list[int]]:
    """Yield the indices of the sequences of each forward pass: neighbours by prefix for a tree, else by length.

    A pass computes at most `token_budget` tokens, or one sequence.
    """
    keys = [each.ids.astype(">u4").tobytes() if is_tree else len(each.ids) for each in sequences]
    previous = np.empty(0, np.int32)
    batch = list[int]()
    used = 0
    for index in sorted(range(len(sequences)), key=keys.__getitem__):  # pyright: ignore[reportArgumentType]
        ids = sequences[index].ids
        size = used + len(ids) - common_prefix(previous, ids) if is_tree else len(ids) * (len(batch) + 1)
        if batch and size > token_budget:
            yield batch
            batch = []
            size = len(ids)
        batch.append(index)
        previous, used = ids, size
    if batch:
        yield batch
