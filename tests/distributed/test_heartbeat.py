from pathlib import Path

import pytest
from forked import start_forked
from launching import LAUNCH, finish, told

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.mark.parametrize("way", ["ends", "waits"])
@pytest.mark.parametrize("early", [0, 1])
def test_a_process_that_comes_to_its_end_is_not_missed(tmp_path, early, way):
    script = Path(__file__).with_name("ending.py")
    ending = [script, early, way, tmp_path / "ended"]
    launched = start_forked(LAUNCH / "ddp-cpu-2.yaml", "--main_process_port", "0", *ending)
    output, errors = finish(launched)
    assert launched.returncode == 0, errors[-2000:]
    assert told(output) == [{}]
    assert "sent no heartbeat" not in errors
