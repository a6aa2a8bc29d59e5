"""Writes the golden trace anew: `python -m tests.golden`, to be run when a change alters training on purpose."""

import json
import tempfile
from pathlib import Path

from tests.test_cli import ROOT, SMALL, align, trace

with tempfile.TemporaryDirectory() as folder:
    recipe = Path(folder) / "small.yaml"
    recipe.write_text(SMALL.format(runs=Path(folder) / "runs"))
    assert align("run", str(recipe)).returncode == 0
    losses = trace(Path(folder) / "runs/small")
(ROOT / "tests/golden/small.json").write_text(json.dumps(losses, indent=1) + "\n")
