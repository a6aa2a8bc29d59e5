"""Everything about a recipe that can be known without training: rows, tokens, memory, arithmetic, time."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.text import Text
from transformers import AutoConfig, PretrainedConfig

from align.accounting.formulas import Decoder, Work, decoder, forward_flops, training_flops, training_memory
from align.config import InputError
from align.data.batching import groups_of_step, imbalance, plan_step, steps_per_epoch
from align.data.chat import TokenGroup
from align.data.preview import preview
from align.models.loading import GGUF, fresh_config, gguf_file, length_limit, quiet_transformers
from align.models.logprobs import TILE_CPU
from align.models.tree import tree_batch
from align.stages.recipe import EvaluateStep, ImportStep, PreferenceStep, Recipe, RewardStep, TrainStep
from align.stages.rewards import rating_of
from align.stages.sources import rows
from align.stages.training import objective_of, tokenizer_of

# Share of a large matrix product's rate that a training step reaches on a CPU (README, comparison with TRL).
EFFICIENCY = 0.6


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a training step will take."""

    name: str
    counts: dict[str, int]
    optimizer_steps: int
    longest: int  # tokens of the longest sequence
    tokens: int  # computed in one epoch, each distinct (prefix, token) of a group once
    unshared: int  # the same if responses did not share their prompt
    flops: float  # of the whole step, reference pass included
    memory: int  # bytes at the peak
    seconds: float
    imbalance: float  # largest over mean tokens of one of eight ranks in the first optimizer step


def check(recipe: Recipe) -> Iterator[Estimate]:
    """An estimate of each training step in turn; the first thing wrong with the recipe is raised."""
    quiet_transformers()
    rate = matrix_rate()
    for name, step in recipe.steps.items():
        if isinstance(step, TrainStep | PreferenceStep | RewardStep):
            yield _estimate(recipe, name, step, rate)


def preview_rows(recipe: Recipe, name: str, *, number: int) -> Iterator[Text]:
    """The first rows of a step as coloured tokens."""
    quiet_transformers()
    step = recipe.steps[name]
    if isinstance(step, ImportStep | EvaluateStep):
        raise InputError(f"step {name!r} trains on no rows; preview shows those of a training step")
    source = recipe.source(step.data)
    free = source.model_copy(update={"max_length": None, "max_prompt_length": None})
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tokenizer_of(recipe, name, Path(folder))
        names = rating_of(recipe, name).names if isinstance(step, RewardStep) else ()
        cut = rows(step, source, tokenizer, seed=recipe.seed, model_limit=None, attributes=names)
        whole = rows(step, free, tokenizer, seed=recipe.seed, model_limit=None, attributes=names)
    uncut = {group.row: group for group in (*whole.train, *whole.held_out)}
    for group in cut.train[:number]:
        yield preview(group, tokenizer, uncut=uncut[group.row])


def _estimate(recipe: Recipe, name: str, step: TrainStep | PreferenceStep | RewardStep, rate: float) -> Estimate:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tokenizer_of(recipe, name, Path(folder))
    config = model_config(recipe, len(tokenizer))
    limit = length_limit(config)
    names = rating_of(recipe, name).names if isinstance(step, RewardStep) else ()
    source = recipe.source(step.data)
    data = rows(step, source, tokenizer, seed=recipe.seed, model_limit=limit, attributes=names)
    model, settings = decoder(config.to_dict()), step.train
    num_steps = settings.num_steps(len(data.train))
    epochs = num_steps / steps_per_epoch(len(data.train), settings.groups_per_step)
    works = [_work(group, head=not isinstance(step, RewardStep)) for group in data.train]
    work = Work(*map(sum, zip(*works, strict=True)))
    sizes = [each.tokens for each in works]
    flops = epochs * training_flops(model, work)
    if not isinstance(step, RewardStep) and objective_of(step).needs_reference:
        flops += forward_flops(model, work)
    return Estimate(
        name=name,
        counts=data.counts,
        optimizer_steps=num_steps,
        longest=max(len(each.ids) for group in data.train for each in group.sequences),
        tokens=work.tokens,
        unshared=sum(len(each.ids) for group in data.train for each in group.sequences),
        flops=flops,
        memory=_memory(recipe, model, max(settings.tokens_per_micro_batch, max(sizes))),
        seconds=flops / (rate * EFFICIENCY),
        imbalance=_imbalance(step, sizes, recipe.seed),
    )


def _work(group: TokenGroup, *, head: bool) -> Work:
    """What one forward pass over the group has to do, as a tree of its own, with or without an LM head."""
    batch = tree_batch(group.sequences)
    return Work(batch.num_tokens, int(batch.position_ids.sum()) + batch.num_tokens, len(batch.targets_N) if head else 0)


def _memory(recipe: Recipe, model: Decoder, tokens: int) -> int:
    lora = recipe.policy.lora
    adapters = None
    if lora is not None:  # two thin matrices for each of seven projections of a layer
        wide = 4 * model.hidden + 2 * (model.query_width + model.kv_width) + 3 * (model.hidden + model.intermediate)
        adapters = model.layers * lora.rank * wide
    parts = training_memory(
        model,
        tokens,
        head_chunk=-(-TILE_CPU // model.vocab),
        trainable=adapters,
        checkpointing=recipe.policy.gradient_checkpointing,
    )
    return sum(parts)


def _imbalance(step: TrainStep | PreferenceStep | RewardStep, sizes: Sequence[int], seed: int) -> float:
    settings = step.train
    first = groups_of_step(0, len(sizes), settings.groups_per_step, seed=seed)
    return imbalance(plan_step(first, sizes, token_budget=settings.tokens_per_micro_batch, num_ranks=8), sizes)


def model_config(recipe: Recipe, vocab_size: int) -> PretrainedConfig:
    """The configuration of the recipe's policy, without its weights."""
    settings = recipe.policy
    if settings.fresh is not None:
        return fresh_config({"vocab_size": vocab_size, **settings.fresh})
    path = str(settings.path)
    try:
        if path.startswith(GGUF):
            file = gguf_file(path)
            return AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"policy: no configuration can be read from {path!r}") from error


def matrix_rate(size: int = 1024, repeats: int = 3) -> float:
    """Floating-point operations a second of a square matrix product in fp32, the best of a few."""
    matrix = torch.ones(size, size)
    best = 0.0
    for _ in range(repeats + 1):
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best
