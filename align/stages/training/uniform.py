"""The uniform runs that a step with selection is compared with, its references, and the check of its settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast

from align.content_hash import STEP
from align.errors import InputError, within
from align.registry import import_dotted, pick
from align.stages.base import Placed, Stage
from align.train.selection.settings import CROSS_FIT, SCORES, UNIFORM, SelectionSettings, fold_names
from align.train.settings import TrainSettings

EQUAL_STEPS = "-steps"  # after the name of a uniform run, for one that ends with as many steps


class SelectingStage(Protocol):
    """What is asked here of a step that trains."""

    train: TrainSettings
    selection: SelectionSettings | None

    def model_copy(self, *, update: Mapping[str, Any] | None = None) -> Any:  # noqa: ANN401 - a stage of the same kind
        """Return the step with other settings."""
        ...


def uniform_names(step: SelectingStage, name: str) -> list[str]:
    """Return the names of the uniform runs beside a step.

    Under a schedule that decays to the end, a run of another length is no comparison at equal steps, so there are two.
    """
    if step.selection is None or step.selection.score == UNIFORM or step.selection.compare != UNIFORM:
        return []
    beside = f"{name}-{UNIFORM}"
    return [beside] if step.train.schedule == "constant" else [beside, beside + EQUAL_STEPS]


def reference_names(step: SelectingStage, name: str) -> list[str]:
    """Return the names of the steps that train the cross-fitted references of a step."""
    return fold_names(name) if step.selection is not None and step.selection.reference == CROSS_FIT else []


def with_uniform(name: str, step: SelectingStage, before: Mapping[str, Stage]) -> list[Placed]:
    """Return a training step after its cross-fitted references and the uniform runs beside it.

    Raise for an unknown step to compare with.
    """
    selection = step.selection
    if selection is None:
        return [Placed(name, cast(Stage, step))]
    selections: dict[str, SelectionSettings] = {}  # of the steps to return, by name
    references = reference_names(step, name)
    for fold, reference in enumerate(references, start=1):
        values = {"score": UNIFORM, "filter": 0, "compare": None, "fold": fold, "score_layers": selection.score_layers}
        selections[reference] = SelectionSettings.model_validate(values)
    if references:
        selection = selection.model_copy(update={"reference": f"{CROSS_FIT}:{name}"})
    _check_reference_layers(selection, before)
    _check_baseline(selection, before)
    names = uniform_names(step, name)
    for beside in names:
        selections[beside] = _uniform(selection, has_equal_steps=beside.endswith(EQUAL_STEPS))
    selections[name] = selection.model_copy(update={"compare": STEP + names[0]}) if names else selection
    return [Placed(each, step.model_copy(update={"selection": own})) for each, own in selections.items()]


def _uniform(selection: SelectionSettings, *, has_equal_steps: bool) -> SelectionSettings:
    """Return the settings of a uniform run beside one that selects: for as many steps, or for as many FLOPs."""
    changes: dict[str, Any] = {"score": UNIFORM, "compare": None, "equal": "flops"}
    if has_equal_steps:
        without = {"coupling": "none", "reference": None, "scorer": None, "score_layers": None}
        changes |= {"equal": "steps", **without}
    return selection.model_copy(update=changes)


def _check_baseline(selection: SelectionSettings, before: Mapping[str, Stage]) -> None:
    """Raise for an unknown step to compare with, and for one that averages its weights."""
    if selection.compare in (None, UNIFORM):
        return
    with within("selection", "compare"):
        baseline = pick(before, selection.compare.removeprefix(STEP), "earlier step")
        train: TrainSettings | None = getattr(baseline, "train", None)
        if train is not None and train.average is not None:
            raise InputError(
                f"{selection.compare} saves averaged weights, whose last held-out loss is no baseline for single "
                "ones; compare with a step without train.average"
            )


def _check_reference_layers(selection: SelectionSettings, before: Mapping[str, Stage]) -> None:
    """Raise unless the reference was trained through as many first layers as score it."""
    layers = selection.score_layers
    for name in selection.fixed_steps.get("reference", ()) if layers is not None else ():
        own: SelectionSettings | None = getattr(before.get(name), "selection", None)
        if name in before and (own is None or not own.trains_exit or own.score_layers != layers):
            setting = f"selection: {{score: uniform, filter: 0, compare: null, score_layers: {layers}}}"
            message = f"{name!r} was not trained through its first {layers} layer(s); give that step `{setting}`"
            raise InputError(message, ("selection", "reference"))


def check_selection(
    selection: SelectionSettings, train: TrainSettings, *, needs_kl: bool, needs_reference: bool
) -> None:
    """Raise located `InputError`s for settings of a selection that cannot work with the training."""
    if selection.score not in SCORES:
        with within("selection", "score"):
            import_dotted(selection.score, "score")
    is_given = "chunks" in selection.model_fields_set
    if is_given and selection.score != UNIFORM and selection.chunks > train.prompts_per_step:
        raise InputError(
            f"{selection.chunks} is more than the {train.prompts_per_step} rows that a step chooses; use at most that",
            ("selection", "chunks"),
        )
    if selection.coupling != "none" and min(selection.chunks, train.prompts_per_step) == 1:
        raise InputError(
            "needs chunks and prompts_per_step of 2 or more: rows that are drawn together do not affect each other",
            ("selection", "coupling"),
        )
    if selection.score_layers is not None:
        _check_layers(train, needs_reference=needs_reference)
    if train.average is not None and selection.compare is not None:
        raise InputError(
            "the baseline is also evaluated before its last step, where its weights are not averaged; set "
            "selection.compare to null",
            ("train", "average"),
        )
    if needs_kl:
        raise InputError(
            "kto estimates its reference point from the rows of a step, which are not known before they are scored; "
            "use apo_zero_unpaired, or leave selection out",
            ("selection",),
        )


def _check_layers(train: TrainSettings, *, needs_reference: bool) -> None:
    """Raise `InputError` for training that `score_layers` does not support."""
    with within("selection", "score_layers"):
        if needs_reference:
            raise InputError("is for losses without reference log-probabilities, which are those of all layers")
        if train.prompts_per_step == 1:
            raise InputError("needs prompts_per_step of 2 or more: half of the rows train only the first layers")
        if train.reduce == "each":
            raise InputError("needs train.reduce: once, as passes through the first layers leave the others out")
