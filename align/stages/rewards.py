"""The stage that makes a reward model, and what it reports on the rows that were held out."""

from __future__ import annotations

import math
from statistics import StatisticsError, correlation, mean
from typing import Any

import torch
from accelerate.utils import broadcast

from align.config import InputError
from align.data.batching import order
from align.data.chat import TokenGroup
from align.data.templates import apply_template
from align.evaluation import score
from align.models.head_start import start_head
from align.models.loading import length_limit, quiet_transformers
from align.models.reward import (
    Rating,
    RewardModel,
    choose_rating,
    last_states,
    load_reward_model,
    save_reward_model,
    saved_rating,
    score_groups,
    set_padding,
)
from align.records import Comparison
from align.stages.pairs import accuracy, pairs_of
from align.stages.recipe import Recipe
from align.stages.sources import Rows, step_rows
from align.stages.steps import RewardStep
from align.stages.training import Context, about, account, describe, done_of, job_of, policy_settings
from align.train.checkpoint import is_begun, remove_checkpoints
from align.train.loop import Loop
from align.train.reward_objective import BradleyTerryObjective, RewardObjective, label_table, reward_objective

BEGIN_WITH = 1024  # groups that a new head is fitted to before training


def train_reward_model(context: Context) -> dict[str, Any]:
    """Train a reward model, report on the held-out rows, and write it as a plain folder."""
    recipe, step = context.recipe, context.recipe.steps[context.name]
    assert isinstance(step, RewardStep)
    quiet_transformers()
    settings = policy_settings(recipe, context.name, context.inputs)
    model, tokenizer = load_reward_model(settings, step.head, default=step.default_attributes)
    apply_template(tokenizer, settings.chat_template)
    rating, limit = model.rating, length_limit(model.base.config)
    data = step_rows(recipe, context.name, tokenizer, model_limit=limit, attributes=rating.names)
    subsets = _subsets(data, step.subset)
    set_padding(model, tokenizer, {int(one.ids[-1]) for group in data.train for one in group.sequences})
    context.report.note(describe(data.counts, data.format))
    worth = dict(zip(rating.names, rating.weights, strict=True))
    context.report.note(f"reward: {' + '.join(f'{weight:.3g} {name}' for name, weight in worth.items())}")
    objective = reward_objective(step.loss, rating.names, rating.weights)
    loop = Loop(model, job_of(context, objective, data, settings, head_rate=step.head.rate), context.report)
    if saved_rating(settings.path) is None and not is_begun(context.working):
        with loop.accelerator.autocast():
            _begin(model, data, objective, recipe.seed)
    outcome = loop.run()
    found: dict[str, Any] = {}
    if loop.accelerator.is_main_process:
        with loop.accelerator.autocast():  # in the precision of the step, which is several times as fast as another
            found = _report(model, data, subsets) if data.held_out else {}
        save_reward_model(model, tokenizer, context.working)
        remove_checkpoints(context.working)
    loop.accelerator.wait_for_everyone()
    return {
        **about(context),
        **account(data, outcome),
        "done": done_of(loop, outcome),
        "aggregate": worth,
        "report": found,
    }


def _begin(model: RewardModel, data: Rows, objective: RewardObjective, seed: int) -> None:
    """Start a new head at what a linear probe of some rows to train on finds."""
    some = [data.train[index] for index in order(len(data.train), seed=seed, epoch=0)[:BEGIN_WITH]]
    states = last_states(model, some)
    if isinstance(objective, BradleyTerryObjective):
        ends = [objective.extremes(group) for group in some]
        leads = [states_KD[end[0]] - states_KD[end[1]] for states_KD, end in zip(states, ends, strict=True) if end]
        # A lead of 1 in the reward, in equal parts by attribute
        share = [1 / (weight * len(objective.weights)) if weight else math.nan for weight in objective.weights]
        start_head(model, torch.stack(leads), torch.tensor(share).expand(len(leads), -1))
    else:
        start_head(
            model,
            torch.cat(states),
            label_table([known for group in some for known in group.attributes], model.rating.names),
        )
    for value in model.head.parameters():
        broadcast(value.data)  # the same on all ranks, to the last bit


def rating_of(recipe: Recipe, name: str) -> Rating:
    """What the step's model will rate, before any step has run."""
    step = recipe.steps[name]
    assert isinstance(step, RewardStep)
    before = recipe.policy_of(name)
    if before is None:
        saved = saved_rating(recipe.policy.path)
    else:
        saved = rating_of(recipe, before) if isinstance(recipe.steps[before], RewardStep) else None
    return choose_rating(step.head, saved, default=step.default_attributes)


def _subsets(data: Rows, key: str | None) -> dict[int, str]:
    """The subset of each held-out row that names one."""
    if key is None:
        return {}
    found = {group.row: data.records[group.row].metadata.get(key) for group in data.held_out}
    if data.held_out and not any(value is not None for value in found.values()):
        keys = sorted({name for group in data.held_out for name in data.records[group.row].metadata})
        raise InputError(f"subset: no held-out row has {key!r} in its metadata; there are: {', '.join(keys) or 'none'}")
    return {row: str(value) for row, value in found.items() if value is not None}


def _report(model: RewardModel, data: Rows, subsets: dict[int, str]) -> dict[str, Any]:
    """Errors by attribute, and accuracy of the reward over pairs, on the held-out rows."""
    rating = model.rating
    scores = score_groups(model, data.held_out)
    worth = dict(zip(rating.names, rating.weights, strict=True))
    pairs = [
        pair
        for group, scores_KA in zip(data.held_out, scores, strict=True)
        if isinstance(record := data.records[group.row], Comparison)
        for pair in pairs_of(group.row, record, rating.rewards(scores_KA), worth=worth, subset=subsets.get(group.row))
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
    return {"attributes": attributes, "pairs": accuracy(pairs)}


def _labels(groups: list[TokenGroup], name: str) -> list[float]:
    return [labels[name] for group in groups for labels in group.attributes if name in labels]


def _errors(known: list[tuple[float, float]], constant: float) -> dict[str, Any]:
    """Squared errors of the model and of who always says `constant`, the mean of the rows trained on."""
    squares = [(predicted - label) ** 2 for predicted, label in known]
    naive = [(constant - label) ** 2 for _, label in known]
    try:
        together = correlation(*zip(*known, strict=True))
    except StatisticsError:  # fewer than two, or one of them never changes
        together = None
    gain = score([before - after for before, after in zip(naive, squares, strict=True)])
    return {
        "n": len(known),
        "mse": mean(squares),
        "mse_of_mean": mean(naive),
        "gain": gain._asdict(),  # how much smaller the squared error is, with its interval
        "pearson": together,
    }
