"""The base class of stages: what the workflow needs to know of every kind of step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from pydantic import Field, model_validator

from align.config import Settings
from align.content_hash import code_of
from align.distributed.launch import num_launched
from align.distributed.slurm import SlurmSettings
from align.errors import InputError, Location
from align.inference.settings import EngineSettings
from align.stages.inputs.opening import first_records
from align.stages.inputs.sources import SourceSettings, source_key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from align.data.token_groups import TokenGroup
    from align.stages.costs.estimates import Estimate, Planning
    from align.stages.inputs.context import ModelSpec, RunContext, StepInputs

# What a step's folder holds, as errors name it
POLICY, REWARD_MODEL, GROUPS, SCORES = "a policy", "a reward model", "groups of responses", "scores"
SYNTHETIC = "synthetic rows"
EMBEDDER = "an encoder of texts"
SOURCE = "a source of data"
TRACKING = "tracking"  # folder of the run with the files of experiment trackers
REFERENCES = "references"  # folder of the run with the cached reference log-probabilities
EMBEDDINGS = "embeddings"  # folder of the run with the cached vectors of texts
RESPONSES = "responses"  # folder of the run with the answers of teachers, by step

# `refused` of most stages
ONE_PROCESS = {
    "launch": "a step of this stage runs in one process; leave launch out",
    "slurm": "a step of this stage runs in one process on this machine; leave slurm out",
}


class Input(NamedTuple):
    """A step or a source that a step reads."""

    name: str
    kinds: tuple[str, ...]  # what it must be: SOURCE, or what a step makes
    loc: Location  # the setting that names it, below the step
    also: tuple[str, ...] = ()  # names of other things that the setting may have, for the error of a wrong one


class Column(NamedTuple):
    """A column of the results table that a step fills."""

    name: str
    loc: Location  # of its settings, below the step
    asked: object  # equal for evaluations that ask the same in the same way
    metric: str = ""  # as the task calls it


class UsedEngine(NamedTuple):
    """An engine of a step, with the policies and models that it samples."""

    engine: EngineSettings
    loc: Location  # of its settings, below the step
    policies: Sequence[str]  # steps that make them
    models: Sequence[str] = ()  # that no step makes


class Placed(NamedTuple):
    """A step of the expanded recipe."""

    name: str
    step: Stage
    below: Location = ()  # the setting of the written step that holds this step's settings
    after: str | None = None  # the step that it directly follows; at its place in the recipe where left out


def latest_policy(before: Mapping[str, Stage]) -> str | None:
    """Return the last of the steps that makes a policy, compressed copies left out."""
    steps = reversed(list(before))
    return next((name for name in steps if before[name].makes == POLICY and not before[name].is_compressed), None)


class LaunchSettings(Settings):
    """Where a step, or a part of it, runs."""

    launch: str | None = Field(
        default=None, description="A config file of `accelerate launch`; the step runs in one process without it."
    )
    slurm: SlurmSettings | None = Field(
        default=None, description="Submit the launch to Slurm and wait for the job; `{}` for the defaults."
    )

    @model_validator(mode="after")
    def _check_slurm(self) -> Self:
        if self.slurm is not None and self.launch is None:
            raise InputError("a job of Slurm starts a launch file on each machine: set launch", ("slurm",))
        return self


class Stage(LaunchSettings, ABC):
    """One kind of step: its settings, and everything that the workflow asks of it.

    A new stage is a subclass with `makes`, `inputs`, `run` and, where it reads rows or a model, the methods about
    them. It gets a row in `STAGES`, or is named by a recipe as `stage: module:Class`.
    """

    stage: Any = Field(description="Kind of the step, or your own as `module:Class`.")  # narrowed by each stage

    makes: ClassVar[str]
    renders_rows: ClassVar[bool] = False  # whether the chat template of the step's model renders rows of its sources
    is_compressed: ClassVar[bool] = False  # whether its policy is a smaller copy of another one

    def expand(self, name: str, before: Mapping[str, Stage], policies: Sequence[str]) -> list[Placed]:
        """Return the steps that this one becomes. `policies` are all policies that the recipe makes, in order."""
        return [Placed(name, self.resolve(before))]

    def made(self, name: str) -> list[str]:
        """Return the names of the steps of kind `makes` that `expand` returns; in other steps `name` means the last."""
        return [name]

    def resolve(self, before: Mapping[str, Stage]) -> Self:
        """Return the step with the settings that it leaves out filled in from the steps before it."""
        return self

    @property
    def start(self) -> str | None:
        """The step whose model this one starts from; None for the recipe's own policy, or for no model."""
        return None

    @property
    def training_precision(self) -> str | None:
        """The precision in which the step's optimizer steps compute; None for a step that has none."""
        return None

    @property
    def compares_with_start(self) -> bool:
        """Whether the step also reads the policy that the training of its policy started from."""
        return False

    def inputs(self) -> list[Input]:
        """Return every step and source that the step reads."""
        return []

    def is_copy(self, inputs: StepInputs) -> bool:
        """Return whether the step's model is a copy of one from outside of the run, whose weights are not removed."""
        return False

    def shares(self) -> dict[str, float]:
        """Return the names of the rows that the step reads, each with its share of an epoch."""
        return {}

    def tests(self) -> list[str]:
        """Return the sources that the step tests policies on."""
        return []

    def with_tests(self, tested: Sequence[str]) -> Self:
        """Return the step with the sources that the recipe tests policies on, if its settings ask for them."""
        return self

    def rows(self, folder: Path) -> SourceSettings | None:
        """Return the rows that later steps read from this step's folder; None if it makes none."""
        return None

    def files(self) -> list[str]:
        """Return the files of rows in the step's folder, which a source names as `step:NAME/FILE`."""
        source = self.rows(Path())
        return [] if source is None else [Path(source.path).name]

    def needs_policy(self) -> bool:
        """Return whether the step starts from the recipe's own policy."""
        return False

    def validate_settings(self) -> None:
        """Raise located `InputError`s for settings that are wrong independently of the inputs."""

    def validate_inputs(self, inputs: StepInputs) -> None:
        """Raise a located `InputError` for the first setting that cannot work with the step's inputs."""

    def check_processes(self, name: str) -> None:
        """Raise `InputError` in a launch of several processes for a step, called `name`, that runs in one."""
        number = num_launched()
        if number > 1 and "launch" in self.refused:
            raise InputError(
                f"step {name!r}: {self.stage} runs in one process, not {number}; start it without a launch"
            )

    def check_machine(self) -> None:
        """Raise a located `InputError` for a setting that needs another machine than this one."""

    def named_models(self) -> list[tuple[str, Location]]:
        """Return the models that the step loads besides the recipe's policy and those of steps, with their settings."""
        return []

    def engines(self) -> list[UsedEngine]:
        """Return the engines that sample policies and models, those of judges included."""
        return []

    def named_files(self) -> list[tuple[str, Location]]:
        """Return the files that the step reads besides its sources and models, with the settings that name them."""
        found: list[tuple[str, Location]] = [(self.launch, ("launch",))] if self.launch is not None else []
        return found if self.slurm is None else [*found, (self.slurm.script, ("slurm", "script"))]

    def open_rows(self, name: str, source: SourceSettings) -> None:
        """Read the first rows of a source; raise an error located below it if the step cannot use them."""
        for _ in first_records(source):
            pass

    def check_template(self, name: str, source: SourceSettings, load: Callable[[], PreTrainedTokenizerBase]) -> None:
        """Raise for one of the first rows that the chat template of the step's model cannot render."""
        if self.renders_rows:
            from align.stages.inputs.rendering import check_template  # noqa: PLC0415 - imports transformers

            check_template(name, source, load())

    def columns(self, inputs: StepInputs) -> list[Column]:
        """Return the columns of the results table that the step fills."""
        return []

    def cache_key(self, inputs: StepInputs) -> list[Any]:
        """Return everything that decides what the step makes, besides the steps that it reads.

        By default: seed, settings, settings and content of the sources, and the code of a user's own stage. What only
        decides how the step is computed is left out.
        """
        shares = self.shares()
        read = {name: source for name, source in inputs.sources.items() if name not in inputs.folders}
        keys = [source_key(shares[name], source, inputs.content) for name, source in read.items()]
        own = [code_of(self.stage)] if ":" in self.stage else []
        return [inputs.seed, self.decisive(), *keys, *own]

    def decisive(self) -> dict[str, Any]:
        """Return the settings that decide what the step makes, as JSON."""
        return self.model_dump(mode="json", exclude=set(LaunchSettings.model_fields))

    def model(self, before: ModelSpec) -> ModelSpec:
        """Return the model that the step's folder will hold, given the one that it starts from."""
        return before

    def estimate(self, planning: Planning) -> Estimate:
        """Return what the step will take, without running it."""
        from align.stages.costs.estimates import Estimate  # noqa: PLC0415 - imports torch

        return Estimate(name=planning.name, stage=self.stage, rows=0)

    def disk(self, model_bytes: int) -> tuple[int, int]:
        """Return the bytes that the step leaves on disk, and those of its checkpoints while it runs."""
        return 0, 0

    def preview(self, planning: Planning, number: int) -> list[tuple[TokenGroup, TokenGroup]] | None:
        """Return the first rows as they are trained on and as they are uncut; None for a step that trains on none."""
        return None

    @abstractmethod
    def run(self, context: RunContext) -> dict[str, Any]:
        """Run the step in `context.folder` and return what the manifest says of it; `done` is the work computed."""
