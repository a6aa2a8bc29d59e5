"""The page: a run's facts through the template, in one file that needs no other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import yaml
from jinja2 import Environment, StrictUndefined

from align.artifacts import disk_errors, write_text
from align.errors import InputError
from align.report import charts, samples, spending, tables
from align.report.quantities import RATE, change_text, duration, interval_text, plain, scaled, score_text, share
from align.report.reading import FINISHED, FIRST, SECOND, Facts, Run, read_run

PAGE = "report.html"
TILES = 3  # tasks at the head of the page
GENERATED = {
    "reward_mean": "mean reward",
    "reward_deviation": "its deviation",
    "gap_mean": "mean gap of best and worst",
    "longer_wins": "share of pairs in which the longer wins",
    "length_correlation": "correlation of reward and length in a group",
}


@dataclass(frozen=True, slots=True)
class Tile:
    """One figure at the head of the page."""

    title: str
    value: str
    note: str


def write_report(run: Path, out: Path | None = None, *, compare: Path | None = None) -> Path:
    """Where the page was written: `out`, or report.html in the run's folder. It appears whole."""
    folders = [run] if compare is None else [run, compare]
    text = render([read_run(folder) for folder in folders])
    target = run / PAGE if out is None else out
    if target.is_dir():
        raise InputError(f"{target}: is a folder; the page needs the name of a file")
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, text, errors="replace")
    return target


def render(found: Sequence[Run]) -> str:
    """The page of one run, or of two side by side; the same runs give the same page."""
    labels = [""] if len(found) == 1 else [FIRST, SECOND]
    runs = dict(zip(labels, found, strict=True))
    made = {label: list(samples.generated(run)) for label, run in runs.items()}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files("align.report").joinpath("page.html").read_text("utf-8"))
    return template.render(
        runs=runs,
        title=" and ".join(run.name for run in found),
        status={label: _status(run) for label, run in runs.items()},
        tiles={label: list(_tiles(run)) for label, run in runs.items()},
        results=tables.results(runs),
        paired=any(run.changes for run in found),
        score_charts=list(charts.scores(runs)),
        steps=tables.steps(runs),
        training=list(charts.training(runs)),
        rewards=[
            (chart, [(label, step, _account(step.report)) for label, step in steps])
            for chart, steps in charts.rewards(made)
        ],
        groups=[(label, step) for label, steps in made.items() for step in steps if step.samples],
        evaluated=list(samples.evaluated(found[0], found[1] if len(found) > 1 else None)),
        reward_models=list(tables.reward_models(runs)),
        ledger=spending.ledger(runs),
        sources=spending.sources(runs),
        rows=tables.rows_read(runs),
        differences=tables.differences(*found) if len(found) > 1 else None,
        recipes={label: _recipe(run) for label, run in runs.items()},
        versions={label: _versions(run) for label, run in runs.items()},
    )


def _status(run: Run) -> str:
    """How far the run has come, and its seed."""
    done = sum(step.state == FINISHED for step in run.steps)
    far = f"all {done} steps finished" if done == len(run.steps) else f"{done} of {len(run.steps)} steps finished"
    return f"{far} · seed {run.recipe['seed']}" if "seed" in run.recipe else far


def _tiles(run: Run) -> Iterator[Tile]:
    """What a reader wants to know first: how far the first tasks have come, and what it took."""
    for task in run.tasks[:TILES]:
        known = [(policy, scores[task]) for policy, scores in run.table.items() if task in scores]
        rate = charts.unit_of(task, [run]) == RATE
        (first, before), (last, after) = known[0], known[-1]
        value = score_text(after["value"], rate=rate)
        if first == last:
            yield Tile(task, value, f"{last}, {interval_text(after, rate=rate)}")
        else:
            moved = change_text(after["value"] - before["value"], rate=rate)
            yield Tile(task, value, f"{last}; {moved} since {first}")
    trained = _spent(run, "tokens_trained")
    if trained:
        computed = _spent(run, "tokens_computed")
        yield Tile("tokens trained", scaled(trained), f"{scaled(computed)} computed" if computed else "")
    if seconds := _spent(run, "seconds"):
        energy = run.total.get("energy_kwh")
        yield Tile("time", duration(seconds), f"{plain(energy)} kWh" if energy is not None else "")


def _spent(run: Run, name: str) -> float:
    """The run's total where there is a ledger, else the sum over the optimizer steps."""
    if run.total.get(name) is not None:
        return float(run.total[name])
    ledgers = [of[name] for of in run.ledgers.values() if of.get(name) is not None]
    return sum(ledgers) if ledgers else sum(line.get(name, 0.0) for step in run.steps for line in step.metrics)


def _account(report: Facts) -> list[tuple[str, str]]:
    """What a step says of the responses it generated, as (what, how much)."""
    counts: Mapping[str, float] = report.get("counts") or {}
    told = [
        (title, share(report[name]) if name == "longer_wins" else plain(report[name]))
        for name, title in GENERATED.items()
        if report.get(name) is not None
    ]
    return told + [(name.replace(":", ": "), plain(number)) for name, number in counts.items()]


def _recipe(run: Run) -> str:
    """The resolved recipe as YAML; empty where the run did not keep it."""
    if not run.recipe:
        return ""
    return yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)


def _versions(run: Run) -> list[tuple[str, str]]:
    """Package and version of the last finished step; several versions of one package are all named."""
    found: dict[str, dict[str, None]] = {}
    for step in run.steps:
        for name, version in (step.manifest.get("versions") or {}).items():
            found.setdefault(name, {})[str(version)] = None
    return [(name, ", ".join(versions)) for name, versions in found.items()]
