"""Settings of policies and reward models, and the checks on them that need no model. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from align.config import Settings
from align.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

GGUF = "gguf:"  # prefix of a path that names a GGUF file

# Aggregation weights of Nemotron-4-340B-Reward (Wang et al. 2024, HelpSteer2, sec. 3).
PUBLISHED_WEIGHTS = {"helpfulness": 0.3, "correctness": 0.74, "coherence": 0.46, "complexity": 0.47, "verbosity": -0.33}
HELPSTEER = tuple(PUBLISHED_WEIGHTS)


SaveDtype = Literal["original", "fp32", "bf16"]


class LoraSettings(Settings):
    """Low-rank adapters (Hu et al. 2021) on linear layers."""

    rank: int = Field(default=16, ge=1, description="Rank of the adapter matrices.")
    alpha: int = Field(default=32, gt=0, description="Adapter outputs are multiplied by alpha / rank.")
    targets: str | list[str] = Field(
        default="all-linear",
        description=(
            "Modules that get adapters: a list of names, a regular expression for whole names, or 'all-linear': every "
            "linear layer but the LM head."
        ),
    )
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description=(
            "Dropout of the adapters' inputs in training. The mask of a token depends on its prefix and the step only, "
            "so that results do not depend on batching; responses to a prompt share its masks."
        ),
    )
    dora: bool = Field(
        default=False, description="Also train the magnitude of each row of weights (DoRA, Liu et al. 2024)."
    )
    rslora: bool = Field(
        default=False,
        description="Multiply adapter outputs by alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski 2023).",
    )
    modules_to_save: list[str] = Field(
        default_factory=list[str],
        description="Names of modules whose weights are all trained, and saved with the adapters, such as lm_head.",
    )
    adapters: Literal["merged", "continued", "stacked"] = Field(
        default="merged",
        description=(
            "How a step saves its adapters and treats those of the step before it: 'merged' folds them into the "
            "weights, 'continued' saves adapters only and trains the existing ones further, 'stacked' saves adapters "
            "only and trains new ones on top of the existing ones, which are frozen."
        ),
    )

    @field_validator("targets")
    @classmethod
    def _check_targets(cls, targets: str | list[str]) -> str | list[str]:
        try:
            re.compile(targets if isinstance(targets, str) else "")
        except re.error as error:
            raise InputError(f"{targets!r} is not a regular expression: {error}; a list names modules") from error
        return targets

    @model_validator(mode="after")
    def _check_stacked(self) -> LoraSettings:
        if self.adapters == "stacked" and (self.dora or self.modules_to_save):
            name = "dora" if self.dora else "modules_to_save"
            raise InputError("cannot be combined with adapters: stacked; use 'merged' or 'continued'", (name,))
        return self

    @property
    def merge(self) -> bool:
        """Return whether adapters are folded into the weights when a step is saved."""
        return self.adapters == "merged"


class PolicySettings(Settings):
    """The model to load and how it runs."""

    path: str | None = Field(
        default=None,
        description="Model to load: a Hub ID, a folder, or 'gguf:FILE'. Exactly one of path and from_config is set.",
    )
    from_config: dict[str, Any] | None = Field(
        default=None,
        description=(
            "Configuration of a randomly initialized model: model_type (a transformers architecture, such as llama) "
            "and its fields."
        ),
    )
    tokenizer: str | None = Field(
        default=None, description="Tokenizer to load: a Hub ID or a folder. Default: the model's tokenizer."
    )
    chat_template: str | None = Field(
        default=None,
        description=(
            "Chat template: the name of one of the tokenizer's own, a built-in name, or a Jinja file. Default: the "
            "tokenizer's only or default template."
        ),
    )
    forward: Literal["auto", "tree", "plain"] = Field(
        default="auto",
        description=(
            "Forward pass: 'tree' computes shared prefixes once, 'plain' pads sequences, 'auto' uses the tree where "
            "the architecture supports it."
        ),
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass to save memory."
    )
    lora: LoraSettings | None = Field(default=None, description="Train low-rank adapters. Default: train all weights.")
    quantize: Literal["nf4"] | None = Field(
        default=None,
        description="Load the frozen base weights in 4 bits (QLoRA, Dettmers et al. 2023). Requires lora.",
    )
    save_dtype: SaveDtype = Field(
        default="original",
        description=(
            "Dtype of saved weights: that of the model's own files ('original'; fp32 for GGUF files, new models and "
            "adapters), fp32 or bf16. `train.weights` is the dtype in training."
        ),
    )
    seed: int = Field(default=0, description="Seed of randomly initialized weights and adapters.")

    @model_validator(mode="after")
    def _check_quantize(self) -> PolicySettings:
        if self.quantize and self.lora is None:
            raise InputError("weights in 4 bits cannot be trained; set lora, or leave quantize out", ("quantize",))
        # SmolLM2-135M, 16 supervised steps: the held-out loss fell from 3.29 to 1.32, and rose back to 3.25 after
        # the adapters had been merged and the result quantized again.
        if self.quantize and self.lora is not None and self.lora.merge:
            raise InputError(
                "the next step would quantize the merged adapters and lose most of what they learned; "
                "set lora.adapters to 'continued' or 'stacked'",
                ("quantize",),
            )
        return self

    @property
    def is_plain_checkpoint(self) -> bool:
        """Return whether `path` is a folder or Hub ID whose weights are loaded unchanged."""
        path = self.path
        if path is None or path.startswith(GGUF) or exported_gguf(path) is not None:
            return False
        return not is_adapter(path) and self.quantize is None


class HeadSettings(Settings):
    """Attributes, aggregation weights and training of a reward head."""

    attributes: tuple[str, ...] | None = Field(
        default=None,
        description=(
            "Names of the attributes that the head predicts. Default: those of the loaded reward model, else the five "
            "HelpSteer attributes for regression and 'reward' for Bradley-Terry."
        ),
    )
    weights: tuple[float, ...] | None = Field(
        default=None,
        description=(
            "Weight of each attribute in the scalar reward. Default: those of the loaded reward model, else the "
            "published weights for the HelpSteer attributes (Wang et al. 2024), else equal weights that sum to 1."
        ),
    )
    lr_multiplier: float = Field(
        default=1.0, gt=0, description="Learning rate of the head as a multiple of the learning rate of the decoder."
    )
    only: bool = Field(
        default=False,
        description=(
            "Train the head only and freeze the decoder (ArmoRM, Wang et al. 2024): suited to few rows, at about a "
            "third of the cost."
        ),
    )


class Rating(NamedTuple):
    """Attribute names in the order of the head, and the weight of each in the scalar reward."""

    names: tuple[str, ...]
    weights: tuple[float, ...]

    def rewards(self, scores_KA: Tensor) -> list[float]:
        """Return the scalar reward of each of K responses: the weighted sum of its A attribute scores, in fp64."""
        scores_KA = scores_KA.double()
        return (scores_KA @ scores_KA.new_tensor(self.weights)).tolist()


def is_adapter(path: str) -> bool:
    """Return whether the folder holds adapters only."""
    return os.path.isfile(Path(path) / "adapter_config.json")  # False for a name that is no path, too


def exported_gguf(path: str) -> str | None:
    """Return `gguf:FILE` for the folder of an exported policy: one GGUF file and no other weights; else None."""
    files = (
        [name for name in os.listdir(path) if name.endswith((".gguf", ".safetensors"))] if os.path.isdir(path) else []
    )
    return f"{GGUF}{Path(path) / files[0]}" if len(files) == 1 and files[0].endswith(".gguf") else None


def resolve_rating(head: HeadSettings, saved: Rating | None, *, default: Sequence[str]) -> Rating:
    """Return the attributes and weights from the settings, else from the saved model, else the `default` attributes."""
    names = head.attributes or (saved.names if saved else tuple(default))
    if saved is not None and names != saved.names:
        raise InputError(
            f"this reward model rates {', '.join(saved.names)}, not {', '.join(names)}", ("head", "attributes")
        )
    if len(set(names)) < len(names) or not all(name.strip() for name in names):
        shown = ", ".join(map(repr, names))
        raise InputError(f"attribute names must be distinct and not empty, not {shown}", ("head", "attributes"))
    return Rating(names, attribute_weights(names, head.weights or (saved.weights if saved else None)))


def attribute_weights(names: Sequence[str], given: tuple[float, ...] | None) -> tuple[float, ...]:
    """Return the given weights, else the published ones for HelpSteer attributes, else equal weights that sum to 1."""
    if given is None:
        if set(names) == set(HELPSTEER):
            return tuple(PUBLISHED_WEIGHTS[name] for name in names)
        return (1 / len(names),) * len(names)  # NeMo-Aligner's merge_attributes without weights
    if len(given) != len(names):
        raise InputError(f"{len(given)} weights for {len(names)} attributes ({', '.join(names)})", ("head", "weights"))
    return given


def kept_adapters_error(lora: LoraSettings) -> InputError:
    """Return the error for adapters that are to be kept on a model that no library loads as their base."""
    return InputError(
        f"{lora.adapters!r} needs a base that is a folder or Hub ID; import the randomly initialized model or GGUF "
        "file in a step of the stage import first",
        ("policy", "lora", "adapters"),
    )


def check_adapters(settings: PolicySettings, head: HeadSettings) -> None:
    """Reject adapter settings that a reward model does not support."""
    if settings.lora is not None and not settings.lora.merge:
        raise InputError(
            f"a reward model is saved with its adapters merged; set it to 'merged', not {settings.lora.adapters!r}",
            ("policy", "lora", "adapters"),
        )
    if settings.lora is not None and head.only:
        raise InputError("the decoder is frozen, so it cannot have adapters; leave policy.lora out", ("head", "only"))
