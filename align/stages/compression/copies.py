"""Stages that write a changed copy of one policy."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from typing import ClassVar, Self

from pydantic import Field

from align.errors import InputError
from align.stages.base import ONE_PROCESS, POLICY, Input, Stage, latest_policy
from align.stages.inputs.context import ModelSpec, StepInputs


class PolicyCopy(Stage, ABC):
    """A step that writes a changed copy of a policy, in one process."""

    policy: str | None = Field(
        default=None, description="Step whose policy is copied; by default the last policy before the step."
    )

    makes: ClassVar[str] = POLICY
    refused = ONE_PROCESS

    def resolve(self, before: Mapping[str, Stage]) -> Self:
        """Return the step with the policy that it copies."""
        return self if self.policy is not None else self.model_copy(update={"policy": latest_policy(before)})

    @property
    def start(self) -> str | None:
        """The step whose policy is copied."""
        return self.policy

    def inputs(self) -> list[Input]:
        """Return the policy."""
        return [Input(self.policy, (POLICY,), ("policy",))] if self.policy is not None else []

    def validate_inputs(self, inputs: StepInputs) -> None:
        """Raise if no step makes a policy."""
        if self.policy is None:
            raise InputError("no step before it makes a policy; import one in a step of the stage import", ("policy",))


class CompressedCopy(PolicyCopy, ABC):
    """A step that writes a smaller copy of a policy."""

    is_compressed: ClassVar[bool] = True  # later steps evaluate the file, and start from it only if they name it

    def model(self, before: ModelSpec) -> ModelSpec:
        """Return the model of the copy, whose adapters are merged."""
        return before._replace(settings=before.settings.model_copy(update={"lora": None, "quantize": None}))
