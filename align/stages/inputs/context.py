"""What a step is given: its resolved inputs, and the context that it runs in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from align.content_hash import STEP, content_of
from align.distributed.progress import Progress
from align.errors import RunError
from align.models.settings import PolicySettings, Rating
from align.stages.inputs.sources import SourceSettings
from align.train.tracking import TrackingSettings

if TYPE_CHECKING:
    from align.distributed.processes import Processes


class ModelSpec(NamedTuple):
    """The model of a step, before any step has run."""

    settings: PolicySettings
    vocab_size: int | None = None  # of the tokenizer that an import step will train
    rating: Rating | None = None  # of a reward model


class TrainingStart(NamedTuple):
    """The policy that the training of another one started from."""

    path: str = ""
    step: str | None = None  # that made it; None for the recipe's own policy
    lacking: str = ""  # why there is none

    @property
    def name(self) -> str:
        """The step that made it, or the path of the recipe's own policy."""
        return self.step or self.path


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """What a step reads, resolved: the settings of its sources, and the folders of earlier steps."""

    seed: int
    policy: PolicySettings  # the recipe's own policy
    sources: Mapping[str, SourceSettings]  # by name; rows that a step makes are a source, too
    folders: Mapping[str, Path]  # of the steps that it reads, by name
    run: Path  # folder of the run
    stands_for: Mapping[str, str] = field(default_factory=dict[str, str])  # step of a search's trial -> step
    training_start: TrainingStart | None = None  # of the evaluated policy, where a step compares them
    tracking: TrackingSettings = TrackingSettings()
    content: Callable[[str], str] = content_of  # hash of a file, folder or module; cached over the steps of a run
    hashed: Mapping[str, str] = field(default_factory=dict[str, str])  # path of rows -> hash that the step's key has

    def check_unchanged(self, *sources: SourceSettings) -> None:
        """Raise `RunError` for rows that are no longer those of the step's key; call it when they have been read."""
        for source in sources:
            if source.path in self.hashed and content_of(source.path) != self.hashed[source.path]:
                raise RunError(
                    f"{source.path}: changed after the run had begun and before the step had read it; rerun the same "
                    "command, which reads it again"
                )

    def path_of(self, model: str) -> str:
        """Return the folder of the step that `step:NAME` names; a path or Hub ID is returned as it is."""
        return str(self.folders[model.removeprefix(STEP)]) if model.startswith(STEP) else model

    def sampled_name(self, policy: str) -> str:
        """Return the name by which a policy is sampled: in a trial of a search the same as without the search."""
        return self.stands_for.get(policy, policy)

    def policy_from(self, start: str | None) -> PolicySettings:
        """Return the policy in an earlier step's folder, run as the recipe says; the recipe's own for None."""
        if start is None:
            return self.policy
        changes = {"path": str(self.folders[start]), "from_config": None, "tokenizer": None, "chat_template": None}
        return self.policy.model_copy(update=changes)


def policy_key(inputs: StepInputs) -> list[Any]:
    """Return what decides how a step runs the recipe's policy: settings, tokenizer and chat template."""
    policy = inputs.policy
    files = [inputs.content(name) for name in (policy.tokenizer, policy.chat_template) if name]
    return [policy.model_dump(mode="json", exclude={"gradient_checkpointing"}), *files]


@dataclass(slots=True, kw_only=True)
class RunContext:
    """Everything that a step's `run` is given besides its settings."""

    name: str
    folder: Path  # working folder; renamed to the step's own once it is complete
    inputs: StepInputs
    progress: Progress
    identity: Mapping[str, Any] = field(default_factory=dict[str, Any])  # of the inputs, for what a kill leaves behind
    _processes: Processes | None = None

    @property
    def processes(self) -> Processes:
        """The processes of this launch. The first access joins them, each with a whole model."""
        if self._processes is None:
            from align.distributed.processes import init_processes  # noqa: PLC0415 - imports torch

            self._processes = init_processes()
        return self._processes
