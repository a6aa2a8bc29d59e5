"""Estimates of training steps: rows, tokens, memory, balance over ranks, FLOPs and time."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from align.accounting.flops import BACKWARD, Decoder, Work, forward_flops, sum_work, total_flops
from align.accounting.peak_memory import gpu_memory
from align.config import Settings
from align.data.balance import Balance, balance
from align.data.batching import Indices, groups_in_steps, order, steps_per_epoch
from align.data.token_groups import TokenGroup
from align.models.loading.config import max_positions
from align.models.loading.pretrained import default_device
from align.models.tree.batch import count_work, tree_batch
from align.models.tree.parts import rows_held
from align.stages.costs.estimates import Estimate, Planning, TrainingEstimate, equal_rows, model_disk
from align.stages.costs.measured import NOTHING, matrix_rate
from align.stages.training.contract import TrainingSettings
from align.stages.training.footprint import footprint, sharding_of
from align.stages.training.rows import RowRequest, StepRows, step_rows
from align.stages.training.selecting import selection_of
from align.train.passes.token_budget import default_token_budget
from align.train.selection.folds import FOLDS
from align.train.selection.selection import CostRange, FixedModel, Selection, SelectionCost, exit_work
from align.train.selection.settings import UNIFORM
from align.train.settings import TrainSettings

# Shares of a large matrix product's rate that training reaches: measured on a Xeon and on an H100 (tests/README.md)
EFFICIENCY = {"cpu": 0.6, "cuda": 0.37}
ASSUMED_MEMORY = 80 * 2**30  # of a GPU that the launch file asks for and this machine lacks: an A100 or H100
BALANCED_STEPS = 16  # optimizer steps of the estimated balance


def planned_rows(step: TrainingSettings, planning: Planning, folder: Path, *, limited: bool = True) -> StepRows:
    """Return the token groups of a step before it runs, in `folder`; without limits of length if not `limited`."""
    limit = max_positions(planning.config) if limited else None
    request = RowRequest(step, planning.tokenizer, planning.inputs, limit, step.attributes(planning.spec))
    return step_rows(request, folder, limited=limited)


def estimate_training(step: TrainingSettings, planning: Planning) -> Estimate:
    """Return the estimate of a step whose rows exist."""
    with tempfile.TemporaryDirectory() as folder:
        return _estimate_rows(step, planning, planned_rows(step, planning, Path(folder)))


def preview_groups(step: TrainingSettings, planning: Planning, number: int) -> list[tuple[TokenGroup, TokenGroup]]:
    """Return the first groups of a step as they are trained on and as they are uncut."""
    with tempfile.TemporaryDirectory() as folder:
        cut = planned_rows(step, planning, Path(folder) / "cut")
        whole = planned_rows(step, planning, Path(folder) / "whole", limited=False)
        shown = cut.train[:number]
        rows = {group.row for group in shown}
        uncut = {group.row: group for part in (whole.train, whole.held_out) for group in part if group.row in rows}
        return [(group, uncut[group.row]) for group in shown]


def _estimate_rows(step: TrainingSettings, planning: Planning, data: StepRows) -> Estimate:
    step, micro_batches = _with_token_budget(step, planning)
    settings, model = step.train, planning.decoder
    num_rows = data.mixture.num_rows if data.mixture is not None else len(data.train)
    selection = selection_of(step, data, model, _fixed_models(step, planning), frozen=_is_frozen(planning))
    num_steps = settings.num_steps(num_rows) if selection is None else selection.num_steps(settings, num_rows)
    average = _average_line(step, num_steps)
    start = _resumed_steps(step, planning)
    num_steps = min(num_steps, settings.until_step or num_steps)
    epochs = max(0, num_steps - start) / steps_per_epoch(num_rows, settings.prompts_per_step)
    epoch = data.mixture.epoch(0) if data.mixture is not None else order(num_rows, seed=planning.inputs.seed, epoch=0)
    found = [(_work(group, head=step.has_lm_head), [len(each.ids) for each in group.sequences]) for group in data.train]
    works = [each for each, _ in found]
    lengths = [each for _, each in found]
    work = sum_work(works[index] for index in epoch)
    sizes = [each.tokens for each in works]
    costs = None if selection is None else selection.cost_range(works, epoch, settings)
    return Estimate(
        name=planning.name,
        stage=step.stage,
        rows=num_rows,
        tokens=work.tokens,
        **_costs(step, planning, work, epochs=epochs, start=start, selection=selection),
        weights=planning.num_weights,
        until_step=settings.until_step,
        disk=planning.model_bytes,
        spare=model_disk(planning.model_bytes, step.train)[1],
        parts=micro_batches | _selection_lines(selection, settings.prompts_per_step, costs) | average,
        training=TrainingEstimate(
            counts=data.counts,
            format=data.format,
            optimizer_steps=num_steps,
            longest=max(map(max, lengths)),
            unshared=sum(sum(lengths[index]) for index in epoch),
            memory=None
            if isinstance(model, str) or model.recurrence is not None
            else footprint(step, planning.inputs.policy, model, sizes, held=_tokens_held(step, data.train, sizes)),
            balance=_balance(step, sizes, epoch),
        ),
    )


def estimate_bound(step: TrainingSettings, planning: Planning, made: Estimate) -> Estimate:
    """Return an upper bound where an earlier step makes the rows: every prompt, with the longest responses."""
    work = equal_rows(made.tokens, made.rows)
    per_epoch = steps_per_epoch(made.rows, step.train.prompts_per_step)
    selection = _bound_selection(step, planning, work, made.rows)
    settings = step.train
    start = _resumed_steps(step, planning)
    num_steps = settings.num_steps(made.rows) if selection is None else selection.num_steps(settings, made.rows)
    step.train.averaged_steps(num_steps)  # raises for an average of more steps than there can be
    epochs = max(0, min(num_steps, step.train.until_step or num_steps) - start) / per_epoch
    return Estimate(
        name=planning.name,
        stage=step.stage,
        rows=made.rows,
        tokens=made.tokens,
        **_costs(step, planning, work, epochs=epochs, start=start, selection=selection),
        weights=planning.num_weights,
        until_step=step.train.until_step,
        disk=planning.model_bytes,
        spare=model_disk(planning.model_bytes, step.train)[1],
        bound=True,
        parts=_selection_lines(selection, step.train.prompts_per_step),
    )


def _fixed_models(step: TrainingSettings, planning: Planning) -> dict[str, FixedModel]:
    """Return the size and training rows of the reference and of the scorer of a step's selection, if it has them."""
    found: dict[str, FixedModel] = {}
    for key, names in step.selection.fixed_steps.items() if step.selection is not None else ():
        is_cross_fitted = len(names) > 1
        rows = sum(_trained_rows(step.train, planning.made[name]) for name in names) if is_cross_fitted else 0
        found[key] = FixedModel(size=planning.dimensions_of(names[0]), trained_rows=rows)
    return found


def _trained_rows(train: TrainSettings, made: Estimate) -> int:
    """Return the number of rows that a cross-fitted reference of the step is trained on."""
    if made.training is not None:
        return groups_in_steps(made.training.optimizer_steps, made.rows, train.prompts_per_step)
    half = -(-made.rows // FOLDS)  # a bound counts all rows
    return groups_in_steps(train.num_steps(half), half, train.prompts_per_step)


def _bound_selection(step: TrainingSettings, planning: Planning, work: Work, num_rows: int) -> Selection | None:
    """Return the selection from rows of equal length that are scored whole; None without a selection."""
    if step.selection is None:
        return None
    model, fixed = planning.decoder, _fixed_models(step, planning)
    sizes = [each.size for each in fixed.values() if not isinstance(each.size, str)]
    if isinstance(model, str) or len(sizes) < len(fixed):  # FLOPs are unknown
        return Selection(settings=step.selection, fixed=fixed)
    num_heads = 2 if step.selection.coupling == "gradient" and step.has_lm_head else 1
    scored = exit_work(step.selection, model, work)
    forward = forward_flops(model, work)
    training = BACKWARD + (not _is_frozen(planning))
    cost = SelectionCost(
        scoring=forward_flops(model, scored._replace(targets=num_heads * work.targets)) / forward,
        once=float(sum(forward_flops(size, exit_work(step.selection, size, work)) for size in sizes)),
        row=training * forward / num_rows,
        training=float(training),
        exit=forward_flops(model, scored) / forward,
    )
    return Selection(settings=step.selection, fixed=fixed, cost=cost)


def with_forward_pass(found: Estimate, size: Decoder | str, precision: str) -> Estimate:
    """Return the estimate of a training with a forward pass of another model over its rows."""
    if found.flops is None or found.seconds is None:
        return found
    if isinstance(size, str):
        return replace(found, flops=None, seconds=None, unknown=size)
    flops = forward_flops(size, equal_rows(found.tokens, found.rows))
    return replace(found, flops=found.flops + flops, seconds=found.seconds + flops / _training_rate(precision))


def planned_device(step: TrainingSettings) -> torch.device:
    """Return the device that a step will train on, on this machine."""
    return torch.device("cpu" if sharding_of(step.launch).cpu else default_device())


def _resumed_steps(step: TrainingSettings, planning: Planning) -> int:
    """Return the number of optimizer steps that a resumed step has already taken."""
    return 0 if step.resume is None else planning.made[step.resume].until_step or 0


def _costs(
    step: TrainingSettings,
    planning: Planning,
    work: Work,
    *,
    epochs: float,
    start: int,
    selection: Selection | None = None,
) -> dict[str, Any]:
    """Return FLOPs and seconds, or why they are unknown; a step that resumes at `start` has its references already."""
    model = planning.decoder
    if isinstance(model, str):
        return {"flops": None, "seconds": None, "unknown": model}
    training = epochs * total_flops(model, trained=work, observed=NOTHING, frozen=_is_frozen(planning))
    # The KL estimate takes a forward pass of policy and reference over the mismatched pairs of every step
    num_forward_passes = (step.needs_reference and not start) + step.needs_kl * 2 * epochs
    flops = training + num_forward_passes * forward_flops(model, work)
    if selection is not None and (selection.settings.score != UNIFORM or selection.settings.trains_exit):
        flops += (selection.cost_factor - 1) * training
        unknown = [each.size for each in selection.fixed.values() if isinstance(each.size, str)]
        if unknown:
            return {"flops": None, "seconds": None, "unknown": unknown[0]}
        flops += selection.cost.once
    peak = matrix_rate(default_device(), step.train.precision)
    return {"flops": flops, "seconds": flops / (peak * EFFICIENCY[default_device()]), "peak_flops": peak}


def _with_token_budget(step: TrainingSettings, planning: Planning) -> tuple[TrainingSettings, dict[str, str]]:
    """Return the step with its default token budget on the planned device, and what the estimate says of that."""
    settings, memory, where = step.train, None, "a CPU"
    if settings.tokens_per_micro_batch is not None:
        return step, {}
    if not sharding_of(step.launch).cpu:
        found = gpu_memory(torch.device(default_device()))
        memory = found or ASSUMED_MEMORY
        where = f"a GPU of {memory / 2**30:.0f} GiB" + ("" if found else " (assumed: this machine has no GPU)")
    checkpointing = planning.inputs.policy.gradient_checkpointing
    budget = default_token_budget(settings, planning.decoder, checkpointing=checkpointing, memory=memory)
    train = settings.model_copy(update={"tokens_per_micro_batch": budget})
    line = {"micro-batches": f"of up to {budget:,} tokens, the default on {where}"}
    return cast(TrainingSettings, cast(Settings, step).model_copy(update={"train": train})), line


def _is_frozen(planning: Planning) -> bool:
    """Return whether only adapters are trained."""
    return planning.inputs.policy.lora is not None


def _selection_lines(
    selection: Selection | None, prompts_per_step: int, costs: CostRange | None = None
) -> dict[str, str]:
    """Return what is predicted of a selection, for the estimate; `costs` are known if the rows exist."""
    if selection is None:
        return {}
    settings, cost = selection.settings, f"{selection.cost_factor:.2f}"
    once = "".join(f"; the {key}'s losses are computed once for each row" for key in selection.fixed)
    if settings.chooses_tokens:
        return {"selection": f"{settings.tokens:.0%} of the trained tokens of each row{once}"}
    if settings.score == UNIFORM:
        passed = f" and a pass of the {' and the '.join(selection.fixed)}" if selection.fixed else ""
        passed += " and its training" if settings.is_cross_fitted else ""
        equal = "" if settings.equal == "steps" else f", for the FLOPs of {cost} times as many optimizer steps{passed}"
        beside = f"filter {settings.filter:g}" if settings.tokens is None else f"tokens {settings.tokens:g}"
        return {"selection": f"uniform, beside a step with {beside}{equal}"}
    size = settings.super_batch(prompts_per_step)
    ends = (
        "" if costs is None else f" ({costs.low:.2f} for the shortest of each step, {costs.high:.2f} for the longest)"
    )
    return {
        "selection": f"{settings.score}: {prompts_per_step} of {size} rows per step, {cost} times the FLOPs of uniform "
        f"training of as many rows if the chosen rows are of mean length{ends}{once}"
    }


def _average_line(step: TrainingSettings, num_steps: int) -> dict[str, str]:
    """Return which weights are averaged, for the estimate; raise `InputError` for too few optimizer steps."""
    steps = step.train.averaged_steps(num_steps)
    return {"average": f"of the weights after steps {', '.join(map(str, steps))}"} if steps else {}


def _work(group: TokenGroup, *, head: bool) -> Work:
    """Return the work of a forward pass over the group's own tree, with or without an LM head."""
    work = count_work(group.sequences)
    return work if head else work._replace(targets=0)


def _tokens_held(step: TrainingSettings, groups: Sequence[TokenGroup], sizes: Sequence[int]) -> int:
    """Return the largest number of tokens of a group that are in memory at once if it may run in parts."""
    budget = step.train.token_budget
    above = (groups[index] for index, size in enumerate(sizes) if size > budget)
    held = (rows_held(tree_batch(group.sequences), budget) for group in above)
    return max(held, default=max(sizes))


def _balance(step: TrainingSettings, sizes: Sequence[int], epoch: Indices) -> Balance | None:
    """Return how evenly the first steps of an epoch are split over the ranks of the launch."""
    num_ranks = sharding_of(step.launch).processes // step.train.sequence_parallel
    if num_ranks == 1:
        return None
    per_step, budget = step.train.prompts_per_step, step.train.token_budget
    starts = range(0, min(BALANCED_STEPS, max(1, len(epoch) // per_step)) * per_step, per_step)
    steps = [epoch[start : start + per_step] for start in starts]
    return balance(steps, sizes, token_budget=budget, num_ranks=num_ranks)


def _training_rate(precision: str) -> float:
    """Return the estimated FLOP/s of a training step on this machine."""
    device = default_device()
    return matrix_rate(device, precision) * EFFICIENCY[device]
