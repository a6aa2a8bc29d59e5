"""Exceptions of a user's own judges, losses, readers, ... are reported as theirs, with file and line."""

import json
import sys

import pytest
import torch

from align.data.reading import read
from align.data.writing import write
from align.errors import InputError, RunError
from align.inference.engines import load_engine
from align.inference.settings import EngineSettings, SamplingSettings
from align.losses.table import preference_loss
from align.records import Message, Prompt
from align.rewards.builtin_judges import VerifierSettings
from align.rewards.judges import load_judge
from align.rewards.rule_judges import VerifierJudge
from align.rewards.verdicts import Verdict

CODE = """
import json
from align.data.readers.table import Reader
from align.errors import InputError
from align.inference.samples import Throughput
from align.records import Message, Prompt
from align.rewards.verdicts import Verdict

class Own(Exception):
    pass

def fail(*_, **__):
    return {}["missing"]  # LINE

def make_failing(): fail()

def judge(): return fail

def lazy_judge():
    def judge(groups):
        yield (Verdict(1.0),)
        fail()
    return judge

def own_error():
    def judge(groups): raise Own("two\\nlines")
    return judge

def in_library():
    return lambda groups: json.loads("{")  # LIBRARY

def value_error():
    def judge(groups): raise ValueError
    return judge

def input_error():
    def judge(groups): raise InputError("the group is empty")
    return judge

def floats(): return lambda groups: [(0.5,)] * len(groups)
def too_few(): return lambda groups: []
def too_many(): return lambda groups: [(Verdict(1.0),)] * 3
def bare(): return lambda groups: [Verdict(1.0)] * len(groups)

def loss(): return fail
def read_row(row):
    yield Prompt((Message("user", row["q"]),))
    fail()
reader = Reader(("q",), read_row)
joining = Reader(("q",), read_row, join=fail)
def verifier(response: str, word: str) -> bool: return fail()

class Engine:
    def __init__(self, policy, settings, *, name): self.name, self.throughput = name, Throughput()
    def sample(self, prompts, settings, *, finished=None):
        if False: yield
        fail()
"""
LINE = CODE[: CODE.index("# LINE")].count("\n") + 1
LIBRARY = CODE[: CODE.index("# LIBRARY")].count("\n") + 1
GROUPS = [(Prompt((Message("user", "2 + 2?"),)), ["4"]), (Prompt((Message("user", "3 + 3?"),)), ["6"])]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write the user's module and return its file."""
    file = tmp_path / "users_code.py"
    file.write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    yield file
    sys.modules.pop("users_code", None)


def judged(name):
    return [*load_judge(f"users_code:{name}")(GROUPS)]


def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"q": "2 + 2?"}) + "\n")
    return str(path)


def sampled():
    engine = load_engine("p", EngineSettings(custom={"name": "users_code:Engine"}))
    return [*engine.sample([GROUPS[0][0]], SamplingSettings())]


def verified():
    judge = VerifierJudge(VerifierSettings(verifiers={"own:word": "users_code:verifier"}))
    instructions = [{"id": "own:word", "kwargs": {"word": "a"}}]
    return [*judge([(Prompt((Message("user", "Hi"),), {"instructions": instructions}), ["a"])])]


CALLS = {
    "judge 'users_code:judge'": lambda _: judged("judge"),
    "judge 'users_code:lazy_judge'": lambda _: judged("lazy_judge"),
    "judge 'users_code:make_failing'": lambda _: judged("make_failing"),
    "preference loss 'users_code:loss'": lambda _: preference_loss("users_code:loss")(*[torch.zeros(1, 2)] * 4),
    "reader 'users_code:reader'": lambda folder: read(rows(folder), format="users_code:reader"),
    "reader 'users_code:joining'": lambda folder: read(rows(folder), format="users_code:joining"),
    "verifier 'users_code:verifier'": lambda _: verified(),
    "engine 'users_code:Engine'": lambda _: sampled(),
}


@pytest.mark.parametrize("what", CALLS)
def test_an_exception_of_users_code_is_reported_with_its_file_and_line(what, module, tmp_path):
    with pytest.raises(RunError) as caught:
        CALLS[what](tmp_path)
    assert str(caught.value).endswith(f"{what} raised KeyError at {module}:{LINE}, in fail: 'missing'")


def test_a_row_that_a_users_reader_fails_on_is_named(module, tmp_path):
    with pytest.raises(RunError, match=r"rows.jsonl: row 1: reader 'users_code:reader' raised KeyError"):
        read(rows(tmp_path), format="users_code:reader", on_error="skip")


def test_the_users_own_exceptions_and_those_in_libraries_are_reported_in_one_line(module):
    with pytest.raises(RunError, match=r"raised Own at .*users_code.py:\d+, in judge: two lines$"):
        judged("own_error")
    with pytest.raises(RunError, match=rf"raised JSONDecodeError at .*users_code.py:{LIBRARY}, in <lambda>: Expecting"):
        judged("in_library")
    with pytest.raises(RunError, match=r"raised ValueError at .*users_code.py:\d+, in judge$"):
        judged("value_error")


def test_a_module_that_fails_in_a_library_is_reported_at_the_line_of_the_user(tmp_path, monkeypatch):
    (tmp_path / "fails_inside.py").write_text("import torch\n\nTHING = torch.zeros(2).reshape(3)\n")
    (tmp_path / "fails_in_python.py").write_text("import json\n\n\nTHING = json.loads('{')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, line in (("fails_inside", 3), ("fails_in_python", 4)):
        with pytest.raises(InputError) as caught:
            load_judge(f"{name}:THING")
        assert f"module:name: {tmp_path / name}.py:{line}: " in str(caught.value)


def test_an_input_error_of_users_code_is_kept(module):
    with pytest.raises(InputError, match="^the group is empty$"):
        judged("input_error")


@pytest.mark.parametrize(
    ("name", "shown"), [("floats", r"\[0.5\]"), ("too_few", r"\[\]"), ("too_many", r"\[Verdict"), ("bare", "Verdict")]
)
def test_verdicts_of_another_form_are_refused(name, shown, module):
    with pytest.raises(RunError, match=f"judge 'users_code:{name}' .*{shown}"):
        judged(name)


def test_verdicts_of_users_judges_are_passed_on(module):
    (module.parent / "more_code.py").write_text(
        "from align.rewards.verdicts import Verdict\n"
        "def make(at): return lambda groups: [[Verdict(at)] for _ in groups]"
    )
    assert [*load_judge("more_code:make", at=0.5)(GROUPS)] == [(Verdict(0.5),)] * 2
    sys.modules.pop("more_code")


def test_an_exception_while_rows_are_made_is_not_a_write_error(tmp_path):
    def records():
        yield GROUPS[0][0]
        raise ValueError("of the judge")

    with pytest.raises(ValueError, match="^of the judge$"):
        write(tmp_path / "out.jsonl", records())
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(InputError, match="cannot be written"):
        write(tmp_path / "out.jsonl", [Prompt((Message("user", "a"),), {"x": float("nan")})])
