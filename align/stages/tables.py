"""The tables that commands end with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

Made = Mapping[str, Mapping[str, Any]]  # manifest by step


def run_tables(made: Made) -> Iterator[Table]:
    """How the steps trained, what their reward models are worth, and how their policies answer."""
    yield _training_table(made)
    yield _attribute_table(made)
    yield _pair_table({step: manifest["report"]["pairs"] for step, manifest in made.items() if manifest.get("report")})
    yield _score_table(made)


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


def _attribute_table(made: Made) -> Table:
    title = "Reward models on held-out rows: squared error, that of the mean of the training rows, and correlation"
    table = _table(title, "step", "attribute", "error", "of the mean", "smaller by (95 %)", "correlation", "labels")
    for step, manifest in made.items():
        for each in manifest.get("report", {}).get("attributes", ()):
            gain = f"{each['gain']['value']:+.3f} ({each['gain']['low']:+.3f} to {each['gain']['high']:+.3f})"
            together = "" if each["pearson"] is None else f"{each['pearson']:.2f}"
            errors = [f"{each['mse']:.3f}", f"{each['mse_of_mean']:.3f}"]
            table.add_row(step, each["attribute"], *errors, gain, together, f"{each['n']:,}")
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


def _score_table(made: Made) -> Table:
    table = Table(title="Held-out prompts whose greedy response passes every check", box=SIMPLE)
    for name in ("policy", "task", "pass rate", "95 % interval", "prompts"):
        table.add_column(name, justify="left" if name in ("policy", "task") else "right")
    for manifest in made.values():
        scores: Mapping[str, Any] = manifest.get("scores", {})
        for step in manifest["settings"]["policies"] if scores else ():
            for task, found in scores[step].items():
                interval = f"{found['low']:.1%} to {found['high']:.1%}"
                table.add_row(step, task, f"{found['value']:.1%}", interval, str(found["n"]))
    return table
