"""Launch files and the environment that `accelerate launch` sets for its processes; imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

from align.config import read_recipe
from align.errors import InputError, RunError

SHARDED_LAUNCHES = ("DEEPSPEED", "FSDP", "MEGATRON_LM")  # accelerate's names of launches that shard the model
NO_SHARDING = (
    "generate, score and evaluate steps split the rows over processes and keep the whole model in each; "
    "use a launch file such as launch/ddp-8gpu.yaml"
)
# Timeout of a collective. Long, because the main process may read or write alone for a while; a process that has died
# is detected much earlier by its missing heartbeats (`align.distributed.heartbeat`).
COLLECTIVE_TIMEOUT = timedelta(minutes=60)
LAUNCH_VARIABLES = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # set together with RANK
# Variables of torchrun and accelerate that a program started by one of the processes would take for its own
OF_LAUNCHERS = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|(GROUP|ROLE)_(NAME|WORLD_SIZE)|MASTER_(ADDR|PORT)|"
    r"(ACCELERATE|TORCHELASTIC|FSDP)_.*"
)


def is_launched() -> bool:
    """Return whether this process was started by `accelerate launch` or torchrun.

    Raises `InputError` if only some of their environment variables are set.
    """
    if "RANK" not in os.environ:
        return False
    if missing := [name for name in LAUNCH_VARIABLES if name not in os.environ]:
        raise InputError(f"RANK is set but {missing[0]} is not: unset RANK, or start with accelerate launch")
    return True


def environment_without_launch(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without what `accelerate launch` or torchrun set for its processes.

    >>> environment_without_launch({"RANK": "0", "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true", "PATH": "/bin"})
    {'PATH': '/bin'}
    """
    return {name: value for name, value in environment.items() if not OF_LAUNCHERS.fullmatch(name)}


def launched_with(plugin: str) -> bool:
    """Return whether the launch file enables a plugin of accelerate: DEEPSPEED, FSDP or MEGATRON_LM."""
    return os.environ.get(f"ACCELERATE_USE_{plugin}", "false").lower() == "true"


def num_launched() -> int:
    """Return the number of processes of the launch that this one belongs to; 1 without a launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_world_size(joined: int) -> None:
    """Raise `RunError` unless accelerate joined as many processes as were launched."""
    launched = num_launched()
    if joined != launched:
        raise RunError(f"{launched} processes were launched, but accelerate joined {joined}")


def check_launch(launch: str | None) -> None:
    """Raise `InputError` for a launch file that shards the model, which only training steps support.

    A file that does not exist is accepted here and reported when the step starts.
    """
    if launch is not None and Path(launch).is_file():
        kind = str(read_recipe(Path(launch)).get("distributed_type"))
        if kind in SHARDED_LAUNCHES:
            raise InputError(f"{launch} enables {kind}, but {NO_SHARDING}", ("launch",))
