"""Render the page from its template into one HTML file without external resources."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from statistics import median

import yaml
from jinja2 import Environment, StrictUndefined

from align.artifacts import write_text
from align.errors import InputError
from align.report import charts, differences, ledger, samples, tables
from align.report.formatting import (
    RATE,
    change_text,
    duration,
    interval_text,
    percent,
    plain,
    scaled,
    score_text,
    size,
)
from align.report.markdown import markdown
from align.report.measures.section import made_data
from align.report.pareto import section as pareto
from align.report.run_folder import FINISHED, LABELS, MEMORY, MIB, RUNNING, THROUGHPUT, Facts, Run, read_run
from align.report.search.section import searches
from align.report.selection.section import selection_charts, selection_table
from align.storage.disk_errors import disk_errors

PAGE, MARKDOWN = "report.html", "report.md"
MAX_TILES = 3  # tasks at the top of the page
ENVIRONMENT = {"host": "host", "device": "device", "git_commit": "git commit", "command": "command"}
GENERATION = {
    "reward_mean": "mean reward",
    "reward_deviation": "standard deviation of rewards",
    "gap_mean": "mean gap between best and worst of a group",
    "longer_wins": "pairs in which the longer response wins",
    "length_correlation": "correlation of reward and length within groups",
    "pass_rate_mean": "mean pass rate of a prompt",
    "never_passed": "prompts that no response passes",
    "always_passed": "prompts that every response passes",
}
PERCENTAGES = ("longer_wins", "pass_rate_mean", "never_passed", "always_passed")


@dataclass(frozen=True, slots=True)
class Tile:
    """A headline number at the top of the page."""

    title: str
    value: str
    note: str


def write_report(
    run: Path, out: Path | None = None, *, compare: Sequence[Path] = (), as_markdown: bool = False
) -> Path:
    """Write the page of a run folder, with other runs beside it, and return its path.

    The path is `out`, or `report.html` in the run folder; `report.md` for its tables as Markdown. The file is written
    atomically.
    """
    if len(compare) >= len(LABELS):
        raise InputError(f"a page compares at most {len(LABELS)} runs, not {1 + len(compare)}")
    found = [read_run(folder) for folder in (run, *compare)]
    text = render_markdown(found) if as_markdown else render(found)
    target = run / (MARKDOWN if as_markdown else PAGE) if out is None else out
    if target.is_dir():
        raise InputError(f"{target}: is a folder; give the name of a file")
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, text, errors="replace")
    return target


def render_markdown(found: Sequence[Run]) -> str:
    """Return results, costs, steps, made data, ledger and rows of one run, or of several side by side, as Markdown."""
    runs = _labelled(found)
    tables_found: dict[str, tables.Table | None] = {
        "Results by stage": tables.results_table(runs),
        "Measures beside the scores": tables.measures_table(runs),
        **{
            f"Prompts of {each.task} on which the runs differ": each.table
            for each in differences.prompt_differences(runs)
        },
        **dict(pareto.tables(pareto.pareto(runs, with_charts=False))),
        "Steps": tables.steps_table(runs),
        **{each.title: each.table for each in searches(runs)},
        "Selection": selection_table(runs),
        **{f"Rows asked of {made.title}": made.yields for made in made_data(runs)},
        **{f"Data made by {made.title}": made.table for made in made_data(runs)},
        "Ledger": ledger.ledger_table(runs),
        "Data rows": tables.rows_table(runs),
        "Settings that differ": tables.differences_table(runs),
    }
    about = [f"{label} {run.name}: {_status(run)}" if label else _status(run) for label, run in runs.items()]
    shown = [(heading, table) for heading, table in tables_found.items() if table is not None and table.rows]
    return markdown(_title(found), about, shown)


def render(found: Sequence[Run]) -> str:
    """Return the page of one run, or of several side by side; the same runs give the same text."""
    runs = _labelled(found)
    generated = {label: list(samples.generation_samples(run)) for label, run in runs.items()}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files("align.report").joinpath("page.html").read_text("utf-8"))
    return template.render(
        runs=runs,
        title=_title(found),
        status={label: _status(run) for label, run in runs.items()},
        tiles={label: list(_tiles(run)) for label, run in runs.items()},
        results=tables.results_table(runs),
        has_changes=any(run.changes for run in found),
        measures=tables.measures_table(runs),
        prompt_differences=list(differences.prompt_differences(runs)),
        score_charts=list(charts.score_charts(runs)),
        pareto=pareto.pareto(runs),
        steps=tables.steps_table(runs),
        reward_models=list(tables.reward_model_tables(runs)),
        training=list(charts.training_curves(runs)),
        searches=list(searches(runs)),
        selection=selection_table(runs),
        selection_charts=list(selection_charts(runs)),
        rewards=[
            (chart, [(label, step, _generation_statistics(step.report)) for label, step in steps])
            for chart, steps in charts.reward_histograms(generated)
        ],
        made=list(made_data(runs)),
        evaluated=list(samples.evaluation_samples(found[0], dict(list(runs.items())[1:]))),
        groups=[(label, step) for label, steps in generated.items() for step in steps if step.samples],
        ledger=ledger.ledger_table(runs),
        sources=ledger.sources(runs),
        rows=tables.rows_table(runs),
        differences=tables.differences_table(runs),
        recipes={label: _recipe(run) for label, run in runs.items()},
        versions={label: _versions(run) for label, run in runs.items()},
        environments={label: _environment(run) for label, run in runs.items()},
    )


def _labelled(found: Sequence[Run]) -> dict[str, Run]:
    return dict(zip([""] if len(found) == 1 else LABELS, found, strict=False))


def _title(found: Sequence[Run]) -> str:
    names = [run.name for run in found]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _status(run: Run) -> str:
    """Return how many steps are finished, the seed, and when and where the last step ran."""
    finished = sum(step.state == FINISHED for step in run.steps)
    is_complete = finished == len(run.steps)
    parts = [f"all {finished} steps finished" if is_complete else f"{finished} of {len(run.steps)} steps finished"]
    parts += [f"{step.name} is running" for step in run.steps if step.state == RUNNING]
    parts += [f"seed {run.recipe['seed']}"] if "seed" in run.recipe else []
    known = max((step.environment for step in run.steps), key=lambda found: str(found.get("time", "")), default={})
    parts += [str(known["time"]).replace("T", " ").replace("+00:00", " UTC")] if known.get("time") else []
    parts += [str(known[name]) for name in ("host", "device") if known.get(name)]
    return " · ".join(parts)


def _tiles(run: Run) -> Iterator[Tile]:
    """Yield the last score of the first tasks, then tokens and time."""
    for task in run.tasks[:MAX_TILES]:
        known = [(policy, scores[task]) for policy, scores in run.table.items() if task in scores]
        rate = charts.unit_of(task, [run]) == RATE
        (first, before), (last, after) = known[0], known[-1]
        value = score_text(after["value"], rate=rate)
        if first == last:
            yield Tile(task, value, f"{last}, {interval_text(after, rate=rate)}")
        else:
            change = change_text(after["value"] - before["value"], rate=rate)
            yield Tile(task, value, f"{last}, {change} vs. {first}")
    trained = _total(run, "tokens_trained")
    if trained:
        computed = _total(run, "tokens_computed")
        yield Tile("tokens trained", scaled(trained), f"{scaled(computed)} computed" if computed else "")
    if seconds := _total(run, "seconds"):
        energy = run.total.get("energy_kwh")
        yield Tile("time", duration(seconds), f"{plain(energy)} kWh" if energy is not None else "")
    if rates := [line[THROUGHPUT] for step in run.steps for line in step.metrics if THROUGHPUT in line]:
        peak = max((line[MEMORY] for step in run.steps for line in step.metrics if MEMORY in line), default=None)
        yield Tile(
            "throughput", f"{scaled(median(rates))}/s", f"tokens trained; peak {size(peak * MIB)}" if peak else ""
        )
    if sizes := [found["weights"] for found in run.ledgers.values() if found.get("weights")]:
        yield Tile("model", scaled(max(sizes)), "parameters")


def _total(run: Run, name: str) -> float:
    """Return the run's total from its ledger, else the sum over steps or over optimizer steps."""
    if run.total.get(name) is not None:
        return float(run.total[name])
    known = [found[name] for found in run.ledgers.values() if found.get(name) is not None]
    return sum(known) if known else sum(line.get(name, 0.0) for step in run.steps for line in step.metrics)


def _generation_statistics(report: Facts) -> list[tuple[str, str]]:
    """Return what a step reports about the responses it generated, as (name, value)."""
    counts: Mapping[str, float] = report.get("counts") or {}
    statistics = [
        (title, percent(report[name]) if name in PERCENTAGES else plain(report[name]))
        for name, title in GENERATION.items()
        if report.get(name) is not None
    ]
    return statistics + [(name.replace(":", ": "), plain(number)) for name, number in counts.items()]


def _recipe(run: Run) -> str:
    """Return the resolved recipe as YAML, or '' if the run folder has none."""
    if not run.recipe:
        return ""
    return yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)


def _versions(run: Run) -> list[tuple[str, str]]:
    """Return each package with its version, or all versions where the steps used several."""
    return _distinct((pair for step in run.steps for pair in (step.manifest.get("versions") or {}).items()), ", ")


def _environment(run: Run) -> list[tuple[str, str]]:
    """Return where, when and from what the steps ran, with all values where steps differ."""
    known = ((title, step.environment.get(name)) for step in run.steps for name, title in ENVIRONMENT.items())
    return _distinct(((title, value) for title, value in known if value), "; ")


def _distinct(pairs: Iterable[tuple[str, object]], separator: str) -> list[tuple[str, str]]:
    """Return each name once, with its distinct values joined."""
    found: dict[str, dict[str, None]] = {}
    for name, value in pairs:
        found.setdefault(name, {})[str(value)] = None
    return [(name, separator.join(values)) for name, values in found.items()]
