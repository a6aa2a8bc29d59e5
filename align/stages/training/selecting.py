"""Online selection of a step: what its training loop is given, and what its manifest says of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.accounting.flops import Decoder, Work, forward_flops, sum_work
from align.artifacts import METRICS
from align.errors import InputError
from align.models.backbone import Backbone
from align.models.loading.config import dimensions, load_config
from align.models.policy import load_policy
from align.models.reward_model import RewardModel, load_reward_model
from align.models.settings import LoraSettings, PolicySettings
from align.stages.inputs.context import StepInputs
from align.stages.training.contract import TrainingSettings
from align.stages.training.rows import StepRows
from align.storage.disk_errors import reading
from align.train.loop import Loop
from align.train.selection.selection import FixedModel, Selection, selection_cost
from align.train.selection.settings import SELECTION, UNIFORM
from align.train.training_run import HELD_OUT, START, TrainingResult, work_of


def selection_of(
    step: TrainingSettings,
    rows: StepRows,
    model: Decoder | str,
    fixed: Mapping[str, FixedModel],
    *,
    frozen: bool,
) -> Selection | None:
    """Return what a step's training loop is given to select with; None if it trains on all rows.

    `model` are the dimensions of the policy, of which only adapters are trained if it is `frozen`.
    """
    if step.selection is None:
        return None
    sizes = [each.size for each in fixed.values()]
    return Selection(
        settings=step.selection,
        fixed=fixed,
        sources=rows.sources,
        size=model,
        cost=selection_cost(
            rows.train,
            step.selection,
            model,
            sizes,
            mixture=rows.mixture,
            has_lm_head=step.has_lm_head,
            frozen=frozen,
        ),
    )


def fixed_models(
    step: TrainingSettings,
    inputs: StepInputs,
    tokenizer: PreTrainedTokenizerBase,
    attributes: Sequence[str] | None = None,
) -> dict[str, FixedModel]:
    """Return the reference and the scorer of a step's selection, where it has them.

    `attributes` are those of a reward model, which they must have in the same order.
    """
    if step.selection is None:
        return {}
    lora = inputs.policy.lora
    keeps_adapters = lora is not None and not lora.merge and step.has_lm_head  # a reward model is saved merged
    kept = LoraSettings(adapters="continued") if keeps_adapters else None
    quantize = inputs.policy.quantize if keeps_adapters else None
    found: dict[str, FixedModel] = {}
    for key, names in step.selection.fixed_steps.items():
        paths = [str(inputs.folders[name]) for name in names]
        settings = [PolicySettings(path=path, lora=kept, quantize=quantize) for path in paths]
        loads = [partial(_load_fixed, each, tokenizer, attributes, key) for each in settings]
        is_cross_fitted = len(paths) > 1
        lines = [line for path in paths for line in _metrics_of(Path(path))] if is_cross_fitted else []
        found[key] = FixedModel(
            loads=loads,
            size=dimensions(load_config(paths[0])),
            trained_rows=sum(int(line["groups"]) for line in lines),
            trained=sum_work(map(work_of, lines)),
        )
    return found


def _metrics_of(folder: Path) -> list[dict[str, float]]:
    """Return the metrics of each optimizer step of a finished step."""
    with reading(folder / METRICS):
        return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def _load_fixed(
    settings: PolicySettings, tokenizer: PreTrainedTokenizerBase, attributes: Sequence[str] | None, key: str
) -> Backbone:
    """Load a fixed model; raise `InputError` unless it reads the same tokens and predicts the same attributes."""
    loc = ("selection", key)
    model, own = load_policy(settings) if attributes is None else load_reward_model(settings)
    if own.get_vocab() != tokenizer.get_vocab():
        raise InputError(f"the {key} has another tokenizer than the policy; name a step with the same", loc)
    if isinstance(model, RewardModel) and model.rating.names != tuple(attributes or ()):
        raise InputError(
            f"the {key} predicts {', '.join(model.rating.names)}, and the step {', '.join(attributes or ())}; name "
            "a step with the same attributes in the same order",
            loc,
        )
    return model


def selection_report(loop: Loop, outcome: TrainingResult, model: Decoder | str) -> dict[str, Any]:
    """Return what the manifest says of a step's selection: costs, shares, and the held-out loss over FLOPs.

    FLOPs are None if the dimensions of a model are unknown. Those of reference and scorer are their passes over all
    rows, estimated from some of them, even if another step has run them already, and the training of cross-fitted
    references; the held-out curve starts after them. The uniform FLOPs are those of training on as many rows of mean
    cost.
    """
    selection = loop.training_run.selection
    if selection is None:
        return {}
    trained = [selection.cost.training * _flops(model, work_of(line)) for line in outcome.metrics]
    scored = [_flops(model, work_of(line, SELECTION)) for line in outcome.metrics]
    is_known = not any(isinstance(size, str) for size in (model, *(each.size for each in selection.fixed.values())))
    uniform = [
        flops / line.get(f"{SELECTION}row_cost", 1.0) for flops, line in zip(trained, outcome.metrics, strict=True)
    ]
    fixed = selection.fixed.values() if selection.settings.score != UNIFORM else ()
    reference = selection.cost.once if fixed else 0.0
    fitted = sum(selection.cost.training * _flops(each.size, each.trained) for each in fixed)
    total = accumulate(map(sum, zip(trained, scored, strict=True)), initial=reference + fitted)
    loss = f"{HELD_OUT}loss"
    points = [[0, next(total), outcome.first_metrics.get(f"{START}loss")]]
    lines = zip(outcome.metrics, total, strict=True)
    points += [[int(line["step"]), flops, line[loss]] for line, flops in lines if loss in line]
    found: dict[str, Any] = {
        "score": "tokens" if selection.settings.chooses_tokens else selection.settings.score,
        "filter": selection.settings.filter if selection.settings.tokens is None else 1 - selection.settings.tokens,
        "equal": selection.settings.equal,
        "compare": selection.settings.compare,
        "steps": selection.selected_steps(loop.training_run.settings, loop.training_run.num_rows),
        "predicted_cost": selection.cost_factor,
        "training_flops": sum(trained) if is_known else None,
        "scoring_flops": sum(scored) if is_known else None,
        "uniform_flops": sum(uniform) if is_known else None,
        "reference_flops": reference if is_known else None,
        "reference_training_flops": fitted if is_known else None,
        "scoring_seconds": sum(line.get(f"{SELECTION}seconds", 0.0) for line in outcome.metrics),
        "curve": [point for point in points if point[-1] is not None] if is_known else [],
    }
    names = sorted({name for line in outcome.metrics for name in line if name.startswith(SELECTION)})
    kept = ("token_share", "share/", "pool_share/", "mean_", "effective_sample_size", "rows")
    for name in names:
        if name.removeprefix(SELECTION).startswith(kept):
            found[name.removeprefix(SELECTION)] = fmean(line[name] for line in outcome.metrics if name in line)
    return {"selection": found}


def _flops(model: Decoder | str, work: Work) -> float:
    return 0.0 if isinstance(model, str) else float(forward_flops(model, work))
