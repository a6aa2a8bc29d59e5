"""`RPOTrainer`: TRL's `DPOTrainer` with any preference loss of `align` and rewards for both responses.

Shape legend: B prompts, K = 2 responses (chosen, rejected), T tokens of the padded sequences after the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportPrivateImportUsage] - where TRL documents them

from align.errors import InputError
from align.integrations.trl_checks import REWARDS, RewardCollator, check_loss_settings, check_trl_version
from align.losses.preference import PreferenceLoss
from align.losses.table import CustomLoss, preference_loss
from align.losses.unpaired import UnpairedLoss

NOT_MODEL_INPUTS = (REWARDS, "completion_mask", "ref_chosen_logps", "ref_rejected_logps")


class _Responses(NamedTuple):
    """What the preference loss and the metrics need of a batch."""

    policy_BK: Tensor  # nats, summed over tokens
    reference_BK: Tensor
    rewards_BK: Tensor
    lengths_BK: Tensor
    mask_BK: Tensor


class RPOTrainer(DPOTrainer):
    """Train a policy with TRL on pairs of responses, with a preference loss of `align` and a reward for each response.

    Data, collation, reference model, precomputed reference log-probabilities, PEFT, distribution and metric names are
    those of `DPOTrainer`; the loss of a batch is the mean over its prompts, as in `align`. Further arguments
    (`train_dataset`, `eval_dataset`, `processing_class`, `peft_config`, …) are those of `DPOTrainer`. Example::

        from datasets import load_dataset
        from trl import DPOConfig

        from align import preference_loss
        from align.integrations.trl import RPOTrainer

        # Columns: prompt, chosen, rejected, score_chosen, score_rejected
        dataset = load_dataset("HuggingFaceH4/ultrafeedback_binarized", split="train_prefs")
        trainer = RPOTrainer(
            "Qwen/Qwen2.5-0.5B-Instruct",
            args=DPOConfig("rpo", learning_rate=3e-7, max_length=2048),
            loss=preference_loss("rpo_bwd_kl", beta=0.2, eta=1.0),
            reward_columns=("score_chosen", "score_rejected"),
            sft_weight=1e-5,
            train_dataset=dataset,
        )
        trainer.train()

    Args:
        model: As for `DPOTrainer`.
        ref_model: As for `DPOTrainer`; not kept if the loss is reference-free.
        args: The configuration. Settings of TRL's own losses (`loss_type`, `beta`, …) must keep their defaults.
        loss: The name of a built-in loss, a loss made by `preference_loss`, or a function with the same arguments that
            returns one value a prompt, shape [B].
        reward_columns: Dataset columns with the reward of the chosen and of the rejected response. Not read by losses
            that use only the order of the rewards (`loss.uses_rewards` is False); for them the chosen response is best.
        sft_weight: Weight of the negative log-likelihood of the response with the higher reward.
        sft_per_token: Whether that term is a mean over the response's tokens instead of a sum.

    Raises `RunError` for a release of TRL that is not known to work, and `InputError` for a setting that would have no
    effect, a missing reward column or a reward that is not a finite number.

    """

    _tag_names = ["trl", "rpo", "align"]
    _name = "RPO"
    _paper = {"title": "Nemotron-4 340B Technical Report", "id": "2406.11704"}

    def __init__(
        self,
        model: str | PreTrainedModel | Any,  # noqa: ANN401 - or a PeftModel, which is optional in TRL
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | None = None,
        *,
        loss: str | PreferenceLoss | CustomLoss | Callable[..., Tensor] = "rpo_bwd_kl",
        reward_columns: tuple[str, str] = ("chosen_reward", "rejected_reward"),
        sft_weight: float = 0.0,
        sft_per_token: bool = False,
        **options: Any,  # noqa: ANN401 - the other arguments of DPOTrainer
    ) -> None:
        check_trl_version(version("trl"))
        check_loss_settings(args)
        if not (math.isfinite(sft_weight) and sft_weight >= 0):
            raise InputError(f"sft_weight must be a number of at least 0, not {sft_weight!r}")
        self.preference_loss = _as_loss(loss)
        self.reward_columns = reward_columns
        self.sft_weight = sft_weight
        self.sft_per_token = sft_per_token
        super().__init__(model, ref_model, args, **options)
        # Afterwards, because precomputing reference log-probabilities in __init__ does not need the rewards
        if self.preference_loss.uses_rewards:
            self.data_collator = RewardCollator(self.data_collator, reward_columns)
        if not self.preference_loss.uses_reference:
            self.ref_model = None

    def compute_ref_log_probs(self, model: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        """Return the reference log-probabilities of the chosen and the rejected responses, each of shape [B]."""
        return super().compute_ref_log_probs(model, {key: inputs[key] for key in inputs if key != REWARDS})

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: DPOConfig, dataset_name: str) -> Any:  # noqa: ANN401 - of the datasets library
        if self.preference_loss.uses_rewards:
            columns = list(next(iter(dataset)))
            for column in self.reward_columns:
                if column not in columns:
                    raise InputError(
                        f"the {dataset_name} dataset has no reward column {column!r}; "
                        f"set reward_columns to two of: {', '.join(columns)}"
                    )
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.preference_loss.uses_rewards:
            known = self._signature_columns
            self._signature_columns = [*known, *(column for column in self.reward_columns if column not in known)]

    def _compute_loss(self, model: Any, inputs: Mapping[str, Tensor], return_outputs: bool) -> Any:  # noqa: ANN401
        model_inputs: dict[str, Any] = {key: inputs[key] for key in inputs if key not in NOT_MODEL_INPUTS}
        model_inputs["use_cache"] = False
        if self.aux_loss_enabled:
            model_inputs["output_router_logits"] = True
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        outputs = model(**model_inputs, labels=labels, fused_lm_head=True)
        responses = self._responses(outputs, inputs)
        preference_B = self.preference_loss(*responses)
        if preference_B.shape != (len(responses.policy_BK),):
            raise InputError(
                f"the preference loss returned shape {list(preference_B.shape)} for {len(responses.policy_BK)} "
                "prompts; it must return one value a prompt"
            )
        best_B = (responses.rewards_BK[:, 1] > responses.rewards_BK[:, 0]).long()
        supervised_B = -_pick(responses.policy_BK, best_B)
        if self.sft_per_token:
            supervised_B = supervised_B / _pick(responses.lengths_BK, best_B)
        loss = preference_B.mean()
        if self.sft_weight:
            loss = loss + self.sft_weight * supervised_B.mean()
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
            self._log_mean("aux_loss", outputs.aux_loss)
        self._log_mean("loss/preference", preference_B)
        self._log_mean("loss/sft", supervised_B)
        self._log_responses(responses, best_B)
        self._log_tokens(outputs, inputs)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**model_inputs)

    def _responses(self, outputs: Any, inputs: Mapping[str, Tensor]) -> _Responses:  # noqa: ANN401 - of the fused head
        """Return log-probabilities, rewards and lengths, each of shape [B, 2]: chosen, rejected."""
        mask_ST = inputs["completion_mask"][:, 1:]
        # Prompt-learning PEFT puts virtual tokens before the real ones
        policy_BK = _side_by_side(outputs.log_probs[:, -mask_ST.shape[1] :].sum(dim=1))
        if not self.preference_loss.uses_reference:
            reference_BK = torch.zeros_like(policy_BK)
        elif self.precompute_ref_logps:
            reference_BK = torch.stack([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]], dim=1)
        else:
            reference = self.model if self.ref_model is None else self.ref_model
            reference_BK = torch.stack(self.compute_ref_log_probs(reference, inputs), dim=1)
        rewards_BK = inputs.get(REWARDS)
        if rewards_BK is None:  # only their order matters
            rewards_BK = policy_BK.new_tensor([[1.0, 0.0]]).expand_as(policy_BK)
        mask_BK = torch.ones_like(policy_BK, dtype=torch.bool)
        return _Responses(policy_BK, reference_BK, rewards_BK, _side_by_side(mask_ST.sum(dim=1)), mask_BK)

    def _log_responses(self, responses: _Responses, best_B: Tensor) -> None:
        """Log implicit rewards and log-probabilities; "chosen" is the response with the higher reward."""
        policy_BK, reference_BK, _, lengths_BK, mask_BK = responses
        implicit_BK = self.preference_loss.implicit_rewards(policy_BK.detach(), reference_BK, lengths_BK, mask_BK)
        chosen_B, rejected_B = _pick(implicit_BK, best_B), _pick(implicit_BK, 1 - best_B)
        self._log_mean("rewards/chosen", chosen_B)
        self._log_mean("rewards/rejected", rejected_B)
        self._log_mean("rewards/accuracies", (chosen_B > rejected_B).float())
        self._log_mean("rewards/margins", chosen_B - rejected_B)
        self._log_mean("logps/chosen", _pick(policy_BK, best_B))
        self._log_mean("logps/rejected", _pick(policy_BK, 1 - best_B))

    def _log_tokens(self, outputs: Any, inputs: Mapping[str, Tensor]) -> None:  # noqa: ANN401 - of the fused head
        """Log the token metrics of `DPOTrainer`, means over the response tokens of all processes."""
        mask_ST = inputs["completion_mask"][:, 1:].bool()
        num_prompts = len(mask_ST) // 2
        num_tokens = mask_ST.shape[1]
        chosen, rejected = slice(None, num_prompts), slice(num_prompts, None)
        for name, values_ST, rows in (
            ("entropy", outputs.entropy, slice(None)),
            ("logits/chosen", outputs.mean_logits, chosen),
            ("logits/rejected", outputs.mean_logits, rejected),
            ("mean_token_accuracy", outputs.is_top1, chosen),
        ):
            values_N = values_ST[rows, -num_tokens:][mask_ST[rows]].detach().float()
            total, count = self._sum(values_N), self._sum(torch.ones_like(values_N))
            self._metrics[self._mode][name].append(total / count if count else 0.0)
        if self._mode == "train":
            self._total_train_tokens += int(self._sum(inputs["attention_mask"])) // (self._tp_size or 1)
        self._metrics[self._mode]["num_tokens"] = [self._total_train_tokens]

    def _log_mean(self, name: str, values: Tensor) -> None:
        """Log the mean of `values` over all processes, which have equally many."""
        gathered: Any = self.accelerator.gather(values.detach())
        self._metrics[self._mode][name].append(gathered.mean().item())

    def _sum(self, values: Tensor) -> float:
        """Return the sum of `values` over all processes."""
        gathered: Any = self.accelerator.gather_for_metrics(values.sum())
        return gathered.sum().item()

    @property
    def _mode(self) -> str:
        model: Any = self.model
        return "train" if model.training else "eval"


def _as_loss(loss: str | PreferenceLoss | CustomLoss | Callable[..., Tensor]) -> PreferenceLoss | CustomLoss:
    made = preference_loss(loss) if isinstance(loss, str) else loss
    if isinstance(made, UnpairedLoss):
        raise InputError("RPOTrainer compares pairs of responses; for a loss on labels use TRL's KTOTrainer")
    if isinstance(made, PreferenceLoss) and made.uses_weights:
        raise InputError(f"RPOTrainer does not compute the weights of weighting: {made.weighting}")
    return made if isinstance(made, PreferenceLoss | CustomLoss) else CustomLoss(made)


def _side_by_side(values_S: Tensor) -> Tensor:
    """Return values of shape [2 B], the chosen ones before the rejected ones, in shape [B, 2]."""
    return torch.stack(values_S.chunk(2), dim=1)


def _pick(values_BK: Tensor, index_B: Tensor) -> Tensor:
    """Return one value of each prompt, shape [B]."""
    return values_BK.gather(1, index_B[:, None])[:, 0]
