"""Checkpoints inside a step: all that a bit-identical resume needs, as safetensors and JSON, whole or not at all.

Nothing in the loop draws random numbers and the order of the data is a function of the step, so weights, optimizer
state and the number of steps taken are everything. Every process that holds a part of its own writes it to a file of
its own, by the parameter's name and place in it; whoever resumes reads what it needs from any of them. So the number
of processes and the way of sharding may change between two lives, and with the same ones nothing else does.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from align import artifacts
from align.artifacts import METRICS, atomic_folder, read_json, write_json
from align.distributed.processes import Processes
from align.errors import RunError
from align.train.sharding import WEIGHT, Part

PREFIX = "checkpoint-"
BEST = "best-"  # before the step whose weights had the lowest held-out loss so far
STATE = "state.json"
SHARD = "shard-{:05}.safetensors"  # of the process with this number


Stored = dict[tuple[str, str], list[tuple[int, Path, str]]]


class Holder(Protocol):
    """Who holds weights and moments in parts."""

    sharded: bool

    def parts(self, *, moments: bool) -> Iterator[Part]:
        """What this process holds."""
        ...

    def begin_moments(self, steps: int, names: Collection[str]) -> None:
        """Make moments that can be written to."""
        ...

    def show(self) -> None:
        """Let the model see what was written into the parts."""
        ...


def save_checkpoint(
    folder: Path, step: int, *, holder: Holder, processes: Processes, settings_hash: str, best: int = 0
) -> None:
    """Write `checkpoint-<step>` beside the earlier one, and only then remove that; all processes call it together.

    Of the weights that were the best at some time those of the step `best` are kept.
    """
    if processes.is_main:
        for half in folder.glob(f".{PREFIX}*"):  # as large as a whole one, of a life that was killed while it wrote
            shutil.rmtree(half)
        if (folder / METRICS).is_file():  # its lines are on the disk before a checkpoint counts on them
            with (folder / METRICS).open("rb") as lines:
                os.fsync(lines.fileno())
    _save(folder / f"{PREFIX}{step}", {"step": step, "settings": settings_hash}, holder, processes, moments=True)
    if processes.is_main:
        others = [path for path in folder.glob(f"{BEST}*") if path.name != f"{BEST}{best}"]
        for older in [*_checkpoints(folder)[:-1], *others]:
            _remove(older)


def load_checkpoint(folder: Path, *, holder: Holder, settings_hash: str) -> int:
    """Put the latest checkpoint's weights and optimizer state in place; the number of steps taken, 0 without one."""
    found = _checkpoints(folder)
    if not found:
        return 0
    state: dict[str, Any] = read_json(found[-1] / STATE)
    if state["settings"] != settings_hash:
        raise RunError(f"{found[-1]}: belongs to other settings or data; remove it to start this step anew")
    stored = _stored(found[-1])
    holder.begin_moments(int(state["step"]), {name for kind, name in stored if kind != WEIGHT})
    _load(found[-1], holder, stored, moments=True)
    return int(state["step"])


def save_best(folder: Path, step: int, *, holder: Holder, processes: Processes) -> None:
    """Keep the weights as the best so far, beside those that were until a checkpoint holds this step.

    A run that is resumed from before it may find, in other micro-batches, that the earlier ones stay the best. Those
    that came between are of no use any more.
    """
    _save(folder / f"{BEST}{step}", {"step": step}, holder, processes, moments=False)
    if processes.is_main:
        covered = max((_step_of(each, PREFIX) for each in _checkpoints(folder)), default=0)
        for other in folder.glob(f"{BEST}*"):
            if covered < _step_of(other, BEST) != step:
                _remove(other)


def load_best(folder: Path, step: int, *, holder: Holder) -> None:
    """Put the best weights in place, which are those of `step`."""
    kept = folder / f"{BEST}{step}"
    if not (kept / STATE).is_file():
        raise RunError(f"{kept}: is not there, and the weights of step {step} were the best")
    _load(kept, holder, _stored(kept), moments=False)


def _save(target: Path, state: Mapping[str, Any], holder: Holder, processes: Processes, *, moments: bool) -> None:
    """Write the parts of all processes and the state as one folder, which is there whole or not at all."""
    what = f"step {state['step']}: writing {target.name}"
    with ExitStack() as stack:

        def write(writing: Path) -> None:
            if holder.sharded or processes.is_main:
                parts = {
                    f"{kind}/{part.start}/{part.name}": value.contiguous()
                    for part in holder.parts(moments=moments)
                    for kind, value in part.values.items()
                }
                file = writing / SHARD.format(processes.rank)
                with artifacts.disk_errors(file):
                    save_file(parts, file)

        def begin() -> Path:
            return stack.enter_context(atomic_folder(target))

        def finish() -> None:
            write_json(writing / STATE, dict(state))
            stack.close()

        writing = processes.run_on_main(begin, what)
        processes.run_on_all(lambda: write(writing), what)
        processes.run_on_main(finish, what)


def _stored(folder: Path) -> Stored:
    """Where each kind of number of each parameter is: its places in the parameter, with the file and the key there."""
    stored: Stored = {}
    for file in sorted(folder.glob(SHARD.format(0).replace("00000", "*"))):
        with _opened(file) as shard:
            for key in shard.keys():  # noqa: SIM118 - no mapping
                kind, start, name = key.split("/", 2)
                stored.setdefault((kind, name), []).append((int(start), file, key))
    return stored


def _load(folder: Path, holder: Holder, stored: Stored, *, moments: bool) -> None:
    """Read what this process holds from wherever it was written."""
    with torch.no_grad(), ExitStack() as stack:
        shards: dict[Path, Any] = {}
        for part in holder.parts(moments=moments):
            for kind, value in part.values.items():
                found = 0
                for start, file, key in stored.get((kind, part.name), ()):
                    if file not in shards:
                        shards[file] = stack.enter_context(_opened(file))
                    found += _copy(value, part.start, shards[file].get_slice(key), start)
                if found != len(value):
                    raise RunError(
                        f"{folder}: {len(value) - found} of {len(value)} numbers of {kind} {part.name} are missing; "
                        "remove it to go on from an earlier one"
                    )
    holder.show()


def _copy(value: torch.Tensor, at: int, stored: Any, start: int) -> int:  # noqa: ANN401 - a slice of safetensors
    """How many numbers of `value`, which begins at `at`, the stored piece from `start` on has given."""
    (length,) = stored.get_shape()
    first, last = max(at, start), min(at + len(value), start + length)
    if first >= last:
        return 0
    value[first - at : last - at].copy_(stored[first - start : last - start])
    return last - first


def _opened(file: Path) -> Any:  # noqa: ANN401 - safetensors has no name for it
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise RunError(f"{file}: cannot be read ({error}); remove {file.parent.name} to go on without it") from error


def has_checkpoint(folder: Path) -> bool:
    """Whether there is a checkpoint to go on from."""
    return bool(_checkpoints(folder))


def remove_checkpoints(folder: Path) -> None:
    """Remove every checkpoint: the finished step's own weights stand for them."""
    for each in [*folder.glob(f"{PREFIX}*"), *folder.glob(f"{BEST}*")]:
        _remove(each)


def metrics_until(path: Path, step: int, *, write: bool) -> list[dict[str, float]]:
    """The lines of the steps that the checkpoint holds; what was logged after it is computed again."""
    lines = path.read_bytes().splitlines(keepends=True)[:step] if path.is_file() else []
    if [_step_in(line) for line in lines] != list(range(1, step + 1)):
        raise RunError(f"{path}: does not hold steps 1 to {step}, which the checkpoint counts on: remove {path.parent}")
    if write:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.truncate(sum(map(len, lines)))  # at once: another rank reads the same lines before and after
    return [json.loads(line) for line in lines]


def _step_in(line: bytes) -> int | None:
    with suppress(ValueError):
        return json.loads(line)["step"]
    return None


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, `state.json` first: what a kill leaves of it is not taken for a whole one."""
    (checkpoint / STATE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def _checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints from the earliest to the latest."""
    found = [path.parent for path in folder.glob(f"{PREFIX}*/{STATE}")]
    return sorted(found, key=lambda path: _step_of(path, PREFIX))


def _step_of(folder: Path, prefix: str) -> int:
    return int(folder.name.removeprefix(prefix))
