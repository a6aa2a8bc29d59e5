"""The built-in judges: their settings, and `JUDGES`, the table of what each of them needs. Imports no torch.

A new built-in judge is a settings class, a subclass of `JudgeSpec`, a row of `JUDGES` and a member of the union
`align.rewards.settings.AnySpec`. A user's own judge needs none of these: see `align.rewards.settings`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from align.config import Settings
from align.errors import InputError
from align.inference.managed.kinds import KINDS
from align.inference.managed.settings import Precision
from align.inference.settings import EngineSettings
from align.rewards.published_rows import ANSWER_KEYS, TEST_KEYS
from align.rewards.thoughts import THINK, ThoughtSettings
from align.sandbox.process import Limits


class BuiltinSettings(Settings):
    """Base class of the settings of built-in judges."""

    def cache_key(self) -> dict[str, Any]:
        """Return the settings that decide a verdict, as JSON."""
        return self.model_dump(mode="json")


class GroundTruthSettings(BuiltinSettings):
    """Settings of the judge that compares final answers with known ones."""

    missing: Literal["abstain", "error"] = Field(
        default="abstain", description="What to do with a prompt that has no `answer`: give no reward, or fail."
    )


class VerifierSettings(BuiltinSettings):
    """Settings of the judge that checks verifiable instructions."""

    reward: Literal["share", "all", "both"] = Field(
        default="share",
        description=(
            "Reward of a response: the share of its instructions that it follows, 1 if it follows all of them and 0 "
            "otherwise, or the mean of both."
        ),
    )
    loose: bool = Field(
        default=False,
        description=(
            "Use IFEval's loose check: a response also follows an instruction if it does so without its first line, "
            "its last line or its asterisks."
        ),
    )
    min_words: int = Field(
        default=0,
        ge=0,
        description="Responses with fewer words get reward 0: an empty text violates few instructions.",
    )
    verifiers: dict[str, str] = Field(
        default_factory=dict[str, str],
        description="A user's own verifiers: the name used in the rows' instructions -> module:function.",
    )

    @field_validator("verifiers")
    @classmethod
    def _check_verifiers(cls, verifiers: dict[str, str]) -> dict[str, str]:
        from align.rewards.verifiers.instructions import with_custom  # noqa: PLC0415 - imports langdetect

        with_custom(verifiers)
        return verifiers


class ExecutedTestsSettings(BuiltinSettings):
    """Settings of the judge that runs unit tests."""

    reward: Literal["share", "all"] = Field(
        default="share",
        description="Reward of a response: the share of tests that pass, or 1 if all pass and 0 otherwise.",
    )
    num_workers: int | None = Field(
        default=None, ge=1, description="Programs to run at a time. Default: the number of CPU cores."
    )
    limits: Limits = Field(default=Limits(), description="Resource limits of a program and all of its tests together.")

    def cache_key(self) -> dict[str, Any]:
        """Return the settings that decide a verdict, as JSON: not the number of workers."""
        return self.model_dump(mode="json", exclude={"num_workers"})


class RewardModelSettings(BuiltinSettings):
    """Settings of the judge that is a reward model."""

    path: str = Field(description="Reward model: a Hub ID, a folder, or step:NAME for an earlier step of the recipe.")
    precision: Precision = Field(
        default="fp32", description="Precision of matrix products; on a server also of the decoder's weights."
    )
    engine: EngineSettings = Field(
        default=EngineSettings(),
        description="What runs the model: this process by default, or a vLLM server (`vllm` or `server`).",
    )

    @field_validator("engine")
    @classmethod
    def _check_engine(cls, engine: EngineSettings) -> EngineSettings:
        instead = "use vllm, or leave engine out to run the reward model in this process"
        if engine.managed is not None and (reason := KINDS[engine.kind].cannot_rate):
            raise InputError(f"{reason}; {instead}", (engine.kind,))
        if engine.local is not None or engine.custom is not None:
            raise InputError(f"a reward model has no settings of a {engine.kind} engine; {instead}", (engine.kind,))
        return engine

    def cache_key(self) -> dict[str, Any]:
        """Return the settings that decide a verdict, as JSON: not where the engine runs."""
        key = self.model_dump(mode="json", exclude={"engine"})
        return key if self.engine.kind == "local" else {**key, "engine": self.engine.cache_key()}


class LlmSettings(BuiltinSettings):
    """Settings of the judge that is a chat model."""

    model: str = Field(description="Chat model: a Hub ID, a folder, or the name under which a server offers it.")
    engine: EngineSettings = Field(default=EngineSettings(), description="What runs the model.")
    mode: Literal["pairs", "rating"] = Field(
        default="pairs",
        description=(
            "pairs: compare every two responses in both orders; rating: rate each response separately from 1 to 10."
        ),
    )
    prompts: str | None = Field(
        default=None,
        description=(
            "File of judge prompts in FastChat's form (judge_prompts.jsonl), used in place of the built-in ones: "
            "single-v1, single-math-v1 and their -multi-turn forms to rate, pair-v2 and pair-math-v1 to compare."
        ),
    )
    attempts: int = Field(
        default=3, ge=1, description="Maximum number of requests per question, until an answer can be parsed."
    )
    max_new_tokens: int = Field(default=512, ge=1, description="Maximum number of tokens of an answer.")
    temperature: float = Field(default=0.0, ge=0, description="Sampling temperature; 0 is greedy.")
    seed: int = Field(default=0, description="Seed of all answers.")
    thoughts: ThoughtSettings = Field(
        default=THINK, description="Delimiters of the judge model's reasoning; verdicts inside it are ignored."
    )

    def cache_key(self) -> dict[str, Any]:
        """Return the settings that decide a verdict, as JSON: not how the engine runs."""
        return {**self.model_dump(mode="json"), "engine": self.engine.cache_key()}


class JudgeSpec(Settings):
    """Base class of the specification of one judge: subclasses add its name and settings, and what it needs."""

    name: Any = Field(description="Name of the judge.")  # narrowed by each subclass; here to be the first field
    weight: float = Field(
        default=1.0, description="Factor of this judge's reward in a weighted sum (combine: weights)."
    )

    maker: ClassVar[str] = ""  # module:name of a callable that returns the judge for its settings
    loads_model: ClassVar[bool] = False  # whether making the judge loads a model or connects to a server
    metadata_keys: ClassVar[tuple[str, ...]] = ()  # a prompt without any of them gets no verdict; () for all prompts

    @model_validator(mode="before")
    @classmethod
    def _add_empty_settings(cls, values: Any) -> Any:  # noqa: ANN401 - input that is not yet validated
        """Add empty settings where there are none, so that an error names the setting that is required."""
        return {"settings": {}, **values} if isinstance(values, Mapping) else values

    @classmethod
    def may_know(cls, metadata: Mapping[str, Any]) -> bool:
        """Return whether a prompt with this metadata may get a verdict."""
        given = [metadata.get(key) for key in cls.metadata_keys]
        return not given or any(value not in (None, "", [], {}) for value in given)

    @field_validator("weight")
    @classmethod
    def _check_weight(cls, weight: float) -> float:
        if weight == 0:
            raise ValueError("a judge of weight 0 has no effect; remove the judge")
        return weight


class GroundTruthSpec(JudgeSpec):
    """Reward 1 for the known answer, 0 for any other."""

    name: Literal["ground_truth"] = Field(description="Compare the response's final answer with the known one.")
    settings: GroundTruthSettings = Field(default=GroundTruthSettings(), description="Settings of the judge.")

    maker = "align.rewards.rule_judges:GroundTruthJudge"
    metadata_keys = ANSWER_KEYS


class ExecutedTestsSpec(JudgeSpec):
    """Reward of the unit tests that a program passes."""

    name: Literal["executed_tests"] = Field(description="Run unit tests on the program in the response.")
    settings: ExecutedTestsSettings = Field(default=ExecutedTestsSettings(), description="Settings of the judge.")

    maker = "align.rewards.unit_tests:executed_tests_judge"
    metadata_keys = TEST_KEYS


class VerifierSpec(JudgeSpec):
    """Reward of the verifiable instructions that a response follows."""

    name: Literal["verifier"] = Field(description="Check verifiable instructions by programs.")
    settings: VerifierSettings = Field(default=VerifierSettings(), description="Settings of the judge.")

    maker = "align.rewards.rule_judges:VerifierJudge"
    metadata_keys = ("instructions", "instruction_id_list", "kind")  # the last: of a procedural task


class RewardModelSpec(JudgeSpec):
    """Reward of a reward model."""

    name: Literal["reward_model"] = Field(description="Rate the response by a reward model.")
    settings: RewardModelSettings = Field(description="Settings of the judge.")

    maker = "align.rewards.reward_model_judge:RewardModelJudge"
    loads_model = True


class LlmSpec(JudgeSpec):
    """Reward of a chat model that compares or rates responses."""

    name: Literal["llm"] = Field(description="Compare or rate responses by a chat model.")
    settings: LlmSettings = Field(description="Settings of the judge.")

    maker = "align.rewards.llm_judge:llm_judge"
    loads_model = True


JUDGES: dict[str, type[JudgeSpec]] = {
    "ground_truth": GroundTruthSpec,
    "executed_tests": ExecutedTestsSpec,
    "verifier": VerifierSpec,
    "reward_model": RewardModelSpec,
    "llm": LlmSpec,
}
