"""Checks of a model's files before transformers opens them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.hub import cached_file

from align.artifacts import read_json
from align.errors import InputError
from align.models.loading.errors import loading

LOC = ("policy",)


def check_weight_index(path: str) -> None:
    """Raise `InputError` unless the index of a sharded model names safetensors files in its own folder only.

    Transformers also opens pickled files and files of other folders that an index names.
    """
    file = _cached(path, SAFE_WEIGHTS_INDEX_NAME)
    if file is None:
        return
    index = read_json(file)
    names: Any = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names:
        raise InputError(f"{file}: has no weight_map, a mapping from weights to files", LOC)
    for name in sorted({str(each) for each in cast("dict[str, Any]", names).values()}):
        if not name.endswith(".safetensors") or name != Path(name).name:
            raise InputError(f"{file}: {name!r} is not the name of a safetensors file in the same folder", LOC)


def check_loaded(path: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise `InputError` if weights of the model are missing in its files, or weights in its files in the model."""
    if lacking := sorted(missing):
        raise InputError(f"{path!r} lacks {len(lacking)} of the model's weights, such as {lacking[0]}", LOC)
    if unused := sorted(unexpected):
        raise InputError(
            f"{path!r} has {len(unused)} weights that its configuration does not use, such as {unused[0]}", LOC
        )


def load_generation_config(path: str) -> GenerationConfig | None:
    """Load the generation configuration of a folder or Hub ID; None if it has none.

    Transformers ignores a file that it cannot read.
    """
    file = _cached(path, GENERATION_CONFIG_NAME)
    if file is None:
        return None
    values = read_json(file)
    if not isinstance(values, dict):
        raise InputError(f"{file}: not a JSON object", LOC)
    with loading("a generation configuration", path, *LOC):
        return GenerationConfig.from_dict(cast("dict[str, Any]", values))


def _cached(path: str, name: str) -> Path | None:
    """Return a file of a folder or Hub ID; None if there is none."""
    options: Any = {
        "_raise_exceptions_for_gated_repo": False,
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    with loading("a model", path, *LOC):
        found = cached_file(path, name, **options)
    return None if found is None else Path(found)
