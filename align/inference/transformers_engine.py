"""Engine that runs a Hugging Face model in this process: each prompt is computed once, responses decode together."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, Self, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from align.data.chat_encoder import ChatEncoder
from align.data.chat_rendering import is_written_mark
from align.data.chat_templates import apply_template
from align.data.chat_turns import OPEN_THOUGHT
from align.data.overlong import character_limit, num_characters
from align.errors import InputError
from align.inference.continuous_batching import (
    ContinuousBatch,
    enable_continuous_batching,
    forward_sizes,
    padded_length,
    prefill,
)
from align.inference.generate_fallback import PartialResponse, decode_group
from align.inference.sampler import sample_tokens, uniform_numbers
from align.inference.samples import (
    NOTHING_FINISHED,
    TOO_LONG,
    Finished,
    Sample,
    Throughput,
    cut_at_stop,
    prompt_key,
    sample_seed,
)
from align.inference.settings import LocalSettings, SamplingSettings
from align.models.loading.int8 import quantize_linear
from align.models.loading.pretrained import default_device
from align.models.policy import load_policy
from align.models.settings import PolicySettings
from align.models.weights import castable_parameters
from align.records import Prompt

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Tokens decoded before a stop string's length in bytes: special tokens, and parts of a character
EXTRA_STOP_TOKENS = 8
MAX_MARK_TOKENS = 32  # of the mark that opens a thought; a token of a byte-level vocabulary is one character


class TransformersEngine:
    """Samples from a causal language model; samples do not depend on batch size, order or interruptions.

    Each token is sampled with a uniform number determined by (seed, policy, prompt, sample number, position), and the
    logits of a response are bit-identical whatever else is in the batch (see `continuous_batching` for the
    conditions). The longest prompts are decoded first. Of the model's own generation config only the tokens that end a
    turn are used.

    Models whose state is not keys and values by position (Mamba, ALiBi, …) are decoded prompt by prompt, which is
    slower; their samples also depend on the number of responses K. `unsupported` then holds the reason.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str, batch_size: int = 64
    ) -> None:
        self.name = name
        self.throughput = Throughput()
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._encoder = ChatEncoder(tokenizer)
        self._batch_size = batch_size
        self._opens_user_turns = False
        self._sizes: dict[int, Sequence[int]] = {}  # number of rows of a batch -> `forward_sizes`
        of_model: Any = model.generation_config.eos_token_id if model.generation_config else None
        ends: list[Any] = [*(of_model if isinstance(of_model, list) else [of_model]), tokenizer.eos_token_id]
        self._end_tokens = {end for end in ends if end is not None}
        special = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        marks = {number for number, token in special.items() if is_written_mark(token)}
        # Special tokens that a text lacks, where it has others: the marks around thoughts and tool calls
        self._unwritten = {*special, *tokenizer.all_special_ids} - marks if marks else set[int]()
        self.unsupported = enable_continuous_batching(model)
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._max_tokens: float = math.inf if limit is None else limit  # of a prompt with its response
        self._max_characters = character_limit(limit)

    @classmethod
    def load(cls, policy: str, settings: LocalSettings = LocalSettings(), *, name: str) -> Self:  # noqa: B008 - frozen
        """Return the engine of a saved policy, on the GPU if there is one; adapters are merged into the weights.

        `policy` is a folder, a Hub ID or gguf:FILE. Raises `InputError` if no model can be loaded from it.
        """
        loaded, tokenizer = load_policy(PolicySettings(path=policy, tokenizer=settings.tokenizer))
        apply_template(tokenizer, settings.chat_template)
        hf = loaded.hf.merge_and_unload() if isinstance(loaded.hf, PeftModel) else loaded.hf
        model = cast_weights(cast(PreTrainedModel, hf), DTYPES[settings.precision])
        if settings.quantize is not None:
            quantize_linear(model, settings.quantize)
        model.to(torch.device(default_device()))  # pyright: ignore[reportArgumentType] - transformers wraps `to`
        return cls(model, tokenizer, name=name, batch_size=settings.batch_size)

    def sample(
        self, prompts: Sequence[Prompt], settings: SamplingSettings, *, finished: Finished = NOTHING_FINISHED
    ) -> Iterator[Sample]:
        """Yield K samples of each distinct prompt in order of completion, except those in `finished`.

        A prompt that leaves less than `max_new_tokens` of the model's context is not answered: its empty samples have
        finish reason `TOO_LONG` and come first. Raises `InputError` for a prompt without tokens.
        """
        responses = self._start(prompts, settings)
        for each in responses:
            self._count_sampled(each, finished.get((each.key, each.number)) or 0)
        missing = [each for each in responses if (each.key, each.number) not in finished]
        yield from (self._finish(each, settings) for each in missing if each.finish)
        if self.unsupported:
            yield from self._decode_by_prompt([each for each in responses if not each.finish], settings, finished)
        else:
            yield from self._decode_together([each for each in missing if not each.finish], settings)

    def open_user_turns(self) -> Self:
        """Return this engine for prompts whose last message, an empty one of the user, the model writes itself.

        So a chat model makes prompts (Xu et al. 2024, Magpie).
        """
        opened = copy.copy(self)
        opened._opens_user_turns = True
        return opened

    def choice_logps(self, prompts: Sequence[Prompt], choices: Sequence[str]) -> Iterator[list[float]]:
        """Yield, for each prompt, the log-probabilities in nats of the first token of each choice as the response.

        Raises `InputError` for choices that begin with the same token.
        """
        firsts = [self._tokenizer(choice, add_special_tokens=False)["input_ids"][0] for choice in choices]
        if len(set(firsts)) < len(firsts):
            raise InputError(f"{self.name}: {' and '.join(map(repr, choices))} begin with the same token")
        for index, prompt in enumerate(prompts):
            with self.throughput.timed():
                ((_, logits),) = prefill(self._model, [self._prompt_ids(prompt, index)])
                logps = logits[0].float().log_softmax(dim=-1)
            yield [float(logps[first]) for first in firsts]

    def _prompt_ids(self, prompt: Prompt, index: int) -> list[int]:
        """Return the tokens that the model continues."""
        if not self._opens_user_turns:
            return self._encoder.prompt_ids(prompt.messages, index, prompt.tools).tolist()
        return self._encoder.open_user_turn(prompt.messages[:-1]).tolist()

    def _start(self, prompts: Sequence[Prompt], settings: SamplingSettings) -> list[PartialResponse]:
        """Return all responses, those to the longest prompt first and those to one prompt adjacent."""
        groups: dict[str, list[PartialResponse]] = {}
        for index, prompt in enumerate(prompts):
            key = prompt_key(prompt)
            if key in groups:
                continue
            is_readable = num_characters(prompt.messages, prompt.tools) <= self._max_characters
            ids = self._prompt_ids(prompt, index) if is_readable else []
            if not ids and is_readable:
                raise InputError(f"prompt {index}: the chat template renders it to no tokens")
            fits = is_readable and len(ids) + settings.max_new_tokens <= self._max_tokens
            if fits:
                self.throughput.processed_tokens += len(ids)
                self.throughput.attended_pairs += len(ids) * (len(ids) + 1) // 2
            opening = self._opened_thought(ids)
            seeds = [sample_seed(settings, self.name, key, number) for number in range(settings.num_responses)]
            groups[key] = [
                PartialResponse(key, number, seed, ids, opening, finish="" if fits else TOO_LONG)
                for number, seed in enumerate(seeds)
            ]
        longest_first = sorted(groups.values(), key=lambda group: -len(group[0].prompt_ids))
        return [response for group in longest_first for response in group]

    def _decode_together(self, responses: Sequence[PartialResponse], settings: SamplingSettings) -> Iterator[Sample]:
        """Decode with continuous batching: each finished response makes room for the next."""
        waiting = deque(responses)
        size = min(self._batch_size, len(responses))
        if size not in self._sizes:
            with self.throughput.timed():
                self._sizes[size] = forward_sizes(self._model, size)
        batch: ContinuousBatch[PartialResponse] = ContinuousBatch(self._model, size, self._sizes[size])
        prefixes: dict[str, tuple[DynamicCache, Tensor]] = {}  # of the latest prompts: key -> cache, logits [1, V]
        while waiting or batch.rows:
            with self.throughput.timed():
                ended: list[PartialResponse] = []
                while waiting and (room := self._batch_size - len(batch.rows)):
                    key = waiting[0].key
                    if key not in prefixes:
                        prefixes = self._prefill(waiting, self._sizes[size])
                    prefix, logits_1V = prefixes[key]
                    group = [each for each in islice(waiting, room) if each.key == key]  # one prompt's are adjacent
                    for _ in group:
                        waiting.popleft()
                    self._sample_next(group, logits_1V.expand(len(group), -1), settings)
                    ended += [response for response in group if response.finish]
                    batch.add([response for response in group if not response.finish], prefix, len(group[0].prompt_ids))
                if batch.rows:
                    active = list(batch.sort())
                    self._sample_next(active, batch.step([response.ids[-1] for response in active]), settings)
                    if done := [response for response in active if response.finish]:
                        batch.remove(done)
                        ended += done
            yield from (self._finish(response, settings) for response in ended)

    def _prefill(
        self, waiting: Sequence[PartialResponse], sizes: Sequence[int]
    ) -> dict[str, tuple[DynamicCache, Tensor]]:
        """Return cache and logits of the next prompt, and of those behind it that a forward pass may take with it."""
        length = padded_length(self._model, len(waiting[0].prompt_ids))
        counts = [rows // length for rows in sizes if length in sizes and rows % length == 0] or [1]
        prompts: dict[str, list[int]] = {}
        for each in waiting:
            if each.key in prompts:
                continue
            if len(prompts) == counts[-1] or padded_length(self._model, len(each.prompt_ids)) != length:
                break
            prompts[each.key] = each.prompt_ids
        together = dict(islice(prompts.items(), max(count for count in counts if count <= len(prompts))))
        return dict(zip(together, prefill(self._model, list(together.values())), strict=True))

    def _decode_by_prompt(
        self, responses: Sequence[PartialResponse], settings: SamplingSettings, finished: Finished
    ) -> Iterator[Sample]:
        """Decode all K responses to a prompt with `generate`; their logits may depend on K and on nothing else."""
        for start in range(0, len(responses), settings.num_responses):
            group = responses[start : start + settings.num_responses]
            missing = [each for each in group if (each.key, each.number) not in finished]
            if not missing:
                continue
            with self.throughput.timed():
                sample_next = partial(self._sample_next, settings=settings)
                decode_group(self._model, group, sample_next, max_new_tokens=settings.max_new_tokens)
            yield from (self._finish(each, settings) for each in missing)

    def _sample_next(
        self, responses: Sequence[PartialResponse], logits_AV: Tensor, settings: SamplingSettings
    ) -> list[int]:
        """Append the next token to each response, and return them."""
        for response in responses:
            response.uniforms = response.uniforms or uniform_numbers(response.seed, settings.max_new_tokens)
        uniforms = [response.uniforms[len(response.ids)] for response in responses]
        tokens = sample_tokens(logits_AV, uniforms, temperature=settings.temperature, top_p=settings.top_p)
        for response, token in zip(responses, tokens, strict=True):
            self._append(response, token, settings)
        return tokens

    def _append(self, response: PartialResponse, token: int, settings: SamplingSettings) -> None:
        response.ids.append(token)
        self.throughput.new_tokens += 1
        if token in self._end_tokens or (settings.stop and self._has_stop_string(response, settings.stop)):
            response.finish = "stop"
        elif len(response.ids) == settings.max_new_tokens:
            response.finish = "length"
        if response.finish:
            response.uniforms = []

    def _has_stop_string(self, response: PartialResponse, stop: Sequence[str]) -> bool:
        """Return whether a stop string has just been completed; decode the whole text only if its end has one."""
        max_tokens = max(len(each.encode()) for each in stop) + EXTRA_STOP_TOKENS  # a token has at least one byte
        return (
            cut_at_stop(self._text(response.ids[-max_tokens:]), stop)[1]
            and cut_at_stop(self._text(response.ids), stop)[1]
        )

    def _finish(self, response: PartialResponse, settings: SamplingSettings) -> Sample:
        text, _ = cut_at_stop(self._text(response.ids), settings.stop)
        num_tokens = len(response.ids)
        self._count_sampled(response, num_tokens)
        text = response.opening + text
        return Sample(response.key, response.number, self.name, text, num_tokens, response.finish, response.seed)

    def _opened_thought(self, prompt_ids: list[int]) -> str:
        """Return the mark of a thought that the prompt opens: without it, an unfinished thought would be an answer."""
        opening = OPEN_THOUGHT.search(str(self._tokenizer.decode(prompt_ids[-MAX_MARK_TOKENS:])))
        return opening[0] if opening else ""

    def _count_sampled(self, response: PartialResponse, num_tokens: int) -> None:
        self.throughput.processed_tokens += num_tokens
        self.throughput.sampled_tokens += num_tokens
        prompt_length = len(response.prompt_ids)
        self.throughput.attended_pairs += num_tokens * prompt_length + num_tokens * (num_tokens + 1) // 2

    def _text(self, ids: Sequence[int]) -> str:
        kept = [token for token in ids if token not in self._end_tokens and token not in self._unwritten]
        skips = not self._unwritten
        text: Any = self._tokenizer.decode(kept, skip_special_tokens=skips, clean_up_tokenization_spaces=False)
        return text


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast the model's weights in place as `from_pretrained(dtype=...)` does, and return it. Buffers are unchanged."""
    for _, value in castable_parameters(model.requires_grad_(False), model):
        value.data = value.data.to(dtype)
    return model
