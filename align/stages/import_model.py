"""Stage `import`: put a policy into a folder of the run."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from align.errors import InputError, Location
from align.stages.base import ONE_PROCESS, POLICY, Stage
from align.stages.costs.estimates import Estimate, Planning, model_disk
from align.stages.inputs.context import ModelSpec, RunContext, StepInputs, policy_key


class ImportModel(Stage):
    """Import a pretrained model, or initialize one randomly, as the policy of a step."""

    stage: Literal["import"] = Field(default="import", description="Put a model into a folder.")
    path: str | None = Field(
        default=None,
        description="Model to import in place of the recipe's policy, such as a larger student.",
    )
    from_config: dict[str, Any] | None = Field(
        default=None, description="Configuration of a randomly initialized model in place of the recipe's policy."
    )
    vocab_size: int | None = Field(
        default=None, ge=1, description="Train a tokenizer of this size on the texts of the built-in tasks."
    )

    makes: ClassVar[str] = POLICY
    refused = ONE_PROCESS

    def needs_policy(self) -> bool:
        """Return whether the step reads the recipe's own policy."""
        return self.path is None and self.from_config is None

    def validate_inputs(self, inputs: StepInputs) -> None:
        """Raise if the step cannot run, or if a new tokenizer would replace one that the model needs."""
        if self.path is not None and self.from_config is not None:
            raise InputError("give either path or from_config (a configuration), not both", ("from_config",))
        if self.vocab_size is None:
            return
        if (path := self._path(inputs)) is not None:
            raise InputError(
                f"vocab_size trains a new tokenizer for policy.from_config; {path} already has a tokenizer",
                ("vocab_size",),
            )
        if inputs.policy.tokenizer is not None:
            raise InputError(
                f"a new tokenizer would take the place of {inputs.policy.tokenizer!r}; leave it or policy.tokenizer "
                "out",
                ("vocab_size",),
            )

    def named_models(self) -> list[tuple[str, Location]]:
        """Return the model to import."""
        return [(self.path, ("path",))] if self.path is not None else []

    def cache_key(self, inputs: StepInputs) -> list[Any]:
        """Return what decides the imported policy: settings, and the content of the model, tokenizer and template."""
        path = self._path(inputs)
        return [*super().cache_key(inputs), *policy_key(inputs), *([inputs.content(path)] if path else [])]

    def is_copy(self, inputs: StepInputs) -> bool:
        """Return whether a model is imported; a new one is made from its seed."""
        return self._path(inputs) is not None

    def _path(self, inputs: StepInputs) -> str | None:
        """Return the model that is imported; None for a new one."""
        return None if self.from_config is not None else self.path or inputs.policy.path

    def model(self, before: ModelSpec) -> ModelSpec:
        """Return the policy as it will be in the step's folder: whole, without adapters or quantization."""
        changes: dict[str, Any] = {"lora": None, "quantize": None}
        if self.path is not None:
            changes |= {"path": self.path, "from_config": None, "tokenizer": None}
        if self.from_config is not None:
            changes |= {"path": None, "from_config": self.from_config}
        return ModelSpec(before.settings.model_copy(update=changes), self.vocab_size)

    def estimate(self, planning: Planning) -> Estimate:
        """Return the disk space of the policy."""
        weights, disk = planning.num_weights, planning.model_bytes
        return Estimate(name=planning.name, stage=self.stage, rows=0, weights=weights, disk=disk)

    def disk(self, model_bytes: int) -> tuple[int, int]:
        """Return the bytes of the policy, and of what is written beside it."""
        return model_disk(model_bytes)

    def run(self, context: RunContext) -> dict[str, Any]:
        """Write the policy as a plain Hugging Face folder."""
        from align.stages.training.models import import_policy  # noqa: PLC0415 - imports torch

        return import_policy(self.model(ModelSpec(context.inputs.policy)), context)
