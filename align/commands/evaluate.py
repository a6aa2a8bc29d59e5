"""`align evaluate`: score a policy, or given responses, on a task."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from align.commands.one_step import SOURCE, RowOptions, check_out, run_one_step
from align.config import Settings
from align.content_hash import PROCEDURAL, content_of
from align.curate.embeddings.settings import EncoderSettings
from align.distributed.progress import Progress
from align.errors import InputError
from align.evaluation.answers import write_lines
from align.evaluation.task import Task
from align.evaluation.tasks import pick_task
from align.inference.settings import EngineSettings, SamplingSettings
from align.rewards.settings import Combination, JudgeSettings
from align.rewards.thoughts import THINK, ThoughtSettings
from align.stages.evaluate import Evaluate
from align.stages.inputs.context import RunContext
from align.stages.responses.engines import PolicyEngines
from align.stages.responses.evaluation import evaluate_tasks
from align.stages.responses.tasks import TaskSettings

# Options of the command line that are not settings
OPTIONS = {
    **{name: f"--{name}" for name in ("data", "policy", "responses", "limit", "out")},
    "judges": "--judge",
    "rows.columns": "--column",
}
STEP = "evaluate"


class EvaluateSettings(Settings):
    """Settings of the command, as `key.sub=value`."""

    sampling: SamplingSettings = Field(
        default=SamplingSettings(temperature=0.0), description="How responses are drawn."
    )
    engine: EngineSettings = Field(default=EngineSettings(), description="What runs the policy.")
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="Precision of likelihoods, of a divergence and of lm-evaluation-harness."
    )
    rows: RowOptions = Field(default=RowOptions(), description="How the rows are read.")
    judges: list[JudgeSettings] = Field(default_factory=list[JudgeSettings], description="Judges of a win rate.")
    combine: Combination = Field(default="precedence", description="How several judges are combined.")
    thoughts: ThoughtSettings = Field(default=THINK, description="Thoughts of the responses, which are not graded.")
    max_length: int | None = Field(default=None, ge=2, description="Most tokens of a row whose likelihood is measured.")
    reference: str | None = Field(
        default=None,
        description="Policy that the tasks fidelity and drift compare with: a folder, a Hub id or gguf:FILE.",
    )
    reference_answers: str | None = Field(
        default=None, description="File of reference answers in FastChat's form, for the judge of mt_bench."
    )
    encoder: EncoderSettings | None = Field(default=None, description="How the policy embeds texts.")
    tasks_folder: str | None = Field(
        default=None, description="Folder of your own task files of lm-evaluation-harness."
    )
    chat_template: bool | None = Field(
        default=None,
        description=(
            "Whether lm-evaluation-harness renders prompts by the policy's chat template; by default, where it has one."
        ),
    )


class Request(NamedTuple):
    """What to evaluate on which task."""

    task: str
    data: str | None = None
    policy: str | None = None
    responses: tuple[str, ...] = ()  # files
    limit: int | None = None  # rows


def evaluate(request: Request, out: Path | None, *, settings: EvaluateSettings, progress: Progress) -> dict[str, Any]:
    """Return `{task, scores: {metric: {value, low, high, n}}, …}` of the policy or the responses."""
    task = pick_task(request.task)
    _check_options(task, request, out, settings)
    for option in task.required:
        if getattr(request, option) is None:
            raise InputError(f"task {request.task}: --{option} is needed")
    _check_answers(task, request)
    if out is not None:
        check_out(out, [each for each in (request.data, *request.responses) if each])
    step = Evaluate(
        models=[] if request.policy is None else [request.policy],
        tasks={STEP: _task_settings(task, request, settings)},
    )
    source = None
    if request.data is not None:
        source = settings.rows.source(request.data, request.limit, max_length=settings.max_length)

    def work(context: RunContext) -> dict[str, Any]:
        tasks = {STEP: (step.tasks[STEP], task)}
        (found,) = evaluate_tasks(tasks, context, PolicyEngines(request.policy, context))
        if out is not None:
            writes = partial(write_lines, out, found.result.verdicts)
            context.processes.run_on_main(writes, f"writing {out}")
        scores, measures = (
            {name: value._asdict() for name, value in each.items()}
            for each in (found.result.scores, found.result.measures)
        )
        written = {"out": str(out) if out else None} if "out" in task.options else {}
        counts = {**found.counts, **found.result.counts}
        return {"task": request.task, **counts, **written, "measures": measures, "scores": scores}

    identity = _identity(request)
    return run_one_step(STEP, step, source, out=out, identity=identity, progress=progress, work=work)


def _identity(request: Request) -> Mapping[str, Any]:
    if request.policy is not None:
        return {"policy": content_of(request.policy)}
    return {"responses": [content_of(path) for path in request.responses]}


def _task_settings(task: Task, request: Request, settings: EvaluateSettings) -> TaskSettings:
    sampling = {name: getattr(settings.sampling, name) for name in SamplingSettings.model_fields}
    options = {
        **(sampling if request.policy is not None else {}),
        "engine": settings.engine,
        "judges": settings.judges,
        "combine": settings.combine,
        "thoughts": settings.thoughts,
        "responses": list(request.responses),
        "reference": settings.reference,
        "reference_answers": settings.reference_answers,
        "encoder": settings.encoder,
        "tasks_folder": settings.tasks_folder,
        "chat_template": settings.chat_template,
        **({} if request.data is not None else {"limit": request.limit}),
    }
    used = task.used_with({"responses"} if request.responses else {"policy"})
    given = {
        name: value
        for name, value in options.items()
        if {"sampling" if name in SamplingSettings.model_fields else name, name} & used
    }
    source = {"data": SOURCE if request.data is not None else "", "task": request.task}
    found = TaskSettings.model_validate({**source, **given})
    if settings.precision == EvaluateSettings().precision:
        return found
    if not found.uses_precision(task):
        raise InputError(f"task {request.task} does not use precision: leave it out")
    return found.model_copy(update={"precision": settings.precision})


def _check_answers(task: Task, request: Request) -> None:
    """Raise unless it is clear whose responses are evaluated."""
    if "responses" in task.options and "policy" in task.options:
        if request.policy is None and len(request.responses) != 1:
            raise InputError(f"task {request.task}: give either --policy or one file of --responses")
    elif "responses" in task.options:
        is_optional = "judges" not in task.options  # the data are verdicts
        if len(request.responses) != 2 and (request.responses or not is_optional):  # noqa: PLR2004
            raise InputError(f"task {request.task}: give --responses twice: the policy's and the baseline's")
    elif "policy" in task.options and request.policy is None:
        raise InputError(f"task {request.task}: --policy is needed")


def _check_options(task: Task, request: Request, out: Path | None, settings: EvaluateSettings) -> None:
    """Raise for the first option or setting that is given and has no effect on the task."""
    given = _given(request, out, settings)
    used = set(task.used_with(given))
    used |= {"sampling"} if "max_new_tokens" in used else set()
    used.add("precision")  # checked with the settings of the task
    is_procedural = (request.data or "").startswith(PROCEDURAL)
    has_constraints = settings.rows.constraints is not None
    if is_procedural or (task.columns and not has_constraints):  # the rows are not read as records
        used -= {"rows.format", "rows.on_error"}
    if is_procedural:
        used.discard("rows.columns")
    if not is_procedural and not has_constraints:  # nothing is drawn
        used.discard("rows.seed")
    if not (ignored := [name for name in given if name not in used]):
        return
    if ignored[0] == "responses" and "responses" in task.options:
        raise InputError(f"task {request.task}: give either --policy or one file of --responses")
    reading = " with --responses" if ignored[0] in task.options and request.responses else ""
    raise InputError(f"task {request.task}{reading} does not use {OPTIONS.get(ignored[0], ignored[0])}: leave it out")


def _given(request: Request, out: Path | None, settings: EvaluateSettings) -> list[str]:
    """Return the options and settings whose values differ from their defaults."""
    options = {**request._asdict(), "out": out, "judges": settings.judges}
    found = [name for name, value in options.items() if name != "task" and value not in (None, (), [])]
    for prefix, own in (("", settings), ("rows.", settings.rows)):
        plain = type(own)()
        names = [name for name in type(own).model_fields if name not in ("rows", "judges")]
        found += [prefix + name for name in names if getattr(own, name) != getattr(plain, name)]
    return found
