"""Matrix products of fp32 tensors in bf16 with fp32 sums, on CPUs with instructions for them (`bf16-products`)."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from align.errors import InputError
from align.train.settings import PRODUCTS

_SIDE = 64  # of the matrices of the check


@contextmanager
def bf16_products() -> Generator[None]:
    """Let oneDNN round the inputs of fp32 products to bf16 within the block; all other operations stay in fp32."""
    products: Any = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009 - not in its type stubs
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before


def products_in(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which the products of a model with fp32 weights use a precision of the settings."""
    if precision == PRODUCTS:
        return bf16_products()
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def check_products(device: torch.device) -> None:
    """Raise `InputError` if `bf16_products` has no effect, by comparing a product within and outside of it."""
    matrix = torch.linspace(1, 2, _SIDE * _SIDE).view(_SIDE, _SIDE)
    exact = matrix @ matrix.T
    with bf16_products():
        has_effect = not torch.equal(matrix @ matrix.T, exact)
    if device.type != "cpu" or not has_effect:
        where = "this CPU with this build of PyTorch" if device.type == "cpu" else f"the device {device.type}"
        raise InputError(f"{PRODUCTS} has no effect on {where}; use fp32 or bf16", ("train", "precision"))
