"""The path from the command line to a loss is short enough to follow in a traceback."""

import sys
import traceback

import pytest
from small_runs import written

from align import cli
from align.losses.preference import PreferenceLoss

MAX_FRAMES = 8  # functions of this project between the command and the loss


def test_at_most_eight_functions_are_called_between_the_command_line_and_a_loss(tmp_path, monkeypatch):
    found = []

    def raises(*_, **__):
        found.extend(frame for frame in traceback.extract_stack() if "/align/" in frame.filename)
        raise KeyboardInterrupt

    monkeypatch.setattr(PreferenceLoss, "__call__", raises)
    monkeypatch.setattr(sys, "argv", ["align", "run", str(written(tmp_path))])
    with pytest.raises(SystemExit):
        cli.main()
    names = [f"{frame.filename.rpartition('/align/')[2]}:{frame.name}" for frame in found]
    print(*names, sep="\n")
    command = next(number for number, name in enumerate(names) if name == "cli.py:run")
    assert len(names[command + 1 :]) <= MAX_FRAMES, names
