"""How responses are sampled, judged and put together, and the judges' models among earlier steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol

from pydantic import AfterValidator, Field, field_validator

from align.config import Settings
from align.content_hash import STEP, code_of
from align.errors import Location
from align.inference.managed.settings import Precision
from align.inference.settings import EngineSettings, LocalSettings, SamplingSettings
from align.rewards.builtin_judges import JUDGES, LlmSettings, RewardModelSettings
from align.rewards.settings import Combination, JudgeSettings, unique_judges
from align.rewards.thoughts import THINK, ThoughtSettings
from align.stages.base import POLICY, REWARD_MODEL, Input, LaunchSettings, UsedEngine
from align.stages.inputs.context import StepInputs
from align.stages.inputs.sources import SourceSettings
from align.synth.settings import GroupSettings

GROUPS_FILE = "groups.jsonl"  # in the folder of a step that makes groups of responses

WORDS = ("missing", "mode", "precision", "reward")  # settings of built-in judges that name no file

Judges = Annotated[list[JudgeSettings], AfterValidator(unique_judges)]


class GenerationSettings(Settings):
    """How responses are sampled, judged and put together."""

    models: list[str] = Field(
        default_factory=list[str],
        description="Additional policies: Hub ids, folders, gguf:FILE, or a server's model names.",
    )
    prompts: dict[str, int] | None = Field(
        default=None, description="How many prompts of each source to answer; all by default."
    )
    sampling: SamplingSettings = Field(
        default=SamplingSettings(num_responses=4), description="How responses are drawn."
    )
    engine: EngineSettings = Field(default=EngineSettings(), description="What runs the policies.")
    judges: Judges = Field(description="Judges that rate the responses; an empty list leaves them without rewards.")
    combine: Combination = Field(
        default="precedence", description="Several judges: the first that does not abstain, or a weighted sum."
    )
    thoughts: ThoughtSettings = Field(default=THINK, description="Delimiters of reasoning, which judges do not see.")
    groups: GroupSettings = Field(default=GroupSettings(), description="Which responses become a group to train on.")
    held_out: float = Field(
        default=0.0, ge=0, lt=1, description="Share of the prompts that training on the groups keeps for evaluation."
    )
    max_length: int | None = Field(
        default=None, ge=2, description="Most tokens of a response with its prompt, in training."
    )

    @field_validator("prompts")
    @classmethod
    def _check_prompts(cls, prompts: dict[str, int] | None) -> dict[str, int] | None:
        if prompts is not None and any(number < 1 for number in prompts.values()):
            raise ValueError("each source needs a count of at least 1")
        return prompts


class RoundGeneration(GenerationSettings, LaunchSettings):
    """How the on-policy rounds of a preference step sample and judge."""


class JudgeChoice(Protocol):
    """Settings of the judges."""

    @property
    def judges(self) -> list[JudgeSettings]:
        """One or several."""
        ...

    @property
    def combine(self) -> Combination:
        """How several judges are combined."""
        ...

    @property
    def thoughts(self) -> ThoughtSettings:
        """Which part of a response judges do not see."""
        ...


class JudgingSettings(JudgeChoice, Protocol):
    """Settings of the judges, and of the groups that are kept."""

    @property
    def groups(self) -> GroupSettings:
        """Which responses are kept."""
        ...


class JudgeModel(NamedTuple):
    """The model of a judge, and what runs it."""

    path: str
    key: str  # of the setting
    engine: EngineSettings
    rates: Precision | None  # of a reward model; None for a chat model


def judge_model(judge: JudgeSettings) -> JudgeModel | None:
    """Return the model of a judge that has one."""
    settings = judge.root.settings
    if isinstance(settings, RewardModelSettings):
        return JudgeModel(settings.path, "path", settings.engine, settings.precision)
    return JudgeModel(settings.model, "model", settings.engine, None) if isinstance(settings, LlmSettings) else None


def judge_engines(judges: list[JudgeSettings]) -> list[UsedEngine]:
    """Return the engines of judges that are models."""
    found: list[UsedEngine] = []
    for number, judge in enumerate(judges):
        if (model := judge_model(judge)) is not None:
            is_step = model.path.startswith(STEP)
            name = model.path.removeprefix(STEP)
            policies, models = ((name,), ()) if is_step else ((), (name,))
            found.append(UsedEngine(model.engine, ("judges", number, "settings", "engine"), policies, models))
    return found


def groups_source(folder: Path, *, held_out: float, max_length: int | None) -> SourceSettings:
    """Return the groups in a step's folder as a source of rows."""
    path = str(folder / GROUPS_FILE)
    return SourceSettings(path=path, format="native", held_out=held_out, max_length=max_length)


def judge_inputs(judges: list[JudgeSettings]) -> list[Input]:
    """Return the steps whose models the judges read."""
    values = [value for judge in judges for value in judge.values.values() if isinstance(value, str)]
    steps = [value.removeprefix(STEP) for value in values if value.startswith(STEP)]
    return [Input(name, (POLICY, REWARD_MODEL), ("judges",)) for name in steps]


def judge_models(judges: list[JudgeSettings]) -> list[tuple[str, Location]]:
    """Return the models whose files judges read, with the settings that name them; of a reward model always some."""
    found: list[tuple[str, Location]] = []
    for number, judge in enumerate(judges):
        model = judge_model(judge)
        if model is not None and (model.rates or model.engine.loads_model):
            found.append((model.path, ("judges", number, "settings", model.key)))
    return found


def judge_key(judges: list[JudgeSettings], inputs: StepInputs) -> list[str]:
    """Return the content of the files, folders and modules that judges are made of."""
    found: list[str] = []
    for judge in judges:
        found.append(code_of(judge.name))
        for key, value in judge.cache_key()["settings"].items():
            is_word = key in WORDS and judge.name in JUDGES
            found += _texts(value) if is_word else map(inputs.content, _texts(value))
    return found


def _texts(value: Any) -> list[str]:  # noqa: ANN401 - any JSON value
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for each in inner for text in _texts(each)]


def with_folders(judges: list[JudgeSettings], inputs: StepInputs) -> list[JudgeSettings]:
    """Return the judges with a folder in place of each step that they name."""

    def resolved(judge: JudgeSettings) -> JudgeSettings:
        values = judge.values
        for key, value in values.items():
            if isinstance(value, str) and value.startswith(STEP):
                name = value.removeprefix(STEP)
                values[key] = folder = str(inputs.folders[name])
                model = judge_model(judge)
                server = None if model is None else model.engine.server
                if server is not None and name in server.models:  # the judge knows the model by its folder
                    values["engine"]["server"]["models"][folder] = server.models[name]
        return judge.with_values(values)

    return [resolved(judge) for judge in judges]


def local_precision(engine: EngineSettings) -> str:
    """Return the precision of a model in this process."""
    return (engine.local or LocalSettings()).precision
