"""The types of a recipe: as written, and with its steps expanded."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from pydantic import Field

from align.accounting.budget import BudgetSettings
from align.accounting.settings import AccountingSettings
from align.config import Settings, stable_hash
from align.content_hash import content_of
from align.errors import InputError, Location
from align.models.settings import PolicySettings
from align.pipeline import MAX_NAME, Step
from align.registry import pick
from align.stages.base import POLICY
from align.stages.inputs.context import StepInputs, TrainingStart
from align.stages.inputs.sources import SourceSettings
from align.stages.table import AnyStage
from align.train.tracking import TrackingSettings
from align.workflow.recipe.retention import Keep
from align.workflow.search.settings import SearchedSteps, SearchSettings


class WrittenRecipe(Settings):
    """The keys of a recipe file."""

    run: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=MAX_NAME,
        examples=["my-model.2"],
        description="Name of the run's folder below `runs`.",
    )
    runs: str = Field(default="runs", description="Folder of all runs.")
    seed: int = Field(default=0, description="Seed of data order, of built-in tasks and of sampling.")
    accounting: AccountingSettings = Field(
        default=AccountingSettings(), description="Price of a device-hour, currency, and electricity grid."
    )
    budget: BudgetSettings = Field(
        default=BudgetSettings(),
        description="Caps on FLOPs, hours, money and energy of the whole run, which stops at a checkpoint.",
    )
    tracking: TrackingSettings = Field(
        default=TrackingSettings(), description="Experiment trackers of the training steps."
    )
    keep: Keep = Field(
        default="all",
        description=(
            "Which policies keep their weights once every step that reads them has finished: all of them, the last one "
            "of the recipe, or the best one, as {best: TASK.METRIC, greater_is_better: true | false}. By default the "
            "highest value is the best; the lowest for nll, kl, perplexity, unparsable, repetition, calibration error, "
            "alignment and uniformity."
        ),
    )
    policy: PolicySettings = Field(description="The model that the recipe starts from, and how policies run.")
    data: dict[str, SourceSettings] = Field(
        default_factory=dict[str, SourceSettings], description="Sources of rows, by name."
    )
    search: dict[str, SearchSettings] = Field(
        default_factory=dict[str, SearchSettings],
        description="Searches of settings, by the name of the searched step.",
    )
    steps: dict[str, AnyStage] = Field(description="Steps by name, in the order in which they run.")


class Sections(Settings):
    """The sections of a recipe that a step reads."""

    policy: PolicySettings = Field(description="The model that the recipe starts from, and how policies run.")
    data: dict[str, SourceSettings] = Field(description="Sources of rows, by name.")


class Recipe(WrittenRecipe):
    """A recipe whose steps are expanded: rounds one by one, and an evaluation of each policy."""

    written: dict[str, tuple[str, ...]] = Field(
        default_factory=dict[str, tuple[str, ...]],
        description="Maps each expanded step to the step and setting of the recipe file that define it.",
    )
    searched: dict[str, SearchedSteps] = Field(
        default_factory=dict[str, SearchedSteps], description="The steps of each search, by its name under `search`."
    )
    own: dict[str, Sections] = Field(
        default_factory=dict[str, Sections],
        description="Sections that steps of trials read in place of the recipe's, by the name of the step.",
    )

    @property
    def root(self) -> Path:
        """Folder of the run."""
        return Path(self.runs) / self.run

    @property
    def copies(self) -> dict[str, str]:
        """Maps steps to those of a search's chosen trial whose folder they copy in place of running."""
        return {step: trial for each in self.searched.values() for step, trial in each.copies.items()}

    @property
    def stands_for(self) -> dict[str, str]:
        """Maps each step before a searched one that is made for trials to that of the recipe."""
        made = [steps for searched in self.searched.values() for steps in searched.earlier.values()]
        return {name: step for steps in made for name, step in steps.items()}

    def sections(self, name: str) -> Sections | Recipe:
        """Return the sections that a step reads: its own, or those of the recipe."""
        return self.own.get(name, self)

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

    @contextmanager
    def locating(self, name: str) -> Generator[None]:
        """Locate the errors that a step raises in the recipe as it is written.

        Locations that begin with a section of the recipe are kept; others are those of the step's own settings. Rows
        that a step has made are not written in the recipe, and their errors name the file alone.
        """
        try:
            yield
        except InputError as error:
            for part in error.parts:
                part.loc = self._written(name, part.loc)
            raise

    def _written(self, name: str, loc: Location) -> Location:
        if loc[:1] == ("steps",) and loc[1:2] and loc[1] in self.steps:
            return self.location(str(loc[1]), loc[2:])
        if loc[:1] == ("data",) and len(loc) > 1:
            return loc if loc[1] in self.data else ()
        is_own = bool(loc) and (loc == ("data",) or loc[0] not in WrittenRecipe.model_fields)
        return self.location(name, loc) if is_own else loc

    def inputs(self, name: str) -> tuple[str, ...]:
        """Return the steps whose folders the step reads: that which it copies, or those of its settings."""
        copied = self.copies.get(name)
        return self._named(name) if copied is None else (copied,)

    def _named(self, name: str) -> tuple[str, ...]:
        """Return the steps that the settings of a step name."""
        names = list[str]()
        data = self.sections(name).data
        for each in self.steps[name].inputs():
            made_by = data[each.name].made_by if each.name in data else None
            names.append(each.name if made_by is None else made_by[0])
        if (start := self._training_start(name)) is not None and start.step is not None:
            names.append(start.step)
        return tuple(dict.fromkeys(other for other in names if other in self.steps))

    def ancestors(self, name: str) -> set[str]:
        """Return the steps that a step depends on, directly or indirectly."""
        found = set[str]()
        waiting = [name]
        while waiting:
            new = set(self.inputs(waiting.pop())) - found
            found |= new
            waiting += new
        return found

    def graph(self) -> list[Step]:
        """Return the steps with the names of those that they read, and without their hashes."""
        return [Step(name, self.inputs(name), key="") for name in self.steps]

    def _training_start(self, name: str) -> TrainingStart | None:
        """Return the policy that the training of a step's policy started from, for a step that compares them."""
        step = self.steps[name]
        if not step.compares_with_start:
            return None
        maker = self.steps.get(step.start or "")
        if maker is None or maker.training_precision is None:
            return TrainingStart(lacking="no step of the recipe trains it")
        if maker.start is not None:
            return TrainingStart(str(self.root / maker.start), maker.start)
        if (path := self.sections(name).policy.path) is not None:
            return TrainingStart(path)
        return TrainingStart(lacking="its training started from random weights")

    def metric_columns(self, *, only_policies: bool = False) -> dict[str, str]:
        """Return the metrics that models of the recipe are evaluated by: TASK.METRIC -> column of the table."""
        found: dict[str, str] = {}
        for name, step in self.steps.items():
            if step.start is not None and not (only_policies and self.steps[step.start].makes != POLICY):
                columns = step.columns(self.resolved(name))
                found |= {f"{column.loc[-1]}.{column.metric}": column.name for column in columns}
        return found

    def source(self, name: str, reader: str = "") -> SourceSettings:
        """Return the rows called `name`: a source, as the step `reader` has it, or what a step makes."""
        step = self.steps.get(name)
        rows = None if step is None else step.rows(self.root / name)
        return rows if rows is not None else pick(self.sections(reader).data, name, "source of data")

    def _located(self, source: SourceSettings) -> SourceSettings:
        """Return a source with the file of its rows in place of the step that makes them."""
        if source.made_by is None:
            return source
        name, file = source.made_by
        format_ = "native" if source.format == "auto" else source.format
        return source.model_copy(update={"path": str(self.root / name / file), "format": format_})

    def resolved(self, name: str, content: Callable[[str], str] = content_of, *, located: bool = True) -> StepInputs:
        """Return what the step reads: settings of its sources, and folders of earlier steps.

        Sources keep `step:NAME/FILE` as their path if not `located`: a key does not depend on the folder of the run.
        """
        step = self.steps[name]
        sources = {source: self.source(source, name) for source in step.shares()}
        return StepInputs(
            seed=self.seed,
            policy=self.sections(name).policy,
            sources={key: self._located(source) for key, source in sources.items()} if located else sources,
            folders={other: self.root / other for other in self._named(name)},
            run=self.root,
            stands_for=self.stands_for,
            training_start=self._training_start(name),
            tracking=self.tracking,
            content=content,
        )

    def pipeline(self, content: Callable[[str], str] | None = None) -> list[Step]:
        """Return the steps for the scheduler, each with the hash of everything that decides its content."""
        content = content or cache(content_of)  # a file that several steps read is hashed once
        copies = self.copies
        keys = {
            name: "copy" if name in copies else step.cache_key(self.resolved(name, content, located=False))
            for name, step in self.steps.items()
        }
        return [Step(name, self.inputs(name), stable_hash(key)) for name, key in keys.items()]
