"""`align export`: write a policy as a GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from align.artifacts import atomic_folder
from align.commands.one_step import settings_of
from align.compress.gguf_export import export_policy
from align.compress.settings import GgufSettings
from align.compress.sizes import Compression
from align.errors import InputError
from align.models.loading.pretrained import silence_transformers
from align.stages.inputs.opening import open_model


def export(policy: str, out: Path | None, overrides: Sequence[str]) -> None:
    """Export a policy to a new folder and print its size. `overrides` are `key=value` of `GgufSettings`."""
    settings = settings_of(GgufSettings, (), overrides)
    is_local = Path(policy).is_dir()
    name = Path(policy).resolve().name if is_local else policy.rpartition("/")[2]
    parent = Path(policy).resolve().parent if is_local else Path()
    target = parent / f"{name}-{settings.gguf}" if out is None else out
    if target.exists():
        raise InputError(f"{target} exists; name another folder with --out, or move it away")
    open_model(policy)
    silence_transformers()
    with atomic_folder(target) as folder:
        report = export_policy(policy, folder / f"{name}-{settings.gguf}.gguf", settings)
    for note in report["notes"]:
        print(f"note: {note}")
    size = report["compression"]
    print(Compression(size["bytes"], size["bytes_before"], size["weights"]))
    print(target / f"{name}-{settings.gguf}.gguf")
