"""Names of the optimizers, and why some need whole parameters; no torch."""

from __future__ import annotations

from importlib.util import find_spec

from align.errors import InputError, within
from align.registry import import_dotted

OPTIMIZERS = ("adamw", "adamw_8bit", "adafactor")
OPTIMIZER_LOC = ("train", "optimizer")  # location in a step
# Why the result of an optimizer would depend on how parameters are sharded
UNSHARDED = {
    "adafactor": "averages squared gradients over rows and columns of whole matrices",
    "adamw_8bit": "quantizes its state in blocks of whole parameters",
}


def check_optimizer(name: str) -> None:
    """Raise `InputError` for an optimizer whose package is missing, or for a user's own that cannot be imported."""
    if name == "adamw_8bit" and find_spec("bitsandbytes") is None:
        message = "adamw_8bit needs bitsandbytes, which is not installed: pip install bitsandbytes"
        raise InputError(message, OPTIMIZER_LOC)
    if ":" in name:
        with within(*OPTIMIZER_LOC):
            import_dotted(name, "optimizer")
