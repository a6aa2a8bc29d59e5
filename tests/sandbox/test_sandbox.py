"""Programs that try to pass without solving anything, or to do harm. Each must fail for the reason that it is given."""

import json
import os
import platform
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align.errors import InputError
from align.rewards.unit_tests import run_tests
from align.sandbox.process import PROGRAM_WORKER, Limits, Sandbox
from align.sandbox.seccomp import ALLOWED

LIMITS = Limits(cpu_s=1, wall_s=20, memory_mb=256, folder_mb=4)
SECRET = "the-user's-own-secret"
TESTS = ("assert f(2) == 4", "assert f(3) == 9")


def why_not():
    """The reason that this machine gives for having no sandbox, "" where it has one."""
    try:
        run_tests("", ["pass"])
    except InputError as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


def processes():
    """Every process: (its number, its parent's)."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            yield int(folder.name), int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue


def descendants(top):
    found, parents = {top}, dict(processes())
    while more := {number for number, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {top}


def gone(numbers, within_s=5.0):
    """Whether processes have ended, which the kernel may take a moment for."""
    until = time.monotonic() + within_s
    while alive := {number for number in numbers if Path(f"/proc/{number}").exists()}:
        if time.monotonic() > until:
            return not alive
        time.sleep(0.01)
    return True


@pytest.fixture
def host(tmp_path, monkeypatch):
    """What an attack would like to reach; nothing of it may have changed afterwards."""
    monkeypatch.setenv("API_KEY", SECRET)
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        places = {"file": str(secret), "outside": str(tmp_path / "created"), "here": os.getpid()}
        yield {**places, "port": server.getsockname()[1]}
        with pytest.raises(BlockingIOError):
            server.accept()
    assert secret.read_text() == SECRET
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    servers = {number for number, parent in processes() if parent == os.getpid()}
    assert gone({number for server in servers for number in descendants(server)})


ALWAYS_EQUAL = """
class Any({base}):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __eq__
    def __sub__(self, other): return self
    __rsub__ = __add__ = __radd__ = __mul__ = __abs__ = __neg__ = __round__ = lambda self, *_: self
    def __hash__(self): return hash(4)
    def __bool__(self): return True
def f(x): return Any({value})
"""
ANY_TESTS = (
    "assert f(2) == 4",
    "assert 4 == f(2)",
    "assert not f(2) != 4",
    "assert f(2) in (4, '4', [4])",
    "assert [f(2)] == [4] or (f(2),) == (4,) or {f(2)} == {4}",
    "assert abs(f(2) - 4) < 1e-6",
    "assert f(2) - 4 <= 0 and 4 - f(2) <= 0 and f(2) * 1 == 4",
    "assert round(f(2), 3) == 4.0",
    "assert 4 in f(2)",
    "assert f(2) > 3.9 and f(2) < 4.1",
)
LINE = """
import json, os, struct
def line(message):
    data = json.dumps(message).encode()
    os.write(4, struct.pack('>I', len(data)) + data)
"""


def answer(expression, imports="os, sys"):
    """A program that does what it should not, and returns what came of it."""
    return f"""
import {imports}
def f(x):
    try: return {expression}
    except BaseException as error: return f'{{type(error).__name__}}: {{error}}'
"""


# name -> (program, what the reason of the first test says[, the tests])
ATTACKS = {
    # Never coming to an end
    "endless loop": ("while True: pass", "exceeded the CPU time limit of 1 s while loading"),
    "endless loop in a call": ("def f(x):\n    while True: pass", "the program exceeded the CPU time limit of 1 s$"),
    "endless loop that ignores signals": (
        """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
while True: pass
""",
        "exceeded the CPU time limit of 1 s",
    ),
    "endless loop after raising the limit": (
        """
import resource
try: resource.setrlimit(resource.RLIMIT_CPU, (99, 99))
except ValueError: pass
while True: pass
""",
        "exceeded the CPU time limit of 1 s",
    ),
    "endless work that Python cannot interrupt": (
        "import re\nre.match('(a+)+b', 'a' * 99)",
        "exceeded the CPU time limit of 1 s",
    ),
    "endless printing": ("while True: print('x' * 100000)", "exceeded the CPU time limit of 1 s"),
    "endless answer": ("def f(x):\n    while True: yield x", "exceeded the CPU time", ["assert list(f(2)) == [4]"]),
    "endless threads": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
        "RuntimeError: can't start new thread",
    ),
    # More than there is
    "fork bomb": ("import os\nwhile True: os.fork()", "PermissionError"),
    "fork bomb that goes on": (
        """
import os
def f(x):
    for _ in range(10000):
        try: os.fork()
        except OSError: pass
    return os.getpid()
""",
        "the program's last value was 1$",
    ),
    "10 GB": ("hoard = bytearray(10 << 30)", "MemoryError"),
    "10 GB bit by bit": ("hoard = []\nwhile True: hoard.append(bytearray(1 << 20))", "MemoryError"),
    "10 GB mapped": ("import mmap\nhoard = mmap.mmap(-1, 10 << 30)", "Cannot allocate memory"),
    "10 GB in its folder": ("for n in range(10): open(f'{n}', 'wb').write(bytes(1 << 20))", "No space left"),
    "10 GB in one file": ("open('big', 'wb').truncate(10 << 30)", "File too large"),
    "a million files": ("for n in range(1000000): open(f'{n}', 'w').close()", "No space left"),
    "a million open files": ("import os\nfiles = [open(os.__file__) for _ in range(1000000)]", "Too many open files"),
    "a large answer": ("def f(x): return 'x' * (65 << 20)", "MemoryError|more than 64 MB at once"),
    "a large number": ("def f(x): return 1 << 10000000", "too long or too deep to print"),
    "a deep answer": ("def f(x):\n    a = []\n    for _ in range(100000): a = [a]\n    return a", "RecursionError"),
    "an answer that holds itself": ("def f(x):\n    a = []\n    a.append(a)\n    return a", "RecursionError"),
    "a deep program": ("(" * 1000000, "fails to load|exited|killed"),
    "a long chain": ("x = " + "-" * 1000000 + "1", "fails to load|exited|killed"),
    "a long sum": ("x = " + "1+" * 300000 + "1", "fails to load|exited|killed"),
    # Reaching out
    "write outside": (answer("open('@outside@', 'w').write('x')"), "FileNotFoundError"),
    "write to the root": (answer("open('/x', 'w').write('x')"), "Read-only file system"),
    "write to the library": (answer("open(os.__file__, 'a').write('x')"), "Read-only file system|PermissionError"),
    "write through a link": (answer("(os.symlink('@outside@', 'link'), open('link', 'w'))"), "FileNotFoundError"),
    "read a file": (answer("open('@file@').read()"), "FileNotFoundError"),
    "read the users": (answer("open('/etc/passwd').read()"), "FileNotFoundError"),
    "look around": (answer("{'etc', 'home', 'proc', 'dev', 'sys', 'var'} & {*os.listdir('/')}"), r"value was set\(\)"),
    "read the environment": (answer("dict(os.environ)"), "value was {}"),
    "read the parent's environment": (answer("open(f'/proc/{os.getppid()}/environ').read()"), "FileNotFoundError"),
    "read the tester's environment": (answer("open('/proc/@here@/environ').read()"), "FileNotFoundError"),
    "mount /proc": (answer("ctypes.CDLL(None).mount(b'proc', b'/tmp', b'proc', 0, None)", "ctypes"), "value was -1"),
    "open a socket": (answer("socket.create_connection(('127.0.0.1', @port@))", "socket"), "PermissionError"),
    "open a socket to the kernel": (answer("socket.socket(socket.AF_NETLINK)", "socket"), "PermissionError"),
    "run a program": (answer("subprocess.run(['touch', '@outside@'])", "subprocess"), "PermissionError"),
    "become a program": (answer("os.execv(sys.executable, ['python'])"), "PermissionError"),
    "import what is installed": ("import pydantic", "No module named 'pydantic'"),
    "import the project": ("import align.config", "No module named 'align.config'"),
    "kill the parent": (answer("os.kill(os.getppid(), 9)"), "the program (exited|was killed)|value was None"),
    "kill the tester": (answer("os.kill(@here@, 9)"), "ProcessLookupError"),
    "kill everyone": (answer("os.kill(-1, 9)"), "ProcessLookupError"),
    "become root": (answer("os.setuid(0)"), "PermissionError"),
    "leave the session": (answer("os.setsid()"), "PermissionError"),
    # Ending before the tests
    "os._exit(0)": ("import os\nos._exit(0)", "the program exited with status 0 while loading"),
    "os._exit(0) in a call": ("import os\ndef f(x): os._exit(0)", "the program exited with status 0$"),
    "sys.exit(0)": ("import sys\nsys.exit(0)", "fails to load: SystemExit: 0"),
    "sys.exit(0) in a call": ("import sys\ndef f(x): sys.exit(0)", "SystemExit: 0"),
    "KeyboardInterrupt": ("def f(x): raise KeyboardInterrupt", "KeyboardInterrupt"),
    "crash": ("import ctypes\ndef f(x): ctypes.string_at(0)", "the program was killed by SIGSEGV"),
    "kill itself": ("import os\ndef f(x): os.kill(os.getpid(), 9)", "the program's last value was None"),
    "stop itself": (
        "import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGSTOP)",
        "the program's last value was None",
    ),
    "exit by a thread": (
        "import os, threading, time\nthreading.Timer(0, os._exit, [0]).start()\ndef f(x): time.sleep(9)",
        "the program exited with status 0",
    ),
    # Deciding the test
    "swallow every exception": (
        """
import atexit, sys, threading
sys.excepthook = threading.excepthook = sys.unraisablehook = lambda *_: None
atexit.register(print, 'passed')
def f(x):
    try: return g(x)
    except BaseException: return None
""",
        "the program's last value was None",
    ),
    "redefine the builtins": (
        """
import builtins
for name in ['AssertionError', 'Exception', 'BaseException', 'compile', 'exec', 'print', 'repr']:
    setattr(builtins, name, type(name, (), {}))
builtins.abs = builtins.isinstance = builtins.all = lambda *_: True
def f(x): return 5
""",
        "assertion failed|the program (exited|was killed)",
    ),
    "lend the test its builtins": (
        """
def abs(x): return -1
def round(*_): return 4
def all(_): return True
def isinstance(*_): return True
class math:
    isclose = staticmethod(lambda *_: True)
def f(x): return 5.0
""",
        "assertion failed",
        [
            "assert abs(f(2) - 4) < 1e-6",
            "assert round(f(2)) == 4",
            "assert all(f(x) == x * x for x in (2, 3))",
            "assert isinstance(f(2), int)",
            "assert math.isclose(f(2), 4)",
        ],
    ),
    "patch every module": (
        """
import sys
for module in list(sys.modules.values()):
    for name in ('eq', 'dumps', 'loads', 'shorten', 'compile'):
        if hasattr(module, name): setattr(module, name, lambda *_, **__: '')
def f(x): return 5
""",
        "sent an invalid message",
    ),
    "raise AssertionError": ("def f(x): raise AssertionError('passed')", "assertion failed"),
    "end the test's loop": (
        "def f(x): raise StopIteration",
        "StopIteration",
        ["assert all(map(lambda x: f(x) == x * x, (2, 3)))", "assert list(map(f, (2, 3))) == []"],
    ),
    **{
        f"equal to anything, as {base or 'an object'}": (
            ALWAYS_EQUAL.format(base=base, value=value),
            "assertion failed|TypeError|ValueError",
            ANY_TESTS,
        )
        for base, value in [("", ""), ("int", "5"), ("float", "5.0"), ("str", "'5'"), ("list", "[5]"), ("dict", "")]
    },
    # Forging the verdict
    "print the success": ("print('[0, \"\"]')\ndef f(x): return 5", "the program's last value was 5"),
    "write to every descriptor": (
        """
import os
for descriptor in range(1000):
    try: os.write(descriptor, b'[0, ""]\\n[1, ""]\\n')
    except OSError: pass
os._exit(0)
""",
        "the program (sent an invalid message|exited with status)",
    ),
    "answer before it is asked": (
        LINE + "for value in [None, {'of sender': 0}, 5, {'of sender': 0}, 5]: line({'value': value, 'changed': []})",
        "the program's last value was 5",
    ),
    "answer with what is no value": (
        LINE + "def f(x): line({'value': {'os.system': ['touch @outside@']}, 'changed': []})",
        "are not accepted",
    ),
    "answer with what equals anything": (
        LINE + "def f(x): line({'value': {'stdlib': ['unittest.mock', 'ANY']}, 'changed': []})",
        "are not accepted",
    ),
    "ask the tests' process for its own": (
        LINE + "def f(x): line({'call': '__getattr__', 'args': [{'of receiver': 0}, '__globals__'], 'kwargs': {}})",
        "assertion failed|the program (exited|was killed)",
    ),
    "look into a function of the tests": (
        "def f(g): return g.__globals__",
        "'__globals__' of 'function' object is not accessible to the program",
        ["assert f(lambda: 4) == 4"],
    ),
    "look into a frame of the tests": (
        "def f(g): return g.gi_frame",
        "'gi_frame' of 'generator' object is not accessible to the program",
        ["assert f(x for x in [4]) == 4"],
    ),
    "search the memory for the tests": (
        """
import gc, sys
def f(x):
    frame, seen = sys._getframe(), []
    while frame:
        seen += frame.f_locals.values()
        frame = frame.f_back
    for held in gc.get_objects():
        seen += held.values() if isinstance(held, dict) else [held]
    return sum('f(2)' + chr(32) + '==' in repr(value) for value in seen if isinstance(value, (str, list, tuple)))
""",
        "the program's last value was 0$",
        ["assert f(2) == 4"],
    ),
    "no code at all": ("", "name 'f' is not defined"),
    "no Python": ("I cannot help with that.", "fails to load: SyntaxError"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_passes_or_does_harm(name, host):
    program, said, *tests = ATTACKS[name]
    for place, value in host.items():
        program = program.replace(f"@{place}@", str(value))
    tests = tests[0] if tests else TESTS
    started = time.monotonic()
    outcomes = run_tests(program, tests, limits=LIMITS)
    assert time.monotonic() - started < 10
    assert len(outcomes) == len(tests)
    assert not any(outcome.passed for outcome in outcomes)
    assert re.search(said, outcomes[0].why), outcomes[0].why
    assert all(outcome.why and "\n" not in outcome.why and len(outcome.why) < 600 for outcome in outcomes)
    assert SECRET not in str(outcomes)


def test_a_program_that_waits_is_ended_by_the_clock(host):
    (outcome,) = run_tests("import time\ntime.sleep(999)", ["pass"], limits=Limits(wall_s=0.3))
    assert outcome == (False, "the program exceeded the time limit of 0.3 s")


def test_a_program_that_closes_its_line_and_waits_is_ended_by_the_clock(host):
    program = "import os, time\nos.closerange(0, 99)\ntime.sleep(999)"
    outcomes = run_tests(program, TESTS, limits=Limits(wall_s=0.3))
    assert [outcome.why for outcome in outcomes] == ["the program exceeded the time limit of 0.3 s while loading"] * 2


def test_tests_that_never_end_fail_and_are_not_the_programs_fault():
    outcomes = run_tests(
        "def f(x): return x", ["assert f(4) == 4", "while True: pass", "assert f(4) == 4"], limits=LIMITS
    )
    assert [outcome.passed for outcome in outcomes] == [True, False, False]
    assert outcomes[1].why == "the tests exceeded the CPU time limit of 1 s"


def alone(code, *, limits=LIMITS):
    """A program in its sandbox without any tests: how it ends once it has been asked to load."""
    asked, ask = os.pipe()
    answered, answer_end = os.pipe()
    order = {"codes": [["", code]], "cut": False}
    with Sandbox(PROGRAM_WORKER, order, descriptors=[asked, answer_end], limits=limits) as box:
        for end in (asked, answer_end):
            os.close(end)
        message = json.dumps({"call": "load", "args": [[]], "kwargs": {}}).encode()
        os.write(ask, struct.pack(">I", len(message)) + message)
        os.close(ask)
        ended = box.wait(time.monotonic() + 20)
    os.close(answered)
    return ended


@pytest.mark.parametrize(
    "hoard",
    [
        "bytearray(10 << 30)",
        "[bytearray(1 << 20) for _ in range(10 << 10)]",
        "[open(f'{n}', 'wb').write(bytes(1 << 20)) for n in range(100)]",
        "'x' * (10 << 30)",
    ],
)
def test_what_a_program_hoards_is_bounded_by_its_limit(hoard):
    ended = alone(f"hoard = {hoard}")
    assert ended.why == "exited with status 0"
    assert 5 < ended.memory_mb < LIMITS.memory_mb


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers of these system calls are those of x86_64")
def test_system_calls_that_are_not_listed_are_refused():
    """Every number up to 500 but those of the table, and two that the kernel keeps from filters and kills for."""
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


def test_the_standard_library_works_inside():
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


def elsewhere(*command, code):
    """What a Python that another program starts says: standard output and the last line of its errors."""
    done = subprocess.run(
        [*command, sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        timeout=60,
    )
    return done.stdout.strip(), (done.stderr.strip().splitlines() or [""])[-1]


TRY = "from align.rewards.unit_tests import run_tests\nprint(run_tests('import os\\nos.mkdir(\"ran\")', ['pass']))"
NO_MORE = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'


@pytest.mark.skipif(shutil.which("unshare") is None, reason="there is no unshare(1) to forbid namespaces with")
@pytest.mark.parametrize(
    ("command", "missing"),
    [
        (["unshare", "-Ur", "sh", "-c", NO_MORE, "sh"], "new namespaces"),
        (["unshare", "-Ur"], "a limit on threads"),
    ],
)
def test_where_the_kernel_lacks_a_layer_nothing_runs_and_one_line_says_which(command, missing):
    if os.geteuid() != 0 and "sh" not in command:
        pytest.skip("the limit on threads binds who is not root outside")
    said, error = elsewhere(*command, code=TRY)
    assert said == ""
    assert error.startswith(
        f"align.errors.InputError: code is executed in a sandbox only, and this system lacks {missing}"
    )


def test_a_user_without_rights_has_the_same_sandbox():
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    if command and elsewhere(*command, code="import os, sys; print(os.access(sys.executable, os.X_OK))")[0] != "True":
        pytest.skip("root's Python is not for other users to run")
    said, error = elsewhere(*command, code=TRY)
    assert (said, error) == ("(Outcome(passed=True, why=''),)", "")


def test_a_killed_parent_leaves_nothing_behind():
    code = "from align.rewards.unit_tests import run_tests\nrun_tests('import time\\ntime.sleep(999)', ['pass'])"
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        until = time.monotonic() + 30
        while len(started := descendants(parent.pid)) < 5:  # the fork server, two supervisors and their workers
            assert time.monotonic() < until
            time.sleep(0.02)
        parent.send_signal(signal.SIGKILL)
    assert gone(started)
