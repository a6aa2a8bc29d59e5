"""From a base language model to an aligned one, each token computed once.

The names in `__all__` are the public API, stable from version 0.2 on. They are imported on first use, so that
`import align` takes milliseconds and does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.data.chat_encoder import ChatEncoder
    from align.data.reading import read
    from align.evaluation.tasks import TASKS
    from align.inference.engines import load_engine
    from align.inference.settings import EngineSettings, SamplingSettings
    from align.losses.table import LOSSES, preference_loss
    from align.models.policy import load_policy, response_logps, save_policy
    from align.models.settings import PolicySettings
    from align.models.tree.batch import tree_batch
    from align.records import Comparison, Demonstration, Message, Prompt, Response, ToolCall
    from align.rewards.judges import make_judge
    from align.rewards.settings import JudgeSettings
    from align.rewards.verifiers.instructions import VERIFIERS
    from align.train.objectives.batch import group_batch
    from align.train.objectives.preference import PreferenceObjective
    from align.train.objectives.reward import BradleyTerryObjective, RegressionObjective
    from align.train.objectives.settings import PreferenceSettings
    from align.train.objectives.supervised import SupervisedObjective
    from align.train.settings import TrainSettings
    from align.train.trainer import Trainer
    from align.workflow.recipe.load import load_recipe
    from align.workflow.run import run

__all__ = [
    "LOSSES",
    "TASKS",
    "VERIFIERS",
    "BradleyTerryObjective",
    "ChatEncoder",
    "Comparison",
    "Demonstration",
    "EngineSettings",
    "JudgeSettings",
    "Message",
    "PolicySettings",
    "PreferenceObjective",
    "PreferenceSettings",
    "Prompt",
    "RegressionObjective",
    "Response",
    "SamplingSettings",
    "SupervisedObjective",
    "ToolCall",
    "TrainSettings",
    "Trainer",
    "group_batch",
    "load_engine",
    "load_policy",
    "load_recipe",
    "make_judge",
    "preference_loss",
    "read",
    "response_logps",
    "run",
    "save_policy",
    "tree_batch",
]

# Module of each public name, as in the imports above
_MODULES = {
    "align.data.chat_encoder": ("ChatEncoder",),
    "align.data.reading": ("read",),
    "align.evaluation.tasks": ("TASKS",),
    "align.inference.engines": ("load_engine",),
    "align.inference.settings": ("EngineSettings", "SamplingSettings"),
    "align.losses.table": ("LOSSES", "preference_loss"),
    "align.models.policy": ("load_policy", "response_logps", "save_policy"),
    "align.models.settings": ("PolicySettings",),
    "align.models.tree.batch": ("tree_batch",),
    "align.records": ("Comparison", "Demonstration", "Message", "Prompt", "Response", "ToolCall"),
    "align.rewards.judges": ("make_judge",),
    "align.rewards.settings": ("JudgeSettings",),
    "align.rewards.verifiers.instructions": ("VERIFIERS",),
    "align.train.objectives.batch": ("group_batch",),
    "align.train.objectives.preference": ("PreferenceObjective",),
    "align.train.objectives.reward": ("BradleyTerryObjective", "RegressionObjective"),
    "align.train.objectives.settings": ("PreferenceSettings",),
    "align.train.objectives.supervised": ("SupervisedObjective",),
    "align.train.settings": ("TrainSettings",),
    "align.train.trainer": ("Trainer",),
    "align.workflow.recipe.load": ("load_recipe",),
    "align.workflow.run": ("run",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - any public object
    """Import a public name, or return `__version__`, the version of the installed package."""
    if name == "__version__":
        from importlib.metadata import version  # noqa: PLC0415 - takes longer to import than everything else here

        value: Any = version("align")
    elif name in _MODULE_OF:
        value = getattr(import_module(_MODULE_OF[name]), name)
    else:
        raise AttributeError(f"module 'align' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names and the module's own attributes."""
    return sorted({*globals(), *__all__, "__version__"})
