"""Seconds and peak memory of curating synthetic rows: exact duplicates, near-duplicates and test items.

Usage, from the root of the repository:

    python -m tests.benchmarks.curation [--rows N ...] [--words N] [--workers N]

    --rows N        rows of each run, each in a process of its own (10,000 and 100,000)
    --words N       words of a row (300)
    --workers N     processes that read rows; 1 to use the main process only (2)

Of the rows, 2 % are copies, 5 % are copies with 3 % of their words changed, and 0.5 % contain one of 1,000 test items.
A row is three quarters response. The rows are written to a file first, which is not measured; reading it is. Seconds
are those of the clock and those of cores, of all processes, for others may be using the machine. Memory is that of the
main process and of the workers together. The last line of each run is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from align.curate.contamination import PROMPT, ContaminationIndex, TestItem
from align.curate.output import curate
from align.curate.settings import CurationSettings, DecontaminationSettings
from align.data.readers.native import native
from align.data.writing import native_line
from align.records import Demonstration, Message, Record

VOCABULARY = 50_000
SPELLED = ["".join("abcdefghij"[int(digit)] for digit in str(number)) for number in range(VOCABULARY)]  # no numbers
ZIPF = 1.3
NUM_ITEMS, ITEM_WORDS = 1000, 40
COPIES, CHANGED, CONTAMINATED = 0.02, 0.05, 0.005  # shares of the rows
CHANGED_WORDS = 0.03
WINDOW = 1000  # rows before a copy, among which is its original
BLOCK = 1000  # rows whose words are drawn at once


def words(draw: np.random.Generator, number: int) -> np.ndarray:
    """Words of a vocabulary by Zipf's law, as their numbers."""
    return draw.zipf(ZIPF, number) % VOCABULARY


def text(numbers: np.ndarray) -> str:
    return " ".join(map(SPELLED.__getitem__, numbers))


def test_texts() -> list[str]:
    draw = np.random.default_rng(0)
    return [text(words(draw, ITEM_WORDS)) for _ in range(NUM_ITEMS)]


def rows(number: int, size: int) -> Iterator[Record]:
    draw, items = np.random.default_rng(number), test_texts()
    recent: deque[np.ndarray] = deque(maxlen=WINDOW)
    for at in range(number):
        if at % BLOCK == 0:
            block = words(draw, BLOCK * size).reshape(BLOCK, size)
        kind, row = draw.random(), block[at % BLOCK]
        if recent and kind < COPIES + CHANGED:
            row = recent[draw.integers(len(recent))].copy()
            if kind >= COPIES:
                changed = draw.random(size) < CHANGED_WORDS
                row[changed] = words(draw, int(changed.sum()))
        recent.append(row)
        prompt = text(row[: size // 4])
        if kind > 1 - CONTAMINATED:
            prompt = f"{prompt} {items[draw.integers(len(items))]}"
        yield Demonstration((Message("user", prompt), Message("assistant", text(row[size // 4 :]))))


def measured(path: Path, num_workers: int) -> dict[str, object]:
    settings = CurationSettings(decontamination=DecontaminationSettings(tests=["test"]))
    began = time.perf_counter()
    index = ContaminationIndex.of([TestItem("test", PROMPT, item) for item in test_texts()], 8)
    with path.open() as lines, tempfile.TemporaryDirectory(dir=path.parent) as folder:
        records = (("rows", record) for line in lines for record in native(json.loads(line)))
        report = curate(records, index, settings, Path(folder), num_workers=num_workers)
    seconds = time.perf_counter() - began
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    peak = used[0].ru_maxrss + used[1].ru_maxrss * (num_workers if num_workers > 1 else 0)
    return {
        "seconds": round(seconds, 1),
        "core_seconds": round(sum(each.ru_utime + each.ru_stime for each in used), 1),
        "peak_gib": round(peak / 2**20, 3),
        **report,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--words", type=int, default=300)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.file is not None:
        print(json.dumps({"rows": given.rows[0], **measured(given.file, given.workers)}))
        return
    for number in given.rows:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            with path.open("w") as stream:
                stream.writelines(native_line(record, path) for record in rows(number, given.words))
            command = [sys.executable, "-m", "tests.benchmarks.curation", "--rows", str(number)]
            command += ["--workers", str(given.workers), "--file", str(path)]
            print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip(), flush=True)


if __name__ == "__main__":
    main()
