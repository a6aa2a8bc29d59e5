"""The commands that work on models: score, generate, evaluate, chat, export, push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from align.commands.parsing.arguments import (
    ColumnOption,
    DataOption,
    JudgeOption,
    LimitOption,
    OnErrorOption,
    Settings,
    SplitOption,
    example,
    parse_columns,
)

models = typer.Typer()


@models.command(
    epilog=example("align score --model runs/my-run/rate --data pairs.jsonl --out rated.jsonl --on-error skip")
)
def score(
    model: Annotated[str, typer.Option(help="A reward model: folder or hub id.", show_default=False)],
    data: DataOption,
    out: Annotated[Path, typer.Option(help="File for the rated rows, .jsonl.", show_default=False)],
    column: ColumnOption = None,
    limit: LimitOption = None,
    format: Annotated[str, typer.Option(help="Name of a row format; auto detects it by the columns.")] = "auto",
    split: SplitOption = None,
    on_error: OnErrorOption = "error",
) -> None:
    """Rate every response of a file by a reward model. The same command resumes an interrupted one."""
    from align.commands import run as command  # noqa: PLC0415 - imports torch
    from align.commands.score import score as score_file  # noqa: PLC0415
    from align.workflow.results.tables import scored_tables  # noqa: PLC0415

    options: dict[str, Any] = {"format": format, "split": split, "limit": limit, "on_error": on_error}
    options["columns"] = parse_columns(column or ())
    with command.shown_progress() as progress:
        summary = score_file(model, data, out, progress=progress, **options)
    command.conclude(scored_tables(summary), summary)


@models.command(
    epilog=example(
        "align generate --policy runs/my-run/sft --data prompts.jsonl --out groups.jsonl "
        "--judge 'reward_model path=runs/my-run/rate' sampling.num_responses=8"
    )
)
def generate(
    policy: Annotated[
        list[str],
        typer.Option(
            help="Policy: folder, Hub id, gguf:FILE or a server's model; may be repeated.", show_default=False
        ),
    ],
    data: Annotated[
        str, typer.Option(help="Prompts: a file, a folder, a dataset id, or tasks:KIND.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="File for the scored groups, .jsonl.", show_default=False)],
    judge: JudgeOption = None,
    column: ColumnOption = None,
    limit: LimitOption = None,
    overrides: Settings = None,
) -> None:
    """Sample responses of policies and have them judged. The same command resumes an interrupted one."""
    from align.commands import generate as implementation  # noqa: PLC0415 - imports torch
    from align.commands import run as command  # noqa: PLC0415
    from align.commands.one_step import settings_of  # noqa: PLC0415
    from align.workflow.results.tables import generated_tables  # noqa: PLC0415

    settings = settings_of(implementation.GenerateSettings, judge or (), overrides or (), column or ())
    with command.shown_progress() as progress:
        summary = implementation.generate(policy, data, out, settings=settings, limit=limit, progress=progress)
    command.conclude(generated_tables(summary), summary)


@models.command(
    epilog=example(
        "align evaluate --task gsm8k --data gsm8k.jsonl --policy runs/my-run/dpo sampling.max_new_tokens=256",
        "align evaluate --task ifeval --data ifeval.jsonl --responses answers.jsonl --out verdicts.jsonl",
    )
)
def evaluate(  # noqa: PLR0913 - one argument for each option
    task: Annotated[
        str, typer.Option(help="Name of a task, harness:NAME of lm-evaluation-harness, or module:NAME of your own.")
    ],
    data: Annotated[str | None, typer.Option(help="The task's rows: file, folder or id.", show_default=False)] = None,
    policy: Annotated[str | None, typer.Option(help="A policy: folder, hub id, gguf:FILE.", show_default=False)] = None,
    responses: Annotated[
        list[Path] | None, typer.Option(help="File of responses to grade in place of a policy's.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write all verdicts to this .jsonl file.", show_default=False)
    ] = None,
    judge: JudgeOption = None,
    column: ColumnOption = None,
    limit: LimitOption = None,
    overrides: Settings = None,
) -> None:
    """Score a policy, or given responses, on a task. The last line of output is JSON."""
    from align.commands import evaluate as implementation  # noqa: PLC0415 - imports torch
    from align.commands import run as command  # noqa: PLC0415
    from align.commands.one_step import settings_of  # noqa: PLC0415
    from align.workflow.results.tables import evaluated_tables  # noqa: PLC0415

    settings = settings_of(implementation.EvaluateSettings, judge or (), overrides or (), column or ())
    request = implementation.Request(task, data, policy, tuple(map(str, responses or ())), limit)
    with command.shown_progress() as progress:
        summary = implementation.evaluate(request, out, settings=settings, progress=progress)
    command.conclude(evaluated_tables(summary), summary)


@models.command("convert-pairs", epilog=example("align convert-pairs judged.jsonl --to fastchat --out judgments.jsonl"))
def convert_pairs(
    pairs: Annotated[str, typer.Argument(help="File of judged pairs, in any known form.", show_default=False)],
    to: Annotated[str, typer.Option(help="align, alpaca_eval, arena_hard, arena_hard_2024 or fastchat.")],
    out: Annotated[Path, typer.Option(help="New file, .jsonl, or .json for one list.", show_default=False)],
) -> None:
    """Write the verdicts of a file of judged pairs in the form of another tool."""
    from align.commands.run import conclude  # noqa: PLC0415 - imports pydantic
    from align.evaluation.pairs.forms.convert import convert_pairs as convert  # noqa: PLC0415

    conclude([], convert(pairs, to, out))


@models.command(epilog=example("align chat runs/my-run/dpo", "align chat runs/my-run/dpo sampling.temperature=0"))
def chat(
    policy: Annotated[
        str, typer.Argument(help="A policy: RUN/STEP, another folder, a hub id or gguf:FILE.", metavar="RUN/STEP")
    ],
    system: Annotated[str | None, typer.Option(help="System message.", show_default=False)] = None,
    overrides: Settings = None,
) -> None:
    """Talk to a policy in the terminal. A line is a message; /reset starts a new dialogue, Ctrl-D ends."""
    from align.commands.interactive.chat import chat as command  # noqa: PLC0415 - imports torch
    from align.commands.interactive.chat import chat_settings  # noqa: PLC0415

    command(policy, system, chat_settings(overrides or ()))


@models.command(epilog=example("align export runs/my-run/rpo-3 --gguf Q4_0", "align export my-org/my-model --out gguf"))
def export(
    policy: Annotated[str, typer.Argument(help="A policy: RUN/STEP, another folder or a Hub id.", metavar="RUN/STEP")],
    gguf: Annotated[
        str, typer.Option(help="Type of the matrices: Q8_0, Q5_1, Q5_0, Q4_1, Q4_0, F16 or BF16.")
    ] = "Q8_0",
    out: Annotated[
        Path | None, typer.Option(help="Folder to write; RUN/STEP-TYPE by default.", show_default=False)
    ] = None,
    overrides: Settings = None,
) -> None:
    """Write a policy as a GGUF file for llama.cpp, Ollama and LM Studio. Adapters are merged first."""
    from align.commands.export import export as command  # noqa: PLC0415 - imports torch

    command(policy, out, [f"gguf={gguf}", *(overrides or ())])


@models.command(epilog=example("align push runs/my-run/rpo-3 my-org/my-model --dry-run"))
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a step: RUN/STEP.", metavar="RUN/STEP", show_default=False)],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub, as owner/name.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be uploaded; uses no network.")] = False,
) -> None:
    """Upload a policy or reward model with its model card to the Hugging Face Hub."""
    from align.commands.push import push as command  # noqa: PLC0415 - imports torch

    command(folder, repo, private=private, dry_run=dry_run)
