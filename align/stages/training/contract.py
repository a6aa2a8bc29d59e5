"""What the work of a training step asks of its settings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from align.data.mixing import Mixture
from align.data.rejections import Rejections
from align.models.settings import HeadSettings
from align.records import Comparison, Demonstration, Located
from align.stages.inputs.context import ModelSpec
from align.stages.inputs.sources import SourceSettings
from align.train.selection.settings import SelectionSettings
from align.train.settings import RewardLoss, TrainSettings

if TYPE_CHECKING:
    from align.data.token_groups import TokenGroup

Groups = Iterable["Located[TokenGroup]"]


class TrainingSettings(Protocol):
    """Settings of a step that trains a model on rows."""

    @property
    def stage(self) -> str:
        """Name of the stage."""
        ...

    @property
    def launch(self) -> str | None:
        """Config file of `accelerate launch`."""
        ...

    @property
    def start(self) -> str | None:
        """The step whose model this one starts from."""
        ...

    @property
    def resume(self) -> str | None:
        """The step whose training this one continues; None to start anew."""
        ...

    @property
    def train(self) -> TrainSettings:
        """Optimizer, schedule, batch and checkpoints."""
        ...

    @property
    def selection(self) -> SelectionSettings | None:
        """How the rows of each optimizer step are chosen; None to use all."""
        ...

    @property
    def record_kind(self) -> type[Demonstration | Comparison]:
        """The kind of record that the step trains on."""
        ...

    @property
    def has_lm_head(self) -> bool:
        """Whether the trained model predicts tokens."""
        ...

    @property
    def needs_reference(self) -> bool:
        """Whether the loss needs reference log-probabilities."""
        ...

    @property
    def needs_kl(self) -> bool:
        """Whether the loss needs an estimate of the KL divergence from the reference before every step."""
        ...

    def shares(self) -> dict[str, float]:
        """Return the names of the rows that the step reads, each with its share of an epoch."""
        ...

    def mixture(self, sizes: tuple[int, ...], seed: int) -> Mixture:
        """Return which rows of several sources of these sizes an epoch takes."""
        ...

    def attributes(self, spec: ModelSpec) -> tuple[str, ...]:
        """Return the attributes that the model rates, given the model that the step starts from."""
        ...

    def filter_groups(
        self, groups: Groups, rejections: Rejections, *, attributes: Sequence[str], source: SourceSettings
    ) -> Groups:
        """Return the groups that contribute to the loss; the others are counted by reason."""
        ...


class RewardSettings(TrainingSettings, Protocol):
    """Settings of a step that trains a reward model."""

    @property
    def loss(self) -> RewardLoss:
        """Regression, or a form of Bradley-Terry."""
        ...

    @property
    def head(self) -> HeadSettings:
        """Attributes of the reward and how the head learns."""
        ...

    @property
    def subset(self) -> str | None:
        """Key of the rows' metadata that the report counts pairs by."""
        ...

    @property
    def default_attributes(self) -> tuple[str, ...]:
        """Attributes of a new head for which the settings name none."""
        ...
