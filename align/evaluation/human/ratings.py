"""Answers of annotators: the JSON of the form, or its CSV with filled columns."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from align.artifacts import read_json
from align.errors import InputError
from align.evaluation.human.scales import FAILED, FAILURE, LENGTH, LENGTHS, LEVELS, SCALES

TRUE, FALSE = ("true", "yes", "1", "x"), ("", "false", "no", "0")


class Rating(NamedTuple):
    """An annotator's answers about one response."""

    annotator: str
    item: str
    model: str
    levels: Mapping[str, int]  # by scale: from 1 to 5, or 0 for a complete failure
    length: str | None  # one of `LENGTHS`; None if it is not answered


class Ratings(NamedTuple):
    """The answers of all annotators."""

    ratings: list[Rating]
    incomplete: Counter[str]  # responses that an annotator left without a level on each scale, by annotator


def read_ratings(paths: list[str], key: Mapping[str, Any]) -> Ratings:
    """Return the answers in files; `key` is that of the sheet. A file's annotator is named in it, or by its name.

    A response without a level on each scale is left out and counted. Raises `InputError` for the file of another
    sheet, for two files of one annotator, for unknown or repeated responses and for answers that the form does not
    have.
    """
    found: list[Rating] = []
    incomplete = Counter[str]()
    seen: dict[str, str] = {}
    for path in paths:
        annotator, sheet, answers = _read(path)
        if sheet != key["sheet"]:
            raise InputError(f"{path}: is of sheet {sheet!r}, and the key of sheet {key['sheet']!r}")
        if annotator in seen:
            raise InputError(f"{path}: annotator {annotator!r} also filled {seen[annotator]}; give each another name")
        seen[annotator] = path
        for name, answer in answers.items():
            if name not in key["responses"]:
                raise InputError(f"{path}: the sheet has no response {name!r}")
            levels = _levels(answer, f"{path}: response {name}")
            if len(levels) < len(SCALES):
                incomplete[annotator] += 1
                continue
            response = key["responses"][name]
            found.append(Rating(annotator, response["item"], response["model"], levels, answer.get(LENGTH) or None))
        incomplete[annotator] += len(key["responses"].keys() - answers.keys())
    return Ratings(found, +incomplete)


def _read(path: str) -> tuple[str, str, dict[str, dict[str, Any]]]:
    """Return (annotator, sheet, answers by response)."""
    if Path(path).suffix.lower() != ".csv":
        content = read_json(Path(path))
        if not isinstance(content, dict) or not {"sheet", "ratings"} <= content.keys():
            raise InputError(f"{path}: is no file that the form saves: it has no sheet and ratings")
        answers = content["ratings"]
        if not isinstance(answers, dict) or not all(isinstance(each, dict) for each in answers.values()):
            raise InputError(f"{path}: ratings are {{response: answers}}, as the form saves them")
        return str(content.get("annotator") or Path(path).stem), content["sheet"], answers
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as CSV: {error}") from error
    needed = {"sheet", "response_id", *SCALES, FAILURE, LENGTH}
    missing = sorted(needed - rows[0].keys()) if rows else []
    if not rows or missing:
        what = f"column {missing[0]}" if rows else "rows"
        raise InputError(f"{path}: has no {what}; it must have {', '.join(sorted(needed))}")
    answers = {row["response_id"]: dict(row) for row in rows}
    if len(answers) < len(rows):
        repeated = next(name for name, count in Counter(row["response_id"] for row in rows).items() if count > 1)
        raise InputError(f"{path}: two rows are of the response {repeated!r}")
    return Path(path).stem, rows[0]["sheet"], answers


def _levels(answer: Mapping[str, Any], place: str) -> dict[str, int]:
    """Return the level on each scale that is answered."""
    if (length := answer.get(LENGTH)) not in (None, "", *LENGTHS):
        raise InputError(f"{place}: length is one of {', '.join(LENGTHS)}, not {length!r}")
    failure = str(answer.get(FAILURE) or "").strip().lower()
    if failure not in (*TRUE, *FALSE):
        raise InputError(f"{place}: {FAILURE} is one of {', '.join(filter(None, (*TRUE, *FALSE)))}, not {failure!r}")
    if failure in TRUE:
        return dict.fromkeys(SCALES, FAILED)
    given = {scale: str(answer.get(scale) or "").strip() for scale in SCALES}
    if wrong := [(scale, text) for scale, text in given.items() if text and text not in map(str, LEVELS)]:
        raise InputError(f"{place}: {wrong[0][0]} is a level from 1 to 5, not {wrong[0][1]!r}")
    return {scale: int(text) for scale, text in given.items() if text}
