"""`align score`: rate every response of a file by a reward model, as rows that RPO can train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align.commands.one_step import SOURCE, check_out, publish, run_one_step
from align.config import build
from align.content_hash import content_of
from align.distributed.progress import Progress
from align.stages.inputs.context import RunContext
from align.stages.inputs.sources import SourceSettings
from align.stages.responses.settings import GROUPS_FILE
from align.stages.score import Score


def score(
    model: str,
    data: str,
    out: Path,
    *,
    format: str = "auto",
    split: str | None = None,
    limit: int | None = None,
    on_error: str = "error",
    progress: Progress,
) -> dict[str, Any]:
    """Write every row with the reward model's ratings to `out` and return a summary.

    Ratings are kept beside `out` as they are made, so that the same call resumes. A row that is too long for the model
    is not cut: it is left out and counted.
    """
    check_out(out, [data, model])
    judge = {"name": "reward_model", "settings": {"path": model}}
    step = build(Score, {"stage": "score", "data": SOURCE, "judges": [judge], "every_row": True})
    values = {"path": data, "format": format, "split": split, "limit": limit, "on_error": on_error}
    source = build(SourceSettings, values)
    identity = {"model": content_of(model), "data": [content_of(data), format, split, on_error]}

    def work(context: RunContext) -> dict[str, Any]:
        found = step.run(context)
        publish(context.folder / GROUPS_FILE, out, context)
        return found

    found = run_one_step("score", step, source, out=out, identity=identity, progress=progress, work=work)
    return {"model": model, "data": data, "out": str(out), **found["ratings"]}
