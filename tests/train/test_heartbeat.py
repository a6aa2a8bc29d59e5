from pathlib import Path

import pytest
from launching import LAUNCH, finish, start, told

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.mark.parametrize("early", [0, 1])
def test_a_process_that_ends_by_itself_is_not_missed(early):
    script = Path(__file__).with_name("ending.py")
    launched = start(LAUNCH / "ddp-cpu-2.yaml", "--main_process_port", "0", script, early)
    output, errors = finish(launched)
    assert launched.returncode == 0, errors[-2000:]
    assert told(output) == [{}]
    assert "has not been heard of" not in errors
