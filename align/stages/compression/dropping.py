"""Work of the stage `drop_layers`."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from align.artifacts import discard_attempt
from align.compress.layer_dropping import block_influence, without_layers, write_without_layers
from align.compress.sizes import Compression
from align.compress.weights import StoredWeights, plain_folder
from align.data.chat_encoder import ChatEncoder
from align.data.chat_templates import apply_template
from align.data.rejections import Rejections
from align.data.token_groups import TokenGroup
from align.errors import InputError
from align.evaluation.likelihood import forward_work
from align.models.loading.config import build_config, dimensions, load_config, max_positions
from align.models.loading.pretrained import default_device, silence_transformers
from align.models.policy import load_policy
from align.models.settings import PolicySettings
from align.records import Demonstration
from align.stages.costs.measured import Done
from align.stages.inputs.context import RunContext, StepInputs
from align.stages.inputs.sources import rows_of, streamed
from align.train.filters import of_kind


class DroppingSettings(Protocol):
    """Settings of the step."""

    @property
    def policy(self) -> str | None:
        """Step whose policy loses layers."""
        ...

    @property
    def drop(self) -> int:
        """Number of layers to drop."""
        ...

    @property
    def data(self) -> str:
        """Source of the rows."""
        ...

    @property
    def max_rows(self) -> int:
        """Number of rows to measure on."""
        ...


def drop_layers(step: DroppingSettings, context: RunContext) -> dict[str, Any]:
    """Write a policy without the layers of the lowest influence, and return what the manifest says of it."""
    assert step.policy is not None
    silence_transformers()
    discard_attempt(context.folder)
    with tempfile.TemporaryDirectory(dir=context.folder, prefix=".merged.partial-") as name:
        stored = StoredWeights(plain_folder(str(context.inputs.folders[step.policy]), Path(name)))
        policy, tokenizer = load_policy(PolicySettings(path=str(stored.folder)))
        apply_template(tokenizer)
        policy = policy.to(default_device()).eval()
        num_layers = check_number(policy.base.config, step.drop)
        groups = measured_groups(step, context.inputs, tokenizer, policy.base.config)
        influence = block_influence(policy, [group.sequences[0] for group in groups])
        dropped = least(influence, step.drop)
        for layer, value in enumerate(influence):
            context.progress.note(f"layer {layer}: influence {value:.4f}{', dropped' if layer in dropped else ''}")
        write_without_layers(policy, stored, dropped, context.folder)
        before = stored.num_bytes
    written = StoredWeights(context.folder)
    weights = written.num_weights
    done = Done(
        dimensions=dimensions(policy.base.config),
        weights=weights,
        observed=forward_work(groups),
        device=default_device(),
    )
    return {
        "layers": {"before": num_layers, "dropped": dropped, "influence": influence, "rows": len(groups)},
        "compression": Compression(written.num_bytes, before, weights).to_json(),
        "done": done,
    }


def least(influence: Sequence[float], number: int) -> list[int]:
    """Return the layers of the lowest influence, in ascending order; of equal ones the first."""
    return sorted(sorted(range(len(influence)), key=lambda layer: (influence[layer], layer))[:number])


def check_number(config: PretrainedConfig, drop: int) -> int:
    """Return the number of layers; raise `InputError` unless one is left, and for a model of more than text."""
    if config.get_text_config() is not config:
        raise InputError(f"{config.model_type} has more than a decoder of text; only that can lose layers", ("policy",))
    number: int = config.get_text_config().num_hidden_layers
    if drop >= number:
        raise InputError(f"{drop} of {number} layers; at least one must be left", ("drop",))
    return number


def measured_groups(
    step: DroppingSettings, inputs: StepInputs, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> list[TokenGroup]:
    """Return the first rows as token groups of one sequence each; raise `InputError` if none is left."""
    source = inputs.sources[step.data]
    encoder = ChatEncoder(
        tokenizer,
        max_length=source.max_length or max_positions(config),
        max_prompt_length=source.max_prompt_length,
        overlong=source.overlong,
        on_error=source.on_error,
    )
    with rows_of(step.data):
        records = streamed(source, kind=Demonstration, seed=inputs.seed).records
        rejections = Rejections(source.on_error)
        located = encoder.encode_located(of_kind(records, Demonstration, rejections))
        groups = [each.record for each in islice(located, step.max_rows)]
        if not groups:
            counts = ", ".join(
                f"{name} {number}" for name, number in sorted((rejections.counts + encoder.counts).items())
            )
            raise InputError(f"{source.path}: no row is left to measure layers on ({counts})")
    inputs.check_unchanged(source)
    return groups


def planned_settings(settings: PolicySettings, drop: int) -> PolicySettings:
    """Return settings of a model of the same size as one without `drop` layers, for estimates."""
    if settings.from_config is not None:
        config = build_config(settings.from_config)
        values = dict(settings.from_config)
    else:
        config = load_config(str(settings.path))
        known = {field.name for field in dataclasses.fields(type(config))} | {"model_type"}
        values = {name: value for name, value in config.to_dict().items() if name in known and value is not None}
    changes = without_layers(config, range(check_number(config, drop) - drop))
    values.pop("num_hidden_layers", None)  # `changes` has the architecture's own name for it
    return settings.model_copy(
        update={
            "from_config": {**values, **changes},
            "path": None,
            "tokenizer": settings.tokenizer or settings.path,
            "lora": None,
            "quantize": None,
        }
    )
