"""Steps that select their rows, beside the uniform runs that they are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from align.report.curves import Line, curves
from align.report.figures import Chart
from align.report.formatting import fixed, percent, scaled
from align.report.run_folder import Facts, Run
from align.report.svg import SERIES
from align.report.tables import Cell, Table

STEP = "step:"
EQUAL_STEPS = "-steps"  # after the name of a uniform run: one that ends with as many steps
FLOPS_TOLERANCE = 1.02  # of "equal FLOPs": a run ends with a whole step, and rows differ in length
COLUMNS = ("score", "loss", "uniform, equal steps", "uniform, equal FLOPs", "cost", "rows", "effective", "chosen")
HEADINGS = {
    "score": "score, filter",
    "loss": "held-out loss",
    "cost": "FLOPs of uniform",
    "rows": "rows scored per step",
    "effective": "effective sample size",
    "chosen": "share of each source",
}


class Comparison(NamedTuple):
    """A selecting step: its last held-out loss, and the uniform run's after as many steps and as many FLOPs."""

    step: str
    beside: str | None  # the uniform run
    selected: Facts
    loss: float | None
    equal_steps: float | None
    equal_flops: float | None
    ended: float | None  # FLOPs of the uniform run over those of the step, where they are fewer

    @property
    def verdict(self) -> str:
        """Return whether the selection has the lower loss at equal FLOPs."""
        if self.loss is None or self.equal_flops is None:
            reason = "" if self.ended is None else f": uniform ended at {percent(self.ended)} of the FLOPs"
            return f"not compared{reason}"
        return "won" if self.loss < self.equal_flops else "lost"

    @property
    def cost(self) -> float:
        """Return the FLOPs of training and scoring over those of training on as many rows of mean length."""
        uniform = self.selected.get("uniform_flops", self.selected["training_flops"])  # of older versions
        return (self.selected["training_flops"] + self.selected["scoring_flops"]) / uniform

    @property
    def once(self) -> str:
        """Return what fixed models have cost, and whether that includes their training; empty if there are none."""
        passes = self.selected["reference_flops"]
        training = self.selected.get("reference_training_flops")
        if not passes:
            return ""
        trained = f", training of the references: {scaled(training)}" if training else ", their training not included"
        return f"fixed models: {scaled(passes)} FLOPs, once{trained}"


def comparisons(selections: Mapping[str, Facts]) -> Iterator[Comparison]:
    """Yield each selecting step; `selections` maps steps to what their manifests say of their selection."""
    for name, found in selections.items():
        if found["score"] == "uniform" or found["training_flops"] is None:
            continue
        beside = None if found["compare"] is None else found["compare"].removeprefix(STEP)
        other, same = selections.get(beside or ""), selections.get(f"{beside}{EQUAL_STEPS}")
        curve = found["curve"]
        steps = (same or other or {}).get("curve", [])
        used = sum(
            found.get(f"{name}_flops", 0.0) for name in ("training", "scoring", "reference", "reference_training")
        )
        beside_curve = (other or {}).get("curve", [])
        yield Comparison(
            name,
            beside if other is not None else None,
            found,
            curve[-1][2] if curve else None,
            next((loss for step, _, loss in reversed(steps) if step <= found["steps"]), None),
            _loss_at(beside_curve, used),
            beside_curve[-1][1] / used if beside_curve and beside_curve[-1][1] < used else None,
        )


def _loss_at(curve: Sequence[Sequence[float]], used: float) -> float | None:
    """Return the loss of the last point of about as many FLOPs, or else on the line between the points around them.

    None if all points have more, or all have fewer.
    """
    before = [point for point in curve if point[1] <= used * FLOPS_TOLERANCE]
    if not before:
        return None
    _, flops, loss = before[-1]
    if flops >= used / FLOPS_TOLERANCE:
        return loss
    if len(before) == len(curve):
        return None
    _, next_flops, next_loss = curve[len(before)]
    return loss + (next_loss - loss) * (used - flops) / (next_flops - flops)


def comparison_cells(compared: Comparison) -> dict[str, str]:
    """Return what is shown of a selecting step, by column."""
    found = compared.selected
    shares = {name.removeprefix("share/"): found[name] for name in found if name.startswith("share/")}
    parts = [f"{name} {percent(share)} of {percent(found[f'pool_share/{name}'])}" for name, share in shares.items()]
    size = found.get("effective_sample_size")
    length = ""
    if "mean_tokens" in found:
        length = f", chosen rows {found['mean_tokens_chosen'] / found['mean_tokens']:.2f} × as long"
    return {
        "score": f"{found['score']}, {found['filter']:g}",
        "loss": fixed(compared.loss) if compared.loss is not None else "",
        "uniform, equal steps": fixed(compared.equal_steps) if compared.equal_steps is not None else "",
        "uniform, equal FLOPs": f"{fixed(compared.equal_flops)} ({compared.verdict})"
        if compared.equal_flops is not None
        else compared.verdict,
        "cost": f"{compared.cost:.2f} × ({found['predicted_cost']:.2f} predicted)",
        "rows": f"{found['rows']:,.0f}{length}" if "rows" in found else "",
        "effective": f"{size:,.1f}" if size is not None else "",
        "chosen": ", ".join(parts) or (f"{percent(found['token_share'])} of tokens" if "token_share" in found else ""),
    }


def selection_table(runs: Mapping[str, Run]) -> Table | None:
    """Return the selecting steps of the runs; None if there are none."""
    rows: list[list[Cell]] = []
    for label, run in runs.items():
        for compared in comparisons(_selections(run)):
            cells = comparison_cells(compared)
            name = f"{compared.step} of {label}" if label else compared.step
            below = [(compared.once, "quiet")] if compared.once else []
            rows.append([Cell(name, below=below), *(Cell(cells[column]) for column in COLUMNS)])
    return Table("selection", ["step", *(HEADINGS.get(column, column) for column in COLUMNS)], rows) if rows else None


def selection_charts(runs: Mapping[str, Run]) -> Iterator[Chart]:
    """Yield the held-out loss over FLOPs of the steps that are compared with one uniform run."""
    for number, (label, run) in enumerate(runs.items()):
        found = _selections(run)
        together: dict[str, list[str]] = {}
        for compared in comparisons(found):
            together.setdefault(compared.beside or compared.step, []).append(compared.step)
        for beside, names in together.items():
            shown = list(dict.fromkeys([beside, *names]))
            lines = [
                Line(name, [(flops, loss) for _, flops, loss in found[name]["curve"]], place % len(SERIES), marked=True)
                for place, name in enumerate(shown)
                if found[name]["curve"]
            ]
            if lines:
                title = "Held-out loss over training FLOPs" + (f", {label}" if label else "")
                yield curves(title, lines, name=f"sel{number}-{beside}", allow_log=True, axis="FLOPs, scoring included")


def _selections(run: Run) -> dict[str, Facts]:
    return {step.name: step.manifest["selection"] for step in run.steps if step.manifest.get("selection")}
