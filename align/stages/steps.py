"""The settings of each kind of step, and what a step makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, Field, field_validator

from align.config import Settings
from align.data.mixing import StoppingStrategy
from align.inference.settings import EngineSettings, SamplingSettings
from align.models.settings import HELPSTEER, HeadSettings
from align.rewards.settings import How, JudgeSettings, each_once
from align.synth.constraints import ConstraintSettings
from align.synth.scored_groups import GroupSettings
from align.train.settings import PreferenceSettings, RewardLoss, TrainSettings

PROCEDURAL = "tasks:"  # prefix of a source's path that names procedural tasks
STEP = "step:"  # prefix of a judge's setting that names a step's folder
ALL = "all"  # in place of the policies of an evaluation: each that the recipe makes


class SourceSettings(Settings):
    """Where rows come from and how they become tokens."""

    path: str  # a file, a folder, a hub id, or tasks:KIND for rows that the project makes itself
    format: str = "auto"
    split: str | None = None
    skip: int = Field(default=0, ge=0)  # rows passed over first
    limit: int | None = Field(default=None, ge=1)  # rows read after them, or made
    responses: int = Field(default=4, ge=1)  # of each prompt, where the rows are made
    on_error: Literal["error", "skip"] = "error"
    seed: int = 0  # of rows that are made, beside the recipe's own
    constraints: ConstraintSettings | None = None  # verifiable instructions to put behind the prompts
    held_out: float = Field(default=0.0, ge=0, lt=1)  # share of the prompts kept for evaluation
    max_length: int | None = Field(default=None, ge=2)  # tokens; the model's own limit where left out
    max_prompt_length: int | None = Field(default=None, ge=1)
    overlong: Literal["drop", "cut_prompt", "cut_response", "error"] = "drop"


Judges = Annotated[list[JudgeSettings], Field(min_length=1), AfterValidator(each_once)]


class StepSettings(Settings):
    """What every kind of step has: where it runs, which changes nothing of what it makes."""

    launch: str | None = None  # a file for `accelerate launch`; in this process where left out


class ImportStep(StepSettings):
    """Put a policy into a folder: from elsewhere, or fresh with a tokenizer trained on the spot."""

    stage: Literal["import"]
    path: str | None = None  # another model than the recipe's own: weak-to-strong takes its base from one
    vocab_size: int | None = Field(default=None, ge=1)  # of a tokenizer trained on the procedural tasks' texts


class ReplaySettings(Settings):
    """Rows of an earlier supervised step, mixed in against forgetting (Adler et al. 2024, sec. 3.3.1)."""

    share: float = Field(gt=0, lt=1)  # of all rows of an epoch
    step: str | None = None  # whose data are replayed; the supervised step before this one where left out


class TrainStep(StepSettings):
    """Supervised fine-tuning of a policy on demonstrations, of one source or several by weight."""

    stage: Literal["sft"]
    policy: str | None = None  # an earlier step; the latest that makes a policy where left out, else the recipe's
    data: str | dict[str, float]  # a name under `data`, or several with their weights
    stopping_strategy: StoppingStrategy = "first_exhausted"  # when an epoch over several sources ends
    replay: ReplaySettings | None = None
    train: TrainSettings


class RoundSettings(Settings):
    """Of a preference step that is taken several times, each from and against the policy of the one before."""

    rounds: int = Field(default=1, ge=1)
    on_policy: bool = False  # whether `data` are prompts, which each round's policy answers first
    generate: dict[str, Any] = Field(default_factory=dict[str, Any])  # how: settings of the stage generate


class PreferenceStep(StepSettings):
    """Preference optimization of a policy against itself as it enters the step."""

    stage: Literal["preference"]
    policy: str | None = None
    data: str  # a name under `data`, or a step that makes groups
    min_chosen: float | None = None  # reward of the best response; rows below it are dropped and counted
    train: TrainSettings
    loss: PreferenceSettings = PreferenceSettings()


class GenerateStep(StepSettings):
    """Responses of policies to prompts, judged, as scored groups."""

    stage: Literal["generate"]
    policies: list[str] = Field(default_factory=list[str])  # steps; the latest policy where both lists are empty
    models: list[str] = Field(default_factory=list[str])  # others: hub ids, folders, gguf:FILE, a server's names
    data: str | list[str]  # sources of prompts
    prompts: dict[str, int] | None = None  # how many each source gives; all of them where left out
    round: int = Field(default=0, ge=0)  # how many times as many prompts of each source are passed over first
    sampling: SamplingSettings = SamplingSettings(num_responses=4)
    engine: EngineSettings = EngineSettings()
    judges: Judges
    combine: How = "precedence"
    groups: GroupSettings = GroupSettings()
    held_out: float = Field(default=0.0, ge=0, lt=1)  # share of the prompts that training on the groups keeps back
    max_length: int | None = Field(default=None, ge=2)  # tokens of a response with its prompt, in training

    @field_validator("prompts")
    @classmethod
    def _some(cls, prompts: dict[str, int] | None) -> dict[str, int] | None:
        if prompts is not None and any(number < 1 for number in prompts.values()):
            raise ValueError("prompts: at least one of each source")
        return prompts


class ScoreStep(StepSettings):
    """The responses of rows that are there, judged anew: as often as the judge changes."""

    stage: Literal["score"]
    data: str
    judges: Judges
    combine: How = "precedence"
    groups: GroupSettings = GroupSettings()
    held_out: float = Field(default=0.0, ge=0, lt=1)
    max_length: int | None = Field(default=None, ge=2)


class RewardStep(StepSettings):
    """A reward model from responses whose attributes are rated, or of which one is better than another."""

    stage: Literal["reward_model"]
    policy: str | None = None  # an earlier step, of which a reward model's head is kept
    data: str
    train: TrainSettings
    loss: RewardLoss = "regression"
    head: HeadSettings = HeadSettings()
    subset: str | None = None  # key of the rows' metadata by whose values the report counts pairs, too

    @property
    def default_attributes(self) -> tuple[str, ...]:
        """What a new head rates where the settings name nothing."""
        return HELPSTEER if self.loss == "regression" else ("reward",)


class TaskSettings(Settings):
    """One evaluation: a column of the table, or several."""

    data: str  # a name under `data`
    task: str | None = None  # an entry of TASKS, or a user's own as module:NAME; for procedural rows it is their kind
    max_new_tokens: int = Field(default=64, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    metrics: list[str] | None = Field(
        default=None, description="Metrics of the task to report, such as prompt_strict; all if left out."
    )


class EvaluateStep(StepSettings):
    """How policies answer what a program can check. One step for several policies becomes one for each."""

    stage: Literal["evaluate"]
    policies: list[str] | Literal["all"]
    tasks: dict[str, TaskSettings] = Field(min_length=1)


AnyStep = ImportStep | TrainStep | PreferenceStep | GenerateStep | ScoreStep | RewardStep | EvaluateStep
SETTINGS: dict[str, type[AnyStep]] = {
    "import": ImportStep,
    "sft": TrainStep,
    "preference": PreferenceStep,
    "generate": GenerateStep,
    "score": ScoreStep,
    "reward_model": RewardStep,
    "evaluate": EvaluateStep,
}
POLICY, REWARD_MODEL, GROUPS, SCORES = "a policy", "a reward model", "groups of responses", "scores"
MAKES: dict[str, str] = {  # stage -> what its folder holds
    "import": POLICY,
    "sft": POLICY,
    "preference": POLICY,
    "generate": GROUPS,
    "score": GROUPS,
    "reward_model": REWARD_MODEL,
    "evaluate": SCORES,
}


class Need(NamedTuple):
    """Something that a step reads of another."""

    step: str
    kinds: tuple[str, ...]  # one of which it must make
    key: str  # of the settings that name it


def key_of(step: AnyStep, source: str) -> str:
    """Where the step's settings name the source of its rows."""
    if isinstance(step, EvaluateStep):
        return next(f"tasks.{column}.data" for column, task in step.tasks.items() if task.data == source)
    return f"data.{source}" if isinstance(step, TrainStep) and isinstance(step.data, dict) else "data"


def judge_steps(judges: Sequence[JudgeSettings]) -> list[str]:
    """Steps whose folders the judges read."""
    values = [value for judge in judges for value in judge.values.values() if isinstance(value, str)]
    return [value.removeprefix(STEP) for value in values if value.startswith(STEP)]


def with_folders(judges: Sequence[JudgeSettings], folders: Mapping[str, Any]) -> list[JudgeSettings]:
    """The judges with a folder in place of each step that they name."""

    def settled(value: object) -> object:
        if isinstance(value, str) and value.startswith(STEP):
            return str(folders[value.removeprefix(STEP)])
        return value

    moved = [{key: settled(value) for key, value in judge.values.items()} for judge in judges]
    return [judge.with_values(each) for judge, each in zip(judges, moved, strict=True)]
