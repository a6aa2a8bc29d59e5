"""A teacher with a server that the step starts for it, with a stub in the place of vLLM."""

import shlex
import sys
from pathlib import Path

import pytest
from small_runs import Told
from synthetic_runs import FAMILIES, recipe, write_recipe

from align.errors import RunError
from align.workflow.launcher import Command
from align.workflow.runner import run_recipe

STUB = Path(__file__).parents[1] / "inference" / "stub_engine.py"


def test_the_server_of_a_teacher_runs_for_as_long_as_the_step_asks(tmp_path):
    command = shlex.join([sys.executable, "-S", str(STUB)])
    engine = {"vllm": {"command": command, "env": {"STUB_MARK": str(tmp_path)}}}
    path = write_recipe(tmp_path, recipe(tmp_path, FAMILIES, engine=engine))
    with pytest.raises(RunError, match="no row was made: subtopics: 6 asked; 0 kept"):  # the stub answers no lists
        run_recipe(Command(path, ()), Told(), disk=(0, 0))
    log = (tmp_path / "runs/made/prompts.partial/engine.log").read_text()
    assert log.count("$ ") == 1
    assert "--served-model-name teacher-" in log
    running = [folder for folder in Path("/proc").glob("[0-9]*") if _has_mark(folder, str(tmp_path))]
    assert running == []


def _has_mark(folder, mark):
    try:
        return f"STUB_MARK={mark}".encode() in (folder / "environ").read_bytes()
    except OSError:
        return False
