"""A blinded sheet: prompts with the responses of several models in random order, as HTML form and as CSV."""

from __future__ import annotations

import csv
import io
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

from align.config import stable_hash
from align.errors import InputError
from align.evaluation.human.scales import FAILURE, FAILURE_TEXT, LENGTH, LENGTHS, SCALES
from align.records import Prompt
from align.rewards.judge_prompts.own import conversation

MIN_MODELS = 2
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet takes a cell that begins so for a formula
CSV_COLUMNS = ("sheet", "category", "prompt", "response_id", "response", *SCALES, FAILURE, LENGTH)


class SheetItem(NamedTuple):
    """A prompt with its responses, in the order in which they are shown."""

    id: str
    category: str
    prompt: str
    responses: tuple[tuple[str, str], ...]  # (response id, text)


class Sheet(NamedTuple):
    """What annotators see, and the key that names the models."""

    id: str  # of its content
    items: tuple[SheetItem, ...]
    key: Mapping[str, tuple[str, str]]  # response id -> (item id, model)


def make_sheet(prompts: Sequence[Prompt], answers: Mapping[str, Mapping[str, str]], *, seed: int = 0) -> Sheet:
    """Return the sheet of all prompts that every model answers; `answers` are by model and text of the last message.

    The order of the responses to a prompt depends on the seed and the prompt only. Categories are `category` of the
    prompts' metadata. Raises `InputError` for fewer than two models, for two prompts with the same last message, and if
    no prompt is answered by all.
    """
    if len(answers) < MIN_MODELS:
        raise InputError(f"a human evaluation compares at least two files of responses, not {len(answers)}")
    asked = Counter(prompt.messages[-1].content for prompt in prompts)
    if repeated := [text for text, count in asked.items() if count > 1]:
        raise InputError(
            f"{asked[repeated[0]]} prompts end with {repeated[0][:60]!r}, which names a response; keep one"
        )
    items: list[SheetItem] = []
    key: dict[str, tuple[str, str]] = {}
    for prompt in prompts:
        question = prompt.messages[-1].content
        if not all(question in of_model for of_model in answers.values()):
            continue
        item = str(len(items) + 1)
        models = sorted(answers)
        random.Random(stable_hash([seed, question])).shuffle(models)
        # With a letter: a spreadsheet takes 1.2 for a date, and 1.10 for 1.1
        responses = tuple((f"r{item}.{place}", answers[model][question]) for place, model in enumerate(models, start=1))
        key |= {name: (item, model) for (name, _), model in zip(responses, models, strict=True)}
        text = question if len(prompt.messages) == 1 else conversation(prompt)
        items.append(SheetItem(item, str(prompt.metadata.get("category") or ""), text, responses))
    if not items:
        raise InputError(f"no prompt is answered in all {len(answers)} files of responses")
    return Sheet(stable_hash([item._asdict() for item in items])[:16], tuple(items), key)


def form_html(sheet: Sheet) -> str:
    """Return the form: one page that needs no network and saves its answers as JSON. It names no model."""
    content = {
        "sheet": sheet.id,
        "scales": {name: [levels[level] for level in sorted(levels)] for name, levels in SCALES.items()},
        "lengths": LENGTHS,
        "failure": FAILURE_TEXT,
        "items": [{**item._asdict(), "responses": [list(each) for each in item.responses]} for item in sheet.items],
    }
    page = files("align.evaluation.human").joinpath("form.html").read_text("utf-8")
    return page.replace("__SHEET__", json.dumps(content, ensure_ascii=False).replace("<", "\\u003c"))


def form_csv(sheet: Sheet) -> str:
    """Return the sheet as CSV with empty columns for the answers; texts that look like formulas begin with a quote."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS)
    writer.writeheader()
    for item in sheet.items:
        for name, response in item.responses:
            cells = {"category": item.category, "prompt": item.prompt, "response": response}
            plain = {column: f"'{cell}" if cell.startswith(FORMULA) else cell for column, cell in cells.items()}
            writer.writerow({"sheet": sheet.id, "response_id": name, **plain})
    return text.getvalue()


def key_json(sheet: Sheet, sources: Mapping[str, str]) -> dict[str, Any]:
    """Return the key of a sheet as JSON: which model each response is of. `sources` are the models' files."""
    return {
        "sheet": sheet.id,
        "models": dict(sources),
        "categories": {item.id: item.category for item in sheet.items},
        "responses": {name: {"item": item, "model": model} for name, (item, model) in sheet.key.items()},
    }
