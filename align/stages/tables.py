"""The tables that commands end with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from align.artifacts import read_json
from align.pipeline import FINISHED, PlannedStep
from align.stages.estimates import Estimate

PLAN = ("step", "stage", "rows", "tokens", "FLOPs", "minutes", "MiB that stay", "what")

Made = Mapping[str, Mapping[str, Any]]  # manifest by step


def run_tables(made: Made, root: Path) -> Iterator[Table]:
    """How the steps trained and sampled, what reward models are worth, what it has cost, and how policies answer."""
    yield _training_table(made)
    yield _sampling_table({step: each for step, each in made.items() if "counts" in each.get("report", {})})
    reports = {step: manifest["report"] for step, manifest in made.items() if "pairs" in manifest.get("report", {})}
    yield _attribute_table(reports)
    yield _pair_table({step: report["pairs"] for step, report in reports.items()})
    yield _cost_table(made, read_json(root / "ledger.json"))
    scores = read_json(root / "table.json")  # by name, and told in the order of the steps
    yield _score_table({step: scores[step] for step in made if step in scores}, read_json(root / "changes.json"))


def plan_table(planned: Sequence[PlannedStep], estimates: Sequence[Estimate]) -> Iterator[Table]:
    """What a run would do, and what it takes."""
    known = {each.name: each for each in estimates}
    table = _table("What would be done; of what is made on the way the most", *PLAN)
    flops, seconds, disk = 0.0, 0.0, 0
    for step, state, why in planned:
        each = known[step.name]
        if state != FINISHED:
            flops, seconds, disk = flops + each.flops, seconds + each.seconds, disk + each.disk
        told = [f"{each.rows:,}", f"{each.tokens:,}", f"{each.flops:.1e}"] if each.rows else ["", "", ""]
        minutes = f"{each.seconds / 60:.1f}" if each.rows else ""
        table.add_row(step.name, each.stage, *told, minutes, f"{each.disk / 2**20:,.0f}", why)
    table.add_row(
        "all that is to be done", "", "", "", f"{flops:.1e}", f"{seconds / 60:.1f}", f"{disk / 2**20:,.0f}", ""
    )
    yield table


def scored_tables(summary: Mapping[str, Any]) -> Iterator[Table]:
    """What `align score` has rated, and how it agrees with what the rows said before."""
    table = _table(f"Rated by {summary['model']}", "rows", "left out", "responses", "mean reward", "lowest", "highest")
    known = summary.get("reward", {})
    rewards = [f"{known[name]:.3f}" for name in ("mean", "lowest", "highest") if known]
    counts = [summary["rated"], sum(summary["left_out"].values()), summary["responses"]]
    table.add_row(*(f"{count:,}" for count in counts), *rewards)
    yield table
    means = _table("Means of the attributes", "attribute", "mean")
    for name, value in summary.get("attributes", {}).items():
        means.add_row(name, f"{value:.3f}")
    yield means
    yield _pair_table({"": summary["agreement"]})


def generated_tables(summary: Mapping[str, Any]) -> Iterator[Table]:
    """What `align generate` has made of how many prompts and responses, and how the rewards lie."""
    counts = _table("Prompts and responses", "what", "number")
    for name, number in summary["counts"].items():
        counts.add_row(name, f"{number:,}")
    yield counts
    told = {
        "mean reward": summary["reward_mean"],
        "its deviation": summary["reward_deviation"],
        "mean gap of best and worst": summary["gap_mean"],
        "share of pairs in which the longer wins": summary["longer_wins"],
        "correlation of reward and length in a group": summary["length_correlation"],
    }
    rewards = _table("Rewards of what was kept", "figure", "value")
    for name, value in told.items():
        if value is not None:
            rewards.add_row(name, f"{value:.3f}")
    yield rewards


def evaluated_tables(summary: Mapping[str, Any]) -> Iterator[Table]:
    """The rates of `align evaluate`."""
    table = _table(f"Task {summary['task']}", "rate", "value", "95 % interval", "number")
    for name, found in summary["scores"].items():
        table.add_row(name, f"{found['value']:.4f}", f"{found['low']:.4f} to {found['high']:.4f}", f"{found['n']:,}")
    yield table


def _table(title: str, *columns: str) -> Table:
    """The first column on the left, figures on the right."""
    table = Table(title=title, box=SIMPLE)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    return table


def _attribute_table(reports: Made) -> Table:
    title = "Reward models on held-out rows: squared error, that of the mean of the training rows, and correlation"
    table = _table(title, "step", "attribute", "error", "of the mean", "smaller by (95 %)", "correlation", "labels")
    for step, report in reports.items():
        for each in report["attributes"]:
            gain = f"{each['gain']['value']:+.3f} ({each['gain']['low']:+.3f} to {each['gain']['high']:+.3f})"
            together = "" if each["pearson"] is None else f"{each['pearson']:.2f}"
            errors = [f"{each['mse']:.3f}", f"{each['mse_of_mean']:.3f}"]
            table.add_row(step, each["attribute"], *errors, gain, together, f"{each['n']:,}")
    return table


def _sampling_table(made: Made) -> Table:
    title = "Responses that were made or judged: prompts, groups to train on, mean reward, mean gap of best and worst"
    table = _table(title, "step", "prompts", "responses", "groups", "of a tie", "reward", "gap", "longer wins")
    for step, manifest in made.items():
        report = manifest["report"]
        names = ("prompts", "responses", "groups", "groups:left out, a tie")
        told = [f"{report['counts'].get(name, 0):,}" for name in names]
        values = [report[name] for name in ("reward_mean", "gap_mean", "longer_wins")]
        table.add_row(step, *told, *("" if value is None else f"{value:.3f}" for value in values))
    return table


def _cost_table(made: Made, whole: Mapping[str, Any]) -> Table:
    title = "What it took: tokens computed, arithmetic and its share of this machine's peak, memory, energy, cost"
    table = _table(title, "step", "tokens", "FLOPs", "of the peak", "seconds", "memory, GiB", "kWh", "CO2, kg", "cost")
    for step, each in [*((step, whole["steps"][step]) for step in made), ("all", whole["total"])]:
        flops = "" if each["flops"] is None else f"{each['flops']:.1e}"
        share = "" if each["mfu"] is None else f"{each['mfu']:.0%}"
        memory = "" if each["peak_memory_bytes"] is None else f"{each['peak_memory_bytes'] / 2**30:.2f}"
        energy = ["" if each[name] is None else f"{each[name]:.2g}" for name in ("energy_kwh", "co2_kg")]
        cost = "" if each["cost"] is None else f"{each['cost']:.2g} {each['currency']}"
        table.add_row(
            step, f"{each['tokens_computed']:,}", flops, share, f"{each['seconds']:,.1f}", memory, *energy, cost
        )
    wall_s, own_s = whole["last_call"]["wall_seconds"], whole["last_call"]["overhead_seconds"]
    table.caption = f"the last call took {wall_s:,.1f} s, of which {own_s:,.1f} s were no step's own"
    return table


def _pair_table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    table = _table("Pairs put in the order of the data", "step", "pairs", "right", "95 % interval", "number", "prompts")
    for step, pairs in found.items():
        rows = [("all", pairs["all"])] if pairs else []
        rows += [("margin {:g} to {:g}".format(*each["margin"]), each) for each in pairs.get("by_margin", ())]
        rows += [(each["subset"], each) for each in pairs.get("by_subset", ())]
        for name, each in rows:
            interval = f"{each['low']:.1%} to {each['high']:.1%}"
            table.add_row(step, name, f"{each['value']:.1%}", interval, f"{each['pairs']:,}", f"{each['n']:,}")
    return table


def _training_table(made: Made) -> Table:
    title = "Training: loss of the first and the last optimizer step, then of the held-out rows"
    table = _table(title, "step", "rows", "steps", "loss", "held-out loss", "margin", "accuracy")
    for step, manifest in made.items():
        if "last" in manifest:
            last, kept = manifest["last"], manifest["kept"]
            known = ("held_out/loss", "held_out/rewards/margins", "held_out/rewards/accuracies")
            held_out = [f"{kept[name]:.3f}" if name in kept else "" for name in known]
            losses = f"{manifest['first']['loss']:.3f} → {last['loss']:.3f}"
            table.add_row(step, f"{manifest['rows']['trained']:,}", str(manifest["optimizer_steps"]), losses, *held_out)
    return table


def _score_table(scores: Mapping[str, Mapping[str, Any]], changes: Mapping[str, Mapping[str, Any]]) -> Table:
    """Stages x evaluations, as in the report's table 6: value and interval, and the change from the stage before."""
    columns = list(dict.fromkeys(column for row in scores.values() for column in row))
    table = _table("Stages and evaluations, with 95 % intervals, and changes over the same prompts", "policy", *columns)
    table.show_lines = True
    for policy, row in scores.items():
        cells = [_cell(row.get(column), changes.get(policy, {}).get(column), column) for column in columns]
        table.add_row(policy, *cells)
    return table


def _cell(found: Mapping[str, Any] | None, change: Mapping[str, Any] | None, column: str) -> str:
    if found is None:
        return ""
    scale, form = (1, ".3f") if "nll" in column else (100, ".1f")
    value, low, high = (f"{scale * found[name]:{form}}" for name in ("value", "low", "high"))
    text = f"{value} [{low}, {high}]"
    if change is not None:
        moved, down, up = (f"{scale * change[name]:+{form}}" for name in ("value", "low", "high"))
        text += f"\n{moved} [{down}, {up}]"
    return text
