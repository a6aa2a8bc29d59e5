"""The policy: a causal language model that answers with log-probabilities, saved as a plain folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from align.data.token_groups import TokenSequence
from align.errors import InputError
from align.models.adapters import save_adapters
from align.models.backbone import Backbone
from align.models.loading import adapted, load_base, load_tokenizer_for
from align.models.logprobs import LogitTransform, install
from align.models.quantized import NF4, is_quantized
from align.models.settings import PolicySettings
from align.models.tree import TokenBatch


class Policy(Backbone):
    """A causal language model that answers with the log-probabilities of a batch's targets."""

    unit = "nats a token"

    def __init__(self, hf: PreTrainedModel | PeftModel) -> None:
        super().__init__(hf)
        head = self.base.get_output_embeddings()
        if type(head) is not nn.Linear:
            kind = type(self.base).__name__
            raise InputError(f"the LM head of {kind} is a {type(head).__name__}, not a plain linear layer")
        install(head, logit_transform(self.base.config))

    @property
    def head(self) -> nn.Module:
        """The LM head."""
        return cast(nn.Module, self.base.get_output_embeddings())

    def answer(self, batch: TokenBatch) -> Tensor:
        """Log-probability of each target in nats, fp32, shape [N]."""
        hidden = self.hidden(batch)
        return self.head(hidden.flatten(0, 1)[batch.rows_N], targets=batch.targets_N)

    def stock(self, sequence: TokenSequence) -> Tensor:
        """Log-probabilities of the sequence's targets from the model's own logits."""
        ids = torch.from_numpy(sequence.ids.astype("int64")).to(self.device)[None]
        logps = self.hf(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(dim=-1)
        trained = torch.from_numpy(sequence.loss_mask[1:]).to(logps.device)
        return logps.gather(1, ids[0, 1:, None])[trained, 0]


def logit_transform(config: PretrainedConfig) -> LogitTransform:
    """What the architecture does to its logits, from the names its configuration uses for it."""
    text = config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1.0) / float(getattr(text, "logits_scaling", None) or 1.0)
    softcap = getattr(text, "final_logit_softcapping", None) or getattr(text, "logits_soft_cap", None)
    return LogitTransform(scale=scale, softcap=softcap)


def load_policy(settings: PolicySettings) -> tuple[Policy, PreTrainedTokenizerBase]:
    """The policy in fp32 with dropout off, and its tokenizer with its own chat template."""
    model = load_base(settings)
    tokenizer = load_tokenizer_for(model, settings)
    hf = adapted(model, settings, task="CAUSAL_LM")
    if settings.lora is not None and type(model.get_output_embeddings()) is not nn.Linear:
        raise InputError("policy.lora.targets: the LM head takes no adapter; name other modules")
    policy = Policy(hf)
    policy.train()  # gradient checkpointing runs in training mode only; there is no dropout left to be on
    return policy, tokenizer


def save_policy(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    merge: bool = True,
    end_of_turn: int | None = None,
) -> None:
    """Write a folder that `from_pretrained` loads: safetensors, tokenizer with chat template, generation config.

    Generation stops at what it stopped at before, at EOS and at `end_of_turn`, the token that trained responses end
    with. With `merge` adapters are folded into the weights, in place: the policy is not to be trained on afterwards.
    """
    hf = policy.hf
    if isinstance(hf, PeftModel) and merge:
        if is_quantized(policy.base):
            raise InputError("policy.quantize: adapters on weights in 4 bits are saved alone, not folded into them")
        hf = cast(PreTrainedModel, hf.merge_and_unload())
    base = policy.base if not isinstance(hf, PreTrainedModel) else hf
    before: Any = base.generation_config.eos_token_id
    known: list[Any] = [*(before if isinstance(before, list) else [before]), tokenizer.eos_token_id, end_of_turn]
    stops = sorted({stop for stop in known if stop is not None})
    base.generation_config.eos_token_id = stops[0] if len(stops) == 1 else stops
    base.generation_config.pad_token_id = tokenizer.pad_token_id
    if isinstance(hf, PeftModel):
        save_adapters(hf, folder, quantize=NF4 if is_quantized(base) else None)
        base.generation_config.save_pretrained(str(folder))
    else:
        hf.save_pretrained(str(folder), safe_serialization=True)
    tokenizer.save_pretrained(str(folder))
