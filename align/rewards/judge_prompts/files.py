"""Prompts for a judge from a file in FastChat's form.

Such a file (judge_prompts.jsonl of FastChat's llm_judge) has rows {name, type, system_prompt, prompt_template,
output_format}. Of each mode four are used: for one turn and for two turns, without and with a reference answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from align.data.rows import read_rows
from align.errors import InputError
from align.records import Message, Prompt
from align.rewards.judge_prompts.own import OwnQuestions, Questions
from align.rewards.judge_prompts.parsing import OUTPUT_FORMATS, PAIR_FORMATS, RATING_FORMATS, Question

REFERENCE = "reference"  # of a prompt's metadata: one answer for each turn


class Template(NamedTuple):
    """A row of a file of judge prompts."""

    system: str
    text: str
    output_format: str

    def question(self, fields: Mapping[str, str]) -> Question:
        """Return the question with these fields filled in; the system message is left out if it is empty."""
        system = (Message("system", self.system),) if self.system.strip() else ()
        parse, form = OUTPUT_FORMATS[self.output_format]
        return Question((*system, Message("user", self.text.format_map(fields))), parse, form)


class FileQuestions:
    """Prompts of a file in FastChat's form.

    A prompt has one user turn, or two with the answer to the first between them. The templates with a reference are
    used where the prompt's metadata have `reference`: a list with an answer for each turn.
    """

    def __init__(self, path: str, mode: str) -> None:
        names = NAMES[mode]
        self.templates = {key: _template(name, path, key, mode) for key, name in names.items()}

    def rating(self, prompt: Prompt, response: str) -> Question:
        """Return the question that asks for a rating of a response."""
        return self._question(prompt, {"answer": response})

    def comparison(self, prompt: Prompt, first: str, second: str) -> Question:
        """Return the question that asks which of two responses is better."""
        return self._question(prompt, {"answer_a": first, "answer_b": second})

    def _question(self, prompt: Prompt, answers: Mapping[str, str]) -> Question:
        roles = [message.role for message in prompt.messages]
        if roles not in (["user"], ["user", "assistant", "user"]):
            found = ", ".join(roles)
            raise InputError(
                f"judge prompts of a file are for one user turn, or for user, assistant, user: not for {found}"
            )
        is_second = len(roles) > 1
        given: Any = prompt.metadata.get(REFERENCE) or []
        references: list[Any] = [given] if isinstance(given, str) else list(given)
        if 0 < len(references) <= is_second:
            raise InputError("a prompt of two turns has one reference answer; give one for each turn")
        texts = [message.text for message in prompt.messages]
        fields = {"question": texts[0]}
        if is_second:
            earlier = {f"{name}_1": texts[1] for name in answers}
            fields = {"question_1": texts[0], "question_2": texts[2], **earlier}
        fields |= {f"{name}_2" if is_second else name: text for name, text in answers.items()}
        fields |= {f"ref_answer_{turn}": str(text) for turn, text in enumerate(references, start=1)}
        return self.templates[is_second, bool(references)].question(fields)


# (is of the second turn, has a reference) -> name, by mode
NAMES: Mapping[str, Mapping[tuple[bool, bool], str]] = {
    "rating": {
        (False, False): "single-v1",
        (False, True): "single-math-v1",
        (True, False): "single-v1-multi-turn",
        (True, True): "single-math-v1-multi-turn",
    },
    "pairs": {
        (False, False): "pair-v2",
        (False, True): "pair-math-v1",
        (True, False): "pair-v2-multi-turn",
        (True, True): "pair-math-v1-multi-turn",
    },
}


def _template(name: str, path: str, key: tuple[bool, bool], mode: str) -> Template:
    """Return a template of the file; raise `InputError` if it is missing or has other fields than its use fills in."""
    row = next((row for row in read_rows(path) if row.get("name") == name), None)
    if row is None:
        raise InputError(
            f"{path}: no judge prompt is called {name!r}; mode {mode} needs {', '.join(NAMES[mode].values())}"
        )
    template = Template(
        str(row.get("system_prompt") or ""), str(row.get("prompt_template")), str(row.get("output_format"))
    )
    formats = RATING_FORMATS if mode == "rating" else PAIR_FORMATS
    if template.output_format not in formats:
        raise InputError(
            f"{path}: {name} has output_format {template.output_format!r}; mode {mode} reads {', '.join(formats)}"
        )
    is_second, has_reference = key
    answers = ("answer",) if mode == "rating" else ("answer_a", "answer_b")
    turns = ("_1", "_2") if is_second else ("",)
    fields = [f"{field}{turn}" for field in ("question", *answers) for turn in turns]
    fields += [f"ref_answer_{number}" for number in (1, 2)[: len(turns)] if has_reference]
    try:
        template.question(dict.fromkeys(fields, ""))
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(f"{path}: {name}: the template cannot use {error}; it has {', '.join(fields)}") from error
    return template


def questions_of(path: str | None, mode: str) -> Questions:
    """Return the prompts of a file, or this project's own."""
    return OwnQuestions() if path is None else FileQuestions(path, mode)
