"""Removal of files that no later step reads: which steps run again when one does, over random graphs."""

import json
import random
from contextlib import suppress

import pytest

from align.pipeline import Cleanup, Step, plan, run
from align.pipeline import cleanup as cleanup_module
from align.storage.removal import Removal

GRAPHS = range(8)


def graph(draw, number=8):
    """Steps of which each reads up to three earlier ones."""
    names = [f"s{position}" for position in range(number)]
    return [
        Step(name, tuple(sorted(draw.sample(names[:position], min(position, draw.randint(0, 3))))), "k")
        for position, name in enumerate(names)
    ]


def unneeded(finished, unread):
    """Everything that is unread, but the last step."""
    return {name: Removal("letters", "test", "run again", ("letter", "more/letter")) for name in unread if name != "s7"}


class Run:
    """A run whose steps write a letter and an appendix; `salt` makes the letters of one run differ from another's."""

    def __init__(self, root, salt=lambda: ""):
        self.root, self.salt, self.executed, self.notes = root, salt, [], []

    def __call__(self, steps, **options):
        self.executed, self.notes = [], []
        cleanup = Cleanup(unneeded=unneeded)
        return run(steps, self.root, execute=self._execute, log=self.notes.append, cleanup=cleanup, **options)

    def _execute(self, step, working, inputs):
        self.executed.append(step.name)
        before = [(folder / "letter").read_text() for folder in inputs.values()]  # fails if an input was removed
        (working / "letter").write_text(f"{step.name}({','.join(before)}){self.salt()}")
        (working / "more").mkdir()
        (working / "more/letter").write_text(step.name)
        (working / "config").write_text(step.name)
        for name in ("launch.log", "metrics.jsonl"):  # which no step reads
            (working / name).write_text(json.dumps(random.random()))
        return {}

    def with_letters(self):
        return {path.parent.name for path in self.root.glob("*/letter")}

    def manifest(self, name):
        return json.loads((self.root / name / "manifest.json").read_text())


def needed(steps, names, gone):
    """The removed ones among the names, and those that making them takes, by their definition."""
    known = {step.name: step for step in steps}
    again = {name for name in names if name in gone}
    return again.union(*(needed(steps, known[name].inputs, gone) for name in again))


@pytest.mark.parametrize("seed", GRAPHS)
def test_a_new_reader_makes_what_it_needs_again_and_nothing_else(tmp_path, seed):
    draw = random.Random(seed)
    steps, made = graph(draw), Run(tmp_path)
    made(steps)
    assert made.with_letters() == {"s7"}
    assert {path.parent.name for path in tmp_path.glob("*/config")} == {step.name for step in steps}
    made(steps)
    assert made.executed == []
    before = {step.name: made.manifest(step.name) for step in steps}
    reader = Step("s8", tuple(sorted(draw.sample([step.name for step in steps], 2))), "k")
    expected = needed(steps, reader.inputs, {step.name for step in steps} - {"s7"})
    planned = [each.step.name for each in plan([*steps, reader], tmp_path) if each.state != "finished"]
    made([*steps, reader])
    assert set(made.executed) == expected | {"s8"} == set(planned) and len(made.executed) == len(planned)
    assert made.with_letters() == {"s7"}
    assert {name: made.manifest(name)["build_id"] for name in before} == {n: m["build_id"] for n, m in before.items()}


@pytest.mark.parametrize("seed", GRAPHS)
def test_kills_at_any_deletion_leave_a_run_that_a_rerun_completes(tmp_path, seed, monkeypatch):
    draw = random.Random(seed)
    steps, made, kills = graph(draw), Run(tmp_path), []
    steps = [*steps, Step("s8", tuple(draw.sample([step.name for step in steps], 2)), "k")]
    unlink = cleanup_module.artifacts.unlink_own

    def cut(folder, names):
        if not kills or draw.random() < 0.5:
            kills.append(folder)
            unlink(folder, [name for name in names if draw.random() < 0.5])
            raise KeyboardInterrupt
        unlink(folder, names)

    with monkeypatch.context() as patch:
        patch.setattr(cleanup_module.artifacts, "unlink_own", cut)
        for _ in range(4):
            with suppress(KeyboardInterrupt):
                made(steps)
    made(steps)
    assert kills and made.with_letters() == {"s7"} and not list(tmp_path.glob("s[0-68]/more/letter"))
    made(steps)
    assert made.executed == []


@pytest.mark.parametrize("seed", GRAPHS)
def test_steps_that_cannot_be_repeated_exactly_make_their_readers_run_again(tmp_path, seed):
    draw, number = random.Random(seed), iter(range(1000))
    steps, made = graph(draw), Run(tmp_path, salt=lambda: next(number))
    made(steps)
    reader = Step("s8", tuple(sorted(draw.sample([step.name for step in steps[:7]], 2))), "k")
    made([*steps, reader])
    for step in [*steps, reader]:
        inputs = {name: made.manifest(name)["build_id"] for name in step.inputs}
        assert made.manifest(step.name)["input_build_ids"] == inputs
    assert sum("differs from what was removed" in note for note in made.notes) >= 1
    made([*steps, reader])
    assert made.executed == [] and made.with_letters() == {"s7"}
