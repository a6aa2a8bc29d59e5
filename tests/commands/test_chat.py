"""`align chat` answers lines with the policy's own replies."""

import io
import sys

import pytest

from align.cli import main
from align.inference.engines import load_engine
from align.inference.settings import SamplingSettings
from align.models.policy import save_policy
from align.records import Message, Prompt
from align.testing import tiny_policy

SETTINGS = ("sampling.temperature=0", "sampling.max_new_tokens=5")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("runs")
    policy, tokenizer = tiny_policy()
    save_policy(policy, tokenizer, found / "mine/dpo")
    return found / "mine"


def said(monkeypatch, capsys, lines, *arguments):
    """Return what the command prints, and its exit status."""
    monkeypatch.setattr(sys, "argv", ["align", "chat", *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    status = 0
    try:
        main()
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr()


def reply(folder, *dialogue):
    """Return the reply to a dialogue, sampled by the engine itself."""
    prompt = Prompt(tuple(Message(role, text) for role, text in dialogue))
    settings = SamplingSettings(temperature=0, max_new_tokens=5)
    (sample,) = load_engine(folder).sample([prompt], settings, finished={})
    return sample.text


def test_every_reply_sees_the_dialogue_so_far_until_it_is_reset(run_folder, monkeypatch, capsys):
    step = str(run_folder / "dpo")
    first = reply(step, ("user", "Hello"))
    second = reply(step, ("user", "Hello"), ("assistant", first), ("user", "And?"))
    status, shown = said(monkeypatch, capsys, ["Hello", "And?", "/reset", "Hello", "/exit", "Hello"], step, *SETTINGS)
    assert (status, shown.out) == (0, "".join(f"{text}\n" for text in (first, second, first)))


def test_a_system_message_comes_first(run_folder, monkeypatch, capsys):
    step = str(run_folder / "dpo")
    first = reply(step, ("system", "Be a cat."), ("user", "Hello"))
    _, shown = said(monkeypatch, capsys, ["Hello"], step, "--system", "Be a cat.", *SETTINGS)
    assert shown.out == f"{first}\n"


WRONG = {
    "a run": ((".",), "; name one of its folders: dpo"),
    "several replies": (("dpo", "sampling.num_responses=2", "sampling.temperature=1"), "a message gets one reply"),
    "an unknown setting": (("dpo", "sampling.max_tokens=2"), "did you mean 'max_new_tokens'?"),
    "a message that does not fit": (("dpo", "sampling.max_new_tokens=400"), "too long for the model"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line(run_folder, monkeypatch, capsys, case):
    arguments, message = WRONG[case]
    monkeypatch.chdir(run_folder)
    status, shown = said(monkeypatch, capsys, ["Hello"], *arguments)
    (line,) = shown.err.splitlines()
    assert status == 2 and message in line
