"""Tables that commands print when they finish."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from align.artifacts import read_json
from align.pipeline import FINISHED, PlannedStep
from align.registry import is_in_nats
from align.report.run_folder import SEARCH
from align.stages.costs.estimates import Estimate

PLAN = ("step", "stage", "rows", "tokens", "FLOPs", "minutes", "MiB kept", "status")

Made = Mapping[str, Mapping[str, Any]]  # manifest by step


def run_tables(made: Made, root: Path) -> Iterator[Table]:
    """Yield the tables of a run: training, samples, reward models, costs, and results."""
    yield _training_table(made)
    yield _selection_table({step: each["selection"] for step, each in made.items() if "selection" in each})
    yield _curation_table({step: each["curation"] for step, each in made.items() if "curation" in each})
    yield _sampling_table({step: each for step, each in made.items() if "counts" in each.get("report", {})})
    reports = {step: manifest["report"] for step, manifest in made.items() if "pairs" in manifest.get("report", {})}
    yield _attribute_table(reports)
    yield _pair_table({step: report["pairs"] for step, report in reports.items()})
    yield _cost_table(made, read_json(root / "ledger.json"))
    scores = read_json(root / "table.json")  # sorted by name; shown in the order of the steps
    if (root / SEARCH).is_file():
        yield from _search_tables(read_json(root / SEARCH), scores)
    yield _score_table({step: scores[step] for step in made if step in scores}, read_json(root / "changes.json"))


def plan_table(planned: Sequence[PlannedStep], estimates: Sequence[Estimate]) -> Iterator[Table]:
    """Yield the table of what a run would do, and its estimated cost."""
    known = {each.name: each for each in estimates}
    table = _table("Planned steps; upper bounds where an earlier step makes the rows", *PLAN)
    flops, seconds, disk, unknown = 0.0, 0.0, 0, 0
    for step, state, reason in planned:
        each = known[step.name]
        if state != FINISHED:
            flops, seconds, disk = flops + (each.flops or 0), seconds + (each.seconds or 0), disk + each.disk
            unknown += each.flops is None
        cost, minutes = "unknown", "unknown"
        if each.flops is not None and each.seconds is not None:
            cost, minutes = f"{each.flops:.1e}", f"{each.seconds / 60:.1f}"
        cells = [f"{each.rows:,}", f"{each.tokens:,}", cost] if each.rows else ["", "", ""]
        minutes = minutes if each.rows else ""
        table.add_row(step.name, each.stage, *cells, minutes, f"{each.disk / 2**20:,.0f}", reason)
    left_out = f"without {unknown} unknown" if unknown else ""
    totals = [f"{flops:.1e}", f"{seconds / 60:.1f}", f"{disk / 2**20:,.0f}"]
    table.add_row("total of the steps to run", "", "", "", *totals, left_out)
    yield table


def scored_tables(summary: Mapping[str, Any]) -> Iterator[Table]:
    """Yield the tables of `align score`: counts, rewards, and agreement with the rows' own preferences."""
    table = _table(f"Rated by {summary['model']}", "rows", "left out", "responses", "mean reward", "lowest", "highest")
    known = summary.get("reward", {})
    rewards = [f"{known[name]:.3f}" for name in ("mean", "lowest", "highest") if known]
    counts = [summary["rated"], sum(summary["left_out"].values()), summary["responses"]]
    table.add_row(*(f"{count:,}" for count in counts), *rewards)
    yield table
    means = _table("Mean of each attribute", "attribute", "mean")
    for name, value in summary.get("attributes", {}).items():
        means.add_row(name, f"{value:.3f}")
    yield means
    yield _pair_table({"": summary["agreement"]})
    yield _benchmark_table(summary.get("reward_bench", {}))


def _benchmark_table(found: Mapping[str, Any]) -> Table:
    """Return the scores of RewardBench or RewardBench 2: overall, sections, subsets."""
    table = _table(f"{found.get('benchmark')}: share of right preferences, in %", "", "value", "95 % interval", "rows")
    overall = {"overall": found["overall"]} if found.get("overall") else {}
    for name, each in {**overall, **found.get("sections", {}), **found.get("subsets", {})}.items():
        value, low, high = (f"{100 * each[key]:.1f}" for key in ("value", "low", "high"))
        table.add_row(name, value, f"{low} to {high}", f"{each['n']:,}")
    if others := found.get("other_rows"):
        table.caption = f"{others:,} rated rows are of none of the benchmark's subsets, and left out here"
    return table


def generated_tables(summary: Mapping[str, Any]) -> Iterator[Table]:
    """Yield the tables of `align generate`: counts, and statistics of the rewards."""
    counts = _table("Prompts and responses", "count", "number")
    for name, number in summary["counts"].items():
        counts.add_row(name, f"{number:,}")
    yield counts
    figures = {
        "mean reward": summary["reward_mean"],
        "standard deviation of the reward": summary["reward_deviation"],
        "mean gap between best and worst": summary["gap_mean"],
        "share of pairs won by the longer response": summary["longer_wins"],
        "correlation of reward and length within groups": summary["length_correlation"],
        "mean pass rate of a prompt": summary.get("pass_rate_mean"),
        "share of prompts that no response passes": summary.get("never_passed"),
        "share of prompts that every response passes": summary.get("always_passed"),
    }
    rewards = _table("Rewards of the kept groups", "figure", "value")
    for name, value in figures.items():
        if value is not None:
            rewards.add_row(name, f"{value:.3f}")
    yield rewards


def evaluated_tables(summary: Mapping[str, Any]) -> Iterator[Table]:
    """Yield the table of `align evaluate`: each metric with its interval."""
    table = _table(f"Task {summary['task']}", "metric", "value", "95 % interval", "number")
    for name, found in summary["scores"].items():
        table.add_row(name, f"{found['value']:.4f}", f"{found['low']:.4f} to {found['high']:.4f}", f"{found['n']:,}")
    yield table


def _table(title: str, *columns: str) -> Table:
    """Return an empty table: the first column left-aligned, the others right-aligned."""
    table = Table(title=title, box=SIMPLE)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    return table


def _attribute_table(reports: Made) -> Table:
    title = "Reward models on held-out rows: squared error, that of predicting the training mean, and correlation"
    table = _table(title, "step", "attribute", "error", "of the mean", "reduction (95 %)", "correlation", "labels")
    for step, report in reports.items():
        for each in report["attributes"]:
            gain = f"{each['gain']['value']:+.3f} ({each['gain']['low']:+.3f} to {each['gain']['high']:+.3f})"
            pearson = "" if each["pearson"] is None else f"{each['pearson']:.2f}"
            errors = [f"{each['mse']:.3f}", f"{each['mse_of_mean']:.3f}"]
            table.add_row(step, each["attribute"], *errors, gain, pearson, f"{each['n']:,}")
    return table


def _sampling_table(made: Made) -> Table:
    title = "Sampled or judged responses: prompts, groups, ties left out, mean reward, mean gap between best and worst"
    table = _table(title, "step", "prompts", "responses", "groups", "ties", "reward", "gap", "longer wins")
    for step, manifest in made.items():
        report = manifest["report"]
        names = ("prompts", "responses", "groups", "groups:left out, a tie")
        counts = [f"{report['counts'].get(name, 0):,}" for name in names]
        values = [report[name] for name in ("reward_mean", "gap_mean", "longer_wins")]
        table.add_row(step, *counts, *("" if value is None else f"{value:.3f}" for value in values))
    return table


def _selection_table(found: Made) -> Table:
    from align.report.selection.section import COLUMNS, comparison_cells, comparisons  # noqa: PLC0415 - imports matplotlib

    title = "Selection beside uniform training: held-out loss, uniform after as many steps and as many FLOPs, and cost"
    columns = ("loss", "equal steps", "equal FLOPs", "FLOPs of uniform", "effective", "chosen")
    table = _table(title, "step", "score, filter", *columns)
    compared = list(comparisons(found))
    for each in compared:
        cells = comparison_cells(each)
        table.add_row(each.step, *(cells[column] for column in COLUMNS if column != "rows"))
    table.caption = "\n".join(f"{each.step}: {each.once}" for each in compared if each.once)
    return table


def _search_tables(found: Made, scores: Made) -> Iterator[Table]:
    from align.report.search.section import summary, trial_rows  # noqa: PLC0415 - imports matplotlib

    _, rates = _columns_and_rates(scores)
    for step, search in found.items():
        columns, rows = trial_rows(search, rates)
        table = _table(f"Search of {step}", *columns)
        for row in rows:
            table.add_row(*row)
        table.caption = summary(search, rates)
        yield table


def _curation_table(found: Made) -> Table:
    reasons = ("rows", "test items", "exact duplicates", "near-duplicates", "merged", "kept")
    table = _table("Curated rows, by what became of them", "step", "source", *reasons)
    for step, report in found.items():
        for source, counts in report["sources"].items():
            table.add_row(step, source, *(f"{counts.get(reason, 0):,}" for reason in reasons))
    return table


def _cost_table(made: Made, whole: Mapping[str, Any]) -> Table:
    title = "Cost: tokens computed, FLOPs, MFU (of a matrix product's rate on this machine), memory, energy, money"
    table = _table(title, "step", "tokens", "FLOPs", "MFU", "seconds", "memory, GiB", "kWh", "CO2, kg", "cost")
    for step, each in [*((step, whole["steps"][step]) for step in made), ("all", whole["total"])]:
        flops = "" if each["flops"] is None else f"{each['flops']:.1e}"
        share = "" if each["mfu"] is None else f"{each['mfu']:.0%}"
        memory = "" if each["peak_memory_bytes"] is None else f"{each['peak_memory_bytes'] / 2**30:.2f}"
        energy = ["" if each[name] is None else f"{each[name]:.2g}" for name in ("energy_kwh", "co2_kg")]
        cost = "" if each["cost"] is None else f"{each['cost']:.2g} {each['currency']}"
        tokens = "" if each["tokens_computed"] is None else f"{each['tokens_computed']:,}"
        table.add_row(step, tokens, flops, share, f"{each['seconds']:,.1f}", memory, *energy, cost)
    wall_s, own_s = whole["last_call"]["wall_seconds"], whole["last_call"]["overhead_seconds"]
    table.caption = f"the last call took {wall_s:,.1f} s, of which {own_s:,.1f} s were pipeline overhead"
    return table


def _pair_table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    table = _table(
        "Accuracy on pairs: does the reward prefer the response that the data prefers?",
        "step",
        "pairs",
        "accuracy",
        "95 % interval",
        "number",
        "prompts",
    )
    for step, pairs in found.items():
        rows = [("all", pairs["all"])] if pairs else []
        rows += [("margin {:g} to {:g}".format(*each["margin"]), each) for each in pairs.get("by_margin", ())]
        rows += [(each["subset"], each) for each in pairs.get("by_subset", ())]
        for name, each in rows:
            interval = f"{each['low']:.1%} to {each['high']:.1%}"
            table.add_row(step, name, f"{each['value']:.1%}", interval, f"{each['pairs']:,}", f"{each['n']:,}")
    return table


def _training_table(made: Made) -> Table:
    title = "Training: loss of the first and last optimizer step, and metrics of the held-out rows"
    table = _table(title, "step", "rows", "steps", "loss", "held-out loss", "margin", "accuracy")
    for step, manifest in made.items():
        if "last" in manifest:
            last, kept = manifest["last"], manifest["kept"]
            known = ("held_out/loss", "held_out/rewards/margins", "held_out/rewards/accuracies")
            held_out = [f"{kept[name]:.3f}" if name in kept else "" for name in known]
            losses = f"{manifest['first']['loss']:.3f} → {last['loss']:.3f}" if last else "diverged"
            table.add_row(step, f"{manifest['rows']['trained']:,}", str(manifest["optimizer_steps"]), losses, *held_out)
    return table


def _score_table(scores: Mapping[str, Mapping[str, Any]], changes: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return policies x evaluations, as in table 6 of the Nemotron-4 report: value, interval, and paired change."""
    columns, rates = _columns_and_rates(scores)
    table = _table("Results with 95 % intervals, and paired changes against the policy before", "policy", *columns)
    table.show_lines = True
    for policy, row in scores.items():
        changed = changes.get(policy, {})
        cells = [_cell(row.get(column), changed.get(column), is_rate=column in rates) for column in columns]
        table.add_row(policy, *cells)
    return table


def _columns_and_rates(scores: Made) -> tuple[list[str], set[str]]:
    """Return the columns of the results table, and those of them that are shown in %."""
    values: dict[str, list[Mapping[str, Any]]] = {}
    for row in scores.values():
        for column, found in row.items():
            values.setdefault(column, []).append(found)
    return list(values), {column for column, found in values.items() if _is_rate(column, found)}


def _is_rate(column: str, found: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the values of a column are shares, which are shown in %, unlike lengths or log-probabilities."""
    return not is_in_nats(column) and all(0 <= each["value"] <= 1 for each in found)


def _cell(found: Mapping[str, Any] | None, change: Mapping[str, Any] | None, *, is_rate: bool) -> str:
    if found is None:
        return ""
    scale, form = (100, ".1f") if is_rate else (1, ".3f")
    value, low, high = (f"{scale * found[name]:{form}}" for name in ("value", "low", "high"))
    text = f"{value} [{low}, {high}]"
    if change is not None:
        moved, down, up = (f"{scale * change[name]:+{form}}" for name in ("value", "low", "high"))
        text += f"\n{moved} [{down}, {up}]"
    return text
