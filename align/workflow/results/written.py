"""The results of a run on disk: table, paired changes, ledger and page, rewritten as steps finish."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from align import artifacts, pipeline
from align.accounting.ledger import Ledger, sum_ledgers
from align.report.run_folder import SEARCH
from align.workflow.recipe.schema import Recipe
from align.workflow.results.changes import changes, results_table
from align.workflow.search.results import search_results

MAX_PAGE_SHARE = 0.05  # of the run's time that may go into rewriting the page after steps


@dataclass(slots=True)
class PageWriter:
    """Rewrites the results and the page after each step, as often as MAX_PAGE_SHARE allows."""

    recipe: Recipe
    show: Callable[[str, str], None]  # shows that a step has changed its state
    running: str = ""
    next_s: float = field(default_factory=time.monotonic)

    def watch(self, step: str, state: str) -> None:
        """Show the state of a step, and rewrite the page when a step that ran has finished."""
        self.show(step, state)
        if state == pipeline.RUNNING:
            self.running = step
        elif state == pipeline.FINISHED and step == self.running and time.monotonic() >= self.next_s:
            began = time.monotonic()
            found = {name: artifacts.read_manifest(self.recipe.root / name) for name in self.recipe.steps}
            current = {name: manifest for name, manifest in found.items() if manifest and manifest.get("fingerprint")}
            write_results(self.recipe, current)
            ended = time.monotonic()
            self.next_s = ended + (ended - began) / MAX_PAGE_SHARE


def write_results(recipe: Recipe, manifests: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Write the results table, paired changes, ledger and page of the finished steps; return the ledger."""
    from align.report import write_report  # noqa: PLC0415 - imports matplotlib, which no launched child needs

    root = recipe.root
    ledgers = {name: Ledger.from_json(each["ledger"]) for name, each in manifests.items()}
    artifacts.write_json(root / "table.json", results_table(manifests))
    artifacts.write_json(root / "changes.json", changes(recipe, manifests))
    if recipe.search:
        artifacts.write_json(root / SEARCH, search_results(recipe, manifests))
    steps = {name: ledger.to_json() for name, ledger in ledgers.items()}
    ledger: dict[str, Any] = {"steps": steps, "total": sum_ledgers(list(ledgers.values())).to_json()}
    artifacts.write_json(root / "ledger.json", ledger)
    write_report(root)
    return ledger
