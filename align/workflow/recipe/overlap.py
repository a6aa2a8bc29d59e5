"""Test items among the first rows of the sources that a recipe trains on. Nothing here imports torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from align.curate.contamination import ContaminationIndex, TestItem
from align.curate.row_keys import joined, prompt_messages, response_texts
from align.curate.settings import DecontaminationSettings
from align.errors import InputError
from align.records import Demonstration
from align.stages.base import POLICY, REWARD_MODEL
from align.stages.inputs.context import StepInputs
from align.stages.inputs.sources import rows_of, streamed
from align.stages.inputs.test_items import test_items
from align.workflow.recipe.schema import Recipe

# Of all sources together: 0.9 s of a core for long rows
MAX_ROWS = 1500
MAX_TEST_ROWS = 1500

EQUAL, NGRAMS = "by an equal prompt", "by n-grams"


def overlap_warnings(recipe: Recipe) -> Iterator[str]:
    """Yield a line for each training source whose first rows contain items of a source that the recipe tests on.

    Rows that steps make do not exist yet, and generated rows have splits of their own; neither is looked at.
    """
    tested, trained = _sources(recipe, tests=True), _sources(recipe, tests=False)
    trained = {
        name: step for name, step in trained.items() if name not in tested and not recipe.data[name].is_procedural
    }
    if not tested or not trained:
        return
    rule = DecontaminationSettings()
    items = list[TestItem]()
    for name, step in tested.items():
        try:
            items += _items(name, recipe.resolved(step), MAX_TEST_ROWS // len(tested))
        except InputError as error:  # rows that a task reads, and that are no records
            yield f"{name}: was not compared with the training rows: {error}"
    index = ContaminationIndex.of(items, rule.ngram)
    for name, step in trained.items():
        hits = Counter[tuple[str, str]]()
        rows = 0
        inputs = recipe.resolved(step)
        with rows_of(name):
            reading = streamed(inputs.sources[name], kind=Demonstration, seed=inputs.seed)
            for rows, located in enumerate(islice(reading.records, MAX_ROWS // len(trained)), start=1):  # noqa: B007
                hit = index.find(joined(prompt_messages(located.record)), response_texts(located.record))
                if hit is not None and (hit.is_equal or hit.coverage > rule.threshold):
                    hits[hit.item.source, EQUAL if hit.is_equal else NGRAMS] += 1
        for test in sorted({source for source, _ in hits}):
            parts = [f"{hits[test, how]} {how}" for how in (EQUAL, NGRAMS) if hits[test, how]]
            found = sum(hits[test, how] for how in (EQUAL, NGRAMS))
            yield (
                f"{name}: {found} of the first {rows:,} rows contain test items of {test} ({', '.join(parts)}); a "
                "step with stage: curate removes such rows"
            )


def _sources(recipe: Recipe, *, tests: bool) -> dict[str, str]:
    """Return the sources that exist and that steps test on, or train on, each with one of these steps."""
    found: dict[str, str] = {}
    for name, step in recipe.steps.items():
        read = step.tests() if tests else step.shares() if step.makes in (POLICY, REWARD_MODEL) else ()
        for source in read:
            if source in recipe.data and recipe.data[source].made_by is None:
                found.setdefault(source, name)
    return found


def _items(name: str, inputs: StepInputs, number: int) -> Iterator[TestItem]:
    """Yield the test items of the first rows of a source."""
    source = inputs.sources[name]
    limited = source.model_copy(update={"limit": min(source.limit or number, number)})
    return test_items([name], replace(inputs, sources={name: limited}))
