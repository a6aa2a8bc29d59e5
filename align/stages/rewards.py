"""The stage that makes a reward model, and what it reports on the rows that were held out."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
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
from align.models.head_init import init_head
from align.models.loading.config import max_positions
from align.models.loading.pretrained import silence_transformers
from align.models.reward_model import RewardModel, load_rating, load_reward_model, save_reward_model, set_pad_token
from align.models.reward_scoring import last_hidden_states, score_groups
from align.models.settings import Rating, resolve_rating
from align.models.weights import full_tensor, gathered_parameters
from align.stages.pairs import accuracy, pairs_of
from align.stages.recipe import Recipe
from align.stages.sources import Rows, step_rows
from align.stages.steps import RewardStep
from align.stages.training import (
    Context,
    about,
    account,
    describe,
    done_of,
    policy_settings,
    training_run_of,
    whole_copy,
)
from align.train.accelerator import make_accelerator, zero3_init
from align.train.checkpoint import has_checkpoint
from align.train.loop import Loop
from align.train.reward_objective import BradleyTerryObjective, RewardObjective, label_table, reward_objective

BEGIN_WITH = 1024  # groups that a new head is fitted to before training


def train_reward_model(context: Context) -> dict[str, Any]:
    """Train a reward model, report on the held-out rows, and write it as a plain folder."""
    recipe, step = context.recipe, context.recipe.steps[context.name]
    assert isinstance(step, RewardStep)
    silence_transformers()
    settings = policy_settings(recipe, context.name, context.inputs)
    accelerator, begun = make_accelerator(step.train, context.working), has_checkpoint(context.working)
    rated_before = load_rating(settings.path) is not None
    with zero3_init(accelerator) if rated_before else nullcontext():
        model, tokenizer = load_reward_model(settings, step.head, default=step.default_attributes)
    apply_template(tokenizer, settings.chat_template)
    rating, limit = model.rating, max_positions(model.base.config)
    first = Processes(accelerator).run_on_main
    data = step_rows(
        recipe, context.name, tokenizer, context.working, model_limit=limit, attributes=rating.names, first=first
    )
    subsets = _subsets(data, step.subset)
    ends = {int(one.ids[-1]) for group in data.train for one in group.sequences}
    set_pad_token(model, tokenizer, ends)
    context.report.note(describe(data.counts, data.format))
    worth = dict(zip(rating.names, rating.weights, strict=True))
    context.report.note(f"reward: {' + '.join(f'{weight:.3g} {name}' for name, weight in worth.items())}")
    objective = reward_objective(step.loss, rating.names, rating.weights)
    job = training_run_of(context, objective, data, settings, head_lr_multiplier=step.head.lr_multiplier)
    loop = Loop(model, job, context.report, accelerator)
    if not rated_before and not begun:
        _begin(loop, model, data, objective)
    outcome = loop.run()
    # By all processes, for the weights may lie over all; in the step's precision, several times as fast as another.
    found = _report(model, data, subsets) if data.held_out else {}
    whole = whole_copy(loop, lambda: load_reward_model(settings, step.head, default=step.default_attributes)[0])

    def save() -> None:
        set_pad_token(whole, tokenizer, ends)
        save_reward_model(whole, tokenizer, context.working)

    loop.processes.run_on_main(save, "writing the reward model")
    return {
        **about(context),
        **account(data, outcome),
        "done": done_of(loop, outcome),
        "aggregate": worth,
        "report": found,
    }


def _begin(loop: Loop, model: RewardModel, data: Rows, objective: RewardObjective) -> None:
    """Start a new head at what a linear probe of some rows to train on finds."""
    some = [data.train[index] for index in order(len(data.train), seed=loop.training_run.seed, epoch=0)[:BEGIN_WITH]]
    states = last_hidden_states(model, some)
    if isinstance(objective, BradleyTerryObjective):
        ends = [objective.extremes(group) for group in some]
        leads = [states_KD[end[0]] - states_KD[end[1]] for states_KD, end in zip(states, ends, strict=True) if end]
        # A lead of 1 in the reward, in equal parts by attribute
        share = [1 / (weight * len(objective.weights)) if weight else math.nan for weight in objective.weights]
        states_ND, label_NA = torch.stack(leads), torch.tensor(share).expand(len(leads), -1)
    else:
        states_ND = torch.cat(states)
        label_NA = label_table([known for group in some for known in group.attributes], model.rating.names)
    heads = {id(value) for value in model.head.parameters() if value.requires_grad}
    ((name, weight),) = [(name, value) for name, value in model.named_parameters() if id(value) in heads]
    with gathered_parameters([weight]):
        new = init_head(full_tensor(weight.detach()), states_ND, label_NA)
    loop.sharding.load_parameters({name: cast(torch.Tensor, broadcast(new))})  # the same on all ranks, to the last bit


def rating_of(recipe: Recipe, name: str) -> Rating:
    """What the step's model will rate, before any step has run."""
    step = recipe.steps[name]
    assert isinstance(step, RewardStep)
    before = recipe.policy_of(name)
    if before is None:
        saved = load_rating(recipe.policy.path)
    else:
        saved = rating_of(recipe, before) if isinstance(recipe.steps[before], RewardStep) else None
    return resolve_rating(step.head, saved, default=step.default_attributes)


def _subsets(data: Rows, key: str | None) -> dict[int, str]:
    """The subset of each held-out row that names one."""
    if key is None:
        return {}
    metadata = [data.held_out.metadata(index) for index in range(len(data.held_out))]
    found = {group.row: known.get(key) for group, known in zip(data.held_out, metadata, strict=True)}
    if data.held_out and not any(value is not None for value in found.values()):
        keys = sorted({name for known in metadata for name in known})
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
        for pair in pairs_of(group.row, group, rating.rewards(scores_KA), worth=worth, subset=subsets.get(group.row))
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


def _labels(groups: Iterable[TokenGroup], name: str) -> list[float]:
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
