"""A run on a disk that is full again and again: python full_disk.py FOLDER, where FOLDER is a small file system.

Prints what each call said and which steps were whole after it, as JSON.
"""

import json
import os
import sys
from pathlib import Path

import pytest
from small_runs import run, skip_rate

from align.accounting import energy
from align.accounting.counters import NoCounter
from align.errors import RunError

STEPS = (20, 90, 170, 260, 400)  # KiB that are free at each call, before the last one which has room

if __name__ == "__main__":
    disk, calls = Path(sys.argv[1]), []
    skip_rate(pytest.MonkeyPatch())
    energy.machine_counter = lambda: NoCounter("not measured in this test")
    filler = disk / "filler"
    for free in (*STEPS, None):
        filler.unlink(missing_ok=True)
        if free is not None:
            there = os.statvfs(disk)
            filler.write_bytes(bytes(there.f_bavail * there.f_frsize - free * 1024))
        said = ""
        try:
            run(disk)
        except RunError as error:
            said = str(error)
        whole = sorted(path.parent.name for path in disk.glob("runs/small/*/manifest.json"))
        losses = {
            path.parent.name: [json.loads(line)["loss"] for line in path.read_text().splitlines()]
            for path in disk.glob("runs/small/*/metrics.jsonl")
        }
        calls.append(
            {"said": said, "whole": [name for name in whole if not name.endswith(".partial")], "losses": losses}
        )
    print(json.dumps(calls))
