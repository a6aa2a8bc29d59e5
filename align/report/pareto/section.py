"""The tables and charts of quality against cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

from align.report.charts import all_policies, all_tasks, unit_of
from align.report.figures import Chart
from align.report.formatting import UNKNOWN
from align.report.pareto.chart import Series, pareto_chart
from align.report.pareto.costs import RESOURCES, Resource, policy_costs
from align.report.pareto.front import DOMINATED, FRONT, NO_COST, UNDECIDED, IsWorse, Point, verdicts
from align.report.pareto.paired import is_worse, read_answers
from align.report.run_folder import Run
from align.report.tables import Cell, Table, row_name

MAX_TASKS = 4  # with charts of the other resources; tables have all tasks
STATUSES = (FRONT, UNDECIDED, DOMINATED, NO_COST)


@dataclass(frozen=True, slots=True)
class Costs:
    """The policies of a task against one resource."""

    resource: str
    table: Table  # tasks by status
    charts: Sequence[Chart]
    num_left_out: int  # tasks without a chart


@dataclass(frozen=True, slots=True)
class _Known:
    """A run with what its policies cost and which of them are worse than others."""

    run: Run
    costs: Mapping[str, Mapping[str, float | None]]
    is_worse: Mapping[str, IsWorse]  # by task; of each two policies decided once for all resources

    @classmethod
    def of(cls, run: Run) -> _Known:
        answers = read_answers(run)
        return cls(run, policy_costs(run), {task: cache(partial(is_worse, run, answers, task)) for task in run.tasks})


@dataclass(frozen=True, slots=True)
class Pareto:
    """Which policies are worth their cost."""

    costs: Table  # policies by resources
    resources: Sequence[Costs]  # the first is shown, the others are collapsed


def pareto(runs: Mapping[str, Run], *, with_charts: bool = True) -> Pareto | None:
    """Return the policies of one run, or several, against their cost; None unless some costs are known and differ."""
    known = {label: _Known.of(run) for label, run in runs.items()}
    costs = [by_policy for each in known.values() for by_policy in each.costs.values()]
    shown = [resource for resource in RESOURCES if any(found[resource.title] for found in costs)]
    compared = [each for each in shown if len({found[each.title] for found in costs} - {None}) > 1]
    if not compared:
        return None
    tasks = all_tasks(runs.values())
    found: list[Costs] = []
    for number, resource in enumerate(compared):
        by_task = {task: [_series(label, each, task, resource) for label, each in known.items()] for task in tasks}
        drawn = [task for task in tasks if _can_draw(by_task[task])]
        charted = (drawn if number == 0 else drawn[:MAX_TASKS]) if with_charts else []
        charts = [
            pareto_chart(
                task,
                by_task[task],
                resource=resource,
                unit=unit_of(task, runs.values()),
                name=f"p-{number}-{tasks.index(task)}",
            )
            for task in charted
        ]
        found.append(Costs(resource.title, _statuses(by_task), charts, len(drawn) - len(charts)))
    return Pareto(_costs_table(known, shown), found)


def _series(label: str, known: _Known, task: str, resource: Resource) -> Series:
    """Return the policies of a run that were evaluated on a task."""
    run = known.run
    scores = {policy: by_task[task] for policy, by_task in run.table.items() if task in by_task}
    is_loss = task in run.lower_is_better
    sign = -1 if is_loss else 1
    points = [Point(name, known.costs[name][resource.title], sign * score["value"]) for name, score in scores.items()]
    found = verdicts(points, known.is_worse[task]) if points else {}
    return Series(label, points, scores, found, is_loss)


def _can_draw(series: Sequence[Series]) -> bool:
    """Return whether costs are known and differ."""
    return len({cost for each in series for cost in each.drawn.values()}) > 1


def _statuses(by_task: Mapping[str, Sequence[Series]]) -> Table:
    """Return which policies have which status, a row for each task and run."""
    rows = [
        [
            row_name(task, series.label),
            *(
                Cell(", ".join(name for name, found in series.verdicts.items() if found.status == status))
                for status in STATUSES
            ),
        ]
        for task, of_task in by_task.items()
        for series in of_task
        if series.points
    ]
    return Table("pareto", ["task", *STATUSES], rows, is_text=True)


def _costs_table(known: Mapping[str, _Known], resources: Sequence[Resource]) -> Table:
    """Return what each policy costs, a row for each policy and run."""
    rows = [
        [row_name(policy, label), *(_cost(each, policy, resource) for resource in resources)]
        for policy in all_policies(each.run for each in known.values())
        for label, each in known.items()
        if policy in each.costs
    ]
    return Table("costs", ["policy", *(resource.title for resource in resources)], rows)


def _cost(known: _Known, policy: str, resource: Resource) -> Cell:
    value = known.costs[policy][resource.title]
    if value is None:
        return Cell(UNKNOWN, "quiet")
    return Cell(f"{resource.format(value)}{_currency(known.run, resource)}")


def _currency(run: Run, resource: Resource) -> str:
    if resource.key != "cost":
        return ""
    return next((f" {ledger['currency']}" for ledger in run.ledgers.values() if ledger.get("currency")), "")


def tables(found: Pareto | None) -> Iterator[tuple[str, Table]]:
    """Yield the tables with their headings."""
    if found is not None:
        yield "Cost of policies, with all steps that they depend on", found.costs
        for each in found.resources:
            yield f"Quality against {each.resource}", each.table
