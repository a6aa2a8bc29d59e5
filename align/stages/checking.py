"""Everything about a recipe that can be known without training: rows, tokens, memory, arithmetic, time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from align.accounting.formulas import (
    FP32,
    Decoder,
    Work,
    added,
    decoder,
    forward_flops,
    training_flops,
)
from align.config import stable_hash
from align.data.batching import Balance, Indices, balance, order, steps_per_epoch
from align.data.chat_encoder import ChatEncoder
from align.data.token_groups import TokenGroup
from align.evaluation.task import Row, Task, TaskSize
from align.models.loading.config import build_config, load_config, max_positions
from align.models.loading.pretrained import default_device, silence_transformers
from align.models.tree.batch import count_tokens, tree_batch
from align.records import Prompt
from align.stages.checks import TRAINING, task_of
from align.stages.costs import matrix_rate
from align.stages.estimates import Estimate, Training
from align.stages.footprint import footprint
from align.stages.grading import likelihood_rows, task_rows
from align.stages.groups import asked_prompts
from align.stages.recipe import Recipe
from align.stages.rewards import rating_of
from align.stages.sources import step_rows
from align.stages.steps import (
    MAKES,
    POLICY,
    REWARD_MODEL,
    EvaluateStep,
    GenerateStep,
    ImportStep,
    PreferenceStep,
    RewardStep,
    ScoreStep,
    SourceSettings,
    TaskSettings,
    TrainStep,
)
from align.stages.training import imported, objective_of, tokenizer_of

# Shares of a large matrix product's rate: of a training step (README, comparison with TRL: a Xeon, an H100), and of
# sampling, which reads all weights for each token of a batch and has been timed on a CPU only.
EFFICIENCY, SAMPLING_EFFICIENCY = {"cpu": 0.6, "cuda": 0.37}, 0.05
CHECKPOINTS = 6  # models' sizes on the disk at once: weights and two moments, of a checkpoint and of the one before it
BEST = 2  # and the best weights so far, beside those that the latest checkpoint knows as the best
RANKS, DEALT = (8, 64), 16  # numbers of ranks that a step's balance is told for, over so many steps
TEXT_BYTES = 8  # of a token in a file of responses and in what is kept beside it until it is whole


def check(recipe: Recipe) -> Iterator[Estimate]:
    """An estimate of each step in turn; the first thing wrong with the recipe is raised."""
    silence_transformers()
    models, asked = _Models(recipe), dict[str, TaskSize]()
    for name, step in recipe.steps.items():
        tokenizer, config = models.of(name)
        model = decoder(config.to_dict())
        size = model.num_weights * FP32
        if isinstance(step, ImportStep):
            yield Estimate(name=name, stage=step.stage, rows=0, disk=size)
        elif isinstance(step, TrainStep | PreferenceStep | RewardStep):
            made_by = next((each for each in recipe.sources_of(name) if each in recipe.steps), None)
            if made_by is None:
                with tempfile.TemporaryDirectory() as folder:
                    yield _of_training(recipe, name, tokenizer, config, model, Path(folder))
            else:
                yield _of_training_to_come(recipe, name, made_by, tokenizer, model)
        else:
            yield _of_answers(recipe, name, tokenizer, model, asked)


class _Models:
    """Tokenizers and configurations by the step that a model first comes from: each is made once."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._known: dict[str, tuple[PreTrainedTokenizerBase, PretrainedConfig]] = {}

    def of(self, name: str) -> tuple[PreTrainedTokenizerBase, PretrainedConfig]:
        """Those of the model that the step makes, trains or asks."""
        (first,) = list(self._recipe.lineage(name))[-1:]
        first = first if isinstance(self._recipe.steps[first], ImportStep) else ""
        if first not in self._known:
            with tempfile.TemporaryDirectory() as folder:
                tokenizer = tokenizer_of(self._recipe, name, Path(folder))
            self._known[first] = tokenizer, model_config(self._recipe, name, len(tokenizer))
        return self._known[first]


def disk_need(recipe: Recipe) -> tuple[int, int]:
    """Bytes that the run's models will take, and those of the largest step's checkpoints while it runs."""
    silence_transformers()
    models = _Models(recipe)
    making = [name for name, step in recipe.steps.items() if MAKES[step.stage] in (POLICY, REWARD_MODEL)]
    sizes = [decoder(models.of(name)[1].to_dict()).num_weights * FP32 for name in making]
    steps = [recipe.steps[name] for name in making]
    kept = [BEST if isinstance(step, TRAINING) and step.train.keep == "best" else 0 for step in steps]
    return sum(sizes), max(((CHECKPOINTS + more) * size for more, size in zip(kept, sizes, strict=True)), default=0)


def _of_training(
    recipe: Recipe,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    model: Decoder,
    folder: Path,
) -> Estimate:
    step = recipe.steps[name]
    assert isinstance(step, TrainStep | PreferenceStep | RewardStep)
    names = rating_of(recipe, name).names if isinstance(step, RewardStep) else ()
    data = step_rows(recipe, name, tokenizer, folder, model_limit=max_positions(config), attributes=names)
    settings = step.train
    num_rows = data.mixture.num_rows if data.mixture is not None else len(data.train)
    num_steps = settings.num_steps(num_rows)
    epochs = num_steps / steps_per_epoch(num_rows, settings.prompts_per_step)
    chosen = data.mixture.epoch(0) if data.mixture is not None else order(num_rows, seed=recipe.seed, epoch=0)
    works = [_work(group, head=not isinstance(step, RewardStep)) for group in data.train]
    work = added(works[index] for index in chosen)
    sizes = [each.tokens for each in works]
    flops = epochs * training_flops(model, work)
    if not isinstance(step, RewardStep) and objective_of(step).needs_reference:
        flops += forward_flops(model, work)
    return Estimate(
        name=name,
        stage=step.stage,
        rows=num_rows,
        tokens=work.tokens,
        flops=flops,
        seconds=flops / _training_rate(settings.precision),
        disk=model.num_weights * FP32,
        spare=CHECKPOINTS * model.num_weights * FP32,
        training=Training(
            counts=data.counts,
            format=data.format,
            optimizer_steps=num_steps,
            longest=max(len(each.ids) for group in data.train for each in group.sequences),
            unshared=sum(len(each.ids) for index in chosen for each in data.train[index].sequences),
            memory=footprint(recipe, step, model, sizes),
            balances=_balances(step, sizes, chosen),
        ),
    )


def _of_training_to_come(
    recipe: Recipe, name: str, made_by: str, tokenizer: PreTrainedTokenizerBase, model: Decoder
) -> Estimate:
    """Of a step whose rows an earlier one will make: if all prompts became groups, and responses as long as may be."""
    step, maker = recipe.steps[name], recipe.steps[made_by]
    assert isinstance(step, TrainStep | PreferenceStep | RewardStep)
    if isinstance(maker, ScoreStep):
        rows, tokens = _given(recipe, maker, tokenizer)
    else:
        assert isinstance(maker, GenerateStep)
        rows, drawn, prompts_tokens = _to_be_drawn(recipe, made_by, maker, tokenizer)
        tokens = prompts_tokens + drawn
    work = _evenly(tokens, rows)
    flops = step.train.epochs * training_flops(model, work) + forward_flops(model, work)
    return Estimate(
        name=name,
        stage=step.stage,
        rows=rows,
        tokens=tokens,
        flops=flops,
        seconds=flops / _training_rate(step.train.precision),
        disk=model.num_weights * FP32,
        spare=CHECKPOINTS * model.num_weights * FP32,
        bound=True,
    )


def _of_answers(
    recipe: Recipe, name: str, tokenizer: PreTrainedTokenizerBase, model: Decoder, known: dict[str, TaskSize]
) -> Estimate:
    """Of a step that answers prompts or judges what is there; `known` holds what evaluations before it asked."""
    step = recipe.steps[name]
    rows, tokens, drawn, precision = 0, 0, 0, "bf16"
    if isinstance(step, GenerateStep):
        rows, drawn, tokens = _to_be_drawn(recipe, name, step, tokenizer)
        precision = step.engine.local.precision if step.engine.local else precision
    elif isinstance(step, ScoreStep):
        rows, tokens = _given(recipe, step, tokenizer)
    else:
        assert isinstance(step, EvaluateStep)
        for task in step.tasks.values():
            key, precision = stable_hash([task, tokenizer.name_or_path]), task.precision
            known[key] = asked = known.get(key) or _asked(recipe, task, tokenizer)
            rows, tokens, drawn = rows + asked.rows, tokens + asked.tokens, drawn + asked.max_sampled_tokens
    whole = tokens + drawn
    flops = float(forward_flops(model, _evenly(whole, rows)))
    return Estimate(
        name=name,
        stage=step.stage,
        rows=rows,
        tokens=whole,
        flops=flops,
        seconds=flops / (matrix_rate(default_device(), precision) * SAMPLING_EFFICIENCY),
        disk=whole * TEXT_BYTES,
        bound=drawn > 0,
    )


def _evenly(tokens: int, rows: int) -> Work:
    """The work of rows of equal length whose tokens all reach the head."""
    return Work(tokens, tokens * max(1, tokens // max(1, rows)) // 2, tokens)


def _asked(recipe: Recipe, settings: TaskSettings, tokenizer: PreTrainedTokenizerBase) -> TaskSize:
    source = recipe.source(settings.data)
    return task_of(settings, source).size(_Inputs(source, recipe.seed, tokenizer, settings.max_new_tokens))


class _Inputs(NamedTuple):
    """What a task needs to estimate its size."""

    source: SourceSettings
    seed: int
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int

    def rows(self, task: Task) -> Sequence[Row]:
        return task_rows(task, self.source, seed=self.seed)

    def token_groups(self, *, preferred_only: bool) -> Sequence[TokenGroup]:
        groups, _ = likelihood_rows(self.source, self.tokenizer, model_limit=None, seed=self.seed, best=preferred_only)
        return groups

    def num_prompt_tokens(self, prompts: Sequence[Prompt]) -> int:
        return _tokens_of(prompts, self.tokenizer)


def _to_be_drawn(
    recipe: Recipe, name: str, step: GenerateStep, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int, int]:
    """(prompts, tokens of responses at most, tokens of prompts) of a step that samples."""
    asked = asked_prompts(recipe, step)
    num_policies = len(recipe.policies_of(name)) + len(step.models)
    responses = len(asked) * step.sampling.num_responses * num_policies
    return len(asked), responses * step.sampling.max_new_tokens, _tokens_of(asked, tokenizer)


def _given(recipe: Recipe, step: ScoreStep, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """(rows, tokens) of a step that judges rows that are there."""
    groups, _ = likelihood_rows(recipe.source(step.data), tokenizer, model_limit=None, seed=recipe.seed)
    return len(groups), sum(count_tokens(group.sequences) for group in groups)


def _tokens_of(asked: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> int:
    encoder = ChatEncoder(tokenizer)
    return sum(len(encoder.prompt_ids(prompt.messages, place)) for place, prompt in enumerate(asked))


def _work(group: TokenGroup, *, head: bool) -> Work:
    """What one forward pass over the group has to do, as a tree of its own, with or without an LM head."""
    batch = tree_batch(group.sequences)
    return Work(batch.num_tokens, int(batch.position_ids.sum()) + batch.num_tokens, len(batch.targets_N) if head else 0)


def _balances(step: TrainStep | PreferenceStep | RewardStep, sizes: Sequence[int], epoch: Indices) -> list[Balance]:
    """How evenly the first steps of an epoch would be dealt to ranks, of which each has a group at least."""
    per_step, budget = step.train.prompts_per_step, step.train.tokens_per_micro_batch
    starts = range(0, min(DEALT, max(1, len(epoch) // per_step)) * per_step, per_step)
    steps = [epoch[start : start + per_step] for start in starts]
    widths = [ranks for ranks in RANKS if ranks <= len(steps[0])] or [len(steps[0])]
    return [balance(steps, sizes, token_budget=budget, num_ranks=ranks) for ranks in widths]


def _training_rate(precision: str) -> float:
    """Floating-point operations a second of a training step on this machine, about."""
    here = default_device()
    return matrix_rate(here, precision) * EFFICIENCY[here]


def model_config(recipe: Recipe, name: str, vocab_size: int) -> PretrainedConfig:
    """The configuration of the model that the step makes, trains or asks, without its weights."""
    settings = recipe.policy
    for step in (recipe.steps[each] for each in recipe.lineage(name)):
        settings = imported(recipe, step) if isinstance(step, ImportStep) else settings
    if settings.from_config is not None:
        return build_config({"vocab_size": vocab_size, **settings.from_config})
    return load_config(str(settings.path))
