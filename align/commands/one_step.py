"""Commands that do the work of one stage: a recipe of one step, run without a pipeline."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field

from align.artifacts import atomic_file, remove_leftovers
from align.commands.parsing.arguments import parse_columns
from align.config import Settings, build, read_overrides
from align.data.chat_clock import began_at, pinned_time
from align.distributed.processes import shutdown_processes
from align.distributed.progress import Progress
from align.errors import InputError, noting_interrupts
from align.models.settings import PolicySettings
from align.rewards.judges import parse_judge
from align.stages.base import Stage
from align.stages.inputs.context import RunContext
from align.stages.inputs.sources import COLUMNS, SourceSettings
from align.storage.disk_errors import disk_errors
from align.synth.settings import ConstraintSettings
from align.workflow.recipe.schema import Recipe
from align.workflow.recipe.validation import validate
from align.workflow.runner import run_context

S = TypeVar("S", bound=Settings)
SOURCE = "rows"  # name of the one source
RUN = "command"


class RowOptions(Settings):
    """How rows are read."""

    format: str = Field(default="auto", description="Name of a row format, or module:name of your own reader.")
    columns: dict[str, str] = Field(default_factory=dict[str, str], description=COLUMNS)
    split: str | None = Field(default=None, description="Split of a folder or dataset, or of a built-in task.")
    on_error: Literal["error", "skip"] = Field(
        default="error", description="Stop at a row that cannot be read, or skip it and count it."
    )
    seed: int = Field(default=0, description="Seed of a built-in task and of constraints.")
    constraints: ConstraintSettings | None = Field(
        default=None, description="Verifiable instructions to append to the prompts."
    )

    def source(self, path: str, limit: int | None = None, *, max_length: int | None = None) -> SourceSettings:
        """Return the rows of `path` as a source."""
        own = {name: getattr(self, name) for name in RowOptions.model_fields}
        return SourceSettings(path=path, limit=limit, max_length=max_length, **own)


def settings_of(kind: type[S], judges: Sequence[str], overrides: Sequence[str], columns: Sequence[str] = ()) -> S:
    """Return the settings that a command line gives; a judge is `NAME key=value …`, with `weight` among the keys."""
    # Without the defaults of nested settings, whose `model_fields_set` must hold only what was given
    defaults = kind.model_validate(dict(kind()))
    values = read_overrides(overrides, defaults.model_dump(mode="json", exclude_unset=True))
    if judges:
        values["judges"] = [parse_judge(text) for text in judges]
    if columns:
        rows = values.setdefault("rows", {})
        rows["columns"] = {**rows.get("columns", {}), **parse_columns(columns)}
    return build(kind, values)


def run_one_step(
    name: str,
    step: Stage,
    source: SourceSettings | None,
    *,
    out: Path | None,
    identity: Mapping[str, Any],
    progress: Progress,
    work: Callable[[RunContext], Any],
) -> Any:  # noqa: ANN401 - whatever the work returns
    """Validate a recipe of this step alone and return `work(context)`.

    What it writes is kept beside `out`, in `work_folder(out)`, so that the same command resumes; without `out` it is
    removed at the end. `identity` are the inputs: a folder that was made from others is refused.
    """
    recipe = Recipe(
        run=RUN,
        policy=PolicySettings(),
        data={} if source is None else {SOURCE: source},
        steps={name: step},
        written={name: (name,)},
    )
    with _command_locations(name):
        validate(recipe)
        context = run_context(recipe, name, Path(), progress)
        context.identity = identity
        kept = "partial results are not kept without --out"
        note = kept if out is None else f"what is finished is kept in {work_folder(out)}: rerun to resume"
        with _folder(out, context) as context.folder, disk_errors(context.folder), noting_interrupts(note):
            prepare = partial(_prepare, out, context.folder)
            with pinned_time(context.processes.run_on_main(prepare, f"preparing {context.folder}")):
                result = work(context)
        shutdown_processes()
    return result


def work_folder(out: Path) -> Path:
    """Return the folder with the journals of an output file."""
    return out.with_name(f".{out.name}.work")


def publish(made: Path, out: Path, context: RunContext) -> None:
    """Copy a finished file to `out` atomically."""

    def copy() -> None:
        with atomic_file(out) as partial:
            shutil.copyfile(made, partial)

    context.processes.run_on_main(copy, f"writing {out}")


def check_out(out: Path, inputs: Sequence[str]) -> None:
    """Raise for a file that must not be written: an input, or one that this command has not made."""
    if out.suffix != ".jsonl":
        raise InputError(f"{out}: rows are written as .jsonl, not as {out.suffix or 'a file without suffix'}")
    folder = next(each for each in out.absolute().parents if each.exists())
    if not folder.is_dir():
        raise InputError(f"{out}: {folder} is a file, and not a folder to write into")
    if out.is_dir():
        raise InputError(f"{out}: is a folder; name a file in it")
    if out.exists() and any(Path(each).exists() and out.samefile(each) for each in inputs):
        raise InputError(f"{out}: is what this command reads; name another file")
    if out.exists() and not work_folder(out).exists():
        raise InputError(f"{out}: exists and was not made by this command; name another file, or move it away")


def _prepare(out: Path | None, folder: Path) -> datetime:
    """Remove temporary files of killed attempts and return when the first attempt began.

    Only the main process calls it, while the others wait: what they write looks like the files that it removes.
    """
    if out is not None:
        remove_leftovers(out.parent, of=out.name)
        remove_leftovers(folder)
    return began_at(folder)


@contextmanager
def _folder(out: Path | None, context: RunContext) -> Generator[Path]:
    if out is not None:
        yield work_folder(out)
        return
    folder = Path(context.processes.run_on_main(lambda: tempfile.mkdtemp(prefix="align-"), "making a temporary folder"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _command_locations(name: str) -> Generator[None]:
    """Turn locations of the one-step recipe into those of the command's settings."""
    try:
        yield
    except InputError as error:
        for part in error.parts:
            if part.loc[:2] == ("steps", name):
                part.loc = part.loc[2:]
            elif part.loc == ("data", SOURCE, "path"):
                part.loc = ()  # the message names the file
            elif part.loc[:2] == ("data", SOURCE):
                part.loc = ("rows", *part.loc[2:])
        raise
