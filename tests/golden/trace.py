"""Record the loss and gradient norm of every optimizer step of a small recipe, and hash the weights it trains."""

import hashlib
import io
import json
import platform
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from align.cli import main

ROOT = Path(__file__).parents[2]
RECIPE = Path(__file__).with_name("recipe.yaml")
TRACE = Path(__file__).with_name("trace.json")
# Rounding depends on the number of threads, so launched processes use one thread too.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
}
COLUMNS = ("loss", "grad_norm")


class Variant(NamedTuple):
    """One run of the recipe."""

    until: str  # the last step that runs
    overrides: tuple[str, ...] = ()


VARIANTS = {
    "full": Variant("reward"),
    "lora": Variant("dpo", ("policy.lora.rank=4", "policy.lora.alpha=8")),
    "zero2": Variant("dpo", ("steps.dpo.launch=launch/zero2-cpu-2.yaml",)),
}


def record(name: str, runs: Path) -> dict[str, dict]:
    """Run a variant below `runs` and return the trace of each trained step, in the order they ran."""
    until, overrides = VARIANTS[name]
    align("run", str(RECIPE), "--until", until, f"runs={runs}", f"run={name}", *overrides)
    finished = sorted((runs / name).glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    return {path.parent.name: trace(path.parent) for path in finished}


def align(*arguments: str) -> None:
    """Run the CLI on one thread, in this process because importing torch takes longer than the training."""
    output, status, threads = io.StringIO(), 0, torch.get_num_threads()
    with redirect_stdout(output), redirect_stderr(output), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["align", *arguments])
        patch.chdir(ROOT)  # paths of launch files are relative to the repository root
        for variable, value in ENVIRONMENT.items():
            patch.setenv(variable, value)
        torch.set_num_threads(1)
        try:
            main()
        except SystemExit as end:
            status = end.code
        finally:
            torch.set_num_threads(threads)
    assert not status, output.getvalue()[-3000:]


def trace(step: Path) -> dict:
    """Return the losses and gradient norms of a finished step and the hash of its saved weights."""
    lines = [json.loads(line) for line in (step / "metrics.jsonl").read_text().splitlines()]
    return {column: [line[column] for line in lines] for column in COLUMNS} | {"weights": weights_hash(step)}


def weights_hash(folder: Path) -> str:
    """Return the SHA-256 of a folder's parameters: their fp32 values in the order of their names, without the names."""
    weights = {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
    assert weights, f"no safetensors in {folder}"
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(weights[name].to(torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def machine() -> dict[str, str]:
    """Return what determines rounding on one thread: CPU model, instruction set and torch version."""
    return {
        "cpu": _cpu_model(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()
