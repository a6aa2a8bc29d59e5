"""Answers and tests in the metadata of prompts, under the names that published data sets give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from align.errors import InputError
from align.records import Prompt

ANSWER_KEYS = ("answer", "ground_truth", "reward_model")  # RLVR; verl has a ground_truth inside reward_model
TEST_KEYS = ("tests", "test_list", "test_cases", "test", "ground_truth")  # MBPP; AceCode; HumanEval; RLVR's code
CONSTRAINT = '"func_name"'  # in the ground_truth of an RLVR row whose answer is checked by a function


class ProgramTests(NamedTuple):
    """Unit tests of a prompt."""

    tests: list[str]
    setup: str = ""
    entry_point: str | None = None
    before: str = ""  # the beginning of the program, which the response completes


def known_answer(metadata: Mapping[str, Any]) -> Any:  # noqa: ANN401 - a value of a row that is not yet checked
    """Return the known answer of a prompt, None if it has none.

    >>> known_answer({"ground_truth": "42", "dataset": "gsm8k"})
    '42'
    """
    if metadata.get("answer") is not None:
        return metadata["answer"]
    truth = _ground_truth(metadata)
    if isinstance(truth, list) and len(cast(list[Any], truth)) == 1:
        truth = cast(list[Any], truth)[0]
    if isinstance(truth, list | Mapping) or (isinstance(truth, str) and (CONSTRAINT in truth or _is_test(truth))):
        return None
    return truth


def known_tests(prompt: Prompt) -> ProgramTests | None:
    """Return the tests of a prompt, None if it has none. Raise `InputError` if they are not texts.

    >>> from align.records import Message
    >>> known_tests(Prompt((Message("user", "Double x."),), {"test_list": ["assert f(1) == 2"]})).tests
    ['assert f(1) == 2']
    """
    row = prompt.metadata
    entry_point = row.get("entry_point")
    setup = row.get("setup") or ""
    if not row.get("tests") and isinstance(row.get("test"), str) and entry_point:
        before = prompt.messages[-1].content
        return ProgramTests([row["test"]], before, _texts([entry_point])[0], before)
    for name in ("tests", "test_list", "test_cases"):
        if row.get(name):
            if name == "test_list":
                setup = "\n".join(_texts([*_texts(row.get("test_imports") or []), row.get("test_setup_code") or ""]))
            return ProgramTests(_texts(row[name]), _texts([setup])[0], entry_point and _texts([entry_point])[0])
    truth = _ground_truth(row)
    tests: list[Any] = cast(list[Any], truth) if isinstance(truth, list) else [truth]
    return ProgramTests(_texts(tests)) if tests and all(map(_is_test, tests)) else None


def _ground_truth(metadata: Mapping[str, Any]) -> Any:  # noqa: ANN401 - any value of a row
    nested = metadata.get("reward_model")
    inside = cast(Mapping[str, Any], nested) if isinstance(nested, Mapping) else {}
    return metadata.get("ground_truth", inside.get("ground_truth"))


def _is_test(value: object) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("assert ")


def _texts(value: Any) -> list[str]:  # noqa: ANN401 - a value of a row that is not yet checked
    values: Any = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(each, str) for each in cast(list[Any], values)):
        raise InputError("a prompt's `tests` are a string or a list of strings, `setup` and `entry_point` are strings")
    return cast(list[str], values)
