"""When a training run saves a checkpoint, which weights it keeps, and where it resumes."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from align.artifacts import METRICS
from align.distributed.processes import Processes
from align.distributed.signals import StopRequest, defer_stop
from align.errors import RunError, Stopped, how_to_resume
from align.train.checkpoint import (
    check_metrics,
    has_checkpoint,
    latest_checkpoint,
    load_best,
    load_checkpoint,
    read_metrics,
    save_best,
    save_checkpoint,
)
from align.train.sharding.replicated import Replicated
from align.train.training_run import TrainingRun, best_metrics


class Checkpointer:
    """Saves and loads the checkpoints of a run; all ranks make the same calls."""

    def __init__(
        self,
        run: TrainingRun,
        settings_hash: str,
        sharding: Replicated,
        processes: Processes,
        *,
        initial_weights: str,
    ) -> None:
        self._run, self._settings_hash, self._initial_weights = run, settings_hash, initial_weights
        self._sharding = sharding
        self._processes = processes
        self._accelerator = sharding.accelerator
        self._keeps_best = run.settings.keep == "best"
        self._saved_at = time.monotonic()

    def resume(self) -> list[dict[str, float]]:
        """Load the latest checkpoint, if any, and return the metrics of the steps before it."""
        folder, num_ranks = self._run.folder, self._accelerator.num_processes
        step = load_checkpoint(
            folder,
            sharding=self._sharding,
            settings_hash=self._settings_hash,
            initial_weights=self._initial_weights,
        )
        if self._sum([step])[0] != step * num_ranks:
            raise RunError(f"{folder}: the processes find different checkpoints; do all nodes share the folder?")
        self._saved_at = time.monotonic()
        lines = read_metrics(folder / METRICS, step, truncate=self._processes.is_main)
        self._processes.run_on_main(lambda: check_metrics(folder), "checking the metrics")
        return lines

    @contextmanager
    def stops(self, note: Callable[[str], None], num_steps: int) -> Generator[StopRequest]:
        """Defer SIGTERM and Ctrl-C in this block; note on an interrupt which checkpoint a rerun resumes from."""
        try:
            with defer_stop(note) as stop:
                yield stop
        except KeyboardInterrupt as error:
            step = latest_checkpoint(self._run.folder)
            error.add_note(f"after its checkpoint of step {step} of {num_steps}" if step else "from its start")
            raise

    def save_if_best(self, lines: Sequence[Mapping[str, float]]) -> None:
        """Save the weights if the last of the steps has the lowest held-out loss, and the run keeps the best."""
        if self._keeps_best and lines[-1] is best_metrics(lines):
            step = int(lines[-1]["step"])
            save_best(self._run.folder, step, sharding=self._sharding, processes=self._processes)

    def save_if_due(self, lines: Sequence[Mapping[str, float]], num_steps: int, stop: StopRequest) -> None:
        """Save a checkpoint if one is due after the last of the steps; raise `Stopped` if a process was asked to stop.

        The main process decides by its clock, as those of the others may differ. No checkpoint is saved after the
        final step, unless the run was stopped.
        """
        settings = self._run.settings
        step = int(lines[-1]["step"])
        minutes = (time.monotonic() - self._saved_at) / 60
        is_late = settings.checkpoint_minutes is not None and minutes >= settings.checkpoint_minutes
        stopped, late = self._sum([stop.requested, is_late and self._processes.is_main])
        by_steps = settings.checkpoint_steps is not None and step % settings.checkpoint_steps == 0
        if stopped or (step < num_steps and (late or by_steps)):
            self._save(lines, moments=True)
        if stopped:
            by = next(by for by in self._processes.all_gather_object(stop.by) if by)  # of the first process with one
            saved = f"saved a checkpoint after step {step} of {num_steps}"
            raise Stopped(f"stopped by {by}: {saved}; {how_to_resume(by)} to resume there", by)

    def save_trained(self, lines: Sequence[Mapping[str, float]]) -> None:
        """Save the weights after the last step, unless a checkpoint has them; with `until_step` also the moments.

        If saving the model then fails, a rerun only repeats the saving. A training that diverged in its
        first step has nothing to save.
        """
        if lines and not has_checkpoint(self._run.folder, int(lines[-1]["step"])):
            self._save(lines, moments=self._run.settings.until_step is not None)

    def load_kept(self, lines: Sequence[Mapping[str, float]], *, has_diverged: bool) -> Mapping[str, float]:
        """Load the weights to keep and return the metrics of their step.

        A training that diverged before its first evaluation keeps the last weights, which are the first ones if it
        took no step.
        """
        best = best_metrics(lines)
        if not self._keeps_best or (has_diverged and best is None):
            return lines[-1] if lines else {}
        if best is None:
            raise RunError("no held-out loss was finite, so there are no best weights to keep")
        load_best(self._run.folder, int(best["step"]), sharding=self._sharding)
        return best

    def _save(self, lines: Sequence[Mapping[str, float]], *, moments: bool) -> None:
        best = best_metrics(lines)
        save_checkpoint(
            self._run.folder,
            int(lines[-1]["step"]),
            sharding=self._sharding,
            processes=self._processes,
            settings_hash=self._settings_hash,
            initial_weights=self._initial_weights,
            best=0 if best is None else int(best["step"]),
            moments=moments,
        )
        self._saved_at = time.monotonic()

    def _sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over ranks."""
        tensor = torch.tensor([float(value) for value in values], dtype=torch.float64, device=self._accelerator.device)
        return cast(Tensor, self._accelerator.reduce(tensor, reduction="sum")).tolist()
