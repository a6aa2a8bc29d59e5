"""How far a policy is from another one: a compressed one from its original, or a trained one from its start."""

from __future__ import annotations

from dataclasses import dataclass

from align.accounting.flops import sum_work
from align.errors import InputError
from align.evaluation.statistics import score
from align.evaluation.task import ROW_OPTIONS, EstimateInputs, Parts, Task, TaskInputs, TaskResult, TaskSize
from align.records import Message, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class DivergenceTask(Task):
    """A task that compares a policy's distributions with a reference's, along the greedy answers of one of them."""

    own_answers: bool  # along the policy's answers; otherwise along the reference's

    def column(self, name: str, metric: str, *, is_only: bool) -> str:
        """Return `name` and the metric, so that a column of nats is not taken for a rate."""
        return f"{name} {metric}"

    def size(self, inputs: EstimateInputs) -> TaskSize:
        """Return the prompts and at most as many tokens as the reference may answer."""
        rows = inputs.rows(self)
        texts = [row["prompt"] for row in rows if isinstance(row.get("prompt"), str)]
        prompts = [Prompt((Message("user", text),)) for text in texts]
        return TaskSize(len(rows), inputs.num_prompt_tokens(prompts), len(rows) * inputs.max_new_tokens)

    def run(self, inputs: TaskInputs) -> TaskResult:
        """Compare token by token."""
        from align.evaluation.fidelity import different_vocabularies, divergences  # noqa: PLC0415 - imports torch
        from align.evaluation.likelihood import forward_work  # noqa: PLC0415

        reference, groups = inputs.reference(own_answers=self.own_answers)
        policy = inputs.policy()
        if (message := different_vocabularies(policy, reference)) is not None:
            raise InputError(message, ("reference",))
        inputs.progress.phase(self.name, len(groups))
        answering, other = (policy, reference) if self.own_answers else (reference, policy)
        found = divergences(other, answering, groups, precision=inputs.precision, processes=inputs.processes)
        parts: list[Parts] = [{name: each[name] for name in self.metrics} for each in found]
        inputs.progress.advance(len(groups))
        columns = {name: list(zip(*(each[name] for each in parts), strict=True)) for name in self.metrics}
        scores = {name: score(*column) for name, column in columns.items()}
        lines = [{"row": group.row, "parts": each} for group, each in zip(groups, parts, strict=True)]
        once = forward_work(groups)  # sampling the answers, and the pass of each policy over them
        return TaskResult(scores=scores, lines=lines, work=sum_work([once, once, once]))


OPTIONS = ROW_OPTIONS | {"data", "policy", "reference", "max_new_tokens", "rows.constraints"}
FIDELITY = DivergenceTask(
    name="fidelity",
    metrics=("agreement", "kl", "js_similarity", "nll_change"),
    options=OPTIONS,
    required=("data", "policy"),
    own_answers=False,
)
# KL(policy || reference), the divergence that preference optimization penalizes
DRIFT = DivergenceTask(name="drift", metrics=("kl",), options=OPTIONS, required=("data", "policy"), own_answers=True)
