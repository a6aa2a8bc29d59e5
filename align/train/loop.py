"""The training loop: accumulate gradients, clip, step, evaluate, log, save, resume."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from accelerate import Accelerator

from align.accounting.peak_memory import peak_memory
from align.artifacts import METRICS, append_line
from align.data.batching import groups_of_step, steps_per_epoch
from align.distributed.processes import Processes
from align.distributed.progress import Progress
from align.errors import InputError, RunError
from align.models.backbone import Backbone
from align.models.probe import choose_forward
from align.models.saving.comparison import ModelOutputs, model_outputs
from align.models.weights import fingerprint
from align.train.callbacks import Callbacks
from align.train.checkpoint import latest_checkpoint
from align.train.checkpointer import Checkpointer
from align.train.indexed_groups import ROWS, GroupView
from align.train.objectives.base import ObjectiveOutput
from align.train.objectives.batch import GroupBatch
from align.train.passes.evaluator import Evaluator
from align.train.passes.micro_batches import COLLATE, MicroBatcher
from align.train.passes.router_pass import router_passes
from align.train.passes.step_statistics import StepStatistics
from align.train.references.cache import ReferenceCache, References, ReferenceWork, check_initial_gap
from align.train.references.compute import REFERENCE_WORK, fill_cache, read_work
from align.train.sharding.accelerator import make_accelerator
from align.train.sharding.optimizer import make_optimizer
from align.train.sharding.prepare import prepare_sharding
from align.train.tracking import Tracking, check_trackers, start_trackers
from align.train.training_run import HELD_OUT, START, TrainingResult, TrainingRun, evaluations_without_gain


class Loop:
    """Trains a policy on fixed groups; results do not depend on the micro-batch size or the number of ranks."""

    def __init__(
        self, policy: Backbone, training_run: TrainingRun, progress: Progress, accelerator: Accelerator | None = None
    ) -> None:
        run, settings = training_run, training_run.settings
        for name, is_set in {"keep": settings.keep == "best", "early_stopping": settings.early_stopping}.items():
            if is_set and not run.held_out:
                raise InputError("needs held-out rows: set held_out of the source", ("train", name))
        check_trackers(settings.trackers)
        self.policy, self.training_run, self.progress = policy, run, progress
        self.num_steps = settings.num_steps(run.num_rows)
        self.epoch = lru_cache(maxsize=2)(run.epoch)  # permuting a large epoch for each of its steps would be slow
        self.accelerator = accelerator or make_accelerator(settings)
        self.processes = Processes(self.accelerator)
        self.initial_weights = fingerprint(policy)
        optimizer = make_optimizer(policy, settings, run.head_lr_multiplier)
        self.sharding = prepare_sharding(self.accelerator, policy, optimizer, settings)
        self.model = self.sharding.model
        self.groups = GroupView(run.train, run.held_out)
        self.forward = choose_forward(policy, self.groups.probe_sequences(), run.forward, precision=settings.precision)
        if self.forward.name == "plain":
            progress.note(f"plain padded forward: {self.forward.reason}")
        progress.note(self._described())
        self.sharding.use_precision()
        self.sharding.warm_up(COLLATE[self.forward.name](self.groups[0].sequences).to(self.accelerator.device))
        self.reference_cache = ReferenceCache(
            run.references, weights=self.initial_weights, precision=settings.precision
        )
        self.references = self._compute_references() if run.objective.needs_reference else None
        self.batcher = MicroBatcher(
            self.groups,
            forward=self.forward.name,
            token_budget=settings.tokens_per_micro_batch,
            references=self.references,
            accelerator=self.accelerator,
        )
        self.router_pass = router_passes(policy, self.groups, self.forward, self.accelerator, progress)
        self.evaluator = (
            Evaluator(self.model, run.objective, self.groups, self.batcher, self.router_pass) if run.held_out else None
        )
        self.callbacks = Callbacks(run, self.num_steps, policy, self.accelerator)
        self.settings_hash = run.settings_hash(self.groups, self.initial_weights, policy.dropout_rates)
        self.checkpointer = Checkpointer(
            run, self.settings_hash, self.sharding, self.processes, initial_weights=self.initial_weights
        )

    def run(self) -> TrainingResult:
        """Train to the end, from the latest checkpoint if there is one."""
        step = latest_checkpoint(self.training_run.folder)
        if self.references is not None and (step or not self._is_checked_in_training):
            self._check_references(min(step, self.num_steps - 1))
        lines = self.checkpointer.resume()
        if lines:
            self.progress.note(f"resumed after step {len(lines)} of {self.num_steps}")
        self._start_trackers()
        self.progress.phase("train", self.num_steps, len(lines))
        with self.checkpointer.stops(self.progress.note, self.num_steps) as stop:
            for number in range(len(lines), self.num_steps):
                if self._stops(lines):
                    break
                with self.processes.activity(f"step {number + 1}"):
                    before = self._start_metrics() if number == 0 else {}
                    metrics = self.step(number) | before
                    self._evaluate_and_log(metrics, lines)
                    self.checkpointer.save_if_due(lines, self.num_steps, stop)
        if self.accelerator.trackers:
            self.accelerator.end_training()
        work_file = self.training_run.folder / REFERENCE_WORK
        return TrainingResult(
            metrics=lines,
            kept_metrics=self.checkpointer.load_kept(lines),
            forward=self.forward,
            initial_weights=self.initial_weights,
            references=read_work(work_file) if self.training_run.objective.needs_reference else ReferenceWork(),
        )

    def _start_trackers(self) -> None:
        run = self.training_run
        config, folder = run.settings.model_dump(mode="json"), run.folder / "tracking"
        tracking = run.tracking or Tracking(run=run.folder.name, step="train", folder=folder, config=config)
        if names := run.settings.trackers or tracking.settings.trackers:
            start_trackers(self.accelerator, names, tracking, self.settings_hash)

    def _stops(self, lines: list[dict[str, float]]) -> bool:
        """Return whether the training ends before its last step, and note why."""
        early = self.training_run.settings.early_stopping
        reason = "a callback returned True" if self.callbacks.is_stopped else None
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

    def _described(self) -> str:
        """Return the device, processes, threads and precision of the training."""
        number, way = self.accelerator.num_processes, type(self.sharding).__name__
        way = f"ZeRO-{self.sharding.stage}" if way.startswith("Zero") else {"Replicated": "DDP"}.get(way, way)
        processes = f"{number} processes ({way})" if number > 1 else "1 process"
        threads, precision = torch.get_num_threads(), self.training_run.settings.precision
        return f"training on {self.accelerator.device}: {processes}, {threads} thread(s) each, {precision}"

    def outputs(self) -> ModelOutputs:
        """Return the trained model's outputs on a few rows in fp32; all processes call it together."""
        with self.sharding.full_precision():
            return model_outputs(self.policy, self.groups.probe_sequences())

    def step(self, number: int) -> dict[str, float]:
        """Take optimizer step `number`, counted from 0, and return its metrics.

        Raises `RunError`, and leaves the weights unchanged, if the loss or the gradient norm is not finite.
        """
        start_s = time.monotonic()
        run, settings = self.training_run, self.training_run.settings
        indices = groups_of_step(number, run.num_rows, settings.prompts_per_step, epoch_of=self.epoch)
        groups, plan = self.groups.select(indices), self.batcher.plan(indices)
        denominator = run.objective.denominator(groups)
        learning_rate = settings.learning_rate_at(number, self.num_steps)
        self.sharding.set_learning_rate(learning_rate)
        statistics = StepStatistics(self.accelerator)
        router = self.router_pass() if self.router_pass is not None else None
        if router is not None and len(plan.ranks[0]) > 1:
            with self._dropout(number):
                router.count(self.model, self.batcher.micro_batches(plan))
        with self._dropout(number), self.sharding.accumulate_gradients():
            for micro in self.batcher.micro_batches(plan):
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
        grad_norm = self.sharding.step()
        if not math.isfinite(grad_norm):
            raise RunError(f"step {number + 1}: the gradient norm is {grad_norm}; the weights are unchanged")
        reduced = statistics.reduce(denominator)
        return {
            "step": number + 1,
            "epoch": (number + 1) / steps_per_epoch(run.num_rows, settings.prompts_per_step),
            **(reduced if router is None else router.metrics(reduced)),
            "grad_norm": grad_norm,
            "lr": learning_rate,
            "groups": len(groups),
            "tokens_trained": groups.num_trained_tokens,
            "imbalance": self.batcher.imbalance(plan),
            "seconds": time.monotonic() - start_s,
            "peak_memory_bytes": peak_memory(self.accelerator.device),
        }

    def _start_metrics(self) -> dict[str, float]:
        """Return the metrics on the held-out rows before the first update."""
        if self.evaluator is None:
            return {}
        return {START + name: value for name, value in self.evaluator.evaluate().items()}

    def _evaluate_and_log(self, metrics: dict[str, float], lines: list[dict[str, float]]) -> None:
        """Evaluate if that is due after the step, then add its metrics to the log, the trackers and `lines`."""
        step, every = int(metrics["step"]), self.training_run.settings.evaluate_every
        is_due = step == self.num_steps or (every is not None and step % every == 0)
        if self.evaluator is not None and is_due:
            metrics |= {HELD_OUT + name: value for name, value in self.evaluator.evaluate().items()}
            self.checkpointer.save_if_best([*lines, metrics])
            self.callbacks("evaluation", metrics)
        self.callbacks("step", metrics)
        if self.accelerator.is_main_process:
            append_line(self.training_run.folder / METRICS, metrics)
        self.accelerator.log({name: value for name, value in metrics.items() if name != "step"}, step=step)
        lines.append(metrics)
        self.progress.advance(1, metrics)

    @torch.no_grad()
    def _check_references(self, number: int) -> None:
        """Raise `RunError` unless the references of a step's groups are those of the initial weights.

        It is called before a checkpoint is loaded; a run that starts anew checks its first step.
        """
        run = self.training_run
        indices = groups_of_step(number, run.num_rows, run.settings.prompts_per_step, epoch_of=self.epoch)
        with self.processes.activity("checking references"):
            for micro in self.batcher.micro_batches(self.batcher.plan(indices)):
                output = run.objective(self.model, micro.batch)
                self._check_gap(output, micro.batch, number)

    def _check_gap(self, output: ObjectiveOutput, batch: GroupBatch, number: int) -> None:
        precision = self.training_run.settings.precision
        check_initial_gap(output, batch, step=number + 1, precision=precision, cache=self.reference_cache)

    def _compute_references(self) -> References:
        """Compute the reference log-probabilities that are not in the cache and return those of all groups."""
        run, column = self.training_run, self.training_run.folder / ROWS / "references.bin"
        work = fill_cache(
            self.reference_cache,
            self.model,
            self.groups,
            column=column,
            work_file=run.folder / REFERENCE_WORK,
            forward=self.forward.name,
            token_budget=run.settings.tokens_per_micro_batch,
            accelerator=self.accelerator,
        )
        with self.processes.activity("computing references"):
            num_missing = next(work)
            num_known = len(self.groups) - num_missing
            self.progress.note(f"references: {num_missing} groups to compute, {num_known} cached or repeated")
            if num_missing:
                self.progress.phase("reference", num_missing)
            for num_done in work:
                self.progress.advance(num_done)
        return References(self.groups, column)
