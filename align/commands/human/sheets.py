"""`align human export` and `align human import`: a blinded human evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.artifacts import atomic_folder, read_json, write_json, write_text
from align.config import build
from align.errors import InputError
from align.evaluation.answers import responses_by_prompt
from align.evaluation.given_responses import row_id_of
from align.evaluation.human.ratings import read_ratings
from align.evaluation.human.results import human_results
from align.evaluation.human.sheet import form_csv, form_html, key_json, make_sheet
from align.rewards.thoughts import visible_text
from align.stages.inputs.sources import SourceSettings, prompts

FORM, TABLE, KEY = "form.html", "form.csv", "key.json"


def export(data: str, responses: Sequence[str], out: Path, *, limit: int | None, seed: int) -> dict[str, Any]:
    """Write the form, the same as CSV, and the key to the new folder `out`; return a summary.

    `responses` are files, or NAME=FILE; a file's name without its ending is the model's name otherwise. Thoughts are
    not shown.
    """
    if out.exists():
        raise InputError(f"{out}: exists; name a new folder")
    files: dict[str, str] = {}
    for given in responses:
        name, path = _named(given)
        if name in files:
            raise InputError(f"two files of responses are called {name!r}; name them as NAME=FILE")
        files[name] = path
    source = build(SourceSettings, {"path": data, "limit": limit}, ("data",))
    asked = list(prompts(source, seed=0))
    rows = [(row_id_of(prompt.metadata), prompt.messages[-1].content) for prompt in asked]
    ids = {row_id: text for row_id, text in rows if row_id is not None}
    answers = {
        name: {prompt: visible_text(text) for prompt, text in responses_by_prompt(path, ids).items()}
        for name, path in files.items()
    }
    sheet = make_sheet(asked, answers, seed=seed)
    with atomic_folder(out) as folder:
        write_text(folder / FORM, form_html(sheet))
        write_text(folder / TABLE, form_csv(sheet))
        write_json(folder / KEY, key_json(sheet, files))
    return {
        "out": str(out),
        "sheet": sheet.id,
        "prompts": len(sheet.items),
        "unanswered": len(asked) - len(sheet.items),
        "models": list(files),
    }


def _named(given: str) -> tuple[str, str]:
    name, separator, path = given.partition("=")
    return (name, path) if separator and name and not Path(given).exists() else (Path(given).stem, given)


def import_ratings(key: Path, files: Sequence[str], baseline: str) -> dict[str, Any]:
    """Return the results of filled forms, with the counts of what annotators left out."""
    known: Any = read_json(key)
    if not isinstance(known, Mapping) or not {"sheet", "models", "categories", "responses"} <= known.keys():
        raise InputError(f"{key}: is no key of a human evaluation, which `align human export` writes as {KEY}")
    if baseline not in known["models"]:
        raise InputError(f"--baseline: the key has no model {baseline!r}; it has {', '.join(known['models'])}")
    found = read_ratings(list(files), known)
    annotators = sorted({rating.annotator for rating in found.ratings})
    counts = {"annotators": annotators, "ratings": len(found.ratings), "incomplete": dict(found.incomplete)}
    return {**counts, **human_results(found.ratings, baseline, known["categories"])}
