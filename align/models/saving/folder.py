"""The files of a saved model: configurations and tokenizer stay what they were, weights get the dtype asked for."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from align.artifacts import read_json, write_json
from align.errors import InputError, RunError, one_line
from align.models.backbone import Backbone
from align.models.loading.errors import LOAD_ERRORS, MAX_SHOWN
from align.models.loading.origin import origin_of, restored
from align.models.loading.tokenizer import TOKENIZER_CONFIG, declared_class
from align.models.saving.weights import WHOLE, Gather, write_weights
from align.models.settings import SaveDtype
from align.models.weights import WrittenWeights
from align.storage.disk_errors import error_code

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Fields of a generation configuration that have no effect without sampling, or without beams
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
BEAMS = ("early_stopping", "length_penalty")
PROBE = "Hello, world! 3 + 4 = 7"  # text that a tokenizer must encode alike after it was saved


def dtype_of(model: PreTrainedModel, asked: SaveDtype) -> torch.dtype:
    """Return the dtype that the weights of a model are saved in."""
    return origin_of(model).dtype if asked == "original" else DTYPES[asked]


def write_model(model: PreTrainedModel, folder: Path, dtype: torch.dtype, gather: Gather = WHOLE) -> WrittenWeights:
    """Write configuration, generation configuration and weights, which are rounded to `dtype`.

    Returns what identifies the weights. Every process must call it, with a `gather` if weights are sharded.
    """
    with _refusals(RunError, "the model cannot be saved"):
        gather.on_main(partial(_write_configuration, model, folder, dtype))
        return write_weights(model, folder, dtype, gather)


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer under the class that it was loaded by, which other versions of transformers know."""
    with _refusals(RunError, "the tokenizer cannot be saved"):
        tokenizer.save_pretrained(str(folder))
    file = folder / TOKENIZER_CONFIG
    if (name := declared_class(tokenizer)) is not None:
        write_json(file, read_json(file) | {"tokenizer_class": name})


def clean_generation_config(model: PreTrainedModel) -> list[str]:
    """Unset the fields of the generation configuration that have no effect, and return their names.

    Transformers loads such a configuration and refuses to save it.
    """
    config: Any = model.generation_config if model.can_generate() else None
    if config is None:
        return []
    default = GenerationConfig()
    ineffective = (() if config.do_sample is True else SAMPLING) + (BEAMS if config.num_beams in (None, 1) else ())
    found = [name for name in ineffective if getattr(config, name, None) != getattr(default, name, None)]
    for name in found:
        setattr(config, name, getattr(default, name, None))
    return found


def check_saveable(model: Backbone, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Write everything but the weights to a temporary folder and read it back, before training.

    Returns the names of the fields that the saved generation configuration will lack because they have no effect.
    Raises `InputError` for a configuration, generation configuration or tokenizer that cannot be saved and loaded.
    """
    base = model.base
    cleaned = clean_generation_config(base)
    with tempfile.TemporaryDirectory() as name, _refusals(InputError, "this model could not be saved after training"):
        base.config.save_pretrained(name)
        if base.can_generate():
            base.generation_config.validate(strict=True)
            base.generation_config.save_pretrained(name)
        write_tokenizer(tokenizer, Path(name))
        AutoConfig.from_pretrained(name, trust_remote_code=False)
        again = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    texts = [PROBE, *(str(token) for token in tokenizer.all_special_tokens)]
    if len(again) != len(tokenizer) or any(again.encode(text) != tokenizer.encode(text) for text in texts):
        raise InputError("the tokenizer encodes text differently once it has been saved and loaded", ("policy",))
    return cleaned


def _write_configuration(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    clean_generation_config(model)
    model.save_pretrained(str(folder), state_dict={})  # everything but weights
    write_json(folder / CONFIG_NAME, restored(read_json(folder / CONFIG_NAME), origin_of(model), dtype))


@contextmanager
def _refusals(kind: type[InputError | RunError], what: str) -> Generator[None]:
    """Turn what transformers raises in this block into an error of one line; full disks are reported elsewhere."""
    try:
        yield
    except (InputError, OSError):
        raise
    except LOAD_ERRORS as error:  # a RunError is a RuntimeError, and has its own reason
        if (code := error_code(error)) is not None:  # of safetensors, which gives an error of the disk as text
            raise OSError(code, os.strerror(code)) from error
        message = f"{what}: {one_line(error)[:MAX_SHOWN]}"
        raise (InputError(message, ("policy",)) if kind is InputError else RunError(message)) from error
