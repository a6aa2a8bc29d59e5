import os
import signal
import threading

import pytest
from tiny_training import Recorder, comparisons, loop, numbers, preference, same, weights

from align.distributed.signals import defer_sigterm
from align.errors import RunError


class Told(Recorder):
    """A reporter that has SIGTERM sent to the process after some step."""

    def advance(self, units, metrics=None):
        super().advance(units, metrics)
        if metrics is not None and metrics["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)


def made(folder, report, steps=6):
    return loop(folder, preference("rpo_bwd_kl", beta=0.1), comparisons(12), progress=report, epochs=steps / 2)


@pytest.mark.parametrize("steps", [6, 3])
def test_a_run_that_is_told_to_stop_keeps_its_step_and_goes_on_bit_for_bit(tmp_path, steps):
    undisturbed = made(tmp_path / "undisturbed", Recorder(), steps)
    undisturbed.run()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RunError, match=f"SIGTERM: saved a checkpoint after step 3 of {steps}; rerun the same command"):
        made(tmp_path / "told", Told(), steps).run()
    assert signal.getsignal(signal.SIGTERM) is before
    again = made(tmp_path / "told", Recorder(), steps)
    again.run()
    assert f"resumed after step 3 of {steps}" in again.progress.notes
    assert numbers(tmp_path / "told") == numbers(tmp_path / "undisturbed")
    assert same(weights(again.policy), weights(undisturbed.policy))


def test_outside_of_the_main_thread_the_signal_is_left_as_it_is():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def elsewhere():
        with defer_sigterm() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
