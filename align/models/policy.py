"""The policy: a causal language model that returns log-probabilities. It is saved as a plain Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from align.data.token_groups import TokenGroup, TokenSequence
from align.errors import InputError
from align.models.adapters.attach import prepare_for_training
from align.models.adapters.files import save_adapters
from align.models.adapters.merging import merge_to_save
from align.models.backbone import Backbone
from align.models.lm_head.logprobs import LogitTransform
from align.models.lm_head.patch import patch_lm_head
from align.models.lm_head.token_sets import top_tokens
from align.models.loading.int8 import check_trainable
from align.models.loading.pretrained import load_base
from align.models.loading.quantization import NF4, is_quantized
from align.models.loading.tokenizer import load_tokenizer_for
from align.models.saving.folder import clean_generation_config, dtype_of, write_model, write_tokenizer
from align.models.saving.weights import WHOLE, Gather
from align.models.settings import PolicySettings, SaveDtype
from align.models.tree.batch import TokenBatch, plain_batch, tree_batch
from align.models.weights import WrittenWeights


class Policy(Backbone):
    """A causal language model that returns the log-probabilities of a batch's targets.

    `policy(batch)` takes a `TokenBatch` and returns nats in fp32, shape [N], one for each target. The transformers
    model is `policy.hf`. Raises `InputError` for an LM head that is not a plain linear layer.
    """

    output_unit = "nats per token"
    outputs_are_of = "targets"

    def __init__(self, hf: PreTrainedModel | PeftModel) -> None:
        super().__init__(hf)
        head = self.linear_head
        if type(head) is not nn.Linear:
            kind = type(self.base).__name__
            raise InputError(f"the LM head of {kind} is a {type(head).__name__}, not a plain linear layer")
        patch_lm_head(head, logit_transform(self.base.config))

    @property
    def head(self) -> nn.Module:
        """Return the LM head."""
        return cast(nn.Module, self.base.get_output_embeddings())

    def forward_batch(self, batch: TokenBatch, *, collisions: bool = False) -> Tensor:
        """Return the log-probability of each target in nats, fp32, shape [N].

        With `collisions` also log sum_v p(v)^2 at each target, without gradient: fp32, shape [2, N]. If the batch names
        K tokens for each target, also their log-probabilities, and that of all others together: fp32, shape [K + 2, N].
        """
        if self.sequence_group is None or batch.layout is None:
            return self._logps(batch, collisions)
        share, targets = batch.share_of(self.sequence_group)
        return self.sequence_group.gather(self._logps(share, collisions), targets, len(batch.targets_N))

    def _logps(self, batch: TokenBatch, collisions: bool) -> Tensor:
        hidden_ND = self._inputs_of_head(batch)
        if batch.tokens_NK is not None:
            return self.head(hidden_ND, targets=batch.targets_N, tokens=batch.tokens_NK).T
        return self.head(hidden_ND, targets=batch.targets_N, collisions=collisions)

    @torch.no_grad()
    def top_logps(self, batch: TokenBatch, number: int) -> tuple[Tensor, Tensor]:
        """Return the `number` most likely tokens at each target, [N, K], and their log-probabilities, [N, K + 1].

        The last log-probability is that of all other tokens together. The weights must be whole in this process.
        """
        hidden_ND = self._inputs_of_head(batch)
        head = cast(nn.Linear, self.linear_head)
        tokens_NK = top_tokens(hidden_ND, head.weight, head.bias, number, logit_transform(self.base.config))
        return tokens_NK, self.head(hidden_ND, targets=batch.targets_N, tokens=tokens_NK)[:, 1:]

    def _inputs_of_head(self, batch: TokenBatch) -> Tensor:
        return self.hidden_states(batch).flatten(0, 1)[batch.rows_N]

    def forward_sequence(self, sequence: TokenSequence) -> Tensor:
        """Return the log-probabilities of the sequence's targets, computed from transformers' own logits."""
        ids = torch.from_numpy(sequence.ids.astype("int64")).to(self.device)[None]
        output = self.hf(input_ids=ids, use_cache=False)
        self.auxiliary_loss = getattr(output, "aux_loss", None)
        logps = output.logits[0, :-1].float().log_softmax(dim=-1)
        loss_mask = torch.from_numpy(sequence.loss_mask[1:]).to(logps.device)
        return logps.gather(1, ids[0, 1:, None])[loss_mask, 0]


def logit_transform(config: PretrainedConfig) -> LogitTransform:
    """Return the scale and soft-capping that the architecture applies to its logits, from its configuration."""
    text = config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1.0) / float(getattr(text, "logits_scaling", None) or 1.0)
    softcap = getattr(text, "final_logit_softcapping", None) or getattr(text, "logits_soft_cap", None)
    return LogitTransform(scale=scale, softcap=softcap)


def response_logps(policy: Policy, groups: Sequence[TokenGroup]) -> Tensor:
    """Return the log-probability of each response given its prompt, shape [B, K], in one forward pass.

    Values are sums over the response tokens in nats and fp64; gradients flow through them. K is the size of the largest
    group; smaller groups are padded with 0. With `policy.use_forward("tree")` each prompt is computed once; otherwise
    all sequences are padded. For a demonstration the value covers all of its assistant messages.
    """
    make_batch = tree_batch if policy.is_tree else plain_batch
    batch = make_batch([sequence for group in groups for sequence in group.sequences]).to(policy.device)
    logps_S = batch.sum_by_sequence(policy(batch))
    logps_by_group = logps_S.split([len(group.sequences) for group in groups])
    return nn.utils.rnn.pad_sequence(list(logps_by_group), batch_first=True)


def load_policy(settings: PolicySettings | str | Path) -> tuple[Policy, PreTrainedTokenizerBase]:
    """Load a policy in fp32 without dropout, and its tokenizer with its chat template, on the CPU.

    A text or path stands for settings with this `path`: a folder, a Hub ID or gguf:FILE.
    Adapters in the folder are merged unless the settings train or keep them. Raises `InputError` if the model or
    tokenizer cannot be loaded, or if the adapter settings do not fit the model.
    """
    if not isinstance(settings, PolicySettings):
        settings = PolicySettings(path=str(settings))
    model = load_base(settings)
    tokenizer = load_tokenizer_for(model, settings)
    hf = prepare_for_training(model, settings, task="CAUSAL_LM")
    if settings.lora is not None and isinstance(model.get_output_embeddings(), LoraLayer):
        raise InputError("the LM head cannot have an adapter; name other modules", ("policy", "lora", "targets"))
    policy = Policy(hf)
    policy.train()  # gradient checkpointing is active in training mode only, and there is no dropout to turn on
    return policy, tokenizer


def save_policy(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    merge: bool = True,
    end_of_turn: int | None = None,
    dtype: SaveDtype = "original",
    gather: Gather = WHOLE,
) -> WrittenWeights:
    """Write a folder that `from_pretrained` loads: safetensors, tokenizer with chat template, generation config.

    With `merge` adapters are merged into the weights in place, and the policy must not be trained afterwards; without
    it only the adapters are written. Generation stops at the model's previous stop tokens, at EOS, and at
    `end_of_turn`, the last token of trained responses. Weights are rounded to `dtype`. They may be sharded: every
    process then calls it with a `gather`.
    Returns what identifies the written weights. Raises `InputError` on merging into weights in 4 bits, and for weights
    in int8.
    """
    hf = policy.hf
    folder = Path(folder)
    check_trainable(policy.base)
    if isinstance(hf, PeftModel) and merge:
        if is_quantized(policy.base):
            raise InputError("adapters cannot be merged into weights in 4 bits", ("policy", "quantize"))
        hf, gather = merge_to_save(hf, gather)
    base = policy.base if not isinstance(hf, PreTrainedModel) else hf
    previous: Any = base.generation_config.eos_token_id
    known: list[Any] = [*(previous if isinstance(previous, list) else [previous]), tokenizer.eos_token_id, end_of_turn]
    stops = sorted({stop for stop in known if stop is not None})
    base.generation_config.eos_token_id = stops[0] if len(stops) == 1 else stops
    base.generation_config.pad_token_id = tokenizer.pad_token_id
    if isinstance(hf, PeftModel):
        saved_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
        quantize = NF4 if is_quantized(base) else None
        clean_generation_config(base)
        written = save_adapters(hf, folder, dtype=saved_dtype, quantize=quantize, gather=gather)
        gather.on_main(lambda: base.generation_config.save_pretrained(str(folder)))
    else:
        written = write_model(hf, folder, dtype_of(hf, dtype), gather)
    gather.on_main(partial(write_tokenizer, tokenizer, folder))
    return written
