"""Decoding with transformers' `generate`, for models that continuous batching does not support."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)


@dataclass(slots=True, eq=False)
class PartialResponse:
    """A response that is being decoded."""

    key: str  # of its prompt
    number: int
    seed: int
    prompt_ids: list[int]
    opening: str = ""  # of its text: the mark of a thought that the prompt opens
    uniforms: list[float] = field(default_factory=list[float])  # in [0, 1), of its tokens, while it is being decoded
    ids: list[int] = field(default_factory=list[int])  # sampled so far
    finish: str = ""


# Sample the next token of each response from its row of logits [A, V], and append it
SampleNext = Callable[[list[PartialResponse], Tensor], list[int]]


def decode_group(
    model: PreTrainedModel, responses: Sequence[PartialResponse], sample_next: SampleNext, *, max_new_tokens: int
) -> None:
    """Decode responses to one prompt to their ends by `generate`, which handles the state of every architecture."""

    class SampledToken(LogitsProcessor):
        """Masks everything but the sampled token."""

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            active = [index for index, response in enumerate(responses) if not response.finish]
            tokens = sample_next([responses[index] for index in active], scores[active])
            masked = torch.full_like(scores, -torch.inf)
            masked[:, 0] = 0  # finished responses are padded with any token
            masked[active] = -torch.inf
            masked[active, tokens] = 0
            return masked

    class Finished(StoppingCriteria):
        """Stops each finished response."""

        def __call__(self, input_ids: Any, scores: Any, **kwargs: object) -> Any:  # noqa: ANN401 - annotated there as tuples
            return torch.tensor([bool(response.finish) for response in responses], device=input_ids.device)

    ids = torch.tensor(responses[0].prompt_ids, device=model.device).repeat(len(responses), 1)
    own_config = model.generation_config
    model.generation_config = GenerationConfig(pad_token_id=0)  # its settings would fill in what is unset below
    generate: Any = model.generate
    try:
        generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0),
            logits_processor=LogitsProcessorList([SampledToken()]),
            stopping_criteria=StoppingCriteriaList([Finished()]),
        )
    finally:
        model.generation_config = own_config
