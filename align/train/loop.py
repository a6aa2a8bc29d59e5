"""The training loop: accumulate gradients, clip, step, evaluate, log, save, resume."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property, lru_cache

import torch
from accelerate import Accelerator

from align.accounting.peak_memory import peak_memory
from align.artifacts import METRICS, append_line
from align.data.batching import groups_of_step, steps_per_epoch
from align.distributed.processes import Processes
from align.distributed.progress import Progress
from align.models.backbone import Backbone
from align.models.probe import Forward, choose_forward
from align.models.saving.comparison import ModelOutputs, model_outputs
from align.models.weights import fingerprint
from align.train.callbacks import Callbacks
from align.train.checkpoint import latest_checkpoint
from align.train.checkpointer import Checkpointer
from align.train.distillation.teacher import teacher_targets
from align.train.indexed_groups import GroupView
from align.train.objectives.base import ObjectiveOutput
from align.train.objectives.batch import GroupBatch
from align.train.objectives.unpaired import uses_kl
from align.train.passes.data_ranks import split_sequences
from align.train.passes.evaluator import Evaluator
from align.train.passes.kl_pass import make_kl_pass
from align.train.passes.large_groups import limit_rows
from align.train.passes.micro_batches import COLLATE
from align.train.passes.router_pass import router_passes
from align.train.passes.step_flops import StepFlops
from align.train.passes.step_statistics import DivergedError, StepStatistics
from align.train.passes.token_budget import with_token_budget
from align.train.references.cache import ReferenceCache, ReferenceWork, check_initial_gap
from align.train.references.compute import REFERENCE_WORK, read_work
from align.train.references.run_passes import RunPasses
from align.train.selection.early_exit import make_exit
from align.train.selection.selector import make_selector
from align.train.selection.token_references import token_references
from align.train.sharding.accelerator import make_accelerator
from align.train.sharding.averaging import WeightAverage
from align.train.sharding.bf16.weights import round_weights
from align.train.sharding.prepare import describe, prepare_sharding
from align.train.tracking import check_trackers, trackers
from align.train.training_run import HELD_OUT, START, STOPPED, TrainingResult, TrainingRun, evaluations_without_gain


class Loop:
    """Trains a policy on fixed groups; results do not depend on the micro-batch size or the number of ranks."""

    def __init__(
        self, policy: Backbone, training_run: TrainingRun, progress: Progress, accelerator: Accelerator | None = None
    ) -> None:
        training_run.check_held_out()
        check_trackers(training_run.settings.trackers)
        self.accelerator = accelerator or make_accelerator(training_run.settings)
        run = with_token_budget(training_run, policy, self.accelerator)
        settings = run.settings
        self.policy, self.training_run, self.progress = policy, run, progress
        self.num_steps = run.num_steps
        self.epoch = lru_cache(maxsize=2)(run.epoch)  # permuting a large epoch for each of its steps would be slow
        self.processes = Processes(self.accelerator)
        self.sharding = prepare_sharding(self.accelerator, policy, settings, run.head_lr_multiplier)
        if settings.weights != "fp32":
            round_weights(policy)
        self.initial_weights = fingerprint(policy)
        self.model = self.sharding.model
        self.groups = GroupView(run.train, run.held_out)
        self.forward = self._choose_forward()
        self.sharding.use_precision()
        progress.note(describe(self.sharding, settings))
        self.sharding.warm_up(COLLATE[self.forward.name](self.groups[0].sequences).to(self.accelerator.device))
        self.average = WeightAverage(self.sharding, settings.averaged_steps(self.num_steps), progress)
        self.reference_cache = ReferenceCache(
            run.references, weights=self.initial_weights, precision=settings.forward_precision
        )
        self.passes = RunPasses(
            run=run,
            model=self.model,
            forward=self.forward.name,
            cache=self.reference_cache,
            accelerator=self.accelerator,
            processes=self.processes,
            progress=progress,
            exit=make_exit(run, policy, self.accelerator.distributed_type.value),
        )
        self.references = self.passes.references(self.groups, REFERENCE_WORK) if run.objective.needs_reference else None
        teacher = teacher_targets(self.passes, self.groups, policy) or token_references(self.passes)
        self.batcher = self.passes.batcher(self.groups, self.references, teacher)
        self.kl_pass = make_kl_pass(self.passes, self.groups, self.epoch) if uses_kl(run.objective) else None
        self.router_pass = router_passes(policy, self.groups, self.forward, self.accelerator, progress)
        evaluated = (self.model, run.held_out_objective, self.groups, self.batcher, self.router_pass, self.kl_pass)
        self.evaluator = Evaluator(*evaluated) if run.held_out else None
        self.callbacks = Callbacks(run, self.num_steps, policy, self.accelerator)
        self.settings_hash = run.settings_hash(self.groups, self.initial_weights, policy.dropout_rates, teacher)
        self.selector = make_selector(
            self.passes, self.groups, self.references, super_batch=self.super_batch, settings_hash=self.settings_hash
        )
        self.checkpointer = Checkpointer(
            run, self.settings_hash, self.sharding, self.processes, initial_weights=self.initial_weights
        )

    def _choose_forward(self) -> Forward:
        """Choose the policy's forward pass, and note why it is padded, or how it runs large groups."""
        is_rounded = self.sharding.gathers_per_layer and self.sharding.in_bf16
        run, sequences = self.training_run, self.groups.probe_sequences()
        precision = run.settings.precision
        forward = choose_forward(self.policy, sequences, run.forward, precision=precision, is_rounded=is_rounded)
        if forward.name == "plain":
            self.progress.note(f"plain padded forward: {forward.reason}")
        notes = (
            limit_rows(self.sharding, self.groups, forward),
            split_sequences(run, self.sharding, self.groups, forward),
        )
        for note in filter(None, notes):
            self.progress.note(note)
        return forward

    def run(self) -> TrainingResult:
        """Train to the end, from the latest checkpoint if there is one."""
        run, step = self.training_run, latest_checkpoint(self.training_run.folder)
        if self.references is not None and (step or not self._is_checked_in_training):
            self._check_references(min(step, self.num_steps - 1))
        lines = self.checkpointer.resume()
        if lines:
            self.progress.note(f"resumed after step {len(lines)} of {self.num_steps}")
        names = run.settings.trackers or run.where_tracked.settings.trackers
        tracked = trackers(self.accelerator, names, run.where_tracked, self.settings_hash)
        last_step, diverged = run.last_step, None
        self.progress.phase("train", last_step, len(lines))
        with tracked, self.checkpointer.stops(self.progress.note, last_step) as stop, self.selector or nullcontext():
            for number in range(len(lines), last_step):
                if self._ends_early(lines):
                    break
                with self.processes.activity(f"step {number + 1}"):
                    before = self.evaluator.evaluate(START) if number == 0 and self.evaluator is not None else {}
                    try:
                        metrics = self.step(number) | before
                    except DivergedError as error:
                        if run.settings.on_divergence == "error":
                            raise
                        diverged = str(error)
                        self.progress.note(f"stopped after step {len(lines)} of {self.num_steps}: {diverged}")
                        break
                    self._evaluate_and_log(metrics | self.average.add(number + 1), lines)
                    self.checkpointer.save_if_due(lines, last_step, stop)
        if run.settings.until_step is not None:
            self.checkpointer.save_trained(lines)  # the last weights, before the best ones replace them
        return TrainingResult(
            metrics=lines,
            kept_metrics=self.checkpointer.load_kept(lines, has_diverged=diverged is not None),
            forward=self.forward,
            initial_weights=self.initial_weights,
            references=read_work(run.folder) if run.objective.needs_reference else ReferenceWork(),
            num_resumed=run.num_resumed,
            diverged=diverged,
        )

    def _ends_early(self, lines: list[dict[str, float]]) -> bool:
        """Return whether the training ends before its last step, and note why."""
        early = self.training_run.settings.early_stopping
        reason = "a callback returned True" if lines and STOPPED in lines[-1] else None
        if early is not None and evaluations_without_gain(lines, early.min_delta) >= early.patience:
            reason = f"the held-out loss has not improved in {early.patience} evaluation(s)"
        if reason is not None:
            self.progress.note(f"stopped after step {len(lines)} of {self.num_steps}: {reason}")
        return reason is not None

    def _dropout(self, number: int) -> AbstractContextManager[None]:
        """Return a context in which the adapters have the dropout of a step, if they have dropout."""
        dropout = self.policy.dropout
        return nullcontext() if dropout is None else dropout.active(self.training_run.seed, number)

    @property
    def _is_checked_in_training(self) -> bool:
        """Whether the first step compares policy and reference; with dropout it takes a pass of its own."""
        return self.references is not None and self.policy.dropout is None

    def outputs(self) -> ModelOutputs:
        """Return the trained model's outputs on a few rows in fp32; all processes call it together."""
        self.sharding.finish()
        with self.sharding.full_precision():
            outputs = model_outputs(self.policy, self.groups.probe_sequences())
        has_base = not all(value.requires_grad for value in self.policy.parameters())  # saved without rounding
        return replace(outputs, is_rounded=self.sharding.always_rounds or (self.sharding.in_bf16 and has_base))

    def step(self, number: int) -> dict[str, float]:
        """Take optimizer step `number`, counted from 0, and return its metrics.

        Raises `DivergedError`, and leaves the weights unchanged, if the loss or the gradient norm is not finite.
        """
        start_s = time.monotonic()
        run, settings = self.training_run, self.training_run.settings
        indices, choice = self._choose(number)
        groups, plan = self.groups.select(indices), self.batcher.plan(indices, run.exits(number, indices))
        denominator = run.objective.denominator(groups)
        learning_rate = settings.learning_rate_at(number, self.num_steps)
        self.sharding.set_learning_rate(learning_rate)
        statistics = StepStatistics(self.batcher.ranks)
        estimate = self.kl_pass.of_step(number, groups) if self.kl_pass is not None else None
        router = self.router_pass() if self.router_pass is not None else None
        if router is not None and len(plan.ranks[0]) > 1:
            with self._dropout(number):
                router.count(self.model, self.batcher.micro_batches(plan))
        with self._dropout(number), self.sharding.accumulate_gradients():
            for micro in self.batcher.micro_batches(plan, kl=estimate and estimate.kl):
                with self.sharding.micro_batch(micro.is_last):
                    output = run.objective(self.model, micro.batch)
                    statistics.add(micro, output)
                    if micro.is_last:
                        statistics.check_finite(number + 1)
                    # Gradients are averaged over ranks, but the loss of a step is a sum over ranks
                    loss = output.loss * micro.weight * self.accelerator.num_processes / denominator
                    if router is not None:
                        loss = loss + router.term(micro) * self.accelerator.num_processes
                    self.sharding.backward(loss)
                if number == 0 and micro.weight and self._is_checked_in_training:
                    self._check_gap(output, micro.batch, number)
        grad_norm = self.sharding.step((run.seed, number))
        if not math.isfinite(grad_norm):
            message = f"optimizer step {number + 1}: the gradient norm is {grad_norm}; the weights are unchanged"
            raise DivergedError(message)
        reduced = statistics.reduce(denominator)
        return {
            "step": number + 1,
            "epoch": (number + 1) / steps_per_epoch(run.num_rows, run.rows_per_step),
            **(reduced if router is None else router.metrics(reduced)),
            **(estimate.metrics if estimate is not None else {}),
            **choice,
            "grad_norm": grad_norm,
            "lr": learning_rate,
            "groups": len(groups),
            "tokens_trained": groups.num_trained_tokens,
            "imbalance": self.batcher.imbalance(plan),
            "seconds": time.monotonic() - start_s,
            "peak_memory_bytes": peak_memory(self.accelerator.device),
        }

    def _choose(self, number: int) -> tuple[Sequence[int], Mapping[str, float]]:
        """Return the groups of an optimizer step, and what is logged of their choice."""
        return (self.super_batch(number), {}) if self.selector is None else self.selector.choose(number)

    def super_batch(self, number: int) -> tuple[int, ...]:
        """Return the groups that optimizer step `number`, from 0, takes from the epoch."""
        return groups_of_step(number, self.training_run.num_rows, self.training_run.rows_per_step, epoch_of=self.epoch)

    def _evaluate_and_log(self, metrics: dict[str, float], lines: list[dict[str, float]]) -> None:
        """Evaluate if that is due after the step, then add its metrics to the log, the trackers and `lines`."""
        is_due = self.training_run.is_evaluated(int(metrics["step"]))
        if is_due:
            self._evaluate(metrics, lines)
        self.callbacks("step", metrics)
        if self.callbacks.is_stopped:
            metrics[STOPPED] = 1.0  # for a rerun, which does not ask the callback again
            if not is_due:
                self._evaluate(metrics, lines)
        if self.accelerator.is_main_process:
            append_line(self.training_run.folder / METRICS, metrics)
        self.accelerator.log(
            {name: value for name, value in metrics.items() if name != "step"}, step=int(metrics["step"])
        )
        lines.append(metrics)
        self.progress.advance(1, metrics | self._flops.of(metrics))

    def _evaluate(self, metrics: dict[str, float], lines: list[dict[str, float]]) -> None:
        """Add the metrics on the held-out rows, if there are any, and save the weights if they are the best so far."""
        if self.evaluator is not None:
            metrics |= self.evaluator.evaluate(HELD_OUT)
            self.checkpointer.save_if_best([*lines, metrics])
            self.callbacks("evaluation", metrics)

    @cached_property
    def _flops(self) -> StepFlops:
        return StepFlops(self.policy, self.sharding.trainable, self.training_run)

    @torch.no_grad()
    def _check_references(self, number: int) -> None:
        """Raise `RunError` unless the references of a step's groups are those of the initial weights.

        It is called before a checkpoint is loaded; a new run checks the references in its first step instead.
        """
        indices = self.super_batch(number)[: self.training_run.settings.prompts_per_step]
        with self.processes.activity("checking references"):
            for micro in self.batcher.micro_batches(self.batcher.plan(indices)):
                output = self.training_run.objective(self.model, micro.batch)
                self._check_gap(output, micro.batch, number)

    def _check_gap(self, output: ObjectiveOutput, batch: GroupBatch, number: int) -> None:
        precision = self.training_run.settings.precision
        check_initial_gap(output, batch, step=number + 1, precision=precision, cache=self.reference_cache)
