"""The influence of a policy's layers, and copies of a policy without some of them.

Shape legend: L layers, R rows of a model input, D width.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from align.artifacts import read_json, write_json
from align.compress.weights import StoredWeights, copy_other_files, tensor_names, write_renamed
from align.data.batching import plan_step
from align.data.token_groups import TokenSequence
from align.errors import InputError, within
from align.models.policy import Policy, load_policy
from align.models.probe import choose_forward
from align.models.saving.comparison import TOLERANCE, model_outputs, random_groups
from align.models.settings import PolicySettings
from align.models.tree.batch import TokenBatch, plain_batch, tree_batch

TOKEN_BUDGET = 4096  # tokens of a forward pass
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "layer_rope_theta")  # lists in configurations


@torch.no_grad()
def block_influence(policy: Policy, sequences: Sequence[TokenSequence]) -> list[float]:
    """Return the block influence of each layer: 1 - cos(input, output), averaged over all tokens of the sequences.

    Men et al. 2024 (ShortGPT, arXiv:2403.03853), eq. 1. The input and the output of a layer are hidden states with the
    residual. A prefix that sequences share is computed once and counts for each of them.
    """
    is_tree = choose_forward(policy, [[each] for each in sequences], "auto").name == "tree"
    make = tree_batch if is_tree else plain_batch
    lengths = [len(each.ids) for each in sequences]
    _, layers = _layers(policy)
    total_L = torch.zeros(len(layers), dtype=torch.float64)
    for micro in plan_step(range(len(sequences)), lengths, token_budget=TOKEN_BUDGET).ranks[0]:
        batch = make([sequences[index] for index in micro]).to(policy.device)
        total_L += _distances(policy, layers, batch)
    return (total_L / sum(lengths)).tolist()


def _layers(policy: Policy) -> tuple[str, nn.ModuleList]:
    """Return the decoder's layers, and their name in the model; raise `InputError` for another structure."""
    config = policy.base.config
    with within("policy"):
        if config.get_text_config() is not config:
            raise InputError(f"{type(policy.base).__name__} is not a model of text alone, whose layers can be dropped")
        return policy.decoder_layers()


def without_layers(config: PretrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
    """Return what changes in a configuration where only the layers `kept` are left."""
    names = type(config).attribute_map
    number = cast(int, config.num_hidden_layers)
    changes: dict[str, Any] = {names.get("num_hidden_layers", "num_hidden_layers"): len(kept)}
    for name in PER_LAYER:
        values = getattr(config, name, None)
        if isinstance(values, list | tuple) and len(values) == number:
            changes[name] = [values[layer] for layer in kept]
    return changes


def write_without_layers(policy: Policy, stored: StoredWeights, dropped: Sequence[int], target: Path) -> None:
    """Write the policy's folder without some layers to `target`; weights are copied one block of bytes at a time.

    `stored` are the weights of `policy`. Raises `InputError` for an architecture whose layers are stored in another
    way, or depend on their number.
    """
    prefix, layers = _layers(policy)
    kept = [layer for layer in range(len(layers)) if layer not in dropped]
    names = _new_names(stored.names, f"{prefix}.", dict(zip(kept, range(len(kept)), strict=True)), len(layers))
    used = [file for file in stored.files if any(name in names for name in tensor_names(file))]
    num_bytes = sum(write_renamed(file, target / file.name, names) for file in used)
    copy_other_files(stored.folder, target)
    if (target / SAFE_WEIGHTS_INDEX_NAME).is_file():
        files = {names[name]: file.name for file in used for name in tensor_names(file) if name in names}
        write_json(target / SAFE_WEIGHTS_INDEX_NAME, {"metadata": {"total_size": num_bytes}, "weight_map": files})
    config = read_json(stored.folder / CONFIG_NAME)
    write_json(target / CONFIG_NAME, {**config, **without_layers(policy.base.config, kept)})
    _check(policy, [layers[layer] for layer in dropped], target)


def _distances(policy: Policy, layers: nn.ModuleList, batch: TokenBatch) -> Tensor:
    """Return the sum of 1 - cos(input, output) over the tokens of a batch's sequences, for each layer, fp64 [L]."""
    counts_R = np.bincount(np.concatenate(batch.paths), minlength=batch.input_ids.numel())
    weight_R = torch.from_numpy(counts_R).to(policy.device)
    total_L = torch.zeros(len(layers), dtype=torch.float64)

    def measure(number: int, _: nn.Module, given: Any, named: Any, output: Any) -> None:  # noqa: ANN401
        after = output[0] if isinstance(output, tuple) else output
        cosine_R = nn.functional.cosine_similarity(_hidden(given, named).double(), after.double(), dim=-1).flatten()
        total_L[number] = float(((1 - cosine_R) * weight_R).sum())

    with ExitStack() as hooks:
        for number, layer in enumerate(layers):
            hooks.callback(layer.register_forward_hook(partial(measure, number), with_kwargs=True).remove)
        policy.hidden_states(batch)
    return total_L


def _hidden(given: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """Return the hidden states among the arguments of a layer."""
    return given[0] if given else named["hidden_states"]


def _new_names(names: Iterable[str], prefix: str, numbers: dict[int, int], num_layers: int) -> dict[str, str]:
    """Return the new name of each tensor that is kept. Raise `InputError` unless every layer has tensors."""
    of_layer = re.compile(re.escape(prefix) + r"(\d+)\.(.+)")
    found: dict[str, str] = {}
    seen: set[int] = set()
    for name in names:
        match = of_layer.fullmatch(name)
        if match is None:
            found[name] = name
            continue
        seen.add(int(match[1]))
        if int(match[1]) in numbers:
            found[name] = f"{prefix}{numbers[int(match[1])]}.{match[2]}"
    if seen != set(range(num_layers)):
        raise InputError(f"the weights have no tensors {prefix}0 to {prefix}{num_layers - 1} of layers", ("policy",))
    return found


@contextmanager
def _skipping(layers: Sequence[nn.Module]) -> Generator[None]:
    """Run the model in this block as if the layers returned their input."""

    def skip(_: nn.Module, given: Any, named: Any, output: Any) -> Any:  # noqa: ANN401 - a layer's own types
        hidden = _hidden(given, named)
        return (hidden, *cast("tuple[Any, ...]", output)[1:]) if isinstance(output, tuple) else hidden

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_hook(skip, with_kwargs=True).remove)
        yield


def _check(policy: Policy, dropped: Sequence[nn.Module], folder: Path) -> None:
    """Raise `InputError` unless the policy in `folder` is the given one with the layers skipped."""
    found, tokenizer = load_policy(PolicySettings(path=str(folder)))
    for each in (policy, found):
        each.use_forward("plain")
    groups = random_groups(len(tokenizer))
    with _skipping(dropped):
        expected = model_outputs(policy, groups)
    difference = (model_outputs(found.to(policy.device), groups).values - expected.values).abs().max().item()
    if not difference <= TOLERANCE:
        raise InputError(
            f"without {len(dropped)} layers {type(policy.base).__name__} differs by {difference:.2g} "
            f"{policy.output_unit} from itself with these layers skipped: its layers depend on their number",
            ("policy",),
        )
