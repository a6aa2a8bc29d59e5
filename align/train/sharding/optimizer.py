"""The optimizer of the training loop: a built-in one or a user's own, and what a checkpoint keeps of its state."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from transformers.optimization import Adafactor

from align.errors import InputError, RunError, one_line
from align.models.backbone import Backbone
from align.registry import DOTTED_PATH, UserCode, import_dotted, pick
from align.train.settings import TrainSettings
from align.train.sharding.optimizer_names import OPTIMIZER_LOC, check_optimizer

Groups = list[dict[str, Any]]


def make_optimizer(
    model: Backbone,
    settings: TrainSettings,
    head_lr_multiplier: float = 1.0,
    copies: Mapping[str, Tensor] | None = None,
) -> Optimizer:
    """Return the optimizer over the trainable parameters; weight decay applies to matrices only.

    `copies` are tensors that it updates in place of the parameters of these names. Each parameter group has an
    `lr_multiplier` for the step's learning rate. If `head_lr_multiplier` is not 1, the head has its own parameter
    groups. Raises `InputError` for an optimizer that is unknown or not installed, or for settings that it does not
    take.
    """
    head = {id(value) for value in model.head.parameters()} if head_lr_multiplier != 1 else set[int]()
    groups: dict[tuple[bool, bool], list[Tensor]] = {
        (is_head, is_matrix): [] for is_head in (False, True) for is_matrix in (True, False)
    }
    for name, value in model.named_parameters():
        if value.requires_grad:
            shape = getattr(value, "ds_shape", value.shape)  # ZeRO-3 flattens parameters and keeps their shape here
            groups[id(value) in head, len(shape) > 1].append((copies or {}).get(name, value))
    parameters: Groups = [
        {
            "params": values,
            "weight_decay": settings.weight_decay if is_matrix else 0.0,
            "lr_multiplier": head_lr_multiplier if is_head else 1.0,
        }
        for (is_head, is_matrix), values in groups.items()
        if values
    ]
    name = settings.optimizer
    is_own = DOTTED_PATH.fullmatch(name) is not None
    make = _own(name) if is_own else pick(OPTIMIZERS, name, "optimizer")
    try:
        made = make(parameters, settings)
    except RunError:  # of a user's own code
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} does not take these settings: {one_line(error)}", OPTIMIZER_LOC) from error
    if not isinstance(made, Optimizer):
        raise InputError(f"{name} returned a {type(made).__name__}, not a torch.optim.Optimizer", OPTIMIZER_LOC)
    return made


def _adamw(groups: Groups, settings: TrainSettings) -> Optimizer:
    options: dict[str, Any] = {"fused": True, **settings.optimizer_settings}
    return AdamW(groups, **_adam_settings(settings), **options)


def _adamw_8bit(groups: Groups, settings: TrainSettings) -> Optimizer:
    check_optimizer(settings.optimizer)
    with warnings.catch_warnings():  # deprecations between libraries
        warnings.simplefilter("ignore", DeprecationWarning)
        bitsandbytes: Any = import_module("bitsandbytes.optim")
    return bitsandbytes.AdamW8bit(groups, **_adam_settings(settings), **settings.optimizer_settings)


def _adam_settings(settings: TrainSettings) -> dict[str, Any]:
    return {"lr": settings.learning_rate, "betas": settings.betas, "eps": settings.epsilon}


def _adafactor(groups: Groups, settings: TrainSettings) -> Optimizer:
    """Return Adafactor with the learning rate of the settings, as transformers' and TRL's trainers use it."""
    options: dict[str, Any] = {"scale_parameter": False, "relative_step": False, **settings.optimizer_settings}
    return Adafactor(groups, lr=settings.learning_rate, **options)


def _own(name: str) -> Callable[[Groups, TrainSettings], Any]:
    """Return a function that calls a user's class or function with parameter groups and the learning rate."""
    function = import_dotted(name, "optimizer")
    code = UserCode("optimizer", name)
    return lambda groups, settings: code.call(
        function, groups, lr=settings.learning_rate, **settings.optimizer_settings
    )


OPTIMIZERS: dict[str, Callable[[Groups, TrainSettings], Optimizer]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "adafactor": _adafactor,
}


class OptimizerState:
    """The state of any optimizer as tensors that a checkpoint stores and loads in place.

    Numbers become tensors while they are stored; `write_numbers` writes them back after a checkpoint is loaded. A
    tensor that several parameters share, such as a quantization table, is stored with the first of them.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._numbers: list[tuple[dict[str, Any], str, Tensor]] = []
        self._seen: set[tuple[int, int]] = set()

    def begin(self) -> None:
        """Forget the tensors of an earlier pass over all parameters."""
        self._numbers = []
        self._seen = set()

    def tensors(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the flattened state of a parameter by name; raise `RunError` for what is no tensor or number."""
        state: dict[str, Any] = self._optimizer.state.get(parameter) or {}
        found: dict[str, Tensor] = {}
        for name, value in state.items():
            if isinstance(value, Tensor) and type(value) in (Tensor, torch.nn.Parameter):
                address = (value.data_ptr(), value.numel())
                if value.numel() and address not in self._seen:
                    self._seen.add(address)
                    found[name] = value.detach().view(-1)
            elif isinstance(value, int | float):
                found[name] = torch.tensor([float(value)], dtype=torch.float64)
                self._numbers.append((state, name, found[name]))
            elif value is not None:
                kind = type(self._optimizer).__name__
                raise RunError(
                    f"a checkpoint cannot hold {name!r} of the state of {kind}, a {type(value).__name__}; its state "
                    "must consist of tensors and numbers"
                )
        return found

    def write_numbers(self) -> None:
        """Write numbers that were loaded into their tensors back into the state."""
        for state, name, value in self._numbers:
            state[name] = type(state[name])(value.item())
        self.begin()

    def create(self, parameters: Iterable[Tensor]) -> None:
        """Create the state of the parameters, to be overwritten, by a step with zero gradients and learning rate."""
        self._optimizer.zero_grad()
        for value in parameters:
            value.grad = torch.zeros_like(value)
        rates = [group["lr"] for group in self._optimizer.param_groups]
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0
        self._optimizer.step()
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._optimizer.zero_grad()
