"""Questions about a table, alone or within a document, to prompts with a known answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from align.data.columns import Row
from align.data.readers.cells import as_list, as_object, as_text, metadata_of
from align.errors import InputError
from align.records import Message, Prompt, Record

FINQA_READ = ("question", "program", "exe_ans", "answer")  # fields of `qa` that are read


def finqa(row: Row) -> Iterator[Record]:
    """Yield a question about a financial report; Chen et al. 2021 (FinQA).

    The metadata's `answer` is the result of the program, a number or "yes" or "no". The answer as it is written in the
    data, often rounded, is `written_answer`. Reads the authors' files (`qa`) and the Hub's columns.
    """
    asked = as_object(row["qa"], "qa") if "qa" in row else row
    result = asked.get("exe_ans" if "qa" in row else "final_result")
    before, after = (_sentences(row[name], name) for name in ("pre_text", "post_text"))
    question = as_text(asked.get("question"), "question")
    found = metadata_of(row, {"pre_text", "post_text", "table", "qa", "question", "answer", "final_result"})
    found |= {"program": asked["program"]} if "program" in asked else {}
    found |= {"written_answer": asked["answer"]} if asked.get("answer") not in (None, "") else {}
    found |= {"answer": result} if result not in (None, "") else {}
    yield _prompt((before, markdown_table(as_list(row["table"], "table")), after, question), found)


def unread_in_finqa(row: Row) -> set[str]:
    """Return the fields of `qa` that are not read."""
    asked = as_object(row.get("qa") or {}, "qa")
    return {f"qa.{name}" for name in asked if name not in FINQA_READ and asked[name] not in (None, "", [], {})}


def wiki_table_questions(row: Row) -> Iterator[Record]:
    """Yield a question about a table; Pasupat and Liang 2015. Several answers become one `answer`, the set `{a; b}`."""
    answers = [as_text(answer, "an answer") for answer in as_list(row["answers"], "answers")]
    if not answers:
        raise InputError("answers is empty; a text is needed")
    table = as_object(row["table"], "table")
    lines = [as_list(table.get("header"), "table.header"), *as_list(table.get("rows"), "table.rows")]
    answer = answers[0] if len(answers) == 1 else f"{{{'; '.join(answers)}}}"
    found = metadata_of(row, {"question", "answers", "table"})
    yield _prompt((markdown_table(lines), as_text(row["question"], "question")), {**found, "answer": answer})


def markdown_table(lines: Sequence[Any]) -> str:
    r"""Return a table in Markdown; the first of the lines is the header, and short lines are filled with empty cells.

    >>> print(markdown_table([["year", "sales"], ["2020", "a|b"]]))
    | year | sales |
    | --- | --- |
    | 2020 | a\|b |
    """
    cells = [[_cell(cell) for cell in as_list(line, "a line of the table")] for line in lines]
    width = max(map(len, cells), default=0)
    if not width:
        return ""
    filled = [line + [""] * (width - len(line)) for line in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in [filled[0], ["---"] * width, *filled[1:]])


def _cell(value: Any) -> str:  # noqa: ANN401 - a cell of any type
    return " ".join(("" if value is None else str(value)).replace("|", "\\|").split())


def _sentences(value: Any, name: str) -> str:  # noqa: ANN401 - a cell of any type
    return "\n".join(as_text(sentence, f"a sentence of {name}") for sentence in as_list(value, name))


def _prompt(parts: Sequence[str], metadata: dict[str, Any]) -> Prompt:
    """Return the parts that are not empty as one user message."""
    if not parts[-1].strip():
        raise InputError("question is empty")
    return Prompt((Message("user", "\n\n".join(part for part in parts if part.strip())),), metadata)
