"""Estimates of training steps: rows, tokens, memory, balance over ranks, FLOPs and time."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.accounting.flops import Decoder, Work, forward_flops, sum_work, training_flops
from align.data.balance import Balance, balance
from align.data.batching import Indices, order, steps_per_epoch
from align.data.token_groups import TokenGroup
from align.models.loading.config import max_positions
from align.models.loading.pretrained import default_device
from align.models.tree.batch import tree_batch
from align.stages.costs.estimates import CHECKPOINTS, Estimate, Planning, TrainingEstimate, equal_rows
from align.stages.costs.measured import matrix_rate
from align.stages.training.contract import TrainingSettings
from align.stages.training.footprint import footprint
from align.stages.training.rows import RowRequest, StepRows, step_rows

# Shares of a large matrix product's rate that training reaches: measured on a Xeon and on an H100 (tests/README.md)
EFFICIENCY = {"cpu": 0.6, "cuda": 0.37}
RANKS, BALANCED_STEPS = (8, 64), 16  # numbers of ranks, and of optimizer steps, of the estimated balance


def planned_rows(step: TrainingSettings, planning: Planning, folder: Path, *, limited: bool = True) -> StepRows:
    """Return the token groups of a step before it runs, in `folder`; without limits of length if not `limited`."""
    limit = max_positions(planning.config) if limited else None
    request = RowRequest(step, planning.tokenizer, planning.inputs, limit, step.attributes(planning.spec))
    return step_rows(request, folder, limited=limited)


def estimate_training(step: TrainingSettings, planning: Planning) -> Estimate:
    """Return the estimate of a step whose rows exist."""
    with tempfile.TemporaryDirectory() as folder:
        return _of_rows(step, planning, planned_rows(step, planning, Path(folder)))


def preview_groups(step: TrainingSettings, planning: Planning, number: int) -> list[tuple[TokenGroup, TokenGroup]]:
    """Return the first groups of a step as they are trained on and as they are uncut."""
    with tempfile.TemporaryDirectory() as folder:
        cut = planned_rows(step, planning, Path(folder) / "cut")
        whole = planned_rows(step, planning, Path(folder) / "whole", limited=False)
        shown = cut.train[:number]
        rows = {group.row for group in shown}
        uncut = {group.row: group for part in (whole.train, whole.held_out) for group in part if group.row in rows}
        return [(group, uncut[group.row]) for group in shown]


def _of_rows(step: TrainingSettings, planning: Planning, data: StepRows) -> Estimate:
    settings, model = step.train, planning.decoder
    num_rows = data.mixture.num_rows if data.mixture is not None else len(data.train)
    num_steps = settings.num_steps(num_rows)
    epochs = num_steps / steps_per_epoch(num_rows, settings.prompts_per_step)
    seed = planning.inputs.seed
    epoch = data.mixture.epoch(0) if data.mixture is not None else order(num_rows, seed=seed, epoch=0)
    works = [_work(group, head=step.has_lm_head) for group in data.train]
    work = sum_work(works[index] for index in epoch)
    sizes = [each.tokens for each in works]
    return Estimate(
        name=planning.name,
        stage=step.stage,
        rows=num_rows,
        tokens=work.tokens,
        **_costs(step, model, work, epochs=epochs, reference=step.needs_reference),
        disk=planning.model_bytes,
        spare=CHECKPOINTS * planning.model_bytes,
        training=TrainingEstimate(
            counts=data.counts,
            format=data.format,
            optimizer_steps=num_steps,
            longest=max(len(each.ids) for group in data.train for each in group.sequences),
            unshared=sum(len(each.ids) for index in epoch for each in data.train[index].sequences),
            memory=None if isinstance(model, str) else footprint(step, planning.inputs.policy, model, sizes),
            balances=_balances(step, sizes, epoch),
        ),
    )


def estimate_bound(step: TrainingSettings, planning: Planning, made: Estimate) -> Estimate:
    """Return an upper bound where an earlier step makes the rows: every prompt, with the longest responses."""
    work = equal_rows(made.tokens, made.rows)
    return Estimate(
        name=planning.name,
        stage=step.stage,
        rows=made.rows,
        tokens=made.tokens,
        **_costs(step, planning.decoder, work, epochs=step.train.epochs, reference=True),
        disk=planning.model_bytes,
        spare=CHECKPOINTS * planning.model_bytes,
        bound=True,
    )


def _costs(
    step: TrainingSettings, model: Decoder | str, work: Work, *, epochs: float, reference: bool
) -> dict[str, Any]:
    """Return the FLOPs and seconds of an estimate, or why they are unknown."""
    if isinstance(model, str):
        return {"flops": None, "seconds": None, "unknown": model}
    flops = epochs * training_flops(model, work) + (forward_flops(model, work) if reference else 0)
    return {"flops": flops, "seconds": flops / _training_rate(step.train.precision)}


def _work(group: TokenGroup, *, head: bool) -> Work:
    """Return the work of a forward pass over the group's own tree, with or without an LM head."""
    batch = tree_batch(group.sequences)
    return Work(batch.num_tokens, int(batch.position_ids.sum()) + batch.num_tokens, len(batch.targets_N) if head else 0)


def _balances(step: TrainingSettings, sizes: Sequence[int], epoch: Indices) -> list[Balance]:
    """Return how evenly the first steps of an epoch are split over ranks, each of which has a group at least."""
    per_step, budget = step.train.prompts_per_step, step.train.tokens_per_micro_batch
    starts = range(0, min(BALANCED_STEPS, max(1, len(epoch) // per_step)) * per_step, per_step)
    steps = [epoch[start : start + per_step] for start in starts]
    widths = [ranks for ranks in RANKS if ranks <= len(steps[0])] or [len(steps[0])]
    return [balance(steps, sizes, token_budget=budget, num_ranks=ranks) for ranks in widths]


def _training_rate(precision: str) -> float:
    """Return the estimated FLOP/s of a training step on this machine."""
    device = default_device()
    return matrix_rate(device, precision) * EFFICIENCY[device]
