"""The types of a recipe: as written, and with its steps expanded."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field

from align.accounting.settings import AccountingSettings
from align.config import Settings, stable_hash
from align.content_hash import content_of
from align.errors import Location
from align.models.settings import PolicySettings
from align.pipeline import MAX_NAME, Step
from align.registry import pick
from align.stages.inputs.context import StepInputs
from align.stages.inputs.sources import SourceSettings
from align.stages.table import AnyStage
from align.train.settings import TrackingSettings


class WrittenRecipe(Settings):
    """The keys of a recipe file."""

    run: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=MAX_NAME,
        description="Name of the run's folder below `runs`.",
    )
    runs: str = Field(default="runs", description="Folder of all runs.")
    seed: int = Field(default=0, description="Seed of data order, procedural rows and samples.")
    accounting: AccountingSettings = Field(
        default=AccountingSettings(), description="Price of a device-hour, currency, and electricity grid."
    )
    tracking: TrackingSettings = Field(
        default=TrackingSettings(), description="Experiment trackers of the training steps."
    )
    policy: PolicySettings = Field(description="The model that the recipe starts from, and how policies run.")
    data: dict[str, SourceSettings] = Field(
        default_factory=dict[str, SourceSettings], description="Sources of rows, by name."
    )
    steps: dict[str, AnyStage] = Field(description="Steps by name, in the order in which they run.")


class Recipe(WrittenRecipe):
    """A recipe whose steps are expanded: rounds one by one, and an evaluation of each policy."""

    written: dict[str, tuple[str, ...]] = Field(
        default_factory=dict[str, tuple[str, ...]],
        description="Of each step the written step that it comes from, and the setting there that holds its own.",
    )

    @property
    def root(self) -> Path:
        """Folder of the run."""
        return Path(self.runs) / self.run

    def expanded(self, name: str) -> list[str]:
        """Return the steps that `name` stands for: itself, or all that the written step became."""
        if name in self.steps:
            return [name]
        origins = {written[0]: written[0] for written in self.written.values()}
        pick({**origins, **dict.fromkeys(self.steps, "")}, name, "step")
        return [step for step, written in self.written.items() if written[0] == name]

    def location(self, name: str, loc: Location) -> Location:
        """Return where the recipe writes a setting of an expanded step.

        The samples of a round have theirs below the preference step's `generate`, and share its `data` and `policy`.
        """
        origin, *below = self.written[name]
        if below and loc[:1] == ("data",):
            return ("steps", origin, *loc)
        if below and loc[:1] == ("policies",):
            return ("steps", origin, "policy", *loc[1:])
        return ("steps", origin, *below, *loc)

    def inputs(self, name: str) -> tuple[str, ...]:
        """Return the steps whose folders the step reads."""
        names = [each.name for each in self.steps[name].inputs() if each.name in self.steps]
        return tuple(dict.fromkeys(names))

    def source(self, name: str) -> SourceSettings:
        """Return the rows called `name`: a source, or what a step makes."""
        step = self.steps.get(name)
        rows = None if step is None else step.rows(self.root / name)
        return rows if rows is not None else pick(self.data, name, "source of data")

    def resolved(self, name: str, content: Any = content_of) -> StepInputs:  # noqa: ANN401 - a cached content_of
        """Return what the step reads: settings of its sources, and folders of earlier steps."""
        step = self.steps[name]
        return StepInputs(
            seed=self.seed,
            policy=self.policy,
            sources={source: self.source(source) for source in step.shares()},
            folders={other: self.root / other for other in self.inputs(name)},
            run=self.root,
            tracking=self.tracking,
            content=content,
        )

    def pipeline(self, content: Any = None) -> list[Step]:  # noqa: ANN401 - a cached content_of
        """Return the steps for the scheduler, each with the hash of everything that decides its content."""
        content = content or cache(content_of)  # a file that several steps read is hashed once
        return [
            Step(name, self.inputs(name), stable_hash(step.cache_key(self.resolved(name, content))))
            for name, step in self.steps.items()
        ]
