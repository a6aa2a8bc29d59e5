"""Experiment trackers of accelerate: which run they write to, and the configuration that they store."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from align.config import Settings, stable_hash
from align.errors import InputError
from align.registry import suggest

if TYPE_CHECKING:
    from accelerate import Accelerator

# Trackers of accelerate (accelerate.tracking.LOGGER_TYPE_TO_CLASS) and the modules one of which each needs
MODULES = {
    "aim": ("aim",),
    "clearml": ("clearml",),
    "comet_ml": ("comet_ml",),
    "dvclive": ("dvclive",),
    "mlflow": ("mlflow",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}


class TrackingSettings(Settings):
    """Experiment trackers of all training steps of a recipe."""

    trackers: list[str] = Field(
        default_factory=list[str], description="Experiment trackers of accelerate: tensorboard, wandb, trackio, …"
    )
    project: str = Field(default="align", min_length=1, description="Project in which runs are tracked.")
    entity: str | None = Field(default=None, description="User or team of the project, for wandb.")
    tags: list[str] = Field(default_factory=list[str], description="Tags of every tracked run, for wandb.")

    @model_validator(mode="after")
    def _check_wandb(self) -> TrackingSettings:
        for name in ("entity", "tags"):
            if getattr(self, name) and "wandb" not in self.trackers:
                raise InputError("applies to wandb only, which is not among the trackers", (name,))
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracking:
    """Where a training step is tracked."""

    settings: TrackingSettings = field(default_factory=TrackingSettings)
    run: str  # name of the run and of the step: together the name of the tracked run
    step: str
    folder: Path  # for trackers that write files; outside of the step's own folder
    config: Mapping[str, Any]  # plain values, nested

    @property
    def name(self) -> str:
        """Return the name of the tracked run."""
        return f"{self.run}/{self.step}"


def check_trackers(names: Sequence[str], loc: tuple[str, ...] = ("train", "trackers")) -> None:
    """Raise `InputError` for a tracker that is not installed."""
    installed = installed_trackers()
    missing = [name for name in names if name not in installed]
    if missing:
        raise InputError(f"no tracker called {missing[0]!r} is installed; {suggest(missing[0], installed)}", loc)


def installed_trackers() -> list[str]:
    """Return the trackers whose modules are installed; none is imported."""
    return [name for name, modules in MODULES.items() if any(find_spec(module) for module in modules)]


@contextmanager
def trackers(accelerator: Accelerator, names: Sequence[str], tracking: Tracking, settings_hash: str) -> Generator[None]:
    """Start trackers, which `accelerator.log` then writes to, and end them with the training, also if it fails.

    A resumed step continues the same tracked run.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS  # noqa: PLC0415 - imports torch, and names are checked before

    config = flattened(tracking.config)
    for name in names:
        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        if name == "tensorboard":
            tracker = kind(tracking.step, tracking.folder / name)
        elif kind.requires_logging_directory:
            tracker = kind(tracking.settings.project, tracking.folder / name)
        else:
            tracker = kind(tracking.settings.project, **_options(name, tracking, settings_hash))
        tracker.start()
        tracker.store_init_configuration(_scalars(config) if name == "tensorboard" else config)
        accelerator.trackers.append(tracker)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:  # `end_training` also ends the process group, which saving needs
            tracker.finish()


def _options(name: str, tracking: Tracking, settings_hash: str) -> dict[str, Any]:
    """Return what a tracker is started with besides the project."""
    settings = tracking.settings
    if name == "wandb":
        tracking.folder.mkdir(parents=True, exist_ok=True)
        return {
            "name": tracking.name,
            "group": tracking.run,
            "entity": settings.entity,
            "tags": settings.tags,
            "dir": str(tracking.folder),
            "id": stable_hash([settings.project, tracking.name, settings_hash]),
            "resume": "allow",
        }
    return {"name": tracking.name} if name == "trackio" else {}


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values under dotted keys, with their types.

    >>> flattened({"train": {"learning_rate": 1e-5, "betas": [0.9, 0.98]}, "seed": 0})
    {'train.learning_rate': 1e-05, 'train.betas': [0.9, 0.98], 'seed': 0}
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flattened(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _scalars(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with everything but numbers, booleans and strings as JSON, as TensorBoard stores them."""
    return {key: value if isinstance(value, int | float | str) else json.dumps(value) for key, value in config.items()}
