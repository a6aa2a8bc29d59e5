"""The floating-point operations of an optimizer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from align.accounting.flops import Decoder, Work, forward_flops, sum_work, total_flops
from align.models.backbone import Backbone
from align.models.loading.config import dimensions
from align.train.references.compute import SCORE_WORK, TEACHER_WORK, read_work
from align.train.selection.settings import SELECTION
from align.train.sharding.replicated import num_parameters
from align.train.training_run import FORWARD_ONLY, KL, ROUTING, TrainingRun, work_of

TIMED = (ROUTING, KL, SELECTION)  # forward passes within the `seconds` of an optimizer step; evaluations follow it


class StepFlops:
    """Counts the FLOPs of the optimizer steps of a run, of all ranks together."""

    def __init__(self, policy: Backbone, trainable: Sequence[Tensor], run: TrainingRun) -> None:
        self._policy = policy
        self._model = dimensions(policy.base.config)
        self._run = run
        self._is_frozen = num_parameters(trainable) < num_parameters(policy.parameters())

    def of(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the FLOPs of an optimizer step; nothing where they are unknown.

        `flops` are all, in the first step with those of the passes before it; `timed_flops` are those of its `seconds`.
        """
        if isinstance(self._model, str):
            return {}
        trained = work_of(metrics)
        observed = sum_work(work_of(metrics, each) for each in TIMED)
        trained, observed = work_in(self._policy, trained), work_in(self._policy, observed)
        timed = total_flops(self._model, trained=trained, observed=observed, frozen=self._is_frozen)
        works: list[tuple[Decoder | str, Work]] = [
            (self._model, work_in(self._policy, work_of(metrics, each))) for each in FORWARD_ONLY if each not in TIMED
        ]
        if metrics["step"] == 1:
            works += [(self._model, read_work(self._run.folder).work), *work_of_others(self._run)]
        flops = timed
        for size, work in works:
            if isinstance(size, str):
                return {}
            flops += forward_flops(size, work)
        return {"flops": float(flops), "timed_flops": float(timed)}


def work_in(policy: Backbone, work: Work) -> Work:
    """Return the work of the policy or reward model for the rows of `work`: a reward model has no LM head."""
    return work if policy.outputs_are_of == "targets" else work._replace(targets=0)


def work_of_others(run: TrainingRun) -> tuple[tuple[Decoder | str, Work], ...]:
    """Return the forward passes before the first step of models besides the policy, with the models' dimensions.

    They are the reference and the scorer of a selection, and a teacher.
    """
    fixed = {} if run.selection is None else run.selection.fixed
    files = [(model.size, SCORE_WORK[key]) for key, model in fixed.items()]
    if run.teacher is not None:
        files.append((run.teacher.size, (TEACHER_WORK,)))
    works = [(size, read_work(run.folder, names).work) for size, names in files]
    return tuple((size, work) for size, work in works if work.tokens)
