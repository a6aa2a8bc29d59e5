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
    progress: Progress,
    **reading: Any,  # noqa: ANN401 - settings have several types
) -> dict[str, Any]:
    """Write every row with the reward model's ratings to `out` and return a summary.

    `reading` are settings of a source, such as `format` and `limit`. Ratings are kept beside `out` as they are made, so
    that the same call resumes. A row that is too long for the model is not cut: it is left out and counted.
    """
    check_out(out, [data, model])
    judge = {"name": "reward_model", "settings": {"path": model}}
    step = build(Score, {"stage": "score", "data": SOURCE, "judges": [judge], "every_row": True})
    source = build(SourceSettings, {"path": data, **reading})
    rows = [source.format, source.split, source.on_error, source.columns]
    identity = {"model": content_of(model), "data": [content_of(data), *rows]}

    def work(context: RunContext) -> dict[str, Any]:
        found = step.run(context)
        publish(context.folder / GROUPS_FILE, out, context)
        return found

    found = run_one_step("score", step, source, out=out, identity=identity, progress=progress, work=work)
    return {"model": model, "data": data, "out": str(out), **found["ratings"]}
