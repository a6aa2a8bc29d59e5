"""The command line: argument parsing only. Nothing heavy is imported before a command is known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from align.exit_status import end, exit_with

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="From a base language model to an aligned one: SFT, reward model, DPO and reward-aware preference "
    "optimization (RPO).",
)

RecipeArgument = Annotated[Path, typer.Argument(help="A recipe: a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings that replace those of the recipe.", metavar="[KEY.SUB=VALUE]...")
]
Settings = Annotated[list[str] | None, typer.Argument(help="Further settings.", metavar="[KEY.SUB=VALUE]...")]
StepOption = Annotated[str, typer.Option("--step", help="Name of a step of the recipe.", show_default=False)]
DataOption = Annotated[
    str, typer.Option(help="Rows: a file, a folder or a Hugging Face dataset id.", show_default=False)
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Read this many rows only.", show_default=False)]
JudgeOption = Annotated[
    list[str] | None,
    typer.Option(help="A judge as 'NAME key=value ...'. Repeat it; the first that knows a prompt judges it."),
]


def example(*lines: str) -> str:
    """Return the epilog of a command's help."""
    return "\n\n".join(["[bold]Example[/]", *(f"[cyan]{line}[/]" for line in lines)])


@app.command(
    epilog=example(
        "align run recipes/quickstart.yaml",
        "align run recipes/quickstart.yaml --rerun-from dpo steps.dpo.train.learning_rate=5e-5",
    )
)
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    until: Annotated[str | None, typer.Option(help="Stop after this step.", show_default=False)] = None,
    rerun_from: Annotated[
        str | None,
        typer.Option(help="Run this step and all that depend on it again, finished or not.", show_default=False),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show which steps would run, with rows, tokens, FLOPs, time and disk.")
    ] = False,
) -> None:
    """Run a recipe's steps in order. Finished steps are skipped; an interrupted step resumes."""
    from align.commands import run as command  # noqa: PLC0415 - imports torch

    command.run(recipe, overrides or (), until=until, rerun_from=rerun_from, dry_run=dry_run)


@app.command(epilog=example("align report runs/quickstart", "align report runs/quickstart --compare runs/other"))
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)],
    compare: Annotated[Path | None, typer.Option(help="Another run to show beside it.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="File; RUN/report.html by default.", show_default=False)] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Write the tables as Markdown: RUN/report.md.")] = False,
) -> None:
    """Write a run as one HTML page: results, curves, rewards, costs, samples and rows."""
    from align.report import write_report  # noqa: PLC0415 - imports matplotlib

    print(write_report(run, out, compare=compare, as_markdown=markdown))


@app.command(epilog=example("align verify runs/quickstart", "align verify runs/quickstart/dpo"))
def verify(
    run: Annotated[Path, typer.Argument(help="Folder of a run or of a step.", metavar="RUN", show_default=False)],
) -> None:
    """Compare every file of a run's steps and checkpoints with its size and SHA-256 from when it was written."""
    from align.commands.verify import verify as command  # noqa: PLC0415 - imports torch

    command(run)


@app.command(
    epilog=example("accelerate launch --config_file launch/ddp-8gpu.yaml -m align train RECIPE.yaml --step sft")
)
def train(recipe: RecipeArgument, step: StepOption, overrides: Overrides = None) -> None:
    """Run one step whose inputs are finished, alone or in every process of an `accelerate launch`."""
    from align.commands import run as command  # noqa: PLC0415 - imports torch

    command.train(recipe, step, overrides or ())
    end(0)


@app.command(epilog=example("align check recipes/smollm2-135m/pipeline.yaml"))
def check(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Validate a recipe and show rows, lengths, tokens, memory, FLOPs and time of each step, without training."""
    from align.commands.check import check as command  # noqa: PLC0415 - imports torch

    command(recipe, overrides or ())


@app.command(epilog=example("align preview recipes/smollm2-135m/pairs.yaml --step dpo --rows 5"))
def preview(
    recipe: RecipeArgument,
    step: StepOption,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Number of rows to show.")] = 3,
) -> None:
    """Show a step's first rows as colored tokens: trained, shared by responses, and cut."""
    from align.commands.check import preview as command  # noqa: PLC0415 - imports torch

    command(recipe, step, overrides or (), rows=rows)


@app.command(
    epilog=example("align score --model runs/my-run/rate --data pairs.jsonl --out rated.jsonl --on-error skip")
)
def score(
    model: Annotated[str, typer.Option(help="A reward model: folder or hub id.", show_default=False)],
    data: DataOption,
    out: Annotated[Path, typer.Option(help="File for the rated rows, .jsonl.", show_default=False)],
    limit: LimitOption = None,
    format: Annotated[str, typer.Option(help="Name of a row format; auto detects it by the columns.")] = "auto",
    split: Annotated[str | None, typer.Option(help="Split of a folder or dataset.", show_default=False)] = None,
    on_error: Annotated[str, typer.Option(help="Rows that cannot be read: error or skip.")] = "error",
) -> None:
    """Rate every response of a file by a reward model. The same command resumes an interrupted one."""
    from align.commands import run as command  # noqa: PLC0415 - imports torch
    from align.commands.score import score as score_file  # noqa: PLC0415
    from align.workflow.results.tables import scored_tables  # noqa: PLC0415

    options: dict[str, Any] = {"format": format, "split": split, "limit": limit, "on_error": on_error}
    with command.shown_progress() as progress:
        summary = score_file(model, data, out, progress=progress, **options)
    command.conclude(scored_tables(summary), summary)


@app.command(
    epilog=example(
        "align generate --policy runs/my-run/sft --data prompts.jsonl --out groups.jsonl "
        "--judge 'reward_model path=runs/my-run/rate' sampling.num_responses=8"
    )
)
def generate(
    policy: Annotated[
        list[str],
        typer.Option(help="A policy: folder, hub id, gguf:FILE or a server's model. Repeat it.", show_default=False),
    ],
    data: Annotated[
        str, typer.Option(help="Prompts: a file, a folder, a dataset id, or tasks:KIND.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="File for the scored groups, .jsonl.", show_default=False)],
    judge: JudgeOption = None,
    limit: LimitOption = None,
    overrides: Settings = None,
) -> None:
    """Sample responses of policies and have them judged. The same command resumes an interrupted one."""
    from align.commands import generate as implementation  # noqa: PLC0415 - imports torch
    from align.commands import run as command  # noqa: PLC0415
    from align.commands.one_step import settings_of  # noqa: PLC0415
    from align.workflow.results.tables import generated_tables  # noqa: PLC0415

    settings = settings_of(implementation.GenerateSettings, judge or (), overrides or ())
    with command.shown_progress() as progress:
        summary = implementation.generate(policy, data, out, settings=settings, limit=limit, progress=progress)
    command.conclude(generated_tables(summary), summary)


@app.command(
    epilog=example(
        "align evaluate --task gsm8k --data gsm8k.jsonl --policy runs/my-run/dpo sampling.max_new_tokens=256",
        "align evaluate --task ifeval --data ifeval.jsonl --responses answers.jsonl --out verdicts.jsonl",
    )
)
def evaluate(
    task: Annotated[
        str, typer.Option(help="Name of a task, harness:NAME of lm-evaluation-harness, or module:NAME of your own.")
    ],
    data: Annotated[str | None, typer.Option(help="The task's rows: file, folder or id.", show_default=False)] = None,
    policy: Annotated[str | None, typer.Option(help="A policy: folder, hub id, gguf:FILE.", show_default=False)] = None,
    responses: Annotated[
        list[Path] | None, typer.Option(help="File of responses to grade in place of a policy's.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File for each verdict, .jsonl.", show_default=False)] = None,
    judge: JudgeOption = None,
    limit: LimitOption = None,
    overrides: Settings = None,
) -> None:
    """Score a policy, or given responses, on a task. The last line of output is JSON."""
    from align.commands import evaluate as implementation  # noqa: PLC0415 - imports torch
    from align.commands import run as command  # noqa: PLC0415
    from align.commands.one_step import settings_of  # noqa: PLC0415
    from align.workflow.results.tables import evaluated_tables  # noqa: PLC0415

    settings = settings_of(implementation.EvaluateSettings, judge or (), overrides or ())
    request = implementation.Request(task, data, policy, tuple(map(str, responses or ())), limit)
    with command.shown_progress() as progress:
        summary = implementation.evaluate(request, out, settings=settings, progress=progress)
    command.conclude(evaluated_tables(summary), summary)


@app.command("test-loss", epilog=example("align test-loss my_losses:make beta=0.1", "align test-loss rpo_bwd_kl eta=2"))
def test_loss(
    loss: Annotated[str, typer.Argument(help="Name of a loss, or module:name of your own.", show_default=False)],
    settings: Annotated[
        list[str] | None, typer.Argument(help="Settings of the loss.", metavar="[KEY=VALUE]...")
    ] = None,
) -> None:
    """Check the properties that every preference loss needs, and that it learns on a tiny model."""
    from align.commands.test_loss import check_named_loss  # noqa: PLC0415 - imports torch

    check_named_loss(loss, settings or ())


@app.command(epilog=example("align push runs/my-run/rpo-3 my-org/my-model --dry-run"))
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a step: RUN/STEP.", metavar="RUN/STEP", show_default=False)],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub, as owner/name.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be uploaded; uses no network.")] = False,
) -> None:
    """Upload a policy or reward model with its model card to the Hugging Face Hub."""
    from align.commands.push import push as command  # noqa: PLC0415 - imports torch

    command(folder, repo, private=private, dry_run=dry_run)


@app.command(epilog=example("align keys", "align keys sft", "align keys data"))
def keys(
    section: Annotated[
        str | None,
        typer.Argument(help="recipe, policy, data, accounting, or the name of a stage; all by default."),
    ] = None,
) -> None:
    """List every recipe key with its type, default and meaning."""
    from align.commands.keys import show_keys  # noqa: PLC0415 - imports pydantic

    show_keys(section)


@app.command(epilog=example("align schema --json > recipe.schema.json"))
def schema(
    json: Annotated[bool, typer.Option("--json", help="Print the JSON Schema itself.")] = False,
) -> None:
    """Print the JSON Schema of a recipe, for completion and checks in an editor."""
    from align.commands.keys import show_schema  # noqa: PLC0415 - imports pydantic

    show_schema(as_json=json)


def main() -> None:
    """Run the command line."""
    exit_with(app)
