"""A disk full in the middle of a step: one line, nothing half-written taken for whole, and a run that goes on."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import metrics, run

SCRIPT = Path(__file__).with_name("full_disk.py")


def on_a_small_disk(folder):
    """What the script says, or a skip where this user may not mount a disk of his own."""
    if shutil.which("unshare") is None:
        pytest.skip("needs util-linux's unshare, to mount a small disk that only a child sees")
    script = 'mount -t tmpfs -o size=8m disk "$0" && exec "$@"'
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, folder]
    if subprocess.run([*mount, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not mount a small disk in a namespace of his own")
    child = subprocess.run([*mount, sys.executable, SCRIPT, folder], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_disk_full_in_the_middle_of_a_step_is_one_line_and_a_later_run_goes_on_to_the_same_numbers(tmp_path):
    (tmp_path / "disk").mkdir()
    *full, last = on_a_small_disk(tmp_path / "disk")
    print(*((call["said"], call["whole"]) for call in full), sep="\n")
    stopped = [call for call in full if call["said"]]
    assert len({tuple(call["whole"]) for call in stopped}) >= 2  # in several steps
    for call in stopped:
        assert call["said"].endswith("no space left on the disk") and "\n" not in call["said"]
        assert str(tmp_path / "disk" / "runs/small") in call["said"]
    assert (last["said"], last["whole"]) == ("", ["base", "dpo", "sft"])
    run(tmp_path / "whole")
    for step in ("sft", "dpo"):
        assert last["losses"][step] == [line["loss"] for line in metrics(tmp_path / "whole", step)]
