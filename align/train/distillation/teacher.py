"""The pass of a teacher over the rows of a run, before the first step."""

from __future__ import annotations

import numpy as np

from align.errors import InputError
from align.models.backbone import Backbone
from align.models.policy import Policy
from align.models.probe import choose_forward
from align.models.tree.batch import TokenBatch
from align.models.weights import fingerprint
from align.train.distillation.cache import TeacherCache, TeacherTargets, TopLogps
from align.train.indexed_groups import GroupView
from align.train.references.compute import TEACHER_WORK
from align.train.references.run_passes import RunPasses
from align.train.sharding.products import products_in

TEACHER = ("teacher",)  # setting of a step


def teacher_targets(passes: RunPasses, groups: GroupView, student: Backbone) -> TeacherTargets | None:
    """Return the teacher's log-probabilities for the groups, from the cache or computed now; None without a teacher.

    It is in memory only for this; every process holds all of it. Raises `InputError` unless it has as many tokens as
    the student.
    """
    run, teacher = passes.run, passes.run.teacher
    if teacher is None:
        return None
    device = passes.accelerator.device
    with passes.processes.activity("loading the teacher"):
        model = teacher.load().to(device)
    sizes = [each.base.config.get_text_config().vocab_size for each in (student, model)]
    if sizes[0] != sizes[1]:
        raise InputError(f"has {sizes[1]} tokens, and the student {sizes[0]}; name a policy with the same", TEACHER)
    precision = run.settings.precision
    top_k = min(teacher.top_k, sizes[0])
    forward = choose_forward(model, groups.probe_sequences(), run.forward, precision=precision)

    def outputs(tokens: TokenBatch) -> list[TopLogps]:
        with products_in(precision, device):
            return top_logps(model, tokens, top_k)

    weights = fingerprint(model)
    cache = TeacherCache(run.references, weights=weights, precision=precision, top_k=top_k)
    places = passes.outputs(cache, outputs, groups, forward=forward.name, work_file=TEACHER_WORK, of=" of the teacher")
    return TeacherTargets(places, cache.folder, passes.column(TEACHER_WORK), weights)


def top_logps(model: Policy, batch: TokenBatch, top_k: int) -> list[TopLogps]:
    """Return the teacher's most likely tokens at the targets of each sequence of a batch."""
    tokens_NK, logps_NC = (value.cpu().numpy() for value in model.top_logps(batch, top_k))
    ends = np.cumsum(np.bincount(batch.sequence_N.cpu().numpy(), minlength=batch.num_sequences))[:-1]
    parts = zip(np.split(tokens_NK.astype(np.int32), ends), np.split(logps_NC.astype(np.float32), ends), strict=True)
    return [TopLogps(*part) for part in parts]
