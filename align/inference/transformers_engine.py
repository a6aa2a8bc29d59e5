"""Responses of a model in this process: prompts computed once, all responses decoded together."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicCache

from align.data.chat_encoder import ChatEncoder
from align.data.chat_templates import apply_template
from align.errors import InputError
from align.inference import continuous_batching as slots
from align.inference.continuous_batching import Slots
from align.inference.sampler import draw, uniforms
from align.inference.samples import (
    NONE,
    TOO_LONG,
    Done,
    Sample,
    Speed,
    before_stop,
    prompt_key,
    sample_seed,
)
from align.inference.settings import LocalSettings, SamplingSettings
from align.models.loading.pretrained import default_device
from align.models.policy import load_policy
from align.models.settings import PolicySettings
from align.records import Prompt

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SPARE_TOKENS = 8  # that a stop string's last characters may be mixed with: special tokens and halves of a character


@dataclass(slots=True, eq=False)
class Row:
    """A response in the making."""

    key: str
    number: int
    seed: int
    prompt: list[int]
    uniforms: list[float]
    ids: list[int] = field(default_factory=list[int])
    finish: str = ""


class TransformersEngine:
    """Samples of a causal language model, which depend on neither the batch size nor the order nor a kill.

    Each token is drawn by a number whose address is (seed, policy, prompt, sample, position), and what is computed for
    a row is the same to the last bit beside any other rows (see `slots`). The longest prompts come first. Temperature
    and top-p are those of the settings; of the model's own generation settings the tokens that end a turn are taken.

    Models whose state is not keys and values by position (Mamba, ALiBi, ...) are decoded prompt by prompt: the same
    samples for a number of responses K, more slowly. `refusal` then says why.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str, batch_size: int = 64
    ) -> None:
        self.name = name
        self.speed = Speed()
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._encoder = ChatEncoder(tokenizer)
        self._batch_size = batch_size
        own: Any = model.generation_config.eos_token_id if model.generation_config else None
        ends: list[Any] = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
        self._ends = {end for end in ends if end is not None}
        self.refusal = slots.prepare(model)
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._most: float = math.inf if most is None else most  # tokens of a prompt and its response

    @classmethod
    def load(cls, policy: str, settings: LocalSettings = LocalSettings(), *, name: str) -> Self:  # noqa: B008 - frozen
        """The engine of a saved policy, on the GPU where there is one; adapters are folded into the weights."""
        loaded, tokenizer = load_policy(PolicySettings(path=policy, tokenizer=settings.tokenizer))
        apply_template(tokenizer, settings.chat_template)
        hf = loaded.hf.merge_and_unload() if isinstance(loaded.hf, PeftModel) else loaded.hf
        model = in_precision(cast(PreTrainedModel, hf), DTYPES[settings.precision])
        model.to(torch.device(default_device()))  # pyright: ignore[reportArgumentType] - transformers wraps `to`
        return cls(model, tokenizer, name=name, batch_size=settings.batch_size)

    def sample(self, prompts: Sequence[Prompt], settings: SamplingSettings, *, done: Done = NONE) -> Iterator[Sample]:
        """K samples of each prompt, in the order of completion, which does depend on the batch size.

        A prompt that leaves no room for `max_new_tokens` comes first, with empty ones that end as TOO_LONG.
        """
        rows = self._rows(prompts, settings)
        for row in rows:
            self._account(row, done.get((row.key, row.number)) or 0)
        yield from (self._sample(row, settings) for row in rows if row.finish and (row.key, row.number) not in done)
        rows = [row for row in rows if not row.finish]
        if self.refusal:
            yield from self._one_by_one(rows, settings, done)
        else:
            yield from self._together([row for row in rows if (row.key, row.number) not in done], settings)

    def _rows(self, prompts: Sequence[Prompt], settings: SamplingSettings) -> list[Row]:
        """All responses to be made, the longest prompt first and the responses of one prompt side by side."""
        rows: dict[str, list[Row]] = {}
        for place, prompt in enumerate(prompts):
            key = prompt_key(prompt)
            if key in rows:
                continue
            ids = self._encoder.prompt_ids(prompt.messages, place).tolist()
            if not ids:
                raise InputError(f"prompt {place}: the chat template makes no token of it")
            fits = len(ids) + settings.max_new_tokens <= self._most
            if fits:
                self.speed.computed += len(ids)
                self.speed.pairs_attended += len(ids) * (len(ids) + 1) // 2
            seeds = [sample_seed(settings, self.name, key, number) for number in range(settings.num_responses)]
            rows[key] = [
                Row(key, number, seed, ids, uniforms(seed, settings.max_new_tokens))
                if fits
                else Row(key, number, seed, ids, [], finish=TOO_LONG)
                for number, seed in enumerate(seeds)
            ]
        return [row for group in sorted(rows.values(), key=lambda group: -len(group[0].prompt)) for row in group]

    def _together(self, rows: Sequence[Row], settings: SamplingSettings) -> Iterator[Sample]:
        """The samples by slots: a row that has ended makes room for the next."""
        waiting = deque(rows)
        work: Slots[Row] = Slots(self._model, min(self._batch_size, len(rows)))
        prefix: tuple[str, DynamicCache, Tensor] | None = None
        while waiting or work.rows:
            with self.speed.timed():
                ended: list[Row] = []
                while waiting and len(work.rows) < self._batch_size:
                    row = waiting.popleft()
                    if prefix is None or prefix[0] != row.key:
                        prefix = (row.key, *slots.prefill(self._model, row.prompt))
                    self._draw([row], prefix[2], settings)
                    if row.finish:
                        ended.append(row)
                    else:
                        work.add(row, prefix[1], len(row.prompt))
                if work.rows:
                    going = list(work.arrange())
                    self._draw(going, work.step([row.ids[-1] for row in going]), settings)
                    for row in going:
                        if row.finish:
                            work.remove(row)
                            ended.append(row)
            yield from (self._sample(row, settings) for row in ended)

    def _one_by_one(self, rows: Sequence[Row], settings: SamplingSettings, done: Done) -> Iterator[Sample]:
        """The samples by `generate`, all K of a prompt at once: their numbers depend on K then, and on nothing else."""
        for start in range(0, len(rows), settings.num_responses):
            group = rows[start : start + settings.num_responses]
            missing = [row for row in group if (row.key, row.number) not in done]
            if not missing:
                continue
            with self.speed.timed():
                _generate(self._model, group, lambda going, logits: self._draw(going, logits, settings))
            yield from (self._sample(row, settings) for row in missing)

    def _draw(self, rows: Sequence[Row], logits_AV: Tensor, settings: SamplingSettings) -> list[int]:
        """Each row's next token, which it takes in."""
        numbers = [row.uniforms[len(row.ids)] for row in rows]
        tokens = draw(logits_AV, numbers, temperature=settings.temperature, top_p=settings.top_p)
        for row, token in zip(rows, tokens, strict=True):
            self._take(row, token, settings)
        return tokens

    def _take(self, row: Row, token: int, settings: SamplingSettings) -> None:
        row.ids.append(token)
        self.speed.tokens += 1
        if token in self._ends or (settings.stop and self._has_stopped(row, settings.stop)):
            row.finish = "stop"
        elif len(row.ids) == settings.max_new_tokens:
            row.finish = "length"

    def _has_stopped(self, row: Row, stop: Sequence[str]) -> bool:
        """Whether a stop string has just been completed; the whole text is looked at only where its end has one."""
        longest = max(len(each.encode()) for each in stop)  # no token is shorter than a byte
        return (
            before_stop(self._text(row.ids[-longest - SPARE_TOKENS :]), stop)[1]
            and before_stop(self._text(row.ids), stop)[1]
        )

    def _sample(self, row: Row, settings: SamplingSettings) -> Sample:
        text, _ = before_stop(self._text(row.ids), settings.stop)
        self._account(row, len(row.ids))
        return Sample(row.key, row.number, self.name, text, len(row.ids), row.finish, row.seed)

    def _account(self, row: Row, drawn: int) -> None:
        self.speed.computed += drawn
        self.speed.drawn += drawn
        self.speed.pairs_attended += drawn * len(row.prompt) + drawn * (drawn + 1) // 2

    def _text(self, ids: Sequence[int]) -> str:
        said = [token for token in ids if token not in self._ends]
        text: Any = self._tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def in_precision(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its weights in `dtype`, as `from_pretrained` would have loaded them: buffers stay as they are."""
    patterns = model._keep_in_fp32_modules_strict or ()  # pyright: ignore[reportPrivateUsage] - no public name
    for name, value in model.named_parameters():
        value.requires_grad_(False)
        if not any(re.search(pattern.replace("*", ".*"), name) for pattern in patterns):  # as its loader matches them
            value.data = value.data.to(dtype)
    return model


def _generate(model: PreTrainedModel, rows: Sequence[Row], draw_rows: Callable[[list[Row], Tensor], list[int]]) -> None:
    """Fill the rows, which share a prompt, by `generate`, which knows every architecture's state."""

    class Drawn(LogitsProcessor):
        """Leaves each row nothing but the token that was drawn for it."""

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            going = [place for place, row in enumerate(rows) if not row.finish]
            tokens = draw_rows([rows[place] for place in going], scores[going])
            only = torch.full_like(scores, -torch.inf)
            only[:, 0] = 0  # rows that have ended are filled up with some token
            only[going] = -torch.inf
            only[going, tokens] = 0
            return only

    class Ended(StoppingCriteria):
        """Says of each row whether it has ended."""

        def __call__(self, input_ids: Any, scores: Any, **kwargs: object) -> Any:  # noqa: ANN401 - annotated there as tuples
            return torch.tensor([bool(row.finish) for row in rows], device=input_ids.device)

    ids = torch.tensor(rows[0].prompt, device=model.device).repeat(len(rows), 1)
    own, model.generation_config = (
        model.generation_config,
        GenerationConfig(pad_token_id=0),
    )  # it fills in what is unset
    run: Any = model.generate
    try:
        run(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(max_new_tokens=len(rows[0].uniforms), do_sample=False, pad_token_id=0),
            logits_processor=LogitsProcessorList([Drawn()]),
            stopping_criteria=StoppingCriteriaList([Ended()]),
        )
    finally:
        model.generation_config = own
