"""A user's own functions, called after every optimizer step and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from align.errors import within
from align.models.backbone import Backbone
from align.registry import UserCode, import_dotted
from align.train.training_run import TrainingRun

Kind = Literal["step", "evaluation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingEvent:
    """The argument of a callback."""

    kind: Kind
    step: int  # finished optimizer steps
    num_steps: int
    metrics: Mapping[str, float]  # of the step, with those on held-out rows in an evaluation
    model: Backbone  # being trained; its transformers model is `model.hf`
    folder: Path  # working folder of the step
    is_main: bool  # whether this is the process that writes files; callbacks run on every process


class Callbacks:
    """The callbacks of a run; all processes call them together."""

    def __init__(self, run: TrainingRun, num_steps: int, model: Backbone, accelerator: Accelerator) -> None:
        self._functions: dict[str, Callable[[TrainingEvent], Any]] = {}
        with within("train", "callbacks"):
            for name in run.settings.callbacks:
                self._functions[name] = import_dotted(name, "callback")
        self._folder = run.folder
        self._num_steps = num_steps
        self._model = model
        self._accelerator = accelerator
        self.is_stopped = False  # whether a callback of any process returned True

    def __call__(self, kind: Kind, metrics: Mapping[str, float]) -> None:
        """Call each of them."""
        if not self._functions:
            return
        event = TrainingEvent(
            kind=kind,
            step=int(metrics["step"]),
            num_steps=self._num_steps,
            metrics=dict(metrics),
            model=self._model,
            folder=self._folder,
            is_main=self._accelerator.is_main_process,
        )
        stops = [UserCode("callback", name).call(each, event) is True for name, each in self._functions.items()]
        total = torch.tensor(float(any(stops)), device=self._accelerator.device)
        self.is_stopped |= bool(cast(Tensor, self._accelerator.reduce(total, reduction="sum")) > 0)
