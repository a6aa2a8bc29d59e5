"""The tables, charts and examples of each step that has measured the data it made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from align.artifacts import MEASURES
from align.report.figures import Chart
from align.report.formatting import count, fixed, percent, plain
from align.report.measures.charts import embedding_map, reward_ridges
from align.report.run_folder import Facts, Run, read_optional
from align.report.tables import Cell, Table

MAX_REASONS = 6  # with a column of their own; why rows were dropped
NUMBERS = {  # measure of a family -> heading of its column; a column without a value is left out
    "distinct": "distinct-{n}",
    "self_bleu": "self-BLEU",
    "vendi": "Vendi score",
    "mean_distance": "mean distance",
    "nearest_distance": "nearest distance",
    "reward_mean": "mean reward",
    "ifd_mean": "IFD",
    "pass_rate_mean": "pass rate",
}
EVERYTHING = "all families"


@dataclass(frozen=True, slots=True)
class MadeData:
    """What a step has measured about the data it made."""

    title: str  # the step, and the run it belongs to in a comparison
    yields: Table | None
    about: str
    table: Table
    topics: str
    charts: Sequence[Chart]
    examples: Sequence[Facts]  # family, text, reward, number of parents, and lineage: the same of each ancestor


def made_data(runs: Mapping[str, Run]) -> Iterator[MadeData]:
    """Yield the measures of each step that has some; `runs` is {label: run}."""
    for number, (label, run) in enumerate(runs.items()):
        for step in run.steps:
            found = read_optional(step.folder / MEASURES)
            if found:
                title = f"{step.name} of {label}" if label else step.name
                yield _made_data(title, found, name=f"m{number}-{step.name}")


def _made_data(title: str, found: Facts, *, name: str) -> MadeData:
    families: Mapping[str, Facts] = found["families"]
    charts: list[Chart] = []
    if found["rewards"]:
        charts.append(reward_ridges("Rewards by family", found["rewards"], families, name=f"{name}-r"))
    if found["map"]:
        charts.append(embedding_map("Map of embeddings", found["map"], list(families), name=f"{name}-e"))
    return MadeData(
        title, _yields(found), _about(found), _table(found), _topics(found["topics"]), charts, found["examples"]
    )


def _about(found: Facts) -> str:
    """Return on what the families were measured."""
    sample: Facts = found["sample"]
    return (
        f"Families are measured on samples of one size, where they are large enough: {sample['rows']:,} rows for "
        f"self-BLEU, {sample['embedded']:,} for Vendi score and distances, and {sample['words']:,} words for "
        f"distinct-{sample['n']}. Embeddings: "
        f"{found['embedding']}. A self-BLEU of 1 means copies, the Vendi score is the number of different rows, and "
        "distances are 1 − cosine."
    )


def _families(found: Facts) -> dict[str, Facts]:
    """Return the measures by family, and last those of all families where there are several."""
    families: dict[str, Facts] = dict(found["families"])
    return families if len(families) == 1 else {**families, EVERYTHING: found["all"]}


def _yields(found: Facts) -> Table | None:
    """Return what became of the rows that were asked for, by family; None if that is not known."""
    families = {name: measured for name, measured in _families(found).items() if measured.get("asked")}
    reasons = Counter[str]()
    for name, measured in families.items():
        reasons.update(measured["dropped"] if name != EVERYTHING else {})
    shown = [reason for reason, _ in reasons.most_common(MAX_REASONS)]
    others = len(reasons) > len(shown)
    rows = [
        [
            Cell(family),
            Cell(count(measured["asked"])),
            Cell(count(measured["rows"])),
            Cell(percent(measured["rows"] / measured["asked"])),
            *(_dropped(measured, [reason]) for reason in shown),
            *([_dropped(measured, [reason for reason in reasons if reason not in shown])] if others else []),
        ]
        for family, measured in families.items()
    ]
    columns = ["family", "asked for", "kept", "yield", *shown, *(["other reasons"] if others else [])]
    return Table("yields", columns, rows) if rows else None


def _dropped(measured: Facts, reasons: Iterable[str]) -> Cell:
    number = sum(measured["dropped"].get(reason, 0) for reason in reasons)
    return Cell(count(number) if number else "")


def _table(found: Facts) -> Table:
    """Return families by measures; a measure that no family has is left out."""
    families = _families(found)
    names = [name for name in NUMBERS if any(measured.get(name) is not None for measured in families.values())]
    rows = [
        [
            Cell(family),
            Cell(count(measured["rows"])),
            *(_number(measured, name, found["sample"]) for name in names),
        ]
        for family, measured in families.items()
    ]
    columns = ["family", "rows", *(NUMBERS[name].format(n=found["sample"]["n"]) for name in names)]
    return Table("measures", columns, rows)


def _number(measured: Facts, name: str, sample: Facts) -> Cell:
    """Return a measure, and below it a smaller sample, or what a mean does not say."""
    value = measured.get(name)
    if value is None:
        return Cell()
    below: list[str] = []
    if name == "distinct" and measured["words"] < sample["words"]:
        below.append(f"of {count(measured['words'])} words")
    for measure, size, wanted in (("self_bleu", "sampled", "rows"), ("vendi", "embedded", "embedded")):
        if name == measure and measured[size] < sample[wanted]:
            below.append(f"of {count(measured[size])} rows")
    if name == "reward_mean":
        below.append(f"± {fixed(measured['reward_deviation'])}")
        if measured["rewarded"] < measured["rows"]:
            below.append(f"of {count(measured['rewarded'])} rows")
    if name == "ifd_mean":
        below.append(f"above 1: {percent(measured['ifd_above_one'])}")
    if name == "pass_rate_mean":
        below.append(f"between 0 and 1: {percent(measured['pass_rate_between'])}")
    return Cell(plain(value) if name == "vendi" else fixed(value), below=[(text, "") for text in below])


def _topics(topics: Facts | None) -> str:
    """Return how rows cover their topics, as text; empty without topics."""
    if not topics:
        return ""
    parts = [f"{count(topics['num'])} topics, {percent(topics['covered'])} of them with rows"]
    if topics["evenness"] is not None:
        parts.append(f"evenness {fixed(topics['evenness'])} (1: as many rows of each)")
    lowest: Iterable[tuple[str, float]] = topics["lowest"]
    below_all = [f"{topic} {percent(share)}" for topic, share in lowest if share < 1]
    parts += [f"lowest yields: {', '.join(below_all)}"] if below_all else []
    return "; ".join(parts) + "."
