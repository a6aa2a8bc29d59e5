"""Pieces of a transformers decoder that `torch.compile` fuses: RMS norms, gated products and rotary embeddings.

Attention and matrix products stay eager. Each piece is a module's own code, so that it has the formula of its family.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from align.errors import InputError, one_line

FAMILIES = "transformers.models."
GATED = "down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"  # of the code of a gated MLP
ROTARY = "apply_rotary_pos_emb"
# PyTorch compiles a function again for one row or several, with and without gradients, and for sizes that are equal. A
# function with more variants than its own limit of 8 would end the training.
RECOMPILE_LIMIT = 64
NORM_ARGUMENTS = 2  # itself and the hidden states; a gated norm has more
PIECES = {"norm": "RMS norms", "mlp": "gated products", "attention": "rotary embeddings"}


class CompiledPieces:
    """The pieces of a model that are compiled, until `remove`; the others are counted by the names of their classes."""

    def __init__(self, model: nn.Module) -> None:
        """Replace the forward of every piece whose code is known; raise `InputError` where nothing can be compiled."""
        _check_compiler(next(model.parameters()).device)
        config: Any = import_module("torch._dynamo.config")  # slow to import
        config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
        self.compiled, self.eager = Counter[str](), Counter[str]()
        self._functions: dict[Any, Callable[..., Any]] = {}
        self._modules: list[nn.Module] = []
        for module in model.modules():
            kind = _kind(module)
            if kind is None:
                continue
            forward = self._forward(kind, module)
            if forward is None:
                self.eager[type(module).__name__] += 1
                continue
            self.compiled[kind] += 1
            cast(Any, module).forward = MethodType(forward, module)
            self._modules.append(module)

    def remove(self) -> None:
        """Run every module with its own code again."""
        for module in self._modules:
            del cast(Any, module).forward
        self._modules.clear()

    def describe(self) -> str:
        """Return what is compiled and what is not."""
        found = [f"{self.compiled[kind]} {name}" for kind, name in PIECES.items()]
        eager = [f"{number} {name}" for name, number in sorted(self.eager.items())]
        return f"compiled: {', '.join(found)}" + (f"; eager: {', '.join(eager)}" if eager else "")

    def _forward(self, kind: str, module: nn.Module) -> Callable[..., Any] | None:
        """Return the function that replaces the forward of a module; None if its code is not known."""
        code = _own_code(type(module))
        if code is None or "forward" in vars(module):
            return None
        if kind == "norm":
            if not type(module).__name__.endswith("RMSNorm") or code.__code__.co_argcount != NORM_ARGUMENTS:
                return None
            # Norms of one width share what is compiled
            return self._compiled(code, getattr(getattr(module, "weight", None), "shape", None))
        if kind == "mlp":
            return self._gated(module) if GATED in inspect.getsource(code) else None
        rotary = code.__globals__.get(ROTARY)
        if ROTARY not in code.__code__.co_names or type(rotary) is not FunctionType:
            return None
        return _copy(code, {ROTARY: self._compiled(rotary)})

    def _gated(self, module: nn.Module) -> Callable[..., Any]:
        """Return the forward of a gated MLP, whose activation and product are compiled and whose layers are not."""

        def gated(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
            return activation(gate) * up

        product = self._compiled(gated, type(cast(Any, module).act_fn))

        def forward(mlp: Any, x: Tensor) -> Tensor:  # noqa: ANN401 - each family has its own class
            return mlp.down_proj(product(mlp.act_fn, mlp.gate_proj(x), mlp.up_proj(x)))

        return forward

    def _compiled(self, function: Callable[..., Any], *key: object) -> Callable[..., Any]:
        """Return a function compiled for tensors of any size, one for all modules with the same code and key."""
        code = cast(FunctionType, function)
        found = (code.__code__, *key)
        if found not in self._functions:
            # A copy, since what PyTorch compiles for a function is limited in number, over all models of a process
            self._functions[found] = torch.compile(_copy(code, {}), dynamic=True, fullgraph=True)
        return self._functions[found]


def _kind(module: nn.Module) -> str | None:
    """Return which piece a module of a transformers model is or contains; None for all others."""
    name = type(module).__name__
    if isinstance(module, nn.LayerNorm) or "Norm" in name:
        return "norm"
    if not type(module).__module__.startswith(FAMILIES):
        return None
    if name.endswith("Attention"):
        return "attention"
    return "mlp" if name.endswith(("MLP", "Experts")) else None


def _own_code(kind: type[nn.Module]) -> FunctionType | None:
    """Return the forward of a class of transformers without the handling of deprecated arguments around it."""
    forward = kind.forward
    while hasattr(forward, "__wrapped__") and forward.__code__.co_filename.endswith("deprecation.py"):
        forward = cast(Any, forward).__wrapped__
    is_known = kind.__module__.startswith(FAMILIES) and type(forward) is FunctionType
    return None if not is_known or hasattr(forward, "__wrapped__") else cast(FunctionType, forward)


def _copy(function: FunctionType, changes: dict[str, Any]) -> FunctionType:
    """Return a copy of a function with changed globals."""
    names = {**function.__globals__, **changes} if changes else function.__globals__
    made = FunctionType(
        function.__code__.replace(), names, function.__name__, function.__defaults__, function.__closure__
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _check_compiler(device: torch.device) -> None:
    """Raise `InputError` if `torch.compile` does not work, as without a C++ compiler."""
    try:
        torch.compile(torch.exp)(torch.zeros(2, device=device))
    except RuntimeError as error:  # the base of what dynamo and inductor raise
        message = "pieces needs a C++ compiler and, on a GPU, Triton; torch.compile fails here"
        raise InputError(f"{message}: {one_line(error)[:300]}", ("train", "compile")) from error
