"""Settings of one evaluation, and the rows of its task."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from align.config import Settings
from align.curate.embeddings.settings import EncoderSettings
from align.data.rejections import DROPPED
from align.data.rows import read_rows
from align.errors import InputError, one_line, within
from align.evaluation.task import Row, Task
from align.evaluation.tasks import IN_RECIPES, TASKS, pick_task
from align.inference.settings import EngineSettings, SamplingSettings
from align.records import Comparison, Demonstration, Located
from align.rewards.settings import Combination, JudgeSettings
from align.rewards.thoughts import THINK, ThoughtSettings
from align.stages.base import EMBEDDINGS
from align.stages.inputs.opening import FIRST_ROWS, first_records
from align.stages.inputs.sources import SourceSettings, prompts, rows_of, streamed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from align.curate.embeddings.cache import Vectors
    from align.data.token_groups import TokenGroup
    from align.stages.inputs.context import StepInputs


class TaskSettings(Settings):
    """One evaluation: a column of the results table, or several."""

    data: str = Field(default="", description="Name under `data`; a task of lm-evaluation-harness has its own rows.")
    task: str | None = Field(
        default=None, description="Task name, or module:NAME. Default for rows of tasks:KIND: their own task."
    )
    metrics: list[str] | None = Field(
        default=None, description="Metrics to report, such as prompt_strict; all of the task's by default."
    )
    num_responses: int = Field(default=1, ge=1, description="Responses to each prompt, as for pass@k.")
    temperature: float = Field(default=0.0, ge=0, description="Sampling temperature; 0 takes the most likely token.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus sampling (top-p).")
    max_new_tokens: int = Field(default=64, ge=1, description="Maximum response length, in tokens.")
    stop: list[str] = Field(default_factory=list[str], description="Stop strings; not part of the response.")
    seed: int = Field(default=0, description="Seed of the samples.")
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="Precision of the policy's forward passes in this process."
    )
    engine: EngineSettings | None = Field(
        default=None, description="What runs the policy; this process, in `precision`, by default."
    )
    judges: list[JudgeSettings] = Field(
        default_factory=list[JudgeSettings], description="Judges, for tasks that compare two responses (win_rate)."
    )
    combine: Combination = Field(default="precedence", description="How several judges are combined.")
    thoughts: ThoughtSettings = Field(
        default=THINK, description="Delimiters of reasoning, which is removed before grading and judging."
    )
    responses: list[str] = Field(
        default_factory=list[str], description="Files of responses to grade in place of a policy's answers."
    )
    reference: str | None = Field(
        default=None,
        description="Reference policy of the tasks fidelity and drift: step:NAME, a folder, a Hub id or gguf:FILE.",
    )
    reference_answers: str | None = Field(
        default=None, description="File of reference answers in FastChat's format, for the judge of mt_bench."
    )
    encoder: EncoderSettings | None = Field(
        default=None, description="How the policy embeds texts, in the tasks sts, alignment and uniformity."
    )
    tasks_folder: str | None = Field(
        default=None, description="Folder of your own task files of lm-evaluation-harness."
    )
    limit: int | None = Field(
        default=None,
        ge=1,
        description="Rows of a task of lm-evaluation-harness; all by default. Other tasks have their source's limit.",
    )
    chat_template: bool | None = Field(
        default=None,
        description=(
            "Whether lm-evaluation-harness renders prompts by the policy's chat template; by default, where it has one."
        ),
    )

    refused = {"encoder.model": "the step's own policies are embedded; name other models under `models`"}

    @property
    def sampling(self) -> SamplingSettings:
        """How responses are drawn."""
        return SamplingSettings(**{name: getattr(self, name) for name in SamplingSettings.model_fields})

    @property
    def files(self) -> list[str]:
        """The files of responses and of reference answers, and the folder of the user's own task files."""
        return [*self.responses, *(path for path in (self.reference_answers, self.tasks_folder) if path)]

    @property
    def code(self) -> str | None:
        """The user's own task, as module:NAME."""
        return self.task if self.task and ":" in self.task else None

    @property
    def contents(self) -> list[str]:
        """What decides the scores by its content: code as module:NAME, and what the engine reads."""
        return [*([self.code] if self.code else []), *(self.engine.contents if self.engine else ())]

    @property
    def is_sampled_here(self) -> bool:
        """Whether this process runs the policy that answers, if there is one."""
        return not self.responses and (self.engine is None or self.engine.kind == "local")

    def embed(self, texts: Sequence[str], policy: str, inputs: StepInputs) -> Vectors:
        """Return a vector of unit length for each text from the policy at a path; the run's folder keeps them."""
        from align.curate.embeddings.encoder import make_encoder  # noqa: PLC0415 - imports torch

        settings = (self.encoder or EncoderSettings()).model_copy(update={"model": policy})
        encoder = make_encoder(settings, texts=texts, cache=inputs.run / EMBEDDINGS, content=inputs.content)
        return encoder.encode(texts)

    def uses_precision(self, task: Task) -> bool:
        """Return whether the task runs the policy in this process, and not as an encoder, which runs in fp32."""
        return "policy" in task.options and "encoder" not in task.options and self.is_sampled_here

    def check_used(self, task: Task) -> None:
        """Raise for a setting that is given and has no effect on the task."""
        used = task.used_with({"responses"} if self.responses else {"policy"})
        for name in self.model_fields_set - {"data", "task", "metrics", "precision"}:
            if not {"sampling" if name in SamplingSettings.model_fields else name, name} & used:
                raise InputError(f"has no effect on task {task.name}; remove it", (name,))
        if "precision" in self.model_fields_set and not self.uses_precision(task):
            raise InputError(f"has no effect on task {task.name} as it is set here; remove it", ("precision",))
        if self.limit is not None and "data" in used:
            raise InputError(f"has no effect on task {task.name}; set the limit of its source", ("limit",))
        if "reference" in used and self.reference is None:
            raise InputError(f"task {task.name} compares with another policy: give step:NAME or a path", ("reference",))

    def resolve(self, source: SourceSettings | None) -> Task:
        """Return the task: the one that the settings name, or the one that the rows are of."""
        if source is None:
            return pick_task(self.task or "")
        own = source.kind
        name = self.task or own or ("ifeval" if source.constraints is not None else None)
        if name is None:
            known = ", ".join(IN_RECIPES)
            raise InputError(f"cannot infer the task from {self.data}; set it to one of {known}", ("task",))
        with within("task"):
            if own is not None and name in TASKS and TASKS[name].columns and name != own:
                raise InputError(
                    f"{source.path} does not generate rows for task {name!r}; remove `task`, or use a source that does"
                )
            task = pick_task(name)
        if source.where and task.columns and not _is_read_as_prompts(source):
            raise InputError(
                f"{self.data} has where, which does not select the rows of task {task.name}; write them to a file of "
                "their own",
                ("data",),
            )
        return task


def _is_read_as_prompts(source: SourceSettings) -> bool:
    """Return whether a task's columns are the metadata of prompts: also in the project's own form of rows."""
    return source.is_procedural or source.constraints is not None or source.format == "native"


def open_task_rows(task: Task, source: SourceSettings) -> None:
    """Read the first rows of a task's source; raise `InputError`, located below the source, if it cannot use them."""
    if _is_read_as_prompts(source) or not task.columns:
        for _ in first_records(source):
            pass
        return
    read = read_rows(source.path, split=source.split, columns=source.columns)
    rows = list(islice(read, source.skip, source.skip + FIRST_ROWS))
    if not rows:
        raise InputError(f"{source.path}: no rows")
    task.check_rows(rows, source.path, skipped=source.skip)


def task_rows(task: Task, name: str, inputs: StepInputs, *, counts: Counter[str] | None = None) -> list[Row]:
    """Return the rows of a task after `Task.check_rows`; for procedural, constrained or native prompts, their metadata.

    `name` is that of their source. `counts` receives the number of rows left out, by reason.
    """
    source = inputs.sources[name]
    with rows_of(name):
        rows = _read_task_rows(task, source, inputs.seed, counts)
        if not rows:
            raise InputError(f"{source.path}: no rows")
        task.check_rows(rows, source.path, skipped=source.skip)
    return rows


def _read_task_rows(task: Task, source: SourceSettings, seed: int, counts: Counter[str] | None) -> list[Row]:
    if not _is_read_as_prompts(source):
        rows = read_rows(source.path, split=source.split, columns=source.columns)
        if source.order == "random":
            rows = list(rows)
            task.check_rows(rows, source.path)  # errors have the numbers of rows in the file
        return list(source.choice.of(rows, task.item))
    found = prompts(source, seed=seed, counts=counts)
    if longer := [prompt for prompt in found if len(prompt.messages) > 1]:
        text = one_line(longer[0].messages[-1].content)[:40]
        raise InputError(f"{source.path}: prompt {text!r}: has messages before it; a task asks one message alone")
    return [{**prompt.metadata, "prompt": prompt.messages[-1].content} for prompt in found]


def likelihood_rows(
    name: str,
    inputs: StepInputs,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model_limit: int | None,
    best: bool = False,
    compares: bool = False,
) -> tuple[list[TokenGroup], dict[str, Any]]:
    """Return the encoded rows with a response of a source, and the counts of rows read and left out.

    Of a source with held-out prompts, only their rows are returned. With `best`, only the preferred response of each.
    Generated rows have one response, or several with `compares`.
    """
    from align.data.chat_encoder import ChatEncoder  # noqa: PLC0415 - imports transformers
    from align.stages.training.rows import is_held_out, preferred  # noqa: PLC0415 - imports torch

    source = inputs.sources[name]
    with rows_of(name):
        reading = streamed(source, kind=Comparison if compares else Demonstration, seed=inputs.seed)
        found = list(reading.records)
        answered = [(each.record, each.place) for each in found if isinstance(each.record, Comparison | Demonstration)]
        limit = source.max_length or model_limit
        encoder = ChatEncoder(tokenizer, max_length=limit, overlong=source.overlong, on_error=source.on_error)
        numbered = (Located(record, place, row) for row, (record, place) in enumerate(answered))
        groups = [located.record for located in encoder.encode_located(numbered)]
        if source.held_out:
            groups = [group for group in groups if is_held_out(group, source.held_out)]
        if not groups:
            raise InputError(f"{source.path}: no row has a response whose likelihood could be computed")
    dropped = {reason: number for reason, number in encoder.counts.items() if reason.startswith(DROPPED)}
    unanswered = len(found) - len(answered)
    without = {"prompts without a response": unanswered} if unanswered else {}
    left_out = sum(map(Counter, (reading.statistics.dropped, without, dropped)), Counter[str]())
    groups = [preferred(group) for group in groups] if best else groups
    others = {name: count for name, count in encoder.counts.items() if name != "rows" and name not in dropped}
    return groups, {"rows": reading.statistics.num_rows, "left_out": left_out, **others}
