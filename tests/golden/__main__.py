"""Rewrite the golden traces: run `python -m tests.golden` after a change that alters training on purpose."""

import json
import tempfile
from pathlib import Path

from .trace import TRACE, VARIANTS, machine, record

with tempfile.TemporaryDirectory() as folder:
    runs = {name: record(name, Path(folder)) for name in VARIANTS}
TRACE.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n")
