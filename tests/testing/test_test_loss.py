"""`align test-loss`: one line for each property, and the exit status."""

import sys

import pytest

from align.cli import main

FAULTY = """
from align.losses.table import preference_loss


def make(beta):
    dpo = preference_loss("dpo", beta=beta)
    return lambda policy, reference, rewards, *rest: dpo(policy, reference, -rewards, *rest)
"""


def align(patch, capsys, *arguments):
    """Return exit status, standard output and standard error of a command in this process."""
    patch.setattr(sys, "argv", ["align", *arguments])
    status = 0
    try:
        main()
    except SystemExit as end:
        status = int(end.code or 0)
    return status, *capsys.readouterr()


def test_a_sound_loss_ends_with_status_0_and_one_line_for_each_property(monkeypatch, capsys):
    status, out, err = align(monkeypatch, capsys, "test-loss", "dpo", "beta=0.2")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == ["passed"] * 9
    assert [line.split()[1] for line in lines][:3] == ["shape", "finite", "gradient"]


def test_a_faulty_loss_of_the_user_ends_with_status_1(monkeypatch, capsys, tmp_path):
    (tmp_path / "planted_loss.py").write_text(FAULTY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # main appends the working directory
    status, out, err = align(monkeypatch, capsys, "test-loss", "planted_loss:make", "beta=0.1")
    assert status == 1
    assert err == "align: loss 'planted_loss:make' failed 1 of 9 properties: prefers_best\n"
    assert "failed  prefers_best" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dqo"], "no preference loss is called 'dqo'; did you mean 'dpo'?"),
        (["dpo", "eta=1"], "loss 'dpo' has no setting 'eta'"),
        (["dpo", "beta"], "'beta' is not of the form key.sub=value"),
    ],
)
def test_a_wrong_name_or_setting_ends_with_status_2(monkeypatch, capsys, arguments, message):
    status, out, err = align(monkeypatch, capsys, "test-loss", *arguments)
    assert (status, out) == (2, "")
    assert message in err
