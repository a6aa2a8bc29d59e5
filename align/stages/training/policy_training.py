"""Training of a policy by `sft` and `preference`: from the step's inputs to a saved folder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from align.accounting.communication import BF16, FP32, Sharding, Traffic, communication_bytes, exchange_bytes
from align.accounting.flops import Decoder
from align.config import Settings
from align.data.chat_templates import apply_template
from align.distributed.processes import Processes
from align.models.loading.config import dimensions, max_positions
from align.models.loading.pretrained import silence_transformers
from align.models.policy import Policy, load_policy, save_policy
from align.models.reward_model import RewardModel
from align.models.saving.weights import Gather
from align.models.settings import PolicySettings
from align.models.weights import WrittenWeights
from align.stages.base import REFERENCES, TRACKING
from align.stages.costs.measured import Done
from align.stages.inputs.context import RunContext
from align.stages.training.contract import TrainingSettings
from align.stages.training.rows import RowRequest, StepRows, describe, step_rows
from align.stages.training.saving import check_before_training, load_saved_policy, save_trained
from align.stages.training.selecting import fixed_models, selection_of, selection_report
from align.train.indexed_groups import end_of_turn
from align.train.loop import Loop
from align.train.objectives.base import Objective
from align.train.passes.step_flops import work_in, work_of_others
from align.train.resuming import adopt_checkpoint
from align.train.sharding.accelerator import make_accelerator, sharded_loading
from align.train.sharding.replicated import num_parameters
from align.train.tracking import Tracking
from align.train.training_run import Teacher, TrainingResult, TrainingRun

MakeTeacher = Callable[[PreTrainedTokenizerBase], Teacher]  # of the tokenizer of the policy


@dataclass(frozen=True, slots=True)
class PolicyTraining:
    """A policy with its rows, ready to be trained."""

    loop: Loop
    rows: StepRows
    settings: PolicySettings
    tokenizer: PreTrainedTokenizerBase

    def save(self, folder: Path, result: TrainingResult) -> dict[str, Any]:
        """Write the trained policy as a plain Hugging Face folder and return what the manifest says of it."""
        settings = self.settings
        done = work_done(self.loop, result)  # with the adapters, which are merged now
        merge = settings.lora is None or settings.lora.merge

        def save(trained: Policy, gather: Gather) -> WrittenWeights:
            return save_policy(
                trained,
                self.tokenizer,
                folder,
                merge=merge,
                end_of_turn=end_of_turn(self.rows.train),
                dtype=settings.save_dtype,
                gather=gather,
            )

        saved = save_trained(
            self.loop,
            result,
            folder,
            save=save,
            load_saved=lambda dtype: load_saved_policy(folder, settings, dtype),
        )
        done = replace(done, weights=num_parameters(self.loop.policy.parameters()))
        return {**training_report(self.loop, self.rows, result), **saved, "done": done}


def prepare(
    step: TrainingSettings, objective: Objective, context: RunContext, make_teacher: MakeTeacher | None = None
) -> PolicyTraining:
    """Load the step's policy and tokenize its rows. The teacher must have the policy's tokenizer."""
    silence_transformers()
    settings = context.inputs.policy_from(step.start)
    accelerator = make_accelerator(step.train)
    with sharded_loading(accelerator, settings.lora) if settings.is_plain_checkpoint else nullcontext():
        policy, tokenizer = load_policy(settings)
    apply_template(tokenizer)
    check_before_training(policy, tokenizer, Processes(accelerator), context.progress)
    request = RowRequest(step, tokenizer, context.inputs, max_positions(policy.base.config))
    rows = step_rows(request, context.folder, run_on_main=Processes(accelerator).run_on_main)
    context.progress.note(describe(rows.counts, rows.format))
    resumed = begin(step, context, Processes(accelerator))
    run = training_run(step, objective, policy, tokenizer, rows, context, num_resumed=resumed)
    if make_teacher is not None:
        run = replace(run, teacher=make_teacher(tokenizer))
    loop = Loop(policy, run, context.progress, accelerator)
    return PolicyTraining(loop, rows, settings, tokenizer)


def begin(step: TrainingSettings, context: RunContext, processes: Processes) -> int:
    """Adopt the checkpoint of the step that this one resumes, if any; return its number of optimizer steps."""
    if step.resume is None:
        return 0
    earlier = context.inputs.folders[step.resume]
    return processes.run_on_main(lambda: adopt_checkpoint(earlier, context.folder), f"resuming {step.resume}")


def training_run(
    step: TrainingSettings,
    objective: Objective,
    model: Policy | RewardModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: StepRows,
    context: RunContext,
    *,
    num_resumed: int,
    head_lr_multiplier: float = 1.0,
) -> TrainingRun:
    """Return the inputs of the training loop, with the reference and the scorer of a selection."""
    attributes = model.rating.names if isinstance(model, RewardModel) else None
    fixed = fixed_models(step, context.inputs, tokenizer, attributes)
    frozen = not all(value.requires_grad for value in model.parameters())
    run = TrainingRun(
        objective=objective,
        train=rows.train,
        held_out=rows.held_out,
        mixture=rows.mixture,
        settings=step.train,
        forward=context.inputs.policy.forward,
        seed=context.inputs.seed,
        head_lr_multiplier=head_lr_multiplier,
        folder=context.folder,
        references=context.inputs.run / REFERENCES,
        selection=selection_of(step, rows, dimensions(model.base.config), fixed, frozen=frozen),
        tracking=_tracking(step, context),
        num_resumed=num_resumed,
    )
    warmup, num_steps = step.train.warmup_steps, run.num_steps
    if warmup and warmup >= num_steps:
        context.progress.note(f"warmup_steps is {warmup}, and the run has {num_steps} steps: all of it is warm-up")
    return run


def _tracking(step: TrainingSettings, context: RunContext) -> Tracking:
    """Return where the step is tracked, with everything that its settings say."""
    inputs = context.inputs
    config: dict[str, Any] = {
        **cast(Settings, step).model_dump(mode="json"),
        "seed": inputs.seed,
        "policy_settings": inputs.policy.model_dump(mode="json"),
        "sources": {name: source.model_dump(mode="json") for name, source in inputs.sources.items()},
    }
    return Tracking(
        settings=inputs.tracking,
        run=inputs.run.name,
        step=context.name,
        folder=inputs.run / TRACKING,
        config=config,
    )


def work_done(loop: Loop, outcome: TrainingResult) -> Done:
    """Return what the training computed, for the step's ledger."""
    weights, trained = num_parameters(loop.policy.parameters()), num_parameters(loop.sharding.trainable)
    processes, device = loop.accelerator.num_processes, loop.accelerator.device
    settings = loop.training_run.settings
    model = dimensions(loop.policy.base.config)
    sharding = Sharding(
        stage=loop.sharding.stage,
        processes=processes,
        reduce=settings.reduce,
        cpu=device.type == "cpu",
    )
    small = [value for value in loop.policy.parameters() if getattr(value, "ds_persist", False)]
    traffic = Traffic(
        weights=weights,
        trained=trained,
        unpartitioned=num_parameters(small),
        steps=outcome.num_steps - outcome.num_resumed,
        micro_batches=outcome.num_micro_batches,
        regathered=outcome.num_micro_batches,  # the probe of the forward comes first, without a backward pass
        forward_only=outcome.num_forward_passes,
        reduced_bytes=BF16 if settings.reduce_dtype == "bf16" else FP32,
        gathered_in_bf16=loop.sharding.num_rounded,
    )
    wire_bytes: int | None = communication_bytes(sharding, traffic)
    if settings.sequence_parallel > 1:
        wire_bytes = None if isinstance(model, str) else wire_bytes + _exchanged(loop, outcome, model)
    return Done(
        dimensions=model,
        weights=weights,
        frozen=trained < weights,
        tokens_trained=outcome.tokens_trained,
        trained=work_in(loop.policy, outcome.trained),
        observed=work_in(loop.policy, outcome.forward_only),
        others=work_of_others(loop.training_run),
        devices=processes,
        precision=settings.precision,
        wire_bytes=wire_bytes,
        device=str(device),
    )


def _exchanged(loop: Loop, outcome: TrainingResult, model: Decoder) -> int:
    """Return the bytes that each process has sent around attention; checkpointed layers send twice going forward."""
    settings = loop.training_run.settings
    passes = 3 if any(getattr(each, "gradient_checkpointing", False) for each in loop.policy.modules()) else 2
    return exchange_bytes(
        model,
        tokens=passes * outcome.trained.tokens + outcome.forward_only.tokens,
        split=settings.sequence_parallel,
        processes=loop.accelerator.num_processes,
        size=BF16 if settings.precision == "bf16" else FP32,
    )


def training_report(loop: Loop, rows: StepRows, outcome: TrainingResult) -> dict[str, Any]:
    """Return the entries of the manifest about the training."""
    uneven = outcome.imbalance  # none if the training diverged in its first step
    return {
        "rows": rows.counts,
        "format": rows.format,
        "optimizer_steps": outcome.num_steps,
        "planned_steps": loop.num_steps,
        **({"averaged_steps": loop.average.steps} if loop.average.steps else {}),
        **({"diverged": outcome.diverged} if outcome.diverged is not None else {}),
        "imbalance": {"mean": sum(uneven) / len(uneven), "worst": max(uneven)} if uneven else None,
        "forward": {"name": outcome.forward.name, "reason": outcome.forward.reason},
        "reference": outcome.initial_weights,
        "first": dict(outcome.first_metrics),
        "last": dict(outcome.last_metrics),
        "kept": dict(outcome.kept_metrics),
        "threads": torch.get_num_threads(),
        "tokens_per_micro_batch": loop.training_run.settings.tokens_per_micro_batch,
        **selection_report(loop, outcome, dimensions(loop.policy.base.config)),
    }
