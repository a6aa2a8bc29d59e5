"""A recipe as frozen settings: the policy it starts from, its sources of rows, its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from align.artifacts import fingerprint
from align.config import InputError, Settings, build, nearest, pick, read_recipe, stable_hash
from align.losses.preference import preference_loss
from align.models.loading import GGUF, PolicySettings
from align.models.reward import HELPSTEER, HeadSettings, choose_rating
from align.pipeline import Step, order
from align.train.objectives import PreferenceSettings
from align.train.reward_objective import RewardLoss
from align.train.settings import TrainSettings

TASKS = "tasks:"  # prefix of a source's path that names procedural tasks


class SourceSettings(Settings):
    """Where rows come from and how they become tokens."""

    path: str  # a file, a folder, a hub id, or tasks:KIND for rows that the project makes itself
    format: str = "auto"
    split: str | None = None
    limit: int | None = Field(default=None, ge=1)  # rows read, or made
    responses: int = Field(default=4, ge=1)  # of each prompt, where the rows are made
    invalid: Literal["error", "drop"] = "error"
    seed: int = 0  # of rows that are made, beside the recipe's own
    held_out: float = Field(default=0.0, ge=0, lt=1)  # share of the prompts kept for evaluation
    max_length: int | None = Field(default=None, ge=2)  # tokens; the model's own limit where left out
    max_prompt_length: int | None = Field(default=None, ge=1)
    overlong: Literal["drop", "cut_prompt", "cut_response", "error"] = "drop"


class ImportStep(Settings):
    """Put a policy into a folder: from elsewhere, or fresh with a tokenizer trained on the spot."""

    stage: Literal["import"]
    vocab_size: int | None = Field(default=None, ge=1)  # of a tokenizer trained on the procedural tasks' texts


class TrainStep(Settings):
    """Supervised fine-tuning of a policy on demonstrations."""

    stage: Literal["sft"]
    policy: str | None = None  # an earlier step; the latest that makes a policy where left out, else the recipe's
    data: str  # a name under `data`
    train: TrainSettings


class PreferenceStep(Settings):
    """Preference optimization of a policy against itself as it enters the step."""

    stage: Literal["preference"]
    policy: str | None = None
    data: str
    train: TrainSettings
    loss: PreferenceSettings = PreferenceSettings()


class RewardStep(Settings):
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


class EvaluateStep(Settings):
    """How each of several policies answers prompts whose answers a program can check."""

    stage: Literal["evaluate"]
    policies: list[str]
    data: str
    task: str | None = None  # an entry of TASKS; for procedural rows it is their kind
    max_new_tokens: int = Field(default=64, ge=1)


AnyStep = ImportStep | TrainStep | PreferenceStep | RewardStep | EvaluateStep
NO_POLICY = (EvaluateStep, RewardStep)  # steps that no policy comes from
SETTINGS: dict[str, type[AnyStep]] = {
    "import": ImportStep,
    "sft": TrainStep,
    "preference": PreferenceStep,
    "reward_model": RewardStep,
    "evaluate": EvaluateStep,
}


class Recipe(Settings):
    """A whole recipe, checked."""

    run: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")  # its folder under `runs`
    runs: str = "runs"
    seed: int = 0
    policy: PolicySettings
    data: dict[str, SourceSettings] = Field(default_factory=dict[str, SourceSettings])
    steps: dict[str, AnyStep] = Field(default_factory=dict[str, AnyStep])

    @property
    def root(self) -> Path:
        """Folder of the run."""
        return Path(self.runs) / self.run

    def inputs(self, name: str) -> tuple[str, ...]:
        """Steps whose folders the step reads."""
        step = self.steps[name]
        if isinstance(step, EvaluateStep):
            return tuple(step.policies)
        return (policy,) if (policy := self.policy_of(name)) is not None else ()

    def policy_of(self, name: str) -> str | None:
        """The step whose policy the step starts from; None where it starts from the recipe's own."""
        step = self.steps[name]
        if isinstance(step, ImportStep | EvaluateStep):
            return None
        if step.policy is not None:
            return step.policy
        names = list(self.steps)
        before = [other for other in names[: names.index(name)] if not isinstance(self.steps[other], NO_POLICY)]
        return before[-1] if before else None

    def source(self, name: str) -> SourceSettings:
        """The source of rows called `name`."""
        return pick(self.data, name, "source of data")

    def pipeline(self) -> list[Step]:
        """The steps for the pipeline, each with the hash of everything that decides its content."""
        return [Step(name, self.inputs(name), stable_hash(self._content(name))) for name in self.steps]

    def _content(self, name: str) -> list[Any]:
        step = self.steps[name]
        content: list[Any] = [self.seed, step.model_dump(mode="json")]
        if not isinstance(step, EvaluateStep):
            content.append(self.policy.model_dump(mode="json"))
        if not isinstance(step, ImportStep):
            source = self.source(step.data)
            content += [source.model_dump(mode="json"), _content_of(source.path)]
        if self.policy_of(name) is None and self.policy.path is not None and not isinstance(step, EvaluateStep):
            content.append(_content_of(self.policy.path.removeprefix(GGUF)))
        return content


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe at `path`, checked: every key known, every source and step that is named there."""
    values = read_recipe(path, overrides)
    given = values.get("steps")
    if not isinstance(given, Mapping) or not given:
        raise InputError(f"{path}: steps: a mapping from a step's name to its settings is needed, not {given!r}")
    # Each step is checked by its own stage's settings, so that an error names the step and the stage's own keys.
    steps = {str(name): _step(str(name), settings) for name, settings in given.items()}
    recipe = build(Recipe, {**values, "steps": {}}, "").model_copy(update={"steps": steps})
    for name, step in steps.items():
        for needed in recipe.inputs(name):
            pick(recipe.steps, needed, "step")
            made_by = recipe.steps[needed]
            if isinstance(made_by, EvaluateStep):
                raise InputError(f"steps.{name}: step {needed!r} evaluates and makes no policy")
            if isinstance(made_by, RewardStep) and not isinstance(step, RewardStep):
                raise InputError(f"steps.{name}: step {needed!r} makes a reward model and no policy")
        if not isinstance(step, ImportStep):
            recipe.source(step.data)
        _check_choices(name, step)
    order([Step(name, recipe.inputs(name), key="") for name in steps])
    return recipe


def _check_choices(name: str, step: AnyStep) -> None:
    """Whatever of a step's settings is wrong only together with others."""
    try:
        if isinstance(step, PreferenceStep):
            preference_loss(step.loss.name, **step.loss.settings)
        elif isinstance(step, RewardStep) and step.head.attributes is not None:
            choose_rating(step.head, None, default=())
    except InputError as error:
        where = f"steps.{name}.loss: " if isinstance(step, PreferenceStep) else f"steps.{name}."
        raise InputError(f"{where}{error}") from error


def _step(name: str, given: object) -> AnyStep:
    if not isinstance(given, Mapping) or "stage" not in given:
        raise InputError(f"steps.{name}: a step needs a stage; {nearest('', SETTINGS)}")
    return build(pick(SETTINGS, str(given["stage"]), "stage"), given, f"steps.{name}")


def _content_of(path: str) -> str:
    """The content hash of a local file or folder; a hub id stands for itself."""
    local = Path(path).expanduser()
    return fingerprint(local) if local.exists() else path
