"""Stage `embedder`: train or whiten an encoder of texts, and write it as a folder of sentence-transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from align.content_hash import STEP
from align.curate.embeddings.settings import OBJECTIVE_COLUMNS, TEXT_COLUMNS, EncoderSettings, TrainingSettings
from align.data.rows import read_rows
from align.errors import ErrorList, InputError, Location, within
from align.evaluation.task import Row
from align.stages.base import EMBEDDER, ONE_PROCESS, POLICY, SOURCE, Input, Stage, latest_policy
from align.stages.costs.estimates import Estimate, Planning
from align.stages.inputs.context import RunContext, StepInputs, policy_key
from align.stages.inputs.opening import FIRST_ROWS
from align.stages.inputs.sources import SourceSettings, check_without_constraints

NOT_SAVED = ("echo", "prompt_eol")

_Numbered = tuple[int, Row]  # a row, with its number in the file


class Embedder(Stage):
    """Train an encoder on pairs of texts, whiten it, or both."""

    stage: Literal["embedder"] = Field(default="embedder", description="Train or whiten an encoder of texts.")
    encoder: EncoderSettings = Field(
        default=EncoderSettings(),
        description="Initial encoder, by default the last policy before the step; `whiten` is fitted after training.",
    )
    data: str = Field(
        description="Source of rows with the columns of the objective, or of texts to fit the whitening on."
    )
    train: TrainingSettings | None = Field(
        default=None, description="Training settings; null to only whiten the encoder."
    )

    makes: ClassVar[str] = EMBEDDER
    refused = ONE_PROCESS

    def resolve(self, before: Mapping[str, Stage]) -> Self:
        """Return the step with the encoder that it starts from."""
        if self.encoder.model is not None or (last := latest_policy(before)) is None:
            return self
        return self.model_copy(update={"encoder": self.encoder.model_copy(update={"model": STEP + last})})

    @property
    def start(self) -> str | None:
        """The step whose policy or encoder this one starts from."""
        model = self.encoder.model or ""
        return model.removeprefix(STEP) if model.startswith(STEP) else None

    @property
    def _reference(self) -> str | None:
        return self.train.jest.reference if self.train is not None and self.train.jest is not None else None

    def inputs(self) -> list[Input]:
        """Return the rows, the encoder, and the reference of selection."""
        found = [Input(self.data, (SOURCE,), ("data",))]
        if self.start is not None:
            found.append(Input(self.start, (POLICY, EMBEDDER), ("encoder", "model")))
        if self._reference is not None and self._reference.startswith(STEP):
            loc = ("train", "jest", "reference")
            found.append(Input(self._reference.removeprefix(STEP), (EMBEDDER,), loc))
        return found

    def shares(self) -> dict[str, float]:
        """Return the rows of the step."""
        return {self.data: 1.0}

    def needs_policy(self) -> bool:
        """Return whether the step starts from the recipe's own policy."""
        return self.encoder.model is None

    def named_models(self) -> list[tuple[str, Location]]:
        """Return the models that no step makes."""
        named = [(self.encoder.model, ("encoder", "model")), (self._reference, ("train", "jest", "reference"))]
        return [(path, loc) for path, loc in named if path is not None and not path.startswith(STEP)]

    def validate_settings(self) -> None:
        """Raise for settings that have no effect, and for a pooling that a folder cannot hold."""
        errors = ErrorList()
        with errors.collect():
            if self.encoder.pooling in NOT_SAVED:
                raise InputError(
                    f"{self.encoder.pooling} wraps the text in a template, which a folder of sentence-transformers "
                    "cannot hold; choose another",
                    ("encoder", "pooling"),
                )
        with errors.collect():
            if self.train is None and self.encoder.whiten is None:
                raise InputError("nothing to do: give train, encoder.whiten, or both", ("train",))
        with errors.collect():
            if self.train is not None and self.train.jest is not None and self.train.objective != "sigmoid":
                raise InputError(
                    f"selection needs the loss of each pair of rows, which {self.train.objective} does not have; set "
                    "objective: sigmoid",
                    ("train", "jest"),
                )
        errors.raise_found()

    def validate_inputs(self, inputs: StepInputs) -> None:
        """Raise for constraints, which are for prompts, and for a choice of rows by their values."""
        check_without_constraints(self.data, inputs.sources[self.data].constraints is not None, ("data",))
        if inputs.sources[self.data].where:
            message = f"{self.data} has where, which does not select rows of texts; write them to a file of their own"
            raise InputError(message, ("data",))

    def open_rows(self, name: str, source: SourceSettings) -> None:
        """Raise for first rows without the columns of the objective."""
        self.columns_of(source.path, self._read(source.model_copy(update={"order": "file", "limit": FIRST_ROWS})))

    def _read(self, source: SourceSettings) -> list[_Numbered]:
        if source.is_procedural:
            raise InputError(f"{source.path} has no columns of texts; give a file or a data set")
        rows = enumerate(read_rows(source.path, split=source.split, columns=source.columns), start=1)
        found = list[_Numbered](source.choice.of(rows))
        if not found:
            raise InputError(f"{source.path}: no rows")
        return found

    def columns_of(self, path: str, rows: list[_Numbered]) -> tuple[str, ...]:
        """Return the columns to read; raise `InputError` for the first row that lacks one, or whose text is none."""
        sets = OBJECTIVE_COLUMNS[self.train.objective] if self.train is not None else tuple((c,) for c in TEXT_COLUMNS)
        columns = next((each for each in sets if all(name in rows[0][1] for name in each)), None)
        if columns is None:
            needed = " or ".join(", ".join(each) for each in sets)
            raise InputError(f"{path}: has no columns {needed}; it has {', '.join(rows[0][1])}; `columns` renames them")
        if self.train is None:
            columns = tuple(name for name in TEXT_COLUMNS if name in rows[0][1])
        for number, row in rows:
            for name in columns:
                is_right = isinstance(row.get(name), str if name in TEXT_COLUMNS else int | float)
                if not is_right:
                    kind = "text" if name in TEXT_COLUMNS else "number"
                    raise InputError(f"{path}: row {number} has {name} {row.get(name)!r}, which is no {kind}")
        return columns

    def training_rows(self, source: SourceSettings) -> list[dict[str, Any]]:
        """Return the rows as the objective reads them: scores become values in [0, 1], and labels numbers from 0."""
        rows = self._read(source)
        columns = self.columns_of(source.path, rows)
        found = [{name: row[name] for name in columns} for _, row in rows]
        if columns == ("text",) and self.train is not None:
            return [{"anchor": row["text"], "positive": row["text"]} for row in found]
        if "score" in columns and self.train is not None:
            for (number, _), row in zip(rows, found, strict=True):
                score = float(row["score"]) / self.train.max_score
                if not 0 <= score <= 1:
                    raise InputError(
                        f"{source.path}: row {number} has score {row['score']}, not from 0 to max_score: "
                        f"{self.train.max_score:g}"
                    )
                row["score"] = score
        if "label" in columns and self.train is not None:
            labels = sorted({row["label"] for row in found})
            if len(labels) < 2:
                raise InputError(f"{source.path}: all rows have label {labels[0]}; classification needs two or more")
            numbers = {label: number for number, label in enumerate(labels)}
            found = [{**row, "label": numbers[row["label"]]} for row in found]
        return found

    def cache_key(self, inputs: StepInputs) -> list[Any]:
        """Return what decides the encoder: settings, rows, and the content of the models."""
        models = [inputs.content(path) for path, _ in self.named_models()]
        return [*super().cache_key(inputs), *models, *(policy_key(inputs) if self.needs_policy() else [])]

    def estimate(self, planning: Planning) -> Estimate:
        """Return the number of rows; the time of sentence-transformers' trainer is not known before it runs."""
        rows = self._read(planning.inputs.sources[self.data])
        return Estimate(
            name=planning.name,
            stage=self.stage,
            rows=len(rows),
            flops=None,
            seconds=None,
            unknown="the trainer of sentence-transformers is not estimated",
        )

    def run(self, context: RunContext) -> dict[str, Any]:
        """Train and whiten the encoder, and write the folder."""
        from align.stages.training.embedder_training import make_embedder  # noqa: PLC0415 - imports torch

        inputs = context.inputs
        source = inputs.sources[self.data]
        rows = self.training_rows(source)
        inputs.check_unchanged(source)
        model = None if self.encoder.model is None else inputs.path_of(self.encoder.model)
        with within("steps", context.name):
            return make_embedder(self.encoder.model_copy(update={"model": model}), self.train, rows, context)
