"""Test items: the prompts and answers of the sources that a recipe evaluates on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from align.curate.contamination import ANSWER, PROMPT, TestItem
from align.curate.row_keys import joined, prompt_messages, response_texts
from align.records import Prompt
from align.stages.inputs.context import StepInputs
from align.stages.inputs.sources import prompts, rows_of, streamed


def test_items(names: Sequence[str], inputs: StepInputs) -> Iterator[TestItem]:
    """Yield the prompts of the sources, and their answers where the rows have some."""
    for name in names:
        source = inputs.sources[name]
        with rows_of(name):
            if source.is_procedural or source.constraints is not None:
                records = prompts(source, seed=inputs.seed)
            else:
                records = (located.record for located in streamed(source, kind=Prompt, seed=inputs.seed).records)
            for record in records:
                yield TestItem(name, PROMPT, joined(prompt_messages(record)))
                for answer in response_texts(record):
                    yield TestItem(name, ANSWER, answer)
        inputs.check_unchanged(source)
