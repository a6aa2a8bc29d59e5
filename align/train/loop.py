"""The only loop: accumulate, clip, step, stop on non-finite, evaluate, log, save, resume."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor

from align.accounting.flops import Work, sum_work
from align.accounting.peak_memory import peak_memory
from align.artifacts import METRICS, append_line
from align.config import stable_hash
from align.data.balance import imbalance
from align.data.batching import groups_of_step, plan_step, steps_per_epoch
from align.distributed.processes import Processes
from align.distributed.progress import Progress
from align.distributed.signals import StopRequest, defer_sigterm
from align.errors import InputError, RunError
from align.models.backbone import Backbone
from align.models.probe import choose_forward
from align.models.tree.batch import plain_batch, tree_batch
from align.models.weights import fingerprint
from align.train.accelerator import make_accelerator
from align.train.checkpoint import load_best, load_checkpoint, metrics_until, save_best, save_checkpoint
from align.train.indexed_groups import ROWS, Groups
from align.train.objectives import GroupBatch, Step, Tally, group_batch
from align.train.optimizer import make_optimizer
from align.train.reference import REFERENCE_WORK, ReferenceCache, fill
from align.train.sharded import shard
from align.train.training_run import WORK, TrainingResult, TrainingRun, best_line, work_of

# How far the policy and its references may be apart before the first update, in nats a token: what rounding does in
# micro-batches of another cut. The loss itself would not show it: at a beta of 1e-3 it hardly depends on them.
FIRST_GAP = {"fp32": 1e-3, "bf16": 5e-2}


class Loop:
    """One training step over fixed groups; the same numbers however it is cut into micro-batches and ranks."""

    def __init__(
        self, policy: Backbone, run: TrainingRun, report: Progress, accelerator: Accelerator | None = None
    ) -> None:
        self.training_run, self.report, self.policy = run, report, policy
        self.keeps_best = run.settings.keep == "best"
        if self.keeps_best and not run.held_out:
            raise InputError("train.keep is 'best', and no row is held out to tell by: set held_out of the source")
        self.accelerator = accelerator or make_accelerator(run.settings, run.folder)
        self.processes = Processes(self.accelerator)
        self.weights = fingerprint(policy)
        self.optimizer = make_optimizer(policy, run.settings, run.head_lr_multiplier)
        self.sharding = shard(self.accelerator, policy, self.optimizer, run.settings)
        self.groups = Groups(run.train, run.held_out)  # a group is known by its index in here
        self.forward = choose_forward(policy, self.groups.probed(), run.forward, precision=run.settings.precision)
        if self.forward.name == "plain":
            report.note(f"plain padded forward: {self.forward.reason}")
        self.make = tree_batch if self.forward.name == "tree" else plain_batch
        self.sizes = self.groups.sizes(self.forward.name)
        self.sharding.use_precision()
        self.model = self.sharding.model
        self.sharding.settle(self.make(self.groups[0].sequences).to(self.accelerator.device))
        self.num_steps = run.settings.num_steps(run.num_rows)
        self.epoch = lru_cache(maxsize=2)(run.epoch)  # the order of a large epoch is not made for each of its steps
        self._referred, self._num_referred = Work(0, 0, 0), 0
        with self.processes.activity("the references, before step 1"):
            self.references = self._fill_references() if run.objective.needs_reference else None
        numbers = [run.settings.cache_key(), run.objective.cache_key(), run.head_lr_multiplier, self.weights, run.seed]
        numbers += [] if run.mixture is None else [asdict(run.mixture)]
        self.settings_hash = stable_hash([*numbers, *self.groups.digests(held_out=self.keeps_best)])

    def run(self) -> TrainingResult:
        """Train to the end, from the latest checkpoint if there is one."""
        run, settings = self.training_run, self.training_run.settings
        done = load_checkpoint(run.folder, holder=self.sharding, settings_hash=self.settings_hash)
        if self._sum(done) != done * self.accelerator.num_processes:
            raise RunError(f"{run.folder}: ranks find different checkpoints in it; do all nodes share the folder?")
        lines = metrics_until(run.folder / METRICS, done, write=self.accelerator.is_main_process)
        if done:
            self.report.note(f"resumed after step {done} of {self.num_steps}")
        if settings.trackers:
            self.accelerator.init_trackers("align", {name: str(value) for name, value in settings.cache_key().items()})
        self.report.phase("train", self.num_steps, done)
        saved = time.monotonic()
        with defer_sigterm() as stop:
            for step in range(done, self.num_steps):
                with self.processes.activity(f"step {step + 1}"):
                    saved = self._advance(step, lines, saved, stop)
        if settings.trackers:
            self.accelerator.end_training()
        return TrainingResult(
            num_steps=self.num_steps,
            forward=self.forward,
            first_metrics=lines[0],
            last_metrics=lines[-1],
            kept_metrics=self._keep(lines),
            initial_weights=self.weights,
            trained=sum_work(work_of(line) for line in lines),
            forward_only=sum_work([self._referred, *(work_of(line, "held_out/") for line in lines)]),
            tokens_trained=sum(int(line["tokens_trained"]) for line in lines),
            imbalance=[line["imbalance"] for line in lines],
            num_micro_batches=sum(int(line["micro_batches"]) for line in lines),
            num_forward_passes=self._num_referred + sum(int(line.get("held_out/micro_batches", 0)) for line in lines),
        )

    def _advance(self, step: int, lines: list[dict[str, float]], saved: float, stop: StopRequest) -> float:
        """Take a step, with its line and what else is due after it; when the latest checkpoint was written."""
        run, settings, final = self.training_run, self.training_run.settings, step + 1 == self.num_steps
        metrics = self.step(step)
        if run.held_out and (final or _every(step + 1, settings.evaluate_every)):
            metrics |= {f"held_out/{name}": value for name, value in self.evaluate().items()}
            if self.keeps_best and metrics is best_line([*lines, metrics]):
                save_best(run.folder, step + 1, holder=self.sharding, processes=self.processes)
        if self.accelerator.is_main_process:
            append_line(run.folder / METRICS, metrics)
        self.accelerator.log({name: value for name, value in metrics.items() if name != "step"}, step=step + 1)
        lines.append(metrics)
        self.report.advance(1, metrics)
        told, late = self._due(saved, stop)
        if not told and (final or not (late or _every(step + 1, settings.checkpoint_steps))):
            return saved
        best = int((best_line(lines) or {"step": 0})["step"])
        save_checkpoint(
            run.folder,
            step + 1,
            holder=self.sharding,
            processes=self.processes,
            settings_hash=self.settings_hash,
            best=best,
        )
        if told:
            raise RunError(
                f"stopped by SIGTERM: saved a checkpoint after step {step + 1} of {self.num_steps}; "
                "rerun the same command to resume"
            )
        return time.monotonic()

    def _keep(self, lines: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
        """Metrics of the step whose weights are to stay, after these have been put in place."""
        if not self.keeps_best:
            return lines[-1]
        best = best_line(lines)
        if best is None:
            raise RunError("the loss of the held-out rows was never a finite number: no weights are the best")
        load_best(self.training_run.folder, int(best["step"]), holder=self.sharding)
        return best

    def step(self, step: int) -> dict[str, float]:
        """Metrics of one optimizer step; the weights change only if loss and gradient are finite."""
        began = time.monotonic()
        run, settings = self.training_run, self.training_run.settings
        indices = groups_of_step(step, run.num_rows, settings.prompts_per_step, epoch_of=self.epoch)
        denominator = run.objective.denominator(self.groups.some(indices))
        rate = settings.learning_rate_at(step, self.num_steps)
        self.sharding.set_rate(rate)
        totals: dict[str, Tally] = {}
        loss = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        with self.sharding.accumulating():
            for batch, share, final in self._micro_batches(indices):
                with self.sharding.micro(final):
                    result = run.objective(self.model, batch)
                    loss += result.loss.detach() * share
                    if final:
                        self._stop_unless_finite(loss, "loss", step)
                    # Gradients are averaged over ranks; the sum over ranks is what is wanted.
                    self.sharding.backward(result.loss * share * self.accelerator.num_processes / denominator)
                _add(totals, result.tallies, share)
                if step == 0 and share:
                    self._check_first(batch, result)
        norm = self.sharding.step()
        if not math.isfinite(norm):
            raise RunError(f"step {step + 1}: the norm of the gradient is {norm}; the weights are as before this step")
        return {
            "step": step + 1,
            "epoch": (step + 1) / steps_per_epoch(run.num_rows, settings.prompts_per_step),
            **self._means(loss / denominator, totals),
            "grad_norm": norm,
            "lr": rate,
            "groups": len(indices),
            "tokens_trained": self.groups.trained_tokens(indices),
            **self._work(),
            "imbalance": self._imbalance,
            "seconds": time.monotonic() - began,
            "peak_memory_bytes": peak_memory(self.accelerator.device),
        }

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and tallies over the held-out groups."""
        indices = range(len(self.training_run.train), len(self.groups))
        totals: dict[str, Tally] = {}
        loss = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        for batch, share, _ in self._micro_batches(indices):
            result = self.training_run.objective(self.model, batch)
            loss += result.loss * share
            _add(totals, result.tallies, share)
        denominator = self.training_run.objective.denominator(self.groups.some(indices))
        return self._means(loss / denominator, totals) | self._work()

    def _micro_batches(self, indices: Sequence[int]) -> Iterator[tuple[GroupBatch, int, bool]]:
        """Micro-batches of this rank: (batch, 1, is the last); an empty share runs one group that counts 0.

        All ranks must run equally many: gradients are reduced in the last one.
        """
        budget = self.training_run.settings.tokens_per_micro_batch
        plan = plan_step(indices, self.sizes, token_budget=budget, num_ranks=self.accelerator.num_processes)
        micros = plan.ranks[self.accelerator.process_index]
        self._imbalance = imbalance(plan, self.sizes)
        self._computed, self._num_micros = Work(0, 0, 0), len(micros)
        for number, micro in enumerate(micros, start=1):
            members = micro or indices[:1]
            known = [self.references.of(index) for index in members] if self.references is not None else None
            batch = group_batch(self.groups.some(members), known, self.make)
            self._computed = sum_work([self._computed, batch.tokens.work()])
            yield batch.to(self.accelerator.device), int(bool(micro)), number == len(micros)

    def _work(self) -> dict[str, int]:
        """What the last micro-batches of all ranks were, as `accounting` counts it, and how many each rank had."""
        computed = {name: int(self._sum(part)) for name, part in zip(WORK, self._computed, strict=True)}
        return {**computed, "micro_batches": self._num_micros}

    def _fill_references(self) -> ReferenceCache:
        cache = ReferenceCache(
            self.training_run.references, weights=self.weights, precision=self.training_run.settings.precision
        )
        work = fill(
            cache,
            self.model,
            self.groups,
            column=self.training_run.folder / ROWS / "references.bin",
            told=self.training_run.folder / REFERENCE_WORK,
            forward=self.forward.name,
            token_budget=self.training_run.settings.tokens_per_micro_batch,
            accelerator=self.accelerator,
        )
        missing = next(work)
        self.report.note(f"references: {missing} groups to compute, {len(self.groups) - missing} known or repeated")
        if missing:
            self.report.phase("reference", missing)
        for done in work:
            self.report.advance(done)
        self._referred, self._num_referred = cache.computed, cache.forwards
        return cache

    def _check_first(self, batch: GroupBatch, result: Step) -> None:
        """Policy and reference are the same weights here, so every first loss is the one that is known for it."""
        if self.references is None or result.logps_BK is None:
            return
        gap = float((result.logps_BK - batch.reference_BK).abs().sum() / batch.lengths_BK.sum())
        if gap > FIRST_GAP[self.training_run.settings.precision]:
            raise RunError(
                f"step 1: policy and reference are {gap:.2g} nats a token apart before any update: what is cached in "
                f"{self.references.folder} is not of this policy; delete it"
            )

    def _stop_unless_finite(self, value: Tensor, what: str, step: int) -> None:
        """Stop all ranks together, naming the first whose value it is."""
        values = cast(Tensor, self.accelerator.gather(value.double().reshape(1))).tolist()
        wrong = [(rank, each) for rank, each in enumerate(values) if not math.isfinite(each)]
        if wrong:
            rank, each = wrong[0]
            where = f" on process {rank} of {len(values)}" if len(values) > 1 else ""
            raise RunError(f"step {step + 1}: the {what} is {each}{where}; the weights are as before this step")

    def _sum(self, value: Tensor | float) -> float:
        """Sum over ranks."""
        tensor = torch.as_tensor(value, dtype=torch.float64, device=self.accelerator.device)
        return float(cast(Tensor, self.accelerator.reduce(tensor, reduction="sum")))

    def _means(self, loss: Tensor, totals: Mapping[str, Tally]) -> dict[str, float]:
        """The loss and every tally's mean over all ranks; every rank has the same names, for each ran a micro-batch."""
        names = sorted(totals)
        sums = torch.stack(
            [loss, *(part for name in names for part in (totals[name].total, totals[name].count))]
        ).double()
        loss_sum, *flat = cast(Tensor, self.accelerator.reduce(sums, reduction="sum")).tolist()
        pairs = zip(names, flat[::2], flat[1::2], strict=True)
        return {"loss": loss_sum, **{name: total / count if count else 0.0 for name, total, count in pairs}}

    def _due(self, saved: float, stop: StopRequest) -> tuple[bool, bool]:
        """Return whether any rank was asked to stop, and whether a checkpoint is due by the first rank's clock."""
        minutes = self.training_run.settings.checkpoint_minutes
        is_late = minutes is not None and (time.monotonic() - saved) / 60 >= minutes
        mine = [float(stop.requested), float(is_late and self.accelerator.is_main_process)]
        tensor = torch.tensor(mine, dtype=torch.float64, device=self.accelerator.device)
        told, late = cast(Tensor, self.accelerator.reduce(tensor, reduction="sum")).tolist()
        return told > 0, late > 0


def _add(totals: dict[str, Tally], tallies: Mapping[str, Tally], share: int) -> None:
    for name, tally in tallies.items():
        mine = Tally(tally.total * share, tally.count * share)
        totals[name] = totals[name] + mine if name in totals else mine


def _every(step: int, period: int | None) -> bool:
    return period is not None and step % period == 0
