"""The table of stages, and the type of a recipe's step."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, SerializeAsAny, Tag, WrapValidator
from pydantic_core.core_schema import ValidatorFunctionWrapHandler

from align.registry import class_tag, pick_class
from align.stages.base import Stage
from align.stages.compression.average import Average, AverageRewardModels
from align.stages.compression.distill import Distill
from align.stages.compression.drop_layers import DropLayers
from align.stages.compression.export import Export
from align.stages.compression.quantize import Quantize
from align.stages.curate import Curate
from align.stages.embedder import Embedder
from align.stages.evaluate import Evaluate
from align.stages.generate import Generate
from align.stages.import_model import ImportModel
from align.stages.preference import Preference
from align.stages.reward_model import RewardModel
from align.stages.score import Score
from align.stages.sft import SFT
from align.stages.synthesize import Synthesize

STAGES: dict[str, type[Stage]] = {
    "import": ImportModel,
    "sft": SFT,
    "reward_model": RewardModel,
    "generate": Generate,
    "score": Score,
    "preference": Preference,
    "evaluate": Evaluate,
    "synthesize": Synthesize,
    "curate": Curate,
    "embedder": Embedder,
    "export": Export,
    "average": Average,
    "average_reward_models": AverageRewardModels,
    "drop_layers": DropLayers,
    "quantize": Quantize,
    "distill": Distill,
}


def stage_class(name: str) -> type[Stage]:
    """Return the stage of a name in STAGES, or a user's own by its dotted path `module:Class`."""
    return pick_class(STAGES, name, Stage, "stage")


def _user_stage(value: Any, handler: ValidatorFunctionWrapHandler) -> Stage:  # noqa: ANN401 - what pydantic gives
    return value if isinstance(value, Stage) else stage_class(value["stage"]).model_validate(value)


# A recipe's step: a discriminated union over `stage`
AnyStage = Annotated[
    Annotated[ImportModel, Tag("ImportModel")]
    | Annotated[SFT, Tag("SFT")]
    | Annotated[RewardModel, Tag("RewardModel")]
    | Annotated[Generate, Tag("Generate")]
    | Annotated[Score, Tag("Score")]
    | Annotated[Preference, Tag("Preference")]
    | Annotated[Evaluate, Tag("Evaluate")]
    | Annotated[Synthesize, Tag("Synthesize")]
    | Annotated[Curate, Tag("Curate")]
    | Annotated[Embedder, Tag("Embedder")]
    | Annotated[Export, Tag("Export")]
    | Annotated[Average, Tag("Average")]
    | Annotated[AverageRewardModels, Tag("AverageRewardModels")]
    | Annotated[DropLayers, Tag("DropLayers")]
    | Annotated[Quantize, Tag("Quantize")]
    | Annotated[Distill, Tag("Distill")]
    | Annotated[SerializeAsAny[Stage], WrapValidator(_user_stage), Tag("Stage")],
    Discriminator(lambda value: class_tag(value, "stage", STAGES, Stage)),
]
