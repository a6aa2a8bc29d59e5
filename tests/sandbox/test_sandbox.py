"""Programs that try to pass tests without solving them, or to do harm. Each must fail for the expected reason."""

import json
import os
import platform
import re
import shutil
import signal
import struct
import subprocess
import sys
import time

import pytest
from attacks import ATTACKS, SECRET, descendants, gone
from sandbox_mark import needs_sandbox

from align.rewards.unit_tests import run_tests
from align.sandbox.process import PROGRAM_WORKER, Limits, Sandbox
from align.sandbox.seccomp import ALLOWED

LIMITS = Limits(cpu_s=1, wall_s=100, memory_mb=256, folder_mb=4)
TESTS = ("assert f(2) == 4", "assert f(3) == 9")
pytestmark = needs_sandbox


@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_passes_or_does_harm(name, host):
    program, pattern, *tests = ATTACKS[name]
    for place, value in host.items():
        program = program.replace(f"@{place}@", str(value))
    tests = tests[0] if tests else TESTS
    started = time.monotonic()
    outcomes = run_tests(program, tests, limits=LIMITS)
    assert time.monotonic() - started < LIMITS.wall_s
    assert len(outcomes) == len(tests)
    assert not any(outcome.passed for outcome in outcomes)
    assert re.search(pattern, outcomes[0].why), outcomes[0].why
    assert all(outcome.why and "\n" not in outcome.why and len(outcome.why) < 600 for outcome in outcomes)
    assert SECRET not in str(outcomes)


def test_a_waiting_program_is_killed_at_the_time_limit(host):
    (outcome,) = run_tests("import time\ntime.sleep(999)", ["pass"], limits=Limits(wall_s=0.3))
    assert outcome == (False, "the program exceeded the time limit of 0.3 s")


def test_a_program_that_closes_its_pipes_is_killed_at_the_time_limit(host):
    program = "import os, time\nos.closerange(0, 99)\ntime.sleep(999)"
    outcomes = run_tests(program, TESTS, limits=Limits(wall_s=0.3))
    assert [outcome.why for outcome in outcomes] == ["the program exceeded the time limit of 0.3 s while loading"] * 2


def test_endless_tests_fail_and_are_not_blamed_on_the_program():
    outcomes = run_tests(
        "def f(x): return x", ["assert f(4) == 4", "while True: pass", "assert f(4) == 4"], limits=LIMITS
    )
    assert [outcome.passed for outcome in outcomes] == [True, False, False]
    assert outcomes[1].why == "the tests exceeded the CPU time limit of 1 s"


def run_alone(code, *, limits=LIMITS):
    """Load a program in a sandbox without tests, and return how it ends."""
    asked, ask = os.pipe()
    answered, answer_end = os.pipe()
    order = {"codes": [["", code]], "cut": False}
    with Sandbox(PROGRAM_WORKER, order, descriptors=[asked, answer_end], limits=limits) as box:
        for end in (asked, answer_end):
            os.close(end)
        message = json.dumps({"call": "load", "args": [[]], "kwargs": {}}).encode()
        os.write(ask, struct.pack(">I", len(message)) + message)
        os.close(ask)
        ended = box.wait(time.monotonic() + LIMITS.wall_s)
    os.close(answered)
    return ended


@pytest.mark.parametrize(
    "data",
    [
        "bytearray(10 << 30)",
        "[bytearray(1 << 20) for _ in range(10 << 10)]",
        "[open(f'{n}', 'wb').write(bytes(1 << 20)) for n in range(100)]",
        "'x' * (10 << 30)",
    ],
)
def test_the_memory_of_a_program_is_limited(data):
    ended = run_alone(f"data = {data}")
    assert ended.why == "exited with status 0"
    assert 5 < ended.memory_mb < LIMITS.memory_mb


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the system call numbers are those of x86_64")
def test_unlisted_system_calls_fail():
    """Covers every number up to 500 except those of the table, and two for which the kernel kills a process itself."""
    listed = {int(row.split()[1]) for row in ALLOWED.split(",") if row.strip()}
    clone, socketpair, clone3, prlimit = 56, 53, 435, 302
    uretprobe, uprobe = 335, 336
    refused = sorted(set(range(500)) - listed - {clone, socketpair, clone3, prlimit, uretprobe, uprobe})
    program = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
def f(numbers): return sorted({(libc.syscall(n, 0, 0, 0, 0, 0, 0), ctypes.get_errno()) for n in numbers})
def g(number, first): return libc.syscall(number, first, 0, 0, 0, 0, 0), ctypes.get_errno()
"""
    tests = [
        f"assert f({refused}) == [(-1, 1)]",
        f"assert [g({clone}, flags) for flags in (0, 17, 0x4111, 0x10010000)] == [(-1, 1)] * 4",
        f"assert g({socketpair}, 2) == (-1, 1)",
        f"assert g({clone3}, 0) == (-1, 38)",
        f"assert [g({prlimit}, process) for process in (1, 2, -1)] == [(-1, 1)] * 3",
        "import resource\nassert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)",
    ]
    assert len(refused) > 350
    assert run_tests(program, tests) == ((True, ""),) * len(tests)


def test_the_standard_library_works_in_the_sandbox():
    program = """
import asyncio, bisect, collections, decimal, hashlib, json, math, random, re, sqlite3, ssl, statistics, tempfile, zlib
from concurrent.futures import ThreadPoolExecutor
def threads(): return list(ThreadPoolExecutor(4).map(abs, range(-3, 0)))
def loop(): return asyncio.run(asyncio.sleep(0.001, 'slept'))
def files():
    with tempfile.TemporaryDirectory() as folder:
        with open(folder + '/a', 'w') as file: file.write('written')
        return open(folder + '/a').read()
def table(): return sqlite3.connect(':memory:').execute('select 6 * 7').fetchall()
"""
    tests = [
        "assert threads() == [3, 2, 1]",
        "assert loop() == 'slept'",
        "assert files() == 'written'",
        "assert table() == [(42,)]",
    ]
    assert run_tests(program, tests) == ((True, ""),) * len(tests)


def run_python(*command, code):
    """Run code in a Python that another command starts; return standard output and the last line of errors."""
    done = subprocess.run(
        [*command, sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        timeout=300,
    )
    return done.stdout.strip(), (done.stderr.strip().splitlines() or [""])[-1]


TRY = "from align.rewards.unit_tests import run_tests\nprint(run_tests('import os\\nos.mkdir(\"ran\")', ['pass']))"
NO_NAMESPACES = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'


@pytest.mark.skipif(shutil.which("unshare") is None, reason="unshare(1) is not installed")
@pytest.mark.parametrize(
    ("command", "missing"),
    [
        (["unshare", "-Ur", "sh", "-c", NO_NAMESPACES, "sh"], "new namespaces"),
        (["unshare", "-Ur"], "a limit on threads"),
    ],
)
def test_a_missing_layer_is_reported_before_anything_runs(command, missing):
    if os.geteuid() != 0 and "sh" not in command:
        pytest.skip("the limit on threads has an effect for users other than root")
    output, error = run_python(*command, code=TRY)
    assert output == ""
    assert error.startswith(f"align.errors.InputError: the code sandbox cannot start: this system lacks {missing}")


def test_an_unprivileged_user_has_the_same_sandbox():
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    if command and run_python(*command, code="import os, sys; print(os.access(sys.executable, os.X_OK))")[0] != "True":
        pytest.skip("other users cannot run root's Python")
    output, error = run_python(*command, code=TRY)
    assert (output, error) == ("(Outcome(passed=True, why=''),)", "")


def test_no_process_remains_after_the_parent_is_killed():
    code = "from align.rewards.unit_tests import run_tests\nrun_tests('import time\\ntime.sleep(999)', ['pass'])"
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        until = time.monotonic() + 300
        while len(started := descendants(parent.pid)) < 5:  # the fork server, two supervisors and their workers
            assert time.monotonic() < until
            time.sleep(0.02)
        parent.send_signal(signal.SIGKILL)
    assert gone(started)
