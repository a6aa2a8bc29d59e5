"""Stage `curate`: clean the rows of sources: test items and duplicates out, equal prompts merged, the best kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from align.curate.settings import KEPT, MERGED, READ, CurationSettings
from align.data.rejections import DROPPED, Rejections
from align.errors import InputError, Location, RunError
from align.records import Demonstration, Record
from align.stages.base import GROUPS, ONE_PROCESS, SOURCE, Input, Stage, UsedEngine
from align.stages.costs.estimates import Estimate, Planning
from align.stages.inputs.context import RunContext, StepInputs
from align.stages.inputs.curation_models import (
    ModelWork,
    curation_models,
    loaded_models,
    model_inputs,
    models_key,
    used_engines,
    uses_own_policy,
)
from align.stages.inputs.sources import SourceSettings, check_without_constraints, rows_of, streamed

ROWS_FILE = "rows.jsonl"  # in the folder of a step
CHARACTERS_PER_TOKEN = 4  # of English text, by rule of thumb; for the estimates of later steps
TOKENS_PER_S = 4e5  # that are curated; measured (tests/README.md)


class Curate(CurationSettings, Stage):
    """Clean rows: without test items, duplicates and near-duplicates, and with equal prompts merged into groups."""

    stage: Literal["curate"] = Field(default="curate", description="Clean rows before training.")
    data: str | list[str] = Field(description="Sources of rows, or steps that make groups.")
    held_out: float = Field(
        default=0.0, ge=0, lt=1, description="Share of the prompts that training on the rows keeps for evaluation."
    )
    max_length: int | None = Field(
        default=None, ge=2, description="Most tokens of a response with its prompt, in training."
    )

    makes: ClassVar[str] = GROUPS
    refused = ONE_PROCESS

    @property
    def data_sources(self) -> list[str]:
        """Names of the sources of rows."""
        return [self.data] if isinstance(self.data, str) else self.data

    @property
    def test_sources(self) -> list[str]:
        """Names of the sources of test items."""
        tests = self.decontamination.tests if self.decontamination is not None else []
        return tests if isinstance(tests, list) else []

    @property
    def target_sources(self) -> list[str]:
        """Names of the sources that rows are compared with for their rank."""
        return [self.rank.targets] if self.rank is not None and self.rank.targets is not None else []

    def with_tests(self, tested: Sequence[str]) -> Self:
        """Return the step with the sources of the recipe's evaluations in place of `evaluate`."""
        rule = self.decontamination
        if rule is None or rule.tests != "evaluate":
            return self
        names = [name for name in tested if name not in self.data_sources]
        return self.model_copy(update={"decontamination": rule.model_copy(update={"tests": names})})

    def inputs(self) -> list[Input]:
        """Return the rows, and the test sets."""
        return [
            *(Input(name, (SOURCE, GROUPS), ("data",)) for name in self.data_sources),
            *(Input(name, (SOURCE,), ("decontamination", "tests")) for name in self.test_sources),
            *(Input(name, (SOURCE, GROUPS), ("rank", "targets")) for name in self.target_sources),
            *model_inputs(self),
        ]

    def shares(self) -> dict[str, float]:
        """Return the sources that the step reads."""
        return dict.fromkeys([*self.data_sources, *self.test_sources, *self.target_sources], 1.0)

    def needs_policy(self) -> bool:
        """Return whether rows are embedded or ranked by the recipe's own policy."""
        return uses_own_policy(self)

    def named_models(self) -> list[tuple[str, Location]]:
        """Return the models that embed rows, and that of the judge."""
        return loaded_models(self)

    def engines(self) -> list[UsedEngine]:
        """Return the engine of the judge of similar test prompts."""
        return used_engines(self)

    def cache_key(self, inputs: StepInputs) -> list[Any]:
        """Return what decides the rows, with the content of models."""
        return [*super().cache_key(inputs), *models_key(self, inputs)]

    def decisive(self) -> dict[str, Any]:
        """Return the settings that decide the rows."""
        settings = super().decisive()
        if self.neighbours is not None and self.neighbours.judge is not None:
            settings["decontamination"]["neighbours"]["judge"] = self.neighbours.judge.cache_key()
        return settings

    def rows(self, folder: Path) -> SourceSettings | None:
        """Return the cleaned rows."""
        path = str(folder / ROWS_FILE)
        return SourceSettings(path=path, format="native", held_out=self.held_out, max_length=self.max_length)

    def validate_settings(self) -> None:
        """Raise for a source that is named twice, and a test set that is cleaned itself."""
        if not self.data_sources or len(set(self.data_sources)) < len(self.data_sources):
            raise InputError(f"{self.data!r}: name at least one source, and each once", ("data",))
        if both := set(self.data_sources) & set(self.test_sources):
            raise InputError(
                f"{min(both)!r} is a source of the rows too, which would all be dropped", ("decontamination", "tests")
            )

    def validate_inputs(self, inputs: StepInputs) -> None:
        """Raise for rows that are not read from files, constraints, and a policy that nothing is loaded from."""
        if uses_own_policy(self) and inputs.policy.path is None:
            raise InputError("the recipe's policy has no path: name the model that embeds or ranks rows", ("policy",))
        for name in self.data_sources:
            source = inputs.sources[name]
            check_without_constraints(name, source.constraints is not None, ("data",))
            if source.is_procedural:
                raise InputError(
                    f"{name} is generated by the project, as the kind of row that a step needs; curate reads files, "
                    "data sets and rows of steps",
                    ("data",),
                )

    def estimate(self, planning: Planning) -> Estimate:
        """Return the number of rows, of which fewer may be kept, and the time if no model runs."""
        from align.curate.output import whole_text  # noqa: PLC0415 - imports numpy

        rows = characters = tokens = 0
        for name in self.data_sources:
            if (made := planning.made.get(name)) is not None:
                rows, tokens = rows + made.rows, tokens + made.tokens
                continue
            for _, record in self._records(name, planning.inputs, Counter()):
                rows += 1
                characters += len(whole_text(record))
        tokens += characters // CHARACTERS_PER_TOKEN
        return Estimate(
            name=planning.name,
            stage=self.stage,
            rows=rows,
            tokens=tokens,
            flops=None if self._asks_models else 0.0,
            seconds=None if self._asks_models else tokens / TOKENS_PER_S,
            unknown="the passes of encoders, judge and ranking policy are not estimated" if self._asks_models else "",
            disk=tokens * CHARACTERS_PER_TOKEN,
            spare=tokens * CHARACTERS_PER_TOKEN,
            bound=True,
            parts={"test sets": ", ".join(self.test_sources) or "none"},
        )

    @property
    def _asks_models(self) -> bool:
        """Whether models embed, rank or judge rows."""
        return bool(self.needs_policy() or loaded_models(self) or model_inputs(self))

    def _records(self, name: str, inputs: StepInputs, dropped: Counter[str]) -> Iterator[tuple[str, Record]]:
        """Yield the records of a source, each with the source's name; `dropped` receives counts by reason."""
        source = inputs.sources[name]
        rejections = Rejections(source.on_error)
        with rows_of(name):
            reading = streamed(source, kind=Demonstration, seed=inputs.seed)
            for located in reading.records:
                record = located.record
                with rejections.at(located.place):
                    if isinstance(record, Demonstration) and record.messages[-1].role != "assistant":
                        raise InputError("the last message of a demonstration is not the assistant's")
                    yield name, record
        dropped.update(reading.statistics.dropped)
        dropped.update({reason.removeprefix(DROPPED): number for reason, number in rejections.counts.items()})

    def run(self, context: RunContext) -> dict[str, Any]:
        """Write the cleaned rows, and the list of the removed ones."""
        from align.curate.contamination import ContaminationIndex  # noqa: PLC0415 - imports numpy
        from align.curate.output import curate  # noqa: PLC0415
        from align.sandbox.process import NUM_CORES  # noqa: PLC0415
        from align.stages.costs.measured import observing_done  # noqa: PLC0415 - imports torch
        from align.stages.inputs.test_items import test_items  # noqa: PLC0415

        inputs = context.inputs
        rule = self.decontamination
        dropped = Counter[str]()
        index = None
        if rule is not None and self.test_sources:
            index = ContaminationIndex.of(test_items(self.test_sources, inputs), rule.ngram)
        elif rule is not None:
            context.progress.note("no test sets: rows were not searched for test items")
        rows = (each for name in self.data_sources for each in self._records(name, inputs, dropped))
        ran: list[ModelWork] = []
        with curation_models(self, context, ran) as models:
            report = curate(rows, index, self, context.folder, models=models, num_workers=NUM_CORES)
        inputs.check_unchanged(*(inputs.sources[name] for name in self.data_sources))
        report |= {"not_read": dict(sorted(dropped.items()))}
        total = sum((Counter(counts) for counts in report["sources"].values()), Counter[str]())
        summary = "; ".join(f"{number:,} {name}" for name, number in total.items())
        context.progress.note(summary)
        if not total[KEPT]:
            raise RunError(f"no row is kept: {summary}")
        return {"rows": _row_statistics(total, dropped), "curation": report, "done": observing_done(ran)}


def _row_statistics(counts: Counter[str], not_read: Counter[str]) -> dict[str, int]:
    """Return the counts of rows under the names of the report's table of rows."""
    removed = {name: number for name, number in counts.items() if name not in (READ, KEPT, MERGED)}
    return {
        READ: counts[READ] + not_read.total(),
        "records": counts[READ],
        **{f"{DROPPED}{name}": number for name, number in [*not_read.items(), *removed.items()]},
        MERGED: counts[MERGED],
        KEPT: counts[KEPT],
    }
