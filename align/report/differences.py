"""Differences between runs prompt by prompt, sorted by change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from align.report.formatting import fixed
from align.report.run_folder import Run, read_lines
from align.report.samples import EVALUATE, line_value, prompt_text
from align.report.tables import Cell, Table

MAX_SHOWN = 12  # prompts with the largest rise, and as many with the largest fall
MAX_PROMPT = 120  # characters of a prompt in the table

Values = Mapping[str, float]  # prompt -> mean of the task's metrics over its responses


@dataclass(frozen=True, slots=True)
class Differences:
    """The prompts of a task on which runs differ."""

    task: str
    policies: Sequence[str]  # of each run, its last one
    counts: Mapping[str, int]
    table: Table


def prompt_differences(runs: Mapping[str, Run]) -> Iterator[Differences]:
    """Yield the differences of each task that the last policies of several runs answered; `runs` is {label: run}.

    The change of a prompt is the largest difference, up or down, of any run from the first.
    """
    if len(runs) < 2:
        return
    found = {label: _values(run) for label, run in runs.items()}
    losses = {task for run in runs.values() for task in run.lower_is_better}
    for task in dict.fromkeys(task for by_task in found.values() for task in by_task):
        own = {label: by_task[task] for label, by_task in found.items() if task in by_task}
        if len(own) > 1 and (differing := _differences(task, own, is_loss=task in losses)).table.rows:
            yield differing


def _differences(task: str, own: Mapping[str, tuple[str, Values]], *, is_loss: bool) -> Differences:
    values = [values for _, values in own.values()]
    prompts = [prompt for prompt in values[0] if all(prompt in each for each in values)]
    change = {prompt: max((each[prompt] - values[0][prompt] for each in values[1:]), key=abs) for prompt in prompts}
    ordered = sorted(prompts, key=lambda prompt: -change[prompt])
    up, down = ([each for each in ordered if sign * change[each] > 0] for sign in (1, -1))
    rows = [
        [
            Cell(_short(prompt)),
            *(Cell(fixed(each[prompt])) for each in values),
            Cell(
                f"{change[prompt]:+.3f}".replace("-", "\N{MINUS SIGN}"),
                "up" if (change[prompt] > 0) != is_loss else "worse",
            ),
        ]
        for prompt in [*up[:MAX_SHOWN], *down[-MAX_SHOWN:]]
    ]
    counts = {"up": len(up), "down": len(down), "equal": len(prompts) - len(up) - len(down), "shown": len(rows)}
    table = Table("differences_by_prompt", ["prompt", *own, "change"], rows)
    return Differences(task, [f"{policy} of {label}" for label, (policy, _) in own.items()], counts, table)


def _values(run: Run) -> dict[str, tuple[str, Values]]:
    """Return {task: (last policy, its value of each prompt)}; a row without a prompt is named by its number."""
    positions = {step.name: position for position, step in enumerate(run.steps)}
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for step in run.steps:
        for path in sorted(step.folder.glob("[!.]*.jsonl")) if step.stage == EVALUATE else ():
            for line in read_lines(path):
                if line.get("parts") and "policy" in line:
                    prompt = prompt_text(line["prompt"]) if "prompt" in line else f"row {int(line.get('row', 0)) + 1}"
                    by_policy = found.setdefault(path.stem, {})
                    by_policy.setdefault(str(line["policy"]), {}).setdefault(prompt, []).append(line_value(line))
    last = {task: max(each, key=lambda policy: positions.get(policy, -1)) for task, each in found.items()}
    return {
        task: (last[task], {prompt: fmean(each) for prompt, each in by_policy[last[task]].items()})
        for task, by_policy in found.items()
    }


def _short(prompt: str) -> str:
    text = " ".join(prompt.split())
    return text if len(text) <= MAX_PROMPT else f"{text[:MAX_PROMPT]} …"
