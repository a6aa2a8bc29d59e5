"""The reward model: a linear head of named attributes on a response's last token, and weights that make one reward.

It is saved as a sequence classifier of transformers whose labels are the attributes.
Shape legend: S sequences, A attributes, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from align.data.token_groups import TokenSequence
from align.errors import InputError, one_line
from align.models.adapters.attach import merge_adapters, prepare_for_training
from align.models.adapters.merging import merge_to_save
from align.models.backbone import Backbone
from align.models.loading.config import is_sequence_classifier, load_config
from align.models.loading.errors import LOAD_ERRORS
from align.models.loading.origin import origin_of, set_origin
from align.models.loading.pretrained import load_base, load_pretrained
from align.models.loading.seeding import seeded
from align.models.loading.tokenizer import load_tokenizer_for
from align.models.saving.folder import dtype_of, write_model, write_tokenizer
from align.models.saving.weights import WHOLE, Gather
from align.models.settings import (
    GGUF,
    HELPSTEER,
    HeadSettings,
    PolicySettings,
    Rating,
    SaveDtype,
    attribute_weights,
    check_adapters,
    is_adapter,
    resolve_rating,
)
from align.models.tree.batch import TokenBatch
from align.models.weights import WrittenWeights

AGGREGATE = "aggregate"  # key in a saved configuration: weight of each attribute in the reward


class RewardModel(Backbone):
    """A sequence classifier that returns the attribute scores of each sequence's last response.

    `model(batch)` takes a `TokenBatch` and returns scores, shape [S, A]; `model.rating.rewards(scores)` are the scalar
    rewards. The transformers model is `model.hf`.
    """

    output_unit = "score points"
    outputs_are_of = "sequences"
    has_fp32_head = True  # in bf16 a score of 4 has an error of up to 0.016

    def __init__(self, hf: PreTrainedModel | PeftModel, rating: Rating) -> None:
        super().__init__(hf)
        self.rating = rating

    @property
    def head(self) -> nn.Module:
        """Return the linear layer that predicts the attributes."""
        return cast(nn.Module, self.base.score)

    def freeze_decoder(self) -> None:
        """Train only the head from here on."""
        self.requires_grad_(False)
        self.head.requires_grad_(True)

    def forward_batch(self, batch: TokenBatch) -> Tensor:
        """Return the attribute scores of each sequence, shape [S, A], from the hidden state of its last token."""
        last_SD = self.last_hidden_states(batch)
        with torch.autocast(last_SD.device.type, enabled=False):  # in bf16 a score of 4 has an error of up to 0.016
            return self.head(last_SD)

    def last_hidden_states(self, batch: TokenBatch) -> Tensor:
        """Return the input of the head for each sequence, shape [S, D], in the dtype of the head."""
        last_SD = self.hidden_states(batch).flatten(0, 1)[batch.last_S]
        return last_SD.to(next(self.head.parameters()).dtype)

    def forward_sequence(self, sequence: TokenSequence) -> Tensor:
        """Return the attribute scores of one sequence, pooled and computed by transformers, shape [1, A]."""
        ids = torch.from_numpy(sequence.ids.astype("int64")).to(self.device)[None]
        config = self.base.config.get_text_config()
        # Transformers skips padding at the end, but a probed sequence may be cut right after a padding id
        padding = config.pad_token_id
        config.pad_token_id = None
        try:
            return self.hf(input_ids=ids, use_cache=False).logits.float()
        finally:
            config.pad_token_id = padding


def load_rating(path: str | None) -> Rating | None:
    """Load the attributes and weights of a reward model's folder or Hub ID; None if it is not a reward model."""
    if path is None or path.startswith(GGUF) or is_adapter(path):
        return None
    config = load_config(path)
    if not is_sequence_classifier(config):
        return None
    labels = cast("dict[int, str]", config.id2label)
    names = tuple(labels[index] for index in range(len(labels)))
    saved: dict[str, float] | None = getattr(config, AGGREGATE, None)
    return Rating(names, attribute_weights(names, tuple(saved[name] for name in names) if saved else None))


def load_reward_model(
    settings: PolicySettings, head: HeadSettings | None = None, *, default: Sequence[str] = HELPSTEER
) -> tuple[RewardModel, PreTrainedTokenizerBase]:
    """Load a reward model in fp32 without dropout, and its tokenizer, on the CPU.

    A language model gets a randomly initialized head for the attributes in `head`, else for the `default` ones.
    Raises `InputError` if the model cannot be loaded, or if attributes, weights or adapters do not fit it.
    """
    head = head or HeadSettings()
    check_adapters(settings, head)
    saved = load_rating(settings.path)
    rating = resolve_rating(head, saved, default=default)
    if saved is None:
        model = _with_head(_language_model(settings), rating, settings.seed)
    else:
        model = load_pretrained(str(settings.path), AutoModelForSequenceClassification)
    if type(getattr(model, "score", None)) is not nn.Linear:
        raise InputError(f"the head of {type(model).__name__} is not one linear layer named score", ("policy",))
    _write_rating(model.config, rating)
    tokenizer = load_tokenizer_for(model, settings)
    reward_model = RewardModel(prepare_for_training(model, settings, task="SEQ_CLS"), rating)
    if head.only:
        reward_model.freeze_decoder()
    reward_model.train()  # gradient checkpointing is active in training mode only, and there is no dropout to turn on
    return reward_model, tokenizer


def save_reward_model(
    model: RewardModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    dtype: SaveDtype = "original",
    gather: Gather = WHOLE,
) -> WrittenWeights:
    """Write a folder that `AutoModelForSequenceClassification` loads: safetensors, labels, weights and tokenizer.

    `set_pad_token` must have been called. Adapters are merged in place; the model must not be trained afterwards.
    Weights may be sharded: every process then calls it with a `gather`.
    Returns what identifies the written weights.
    """
    assert model.base.config.get_text_config().pad_token_id is not None, "call set_pad_token first"
    hf = model.hf
    if isinstance(hf, PeftModel):
        hf, gather = merge_to_save(hf, gather)
    written = write_model(hf, folder, dtype_of(hf, dtype), gather)
    gather.on_main(partial(write_tokenizer, tokenizer, folder))
    return written


def load_saved_reward_model(folder: Path, dtype: torch.dtype) -> RewardModel:
    """Load the reward model that was written to a folder, without its tokenizer."""
    rating = load_rating(str(folder))
    assert rating is not None, "a reward model was written"
    return RewardModel(load_pretrained(str(folder), AutoModelForSequenceClassification, dtype=dtype), rating)


def set_pad_token(model: RewardModel, tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> None:
    """Set the padding token of model and tokenizer to one that is not in `ends`, the last tokens of responses.

    Transformers scores the last token that is not padding. If the end-of-turn token were also the padding token, as in
    SmolLM2's tokenizer, it would score the token before it. Raises `InputError` if there is no other special token.
    """
    ids: Any = tokenizer
    special = sorted(number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    for candidate in (ids.pad_token_id, ids.unk_token_id, *special, ids.bos_token_id):
        if candidate is not None and candidate not in ends:
            ids.pad_token = tokenizer.convert_ids_to_tokens(candidate)
            for config in (model.base.config, model.base.config.get_text_config()):
                config.pad_token_id = candidate
            return
    raise InputError(
        "padding needs a special token that does not end a response; add one to the tokenizer", ("policy", "tokenizer")
    )


def _language_model(settings: PolicySettings) -> PreTrainedModel:
    model = load_base(settings)
    return merge_adapters(model, settings.path) if settings.path is not None and is_adapter(settings.path) else model


def _with_head(model: PreTrainedModel, rating: Rating, seed: int) -> PreTrainedModel:
    """Return the model's decoder with a new head, which depends on the configuration and the seed only."""
    config = copy.deepcopy(model.config)
    _write_rating(config, rating)
    try:
        with seeded(seed):
            classifier: Any = AutoModelForSequenceClassification.from_config(
                config, dtype=torch.float32, trust_remote_code=False
            )
        classifier.base_model.load_state_dict(model.base_model.state_dict(), assign=True)
    except LOAD_ERRORS as error:
        kind = type(model).__name__
        raise InputError(
            f"transformers has no sequence classifier for {kind}: {one_line(error)[:80]}", ("policy",)
        ) from error
    return set_origin(classifier, origin_of(model))


def _write_rating(config: PretrainedConfig, rating: Rating) -> None:
    """Write the attributes and weights into the configuration."""
    config.id2label = dict(enumerate(rating.names))
    config.label2id = {name: index for index, name in enumerate(rating.names)}
    config.problem_type = "regression"
    setattr(config, AGGREGATE, dict(zip(rating.names, rating.weights, strict=True)))
