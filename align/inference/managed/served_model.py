"""What a server is started for: a saved policy as it is, its base with adapters, or a merged copy."""

from __future__ import annotations

import shutil
from pathlib import Path

from peft import LoraConfig

from align.artifacts import check_not_removed
from align.content_hash import GGUF
from align.errors import InputError
from align.inference.managed.kinds import KINDS, LORA_RANKS, Adapters, ServedModel
from align.inference.managed.settings import ManagedSettings, Precision
from align.models.adapters.files import adapter_base, base_quantization, load_adapter_config
from align.models.policy import load_policy, save_policy
from align.models.settings import PolicySettings, is_adapter

MERGED = "merged-model"  # folder of a merged copy, in that of the step


def served_model(
    path: str, name: str, settings: ManagedSettings, folder: Path, *, rates: Precision | None = None
) -> ServedModel:
    """Return what a server is started for; adapters that it does not take are merged into a copy in `folder`.

    `rates` is the precision of a reward model, which is never one of adapters.

    Raises `InputError` for a model that no server can offer: a GGUF file, or adapters on a base in 4 bits.
    """
    title = KINDS[settings.kind].title
    if path.startswith(GGUF):
        raise InputError(f"{title} serves folders and hub ids, and {path} is a GGUF file; use engine.local")
    check_not_removed(path)
    if not is_adapter(path):
        local = Path(path).expanduser()
        return ServedModel(str(local.resolve()) if local.is_dir() else path, name, rates=rates)
    if base_quantization(path) is not None:
        raise InputError(
            f"{path}: the adapters were trained on a base in 4 bits, which {title} would serve unquantized: another "
            "policy; use engine.local"
        )
    config = load_adapter_config(path)
    if KINDS[settings.kind].takes_adapters and not _lack_of_support(config):
        base = adapter_base(path)
        check_not_removed(base)
        local = Path(base).expanduser()
        return ServedModel(
            str(local.resolve()) if local.is_dir() else base, name, Adapters(str(Path(path).resolve()), config.r)
        )
    return ServedModel(str(_merged(path, folder / MERGED)), name)


def remove_merged(folder: Path) -> None:
    """Remove the merged copy in a step's folder."""
    shutil.rmtree(folder / MERGED, ignore_errors=True)


def _lack_of_support(config: LoraConfig) -> bool:
    """Return whether vLLM refuses these adapters or would scale them wrongly (`vllm/lora/peft_helper.py`)."""
    of_modules = bool(config.rank_pattern or config.alpha_pattern)
    return bool(config.modules_to_save or config.use_dora or config.bias != "none" or of_modules) or (
        config.r > LORA_RANKS[-1]
    )


def _merged(path: str, target: Path) -> Path:
    """Write the policy with its adapters merged into its weights; return the folder."""
    shutil.rmtree(target, ignore_errors=True)
    policy, tokenizer = load_policy(PolicySettings(path=path))
    save_policy(policy, tokenizer, target)
    return target.resolve()
