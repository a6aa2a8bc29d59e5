"""Training of a reward model, and its report on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from statistics import StatisticsError, correlation, mean
from typing import Any, cast

import torch
from accelerate.utils import broadcast

from align.data.batching import order
from align.data.chat_templates import apply_template
from align.data.token_groups import TokenGroup
from align.distributed.processes import Processes
from align.errors import InputError
from align.evaluation import score
from align.evaluation.pair_accuracy import pair_accuracy, preference_pairs
from align.models.head_init import init_head
from align.models.loading.config import max_positions
from align.models.loading.pretrained import silence_transformers
from align.models.reward_model import (
    RewardModel,
    load_rating,
    load_reward_model,
    load_saved_reward_model,
    save_reward_model,
    set_pad_token,
)
from align.models.reward_scoring import last_hidden_states, score_groups
from align.models.saving.weights import Gather
from align.models.weights import WrittenWeights, full_tensor, gathered_parameters
from align.stages.inputs.context import RunContext
from align.stages.training.contract import RewardSettings
from align.stages.training.policy_training import begin, training_report, training_run, work_done
from align.stages.training.rows import RowRequest, StepRows, describe, step_rows
from align.stages.training.saving import check_before_training, save_trained
from align.train.checkpoint import has_checkpoint
from align.train.loop import Loop
from align.train.objectives.reward import BradleyTerryObjective, RewardObjective, label_table, reward_objective
from align.train.sharding.accelerator import make_accelerator, sharded_loading
from align.train.sharding.replicated import num_parameters

INIT_GROUPS = 1024  # groups that a new head is fitted to before training


def train_reward_model(step: RewardSettings, context: RunContext) -> dict[str, Any]:
    """Train a reward model, report on the held-out rows, and write it as a plain Hugging Face folder."""
    silence_transformers()
    settings = context.inputs.policy_from(step.start)
    accelerator = make_accelerator(step.train)
    num_resumed = begin(step, context, Processes(accelerator))
    is_resumed = has_checkpoint(context.folder)
    has_head = load_rating(settings.path) is not None
    with sharded_loading(accelerator, settings.lora) if has_head else nullcontext():
        model, tokenizer = load_reward_model(settings, step.head, default=step.default_attributes)
    apply_template(tokenizer)
    check_before_training(model, tokenizer, Processes(accelerator), context.progress)
    rating = model.rating
    request = RowRequest(step, tokenizer, context.inputs, max_positions(model.base.config), rating.names)
    rows = step_rows(request, context.folder, run_on_main=Processes(accelerator).run_on_main)
    subsets = _subsets(rows, step.subset)
    end_tokens = {int(one.ids[-1]) for group in rows.train for one in group.sequences}
    set_pad_token(model, tokenizer, end_tokens)
    context.progress.note(describe(rows.counts, rows.format))
    aggregate = dict(zip(rating.names, rating.weights, strict=True))
    context.progress.note(f"reward: {' + '.join(f'{weight:.3g} {name}' for name, weight in aggregate.items())}")
    objective = reward_objective(step.loss, rating.names, rating.weights)
    run = training_run(
        step,
        objective,
        model,
        tokenizer,
        rows,
        context,
        num_resumed=num_resumed,
        head_lr_multiplier=step.head.lr_multiplier,
    )
    loop = Loop(model, run, context.progress, accelerator)
    if not has_head and not is_resumed:
        _init_head(loop, model, rows, objective)
    outcome = loop.run()
    # On all processes, since the weights may be sharded; in the step's precision, several times as fast as fp32
    report = _report(model, rows, subsets) if rows.held_out else {}

    def save(trained: RewardModel, gather: Gather) -> WrittenWeights:
        set_pad_token(trained, tokenizer, end_tokens)
        return save_reward_model(trained, tokenizer, context.folder, dtype=settings.save_dtype, gather=gather)

    done = work_done(loop, outcome)  # with the adapters, which are merged now
    saved = save_trained(
        loop,
        outcome,
        context.folder,
        save=save,
        load_saved=lambda dtype: load_saved_reward_model(context.folder, dtype),
    )
    return {
        **training_report(loop, rows, outcome),
        **saved,
        "done": replace(done, weights=num_parameters(model.parameters())),
        "aggregate": aggregate,
        "report": report,
    }


def _init_head(loop: Loop, model: RewardModel, data: StepRows, objective: RewardObjective) -> None:
    """Initialize a new head by a ridge regression on some of the training rows."""
    some = [data.train[index] for index in order(len(data.train), seed=loop.training_run.seed, epoch=0)[:INIT_GROUPS]]
    states = last_hidden_states(model, some)
    if isinstance(objective, BradleyTerryObjective):
        ends = [objective.extremes(group) for group in some]
        leads = [states_KD[end[0]] - states_KD[end[1]] for states_KD, end in zip(states, ends, strict=True) if end]
        # A margin of 1 in the reward, in equal parts by attribute
        share = [1 / (weight * len(objective.weights)) if weight else math.nan for weight in objective.weights]
        states_ND = torch.stack(leads)
        label_NA = torch.tensor(share).expand(len(leads), -1)
    else:
        states_ND = torch.cat(states)
        label_NA = label_table([known for group in some for known in group.attributes], model.rating.names)
    heads = {id(value) for value in model.head.parameters() if value.requires_grad}
    ((name, weight),) = [(name, value) for name, value in model.named_parameters() if id(value) in heads]
    with gathered_parameters([weight]):
        new = init_head(full_tensor(weight.detach()), states_ND, label_NA)
    loop.sharding.load_parameters({name: cast(torch.Tensor, broadcast(new))})  # identical on all ranks


def _subsets(data: StepRows, key: str | None) -> dict[int, str]:
    """Return the subset of each held-out row whose metadata name one, by row number."""
    if key is None:
        return {}
    metadata = [data.held_out.metadata(index) for index in range(len(data.held_out))]
    found = {group.row: known.get(key) for group, known in zip(data.held_out, metadata, strict=True)}
    if data.held_out and not any(value is not None for value in found.values()):
        keys = sorted({name for known in metadata for name in known})
        known_keys = ", ".join(keys) or "none"
        raise InputError(f"no held-out row has {key!r} in its metadata; keys there: {known_keys}", ("subset",))
    return {row: str(value) for row, value in found.items() if value is not None}


def _report(model: RewardModel, data: StepRows, subsets: dict[int, str]) -> dict[str, Any]:
    """Return squared errors by attribute, and the accuracy over pairs, on the held-out rows."""
    rating = model.rating
    scores = score_groups(model, data.held_out)
    worth = dict(zip(rating.names, rating.weights, strict=True))
    pairs = [
        pair
        for group, scores_KA in zip(data.held_out, scores, strict=True)
        for pair in preference_pairs(
            group.row, group, rating.rewards(scores_KA), weights=worth, subset=subsets.get(group.row)
        )
    ]
    attributes: list[dict[str, Any]] = []
    for index, name in enumerate(rating.names):
        known = [
            (predicted, labels[name])
            for group, scores_KA in zip(data.held_out, scores, strict=True)
            for predicted, labels in zip(scores_KA[:, index].tolist(), group.attributes, strict=True)
            if name in labels
        ]
        trained = _labels(data.train, name)
        if known and trained:
            attributes.append({"attribute": name, **_errors(known, mean(trained))})
    return {"attributes": attributes, "pairs": pair_accuracy(pairs)}


def _labels(groups: Iterable[TokenGroup], name: str) -> list[float]:
    return [labels[name] for group in groups for labels in group.attributes if name in labels]


def _errors(known: list[tuple[float, float]], constant: float) -> dict[str, Any]:
    """Return squared errors of the model, and of always predicting `constant`, the mean of the training rows."""
    squares = [(predicted - label) ** 2 for predicted, label in known]
    naive = [(constant - label) ** 2 for _, label in known]
    try:
        together = correlation(*zip(*known, strict=True))
    except StatisticsError:  # fewer than two values, or a constant one
        together = None
    gain = score([before - after for before, after in zip(naive, squares, strict=True)])
    return {
        "n": len(known),
        "mse": mean(squares),
        "mse_of_mean": mean(naive),
        "gain": gain._asdict(),  # reduction of the squared error, with its interval
        "pearson": together,
    }
