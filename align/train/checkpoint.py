"""Checkpoint files for a bit-identical resume, as safetensors and JSON; each checkpoint is written atomically.

The loop draws no random numbers, and the order of the rows is a function of the step. So weights, optimizer state, the
average of weights (once it has begun) and the number of finished steps are the complete state. Every process that holds
a shard writes it to its own file, under the parameter's name and the shard's position in it; on resume each process
reads what it needs from any file. Therefore the number of processes and the kind of sharding may change on resume; if
they do not, and the token budget of a micro-batch does not, results do not either.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from align.artifacts import FILES, METRICS, STATE, atomic_folder, read_json, write_json
from align.distributed.processes import Processes
from align.errors import RunError
from align.storage.checksums import FileRecords, as_records, content_problems, sha256_of
from align.storage.disk_errors import disk_errors
from align.train.sharding.replicated import AVERAGE, WEIGHT, Replicated

CHECKPOINT = "checkpoint-"  # folder name, followed by the number of finished steps
BEST = "best-"  # folder name of the weights with the lowest held-out loss so far, followed by their step
SHARD_FILE = "shard-{:05}.safetensors"  # numbered by rank

# (kind of values, parameter name) -> start in the flattened parameter, file, key in the file
Stored = dict[tuple[str, str], list[tuple[int, Path, str]]]


def save_checkpoint(  # noqa: PLR0913 - keyword arguments
    folder: Path,
    step: int,
    *,
    sharding: Replicated,
    processes: Processes,
    settings_hash: str,
    initial_weights: str = "",
    best: int = 0,
    moments: bool = True,
) -> None:
    """Write `checkpoint-<step>`, then remove older checkpoints; all processes call it together.

    Of the saved best weights only those of the step `best` are kept. `initial_weights` is the fingerprint of the policy
    before the first step. Without `moments` it holds the weights alone, which suffices after the last step.
    """
    if processes.is_main:
        for partial in folder.glob(f".{CHECKPOINT}*"):  # of a killed attempt, as large as a complete checkpoint
            shutil.rmtree(partial)
        if (folder / METRICS).is_file():  # metrics up to this step must be on disk before the checkpoint
            with (folder / METRICS).open("rb") as lines:
                os.fsync(lines.fileno())
    state = {"step": step, "settings": settings_hash, "moments": moments}
    state |= {"initial_weights": initial_weights, METRICS: _metrics(folder)}
    _save(folder / f"{CHECKPOINT}{step}", state, sharding, processes, moments=moments)
    if processes.is_main:
        others = [path for path in folder.glob(f"{BEST}*") if path.name != f"{BEST}{best}"]
        for older in [*_checkpoints(folder)[:-1], *others]:
            _remove(older)


def _metrics(folder: Path) -> dict[str, Any] | None:
    """Return size and SHA-256 of the metrics up to now; later steps are appended to the file."""
    path = folder / METRICS
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)} if path.is_file() else None


def load_checkpoint(folder: Path, *, sharding: Replicated, settings_hash: str, initial_weights: str = "") -> int:
    """Load weights and optimizer state of the latest checkpoint; return its step, or 0 without a checkpoint.

    Raises `RunError` if the checkpoint belongs to a run with other initial weights, settings or data, or if one of its
    files is damaged.
    """
    checkpoints = _checkpoints(folder)
    if not checkpoints:
        return 0
    latest = checkpoints[-1]
    state: dict[str, Any] = read_json(latest / STATE)
    if initial_weights and state.get("initial_weights") not in (None, "", initial_weights):
        raise RunError(
            f"{latest}: this run started from other weights than the policy has now: the model that it started from "
            "has changed or is damaged; restore it to resume (load it again, if it was trained in memory), or remove "
            "the checkpoint to start again"
        )
    if state["settings"] != settings_hash:
        raise RunError(f"{latest}: the checkpoint has other settings or data; remove it to restart this step")
    _check_files(latest, state, sharding)
    stored = _stored(latest)
    moments = bool(state.get("moments", True))
    if moments:
        sharding.init_moments(int(state["step"]), {name for kind, name in stored if kind not in (WEIGHT, AVERAGE)})
        sharding.is_averaging = any(kind == AVERAGE for kind, _ in stored)
    _load(latest, sharding, stored, moments=moments)
    return int(state["step"])


def save_best(folder: Path, step: int, *, sharding: Replicated, processes: Processes) -> None:
    """Save the weights as the best so far.

    Earlier best weights are kept until a checkpoint includes this step: a run resumed from before it may round the
    held-out losses differently and find that the earlier ones are still the best.
    """
    _save(folder / f"{BEST}{step}", {"step": step}, sharding, processes, moments=False)
    if processes.is_main:
        latest = latest_checkpoint(folder)
        for other in folder.glob(f"{BEST}*"):
            if latest < _step_of(other, BEST) != step:
                _remove(other)


def load_best(folder: Path, step: int, *, sharding: Replicated) -> None:
    """Load the best weights, which are those of `step`."""
    best = folder / f"{BEST}{step}"
    if not (best / STATE).is_file():
        raise RunError(f"{best}: missing, but the weights of step {step} had the lowest held-out loss")
    _check_files(best, read_json(best / STATE), sharding)
    _load(best, sharding, _stored(best), moments=False)


def _check_files(folder: Path, state: Mapping[str, Any], sharding: Replicated) -> None:
    """Raise `RunError` on all processes if a file is not as it was written; each process reads some of the files.

    Checkpoints of older versions have no records of their files.
    """
    processes = Processes(sharding.accelerator)
    names = sorted(state.get(FILES, {}))[processes.rank :: processes.world_size]

    def check() -> None:
        if problems := content_problems(folder, {name: state[FILES][name] for name in names}):
            raise RunError(f"{problems[0]}; remove {folder} to resume without it")

    processes.run_on_all(check, f"checking {folder.name}")


def _save(target: Path, state: Mapping[str, Any], sharding: Replicated, processes: Processes, *, moments: bool) -> None:
    """Write the shards of all processes and the state as one folder, atomically."""
    activity = f"step {state['step']}: writing {target.name}"
    with ExitStack() as stack:

        def write_shards(partial: Path) -> dict[str, Any]:
            if not (sharding.is_sharded or processes.is_main):
                return {}
            tensors = {
                f"{kind}/{shard.start}/{shard.name}": values.contiguous()
                for shard in sharding.shards(moments=moments)
                for kind, values in shard.values.items()
            }
            file = partial / SHARD_FILE.format(processes.rank)
            with disk_errors(file):
                save_file(tensors, file)
                return {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)}}

        def begin() -> Path:
            return stack.enter_context(atomic_folder(target))

        def finish() -> None:
            write_json(partial / STATE, {**state, FILES: {name: one for each in written for name, one in each.items()}})
            stack.close()

        partial = processes.run_on_main(begin, activity)
        written = processes.all_gather_object(processes.run_on_all(lambda: write_shards(partial), activity))
        processes.run_on_main(finish, activity)


def _stored(folder: Path) -> Stored:
    """Return where the pieces of each parameter are stored."""
    stored: Stored = {}
    for file in sorted(folder.glob(SHARD_FILE.format(0).replace("00000", "*"))):
        with _open(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                kind, start, name = key.split("/", 2)
                stored.setdefault((kind, name), []).append((int(start), file, key))
    return stored


def _load(folder: Path, sharding: Replicated, stored: Stored, *, moments: bool) -> None:
    """Read the shards of this process from whichever files hold them."""
    with torch.no_grad(), ExitStack() as stack:
        files: dict[Path, Any] = {}
        for shard in sharding.shards(moments=moments):
            for kind, values in shard.values.items():
                num_read = 0
                for start, file, key in stored.get((kind, shard.name), ()):
                    if file not in files:
                        files[file] = stack.enter_context(_open(file))
                    num_read += _copy(values, shard.start, files[file].get_slice(key), start)
                if num_read != len(values):
                    raise RunError(
                        f"{folder}: {len(values) - num_read} of {len(values)} values of {kind} {shard.name} are "
                        "missing; remove it to resume from an earlier checkpoint"
                    )
    sharding.sync_model()


def _copy(values: torch.Tensor, first: int, stored: Any, stored_first: int) -> int:  # noqa: ANN401 - safetensors slice
    """Copy the overlap of two pieces of a flattened parameter, given their start positions; return its length."""
    (length,) = stored.get_shape()
    start, stop = max(first, stored_first), min(first + len(values), stored_first + length)
    if start >= stop:
        return 0
    values[start - first : stop - first].copy_(stored[start - stored_first : stop - stored_first])
    return stop - start


def _open(file: Path) -> Any:  # noqa: ANN401 - safetensors has no name for it
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise RunError(f"{file}: cannot be read ({error}); remove {file.parent.name} to resume without it") from error


def saved_records(folder: Path) -> dict[Path, FileRecords | None]:
    """Return size and SHA-256 of the files of each checkpoint and best weights; None for those of older versions."""
    states = sorted([*folder.glob(f"{CHECKPOINT}*/{STATE}"), *folder.glob(f"{BEST}*/{STATE}")])
    return {state.parent: as_records(read_json(state).get(FILES)) for state in states}


def has_checkpoint(folder: Path, step: int | None = None) -> bool:
    """Return whether the folder has a checkpoint to resume from, of the given step if there is one."""
    return any(step in (None, _step_of(path, CHECKPOINT)) for path in _checkpoints(folder))


def latest_checkpoint(folder: Path) -> int:
    """Return the step of the checkpoint to resume from, or 0 without a checkpoint."""
    return max((_step_of(path, CHECKPOINT) for path in _checkpoints(folder)), default=0)


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints and best weights, once the weights of the finished step are saved."""
    for path in [*folder.glob(f"{CHECKPOINT}*"), *folder.glob(f"{BEST}*")]:
        _remove(path)


def read_metrics(path: Path, step: int, *, truncate: bool) -> list[dict[str, float]]:
    """Return the metrics of steps 1 to `step`, and with `truncate` remove those of later steps from the file.

    Later steps are not in the checkpoint, so they are repeated.
    """
    lines = path.read_bytes().splitlines(keepends=True)[:step] if path.is_file() else []
    if [_step_in(line) for line in lines] != list(range(1, step + 1)):
        raise RunError(f"{path}: lacks some of the steps 1 to {step} of the checkpoint; remove {path.parent}")
    if truncate:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.truncate(sum(map(len, lines)))  # in one call: another rank may be reading these lines
    return [json.loads(line) for line in lines]


def check_metrics(folder: Path) -> None:
    """Raise `RunError` if the metrics up to the latest checkpoint are not those that it was written with."""
    path = folder / METRICS
    checkpoints = _checkpoints(folder)
    record = read_json(checkpoints[-1] / STATE).get(METRICS) if checkpoints else None
    if record is not None and sha256_of(path, record["bytes"]) != record["sha256"]:
        raise RunError(
            f"{path}: damaged: its lines have changed since {checkpoints[-1].name} was written; restore it to resume, "
            f"or remove {folder} to start again"
        )


def _step_in(line: bytes) -> int | None:
    with suppress(ValueError):
        return json.loads(line)["step"]
    return None


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, `state.json` first: without it the rest does not count as a checkpoint."""
    (checkpoint / STATE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def _checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints from the earliest to the latest."""
    complete = [path.parent for path in folder.glob(f"{CHECKPOINT}*/{STATE}")]
    return sorted(complete, key=lambda path: _step_of(path, CHECKPOINT))


def _step_of(folder: Path, prefix: str) -> int:
    number = folder.name.removeprefix(prefix)
    if not number.isdecimal():
        raise RunError(f"{folder}: {number!r} is not the number of a step; move this folder away")
    return int(number)
