"""The stages that make a policy: import, sft, preference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from transformers import PreTrainedTokenizerBase

from align.accounting.formulas import Sharding, Traffic, wire_bytes
from align.artifacts import versions
from align.data.chat_templates import apply_template
from align.data.token_groups import TokenGroup
from align.data.tokenizer import train_tokenizer
from align.distributed.processes import Processes
from align.distributed.progress import Progress
from align.models.backbone import Backbone
from align.models.loading.config import max_positions
from align.models.loading.pretrained import silence_transformers
from align.models.loading.tokenizer import load_tokenizer
from align.models.policy import load_policy, save_policy
from align.models.settings import PolicySettings
from align.procedural import tasks
from align.stages.costs import Done, dimensions
from align.stages.recipe import Recipe
from align.stages.sources import UNUSED, Rows, step_rows
from align.stages.steps import ImportStep, PreferenceStep, RewardStep, TrainStep
from align.train.accelerator import make_accelerator, zero3_init
from align.train.loop import Loop
from align.train.objectives import Objective, PreferenceObjective, SupervisedObjective
from align.train.sharding import num_parameters
from align.train.training_run import TrainingResult, TrainingRun

B = TypeVar("B", bound=Backbone)

REFERENCES = "references"  # folder of the run that holds the cached reference log-probabilities


@dataclass(frozen=True, slots=True)
class Context:
    """Where a step runs."""

    recipe: Recipe
    name: str
    working: Path
    inputs: Mapping[str, Path]
    report: Progress


def import_policy(context: Context) -> dict[str, Any]:
    """Write the recipe's policy as a plain folder; a fresh one gets a tokenizer trained on the spot if it has none."""
    step = context.recipe.steps[context.name]
    assert isinstance(step, ImportStep)
    silence_transformers()
    settings = with_tokenizer(imported(context.recipe, step), step, context.working)
    policy, tokenizer = load_policy(settings)
    apply_template(tokenizer, settings.chat_template)
    save_policy(policy, tokenizer, context.working)
    weights = sum(value.numel() for value in policy.parameters())
    done = Done(dimensions=dimensions(policy.base.config), weights=weights)
    return {**about(context), "weights": weights, "tokens": len(tokenizer), "done": done}


def imported(recipe: Recipe, step: ImportStep) -> PolicySettings:
    """The policy that the step puts into its folder, whole: the recipe's own, or another model run in the same way."""
    plain: dict[str, Any] = {
        "lora": None,
        "quantize": None,
    }  # a training step adds adapters, and quantises what it reads
    if step.path is not None:
        plain |= {"path": step.path, "from_config": None, "tokenizer": None}
    return recipe.policy.model_copy(update=plain)


def with_tokenizer(settings: PolicySettings, step: ImportStep, folder: Path) -> PolicySettings:
    """The settings with a tokenizer trained into `folder` where one is asked for."""
    if step.vocab_size is None:
        return settings
    tokenizer = train_tokenizer(tasks.corpus(), vocab_size=step.vocab_size, chat_template="")
    apply_template(tokenizer, settings.chat_template or "chatml")
    tokenizer.save_pretrained(str(folder))
    fresh = settings.from_config
    if fresh is not None:  # a fresh model is made for this tokenizer
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
        fresh = {"vocab_size": len(tokenizer), **ids, **fresh}
    return settings.model_copy(update={"tokenizer": str(folder), "from_config": fresh, "chat_template": None})


def train(context: Context) -> dict[str, Any]:
    """Train the step's policy and write it as a plain folder."""
    recipe, step = context.recipe, context.recipe.steps[context.name]
    assert isinstance(step, TrainStep | PreferenceStep)
    silence_transformers()
    settings = policy_settings(recipe, context.name, context.inputs)
    accelerator = make_accelerator(step.train, context.working)
    with zero3_init(accelerator) if settings.is_plain_checkpoint else nullcontext():
        policy, tokenizer = load_policy(settings)
    apply_template(tokenizer, settings.chat_template)
    limit = max_positions(policy.base.config)
    first = Processes(accelerator).run_on_main
    data = step_rows(recipe, context.name, tokenizer, context.working, model_limit=limit, first=first)
    context.report.note(describe(data.counts, data.format))
    loop = Loop(policy, training_run_of(context, objective_of(step), data, settings), context.report, accelerator)
    outcome = loop.run()
    trained = whole_copy(loop, lambda: load_policy(settings)[0])
    merge = settings.lora is None or settings.lora.merge

    def save() -> None:
        save_policy(trained, tokenizer, context.working, merge=merge, end_of_turn=end_of_turn(data.train))

    loop.processes.run_on_main(save, "writing the policy")
    return {**about(context), **account(data, outcome), "done": done_of(loop, outcome)}


def whole_copy(loop: Loop, read: Callable[[], B]) -> B:
    """The trained model with all its weights where it is saved, which is the first process.

    Where weights are whole only while a layer runs that is a model read anew, in main memory, with what was trained.
    """
    if not loop.sharding.gathers_per_layer:
        return cast(B, loop.policy)
    copy = loop.processes.run_on_all(lambda: read() if loop.processes.is_main else None, "reading the model to save it")
    places = {} if copy is None else dict(copy.named_parameters())
    with torch.no_grad():
        for name, value in loop.sharding.full_parameters():
            if copy is not None:
                places[name].copy_(value)
    return cast(B, copy)


def training_run_of(
    context: Context, objective: Objective, data: Rows, settings: PolicySettings, *, head_lr_multiplier: float = 1.0
) -> TrainingRun:
    """What the step gives to the loop."""
    step = context.recipe.steps[context.name]
    assert isinstance(step, TrainStep | PreferenceStep | RewardStep)
    job = TrainingRun(
        objective=objective,
        train=data.train,
        held_out=data.held_out,
        mixture=data.mixture,
        settings=step.train,
        forward=settings.forward,
        seed=context.recipe.seed,
        head_lr_multiplier=head_lr_multiplier,
        folder=context.working,
        references=context.recipe.root / REFERENCES,
    )
    if (warm := step.train.warmup_steps) >= (num_steps := step.train.num_steps(job.num_rows)) and warm:
        context.report.note(f"the warm-up of {warm} steps takes all {num_steps} of this run")
    return job


def end_of_turn(groups: Sequence[TokenGroup]) -> int | None:
    """The token that most sequences end with; None where no token ends more than half of them."""
    ends = Counter(int(sequence.ids[-1]) for group in groups for sequence in group.sequences)
    token, times = ends.most_common(1)[0]
    return token if 2 * times > ends.total() else None


def objective_of(step: TrainStep | PreferenceStep) -> Objective:
    """What the step optimizes."""
    return SupervisedObjective() if isinstance(step, TrainStep) else PreferenceObjective(step.loss)


def policy_settings(recipe: Recipe, name: str, inputs: Mapping[str, Path]) -> PolicySettings:
    """The recipe's policy, or the folder of the step that this one starts from, run in the same way."""
    before = recipe.policy_of(name)
    if before is None:
        return recipe.policy
    moved = {"path": str(inputs[before]), "from_config": None, "tokenizer": None, "chat_template": None}
    return recipe.policy.model_copy(update=moved)


def tokenizer_of(recipe: Recipe, name: str, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that the step will see, with its chat template, before any step has run."""
    settings = recipe.policy
    for step in (recipe.steps[each] for each in recipe.lineage(name)):
        if isinstance(step, ImportStep):
            settings = with_tokenizer(imported(recipe, step), step, folder)
    tokenizer = load_tokenizer(settings)
    apply_template(tokenizer, settings.chat_template)
    return tokenizer


def describe(counts: Mapping[str, int], form: str = "") -> str:
    """Row statistics in one line."""
    read = f"{counts['rows']} rows read{f' as {form}' if form else ''}"
    said = [read, f"{counts['trained']} trained", f"{counts['held_out']} held out"]
    known = {"rows", "records", "trained", "held_out"}
    unused = sorted(name for name in counts if name.startswith(UNUSED))
    told = (f"{name} {number}" for name, number in sorted(counts.items()) if name not in (*known, *unused))
    columns = ", ".join(name.removeprefix(UNUSED) for name in unused)
    return ", ".join([*said, *told]) + (f"; columns left unused: {columns}" if columns else "")


def about(context: Context) -> dict[str, Any]:
    """What every stage says of itself in the manifest."""
    step = context.recipe.steps[context.name]
    return {
        "stage": step.stage,
        "settings": step.model_dump(mode="json"),
        "seed": context.recipe.seed,
        "versions": versions(),
    }


def done_of(loop: Loop, outcome: TrainingResult) -> Done:
    """What the training has computed, for the step's ledger."""
    weights, trained = num_parameters(loop.policy.parameters()), num_parameters(loop.sharding.trainable)
    processes, device = loop.accelerator.num_processes, loop.accelerator.device
    ways = Sharding(
        stage=loop.sharding.stage,
        processes=processes,
        reduce=loop.training_run.settings.reduce,
        cpu=device.type == "cpu",
    )
    small = [value for value in loop.policy.parameters() if getattr(value, "ds_persist", False)]
    traffic = Traffic(
        weights=weights,
        trained=trained,
        small=num_parameters(small),
        steps=outcome.num_steps,
        micro_batches=outcome.num_micro_batches,
        unkept=outcome.num_micro_batches,  # the probe of the forward comes first, without a backward pass
        forwards=outcome.num_forward_passes,
    )
    return Done(
        dimensions=dimensions(loop.policy.base.config),
        weights=weights,
        frozen=trained < weights,
        tokens_trained=outcome.tokens_trained,
        trained=outcome.trained,
        observed=outcome.forward_only,
        devices=processes,
        precision=loop.training_run.settings.precision,
        wire_bytes=wire_bytes(ways, traffic),
        device=str(device),
    )


def account(data: Rows, outcome: TrainingResult) -> dict[str, Any]:
    """What training leaves in the manifest."""
    return {
        "rows": data.counts,
        "format": data.format,
        "optimizer_steps": outcome.num_steps,
        "imbalance": {"mean": sum(outcome.imbalance) / len(outcome.imbalance), "worst": max(outcome.imbalance)},
        "forward": {"name": outcome.forward.name, "reason": outcome.forward.reason},
        "reference": outcome.initial_weights,
        "first": dict(outcome.first_metrics),
        "last": dict(outcome.last_metrics),
        "kept": dict(outcome.kept_metrics),
        "threads": torch.get_num_threads(),
    }
