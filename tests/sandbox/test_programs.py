"""Correct programs pass, and incorrect ones fail, as in one plain Python interpreter."""

import ast
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from programs import PROGRAMS
from sandbox_mark import needs_sandbox

from align.rewards.unit_tests import run_tests
from align.sandbox.process import Limits

CASES = Path(__file__).parents[2] / ".." / "shared" / "cases" / "programs.jsonl"
pytestmark = needs_sandbox


class Negated(ast.NodeTransformer):
    """Asserts the opposite everywhere."""

    def visit_Assert(self, node):
        return ast.Assert(ast.UnaryOp(ast.Not(), node.test), node.msg)


def negated(test):
    return ast.unparse(ast.fix_missing_locations(Negated().visit(ast.parse(test))))


PLAIN = """
import json, sys, types
code, tests = json.load(sys.stdin)
module = sys.modules["program"] = types.ModuleType("program")
exec(compile(code, "<program>", "exec"), module.__dict__)
passed, streams = [], (sys.stdin, sys.stdout, sys.stderr)
for test in tests:
    try:
        exec(compile(test, "<test>", "exec"), module.__dict__)
        passed.append(True)
    except BaseException:
        passed.append(False)
    sys.stdin, sys.stdout, sys.stderr = streams
print(f"\\n{json.dumps(passed)}")
"""


def plain(code, tests):
    """Return which tests pass in one plain interpreter: a program and its tests in one module."""
    command = [sys.executable, "-W", "ignore", "-c", PLAIN]
    done = subprocess.run(command, input=json.dumps([code, tests]), capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", PROGRAMS)
def test_tests_pass_as_in_plain_python(name):
    code, tests = PROGRAMS[name]
    assert plain(code, tests) == [True] * len(tests)
    assert [outcome.why for outcome in run_tests(code, tests)] == [""] * len(tests)


@pytest.mark.parametrize("name", PROGRAMS)
def test_negated_tests_fail_as_in_plain_python(name):
    code, tests = PROGRAMS[name]
    opposite = [negated(test) for test in tests]
    expected = plain(code, opposite)
    assert [outcome.passed for outcome in run_tests(code, opposite)] == expected
    assert sum(expected) <= len(tests) / 3  # where no assertion is reached


def test_the_programs_cover_the_language():
    assert sum(len(tests) for _, tests in PROGRAMS.values()) > 230


# Programs that are wrong in what used to be lost between the processes, and a test that they fail
WRONG = {
    "a time zone where none is expected": (
        "from datetime import datetime, timezone\ndef f(): return datetime(2020, 1, 1, tzinfo=timezone.utc)",
        "from datetime import datetime\nassert f() == datetime(2020, 1, 1)",
    ),
    "another time zone": (
        "from datetime import datetime, timezone\ndef f(): return datetime(2020, 1, 1, tzinfo=timezone.utc)",
        "from datetime import datetime, timezone, timedelta\n"
        "assert f() == datetime(2020, 1, 1, tzinfo=timezone(timedelta(hours=1)))",
    ),
    "a naive time where a time zone is expected": (
        "import datetime\ndef f(): return datetime.time(1)",
        "import datetime\nassert f() == datetime.time(1, tzinfo=datetime.timezone.utc)",
    ),
    "a copy where the argument itself is to be changed": (
        "def f(xs): xs = sorted(xs)\ndef g(xs): return list(xs)",
        "xs = [2, 1]\nf(xs)\nassert xs == [1, 2]",
    ),
    "a copy where the argument itself is to be returned": (
        "def f(xs): return list(xs)",
        "xs = [1]\nassert f(xs) is xs",
    ),
    "a changed argument where none is to be changed": (
        "def f(xs): xs.sort(); return xs",
        "xs = [2, 1]\nassert f(xs) == [1, 2] and xs == [2, 1]",
    ),
    "an exception of another class": (
        "class A(Exception): pass\nclass B(Exception): pass\ndef f(): raise A",
        "try: f()\nexcept B: pass",
    ),
    "an override that does nothing": (
        "class Upper(dict):\n    def __setitem__(self, k, v): super().__setitem__(k, v)",
        "d = Upper()\nd['a'] = 1\nassert d == {'A': 1}",
    ),
    "an operator that returns another class": (
        "class V:\n    def __init__(self, x): self.x = x\n    def __mul__(self, k): return self.x * k",
        "assert (V(2) * 3).x == 6",
    ),
    "a member that is not the constant": (
        "from enum import Enum\nclass C(Enum):\n    A = 1\n    B = 2\ndef f(): return C.B",
        "assert f() is C.A or f().value == 1",
    ),
    "an exit that swallows": (
        "class C:\n    def __enter__(self): return self\n    def __exit__(self, *e): return True",
        "try:\n    with C(): raise KeyError\nexcept KeyError: pass\nelse: assert False",
    ),
    "output in place of a value": (
        "def f(): print('a')",
        "import io, contextlib\nb = io.StringIO()\nwith contextlib.redirect_stdout(b): f()\nassert b.getvalue() == 'a'",
    ),
    "a coroutine that is not awaited": ("async def f(): return 4", "assert f() == 4"),
    "a list in place of a tuple": ("def f(): return [1, 2]", "assert f() == (1, 2)"),
    "an object without its operator": (
        "class V:\n    def __init__(self, x): self.x = x",
        "assert V(1).x == 1 and V(1) == V(1)",
    ),
    "no hash": (
        "class V:\n    def __init__(self, x): self.x = x\n    def __eq__(self, o): return self.x == o.x",
        "assert V(1).x == 1 and len({V(1), V(1)}) == 1",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_incorrect_program_fails_as_in_plain_python(name):
    code, test = WRONG[name]
    assert plain(code, [test]) == [False]
    assert [outcome.passed for outcome in run_tests(code, [test])] == [False]


@pytest.mark.skipif(not CASES.is_file(), reason=f"the cases are not at {CASES}")
def test_the_cases_of_the_issue_have_the_right_verdict():
    rows = [json.loads(line) for line in CASES.read_text().splitlines()]
    wrong = [
        row["name"]
        for row in rows
        if all(outcome.passed for outcome in run_tests(row["program"], row["tests"])) != row["passes"]
    ]
    assert wrong == []
    assert len(rows) >= 31


@pytest.mark.parametrize(
    ("code", "test"),
    [
        ("import time\ntime.sleep(999)", "pass"),
        ("import time\ndef f():\n    while True: time.sleep(0.01)", "f()"),
        ("import threading\ndef f(): threading.Event().wait()", "f()"),
        ("import asyncio\nasync def f(): await asyncio.sleep(999)", "import asyncio\nasyncio.run(f())"),
    ],
)
def test_a_sleeping_program_ends_at_the_cpu_limit(code, test):
    started = time.monotonic()
    (outcome,) = run_tests(code, [test], limits=Limits(cpu_s=1))
    assert time.monotonic() - started < 55  # 60 is the limit on elapsed time
    assert outcome == (False, "the program waited for 1 s without computing")


def test_a_program_may_sleep_for_less():
    assert run_tests("import time\ndef f(): time.sleep(0.5); return 1", ["assert f() == 1"])[0].passed


def test_many_objects_and_calls_fit_into_the_limits():
    code = (
        "class S:\n    def __init__(self): self.d = []\n    def push(self, x): self.d.append(x)\ndef f(x): return x + 1"
    )
    tests = [
        "assert all(f(n) == n + 1 for n in range(20000))",
        "s = S()\nfor n in range(9000): s.push(n)\nassert len(s.d) == 9000",
    ]
    assert [outcome.why for outcome in run_tests(code, tests)] == ["", ""]
