"""The reward model: a linear head of named attributes on a response's last token, and weights that make one reward.

A plain sequence classifier of transformers whose labels are the attributes. Shape legend: S sequences, K responses of a
group, A attributes, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
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

from align.data.batching import plan_step
from align.data.token_groups import TokenGroup, TokenSequence
from align.errors import InputError, one_line
from align.models.adapters import UNREADABLE, folded, seeded
from align.models.backbone import Backbone
from align.models.loading import (
    adapted,
    config_of,
    is_classifier,
    load_base,
    load_pretrained,
    load_tokenizer_for,
)
from align.models.settings import (
    GGUF,
    HELPSTEER,
    HeadSettings,
    PolicySettings,
    Rating,
    attribute_weights,
    check_adapters,
    choose_rating,
    is_adapter,
)
from align.models.tree import TokenBatch, count_tokens, plain_batch, tree_batch

AGGREGATE = "aggregate"  # key of a saved configuration: weight by attribute


class RewardModel(Backbone):
    """A sequence classifier that answers with the attributes of each sequence's last response."""

    unit = "points of a score"

    def __init__(self, hf: PreTrainedModel | PeftModel, rating: Rating) -> None:
        super().__init__(hf)
        self.rating = rating

    @property
    def head(self) -> nn.Module:
        """The linear layer over the attributes."""
        return cast(nn.Module, self.base.score)

    def keep_decoder(self) -> None:
        """From here on train the head and nothing else."""
        self.requires_grad_(False)
        self.head.requires_grad_(True)

    def answer(self, batch: TokenBatch) -> Tensor:
        """Attributes of each sequence, shape [S, A], from the hidden state of its last token."""
        last_SD = self.last_hidden(batch)
        with torch.autocast(last_SD.device.type, enabled=False):  # in bf16 a score of 4 is off by up to 0.016
            return self.head(last_SD)

    def last_hidden(self, batch: TokenBatch) -> Tensor:
        """What the head sees of each sequence, shape [S, D], in the head's own precision."""
        last_SD = self.hidden(batch).flatten(0, 1)[batch.last_S]
        return last_SD.to(next(self.head.parameters()).dtype)

    def stock(self, sequence: TokenSequence) -> Tensor:
        """Attributes of the sequence as transformers pools and scores it."""
        ids = torch.from_numpy(sequence.ids.astype("int64")).to(self.device)[None]
        config = self.base.config.get_text_config()
        padding, config.pad_token_id = config.pad_token_id, None  # the probe cuts anywhere, behind padding ids too
        try:
            return self.hf(input_ids=ids, use_cache=False).logits.float()
        finally:
            config.pad_token_id = padding


def saved_rating(path: str | None) -> Rating | None:
    """What the reward model at a folder or hub id rates; None where something else is there."""
    if path is None or path.startswith(GGUF) or is_adapter(path):
        return None
    config = config_of(path)
    if not is_classifier(config):
        return None
    labels = cast("dict[int, str]", config.id2label)
    names = tuple(labels[index] for index in range(len(labels)))
    known: dict[str, float] | None = getattr(config, AGGREGATE, None)
    return Rating(names, attribute_weights(names, tuple(known[name] for name in names) if known else None))


def load_reward_model(
    settings: PolicySettings, head: HeadSettings | None = None, *, default: Sequence[str] = HELPSTEER
) -> tuple[RewardModel, PreTrainedTokenizerBase]:
    """The reward model in fp32 with dropout off, and its tokenizer; a language model gets a new head."""
    head = head or HeadSettings()
    check_adapters(settings, head)
    saved = saved_rating(settings.path)
    rating = choose_rating(head, saved, default=default)
    if saved is None:
        model = _with_head(_language_model(settings), rating, settings.seed)
    else:
        model = load_pretrained(str(settings.path), AutoModelForSequenceClassification)
    if type(getattr(model, "score", None)) is not nn.Linear:
        raise InputError(f"policy: the head of {type(model).__name__} is not one linear layer called score")
    _describe(model.config, rating)
    tokenizer = load_tokenizer_for(model, settings)
    reward_model = RewardModel(adapted(model, settings, task="SEQ_CLS"), rating)
    if head.only:
        reward_model.keep_decoder()
    reward_model.train()  # gradient checkpointing runs in training mode only; there is no dropout left to be on
    return reward_model, tokenizer


def _language_model(settings: PolicySettings) -> PreTrainedModel:
    model = load_base(settings)
    return folded(model, settings.path) if settings.path is not None and is_adapter(settings.path) else model


def _with_head(model: PreTrainedModel, rating: Rating, seed: int) -> PreTrainedModel:
    """The model's decoder under a new head, which depends on the configuration and the seed only."""
    config = copy.deepcopy(model.config)
    _describe(config, rating)
    try:
        with seeded(seed):
            made: Any = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        made.base_model.load_state_dict(model.base_model.state_dict(), assign=True)
    except UNREADABLE as error:
        kind = type(model).__name__
        raise InputError(
            f"policy: transformers makes no sequence classifier of {kind}: {one_line(error)[:80]}"
        ) from error
    return made


def _describe(config: PretrainedConfig, rating: Rating) -> None:
    """Write into the configuration what the model rates."""
    config.id2label = dict(enumerate(rating.names))
    config.label2id = {name: index for index, name in enumerate(rating.names)}
    config.problem_type = "regression"
    setattr(config, AGGREGATE, dict(zip(rating.names, rating.weights, strict=True)))


def set_padding(model: RewardModel, tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> None:
    """Give both a padding token that is none of `ends`, with which responses end.

    Transformers scores the last token that is not padding: behind an end of turn that is also the padding (as in
    SmolLM2's tokenizer) it would score the token before it.
    """
    ids: Any = tokenizer
    special = sorted(number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    for found in (ids.pad_token_id, ids.unk_token_id, *special, ids.bos_token_id):
        if found is not None and found not in ends:
            ids.pad_token = tokenizer.convert_ids_to_tokens(found)
            for config in (model.base.config, model.base.config.get_text_config()):
                config.pad_token_id = found
            return
    raise InputError("policy.tokenizer: it has no special token to pad with but those that end a response; add one")


def save_reward_model(model: RewardModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a folder that `AutoModelForSequenceClassification` loads: safetensors, labels, weights and tokenizer.

    Adapters are folded into the weights, in place: the model is not to be trained on afterwards.
    """
    assert model.base.config.get_text_config().pad_token_id is not None, "set_padding comes first"
    whole: Any = model.hf.merge_and_unload() if isinstance(model.hf, PeftModel) else model.hf
    whole.save_pretrained(str(folder), safe_serialization=True)
    tokenizer.save_pretrained(str(folder))


def score_groups(model: RewardModel, groups: Sequence[TokenGroup], *, token_budget: int = 4096) -> list[Tensor]:
    """Attributes of the responses of each group, [K, A] in fp32 on the CPU; a group's responses share their prompt."""
    return _of_each(groups, model, model.__call__, token_budget)


def last_states(model: RewardModel, groups: Sequence[TokenGroup], *, token_budget: int = 4096) -> list[Tensor]:
    """What the head sees of the responses of each group, [K, D] in fp32 on the CPU."""
    seen: list[Tensor] = []

    def see(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen[:] = given

    def answer(batch: TokenBatch) -> Tensor:
        model(batch)
        return seen[0]

    with model.head.register_forward_pre_hook(see):
        return _of_each(groups, model, answer, token_budget)


@torch.no_grad()
def _of_each(
    groups: Sequence[TokenGroup], model: RewardModel, answer: Callable[[TokenBatch], Tensor], token_budget: int
) -> list[Tensor]:
    """The rows of `answer` that belong to each group, from micro-batches in the forward that the model is set to."""
    sequences = [group.sequences for group in groups]
    sizes = [count_tokens(each) if model.is_tree else sum(len(one.ids) for one in each) for each in sequences]
    make = tree_batch if model.is_tree else plain_batch
    found: dict[int, Tensor] = {}
    for micro in plan_step(range(len(groups)), sizes, token_budget=token_budget).ranks[0]:
        batch = make([one for index in micro for one in sequences[index]]).to(model.device)
        rows = answer(batch).float().cpu().split([len(sequences[index]) for index in micro])
        found |= dict(zip(micro, rows, strict=True))
    return [found[index] for index in range(len(groups))]
