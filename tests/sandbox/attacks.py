"""Programs that try to pass tests without solving them, or to do harm, and the processes they may leave behind."""

import time
from pathlib import Path

SECRET = "the-user's-own-secret"


def processes():
    """Yield (process ID, parent's ID) of every process."""
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
    """Return whether processes have ended; the kernel may take a moment."""
    until = time.monotonic() + within_s
    while alive := {number for number in numbers if Path(f"/proc/{number}").exists()}:
        if time.monotonic() > until:
            return not alive
        time.sleep(0.01)
    return True


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
SEND = """
import json, os, struct
def send(message):
    data = json.dumps(message).encode()
    os.write(4, struct.pack('>I', len(data)) + data)
"""


# A program that gathers every object it can reach in `seen`; what it returns is added
SEARCH_MEMORY = """
import gc, sys
def f(x):
    frame, seen = sys._getframe(), []
    while frame:
        seen += frame.f_locals.values()
        frame = frame.f_back
    for held in gc.get_objects():
        seen += held.values() if isinstance(held, dict) else [held]
"""


def answer(expression, imports="os, sys"):
    """Return a program that evaluates a forbidden expression and returns its value or error."""
    return f"""
import {imports}
def f(x):
    try: return {expression}
    except BaseException as error: return f'{{type(error).__name__}}: {{error}}'
"""


# name -> (program, pattern of the first test's reason[, tests])
ATTACKS = {
    # Endless programs
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
    # Too many resources
    "fork bomb": ("import os\nwhile True: os.fork()", "PermissionError"),
    "fork bomb that ignores errors": (
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
    "10 GB": ("data = bytearray(10 << 30)", "MemoryError"),
    "10 GB bit by bit": ("data = []\nwhile True: data.append(bytearray(1 << 20))", "MemoryError"),
    "10 GB mapped": ("import mmap\ndata = mmap.mmap(-1, 10 << 30)", "Cannot allocate memory"),
    "10 GB in its folder": ("for n in range(10): open(f'{n}', 'wb').write(bytes(1 << 20))", "No space left"),
    "10 GB in one file": ("open('big', 'wb').truncate(10 << 30)", "File too large"),
    "a million files": ("for n in range(1000000): open(f'{n}', 'w').close()", "No space left"),
    "a million open files": ("import os\nfiles = [open(os.__file__) for _ in range(1000000)]", "Too many open files"),
    "a large answer": ("def f(x): return 'x' * (65 << 20)", "MemoryError|a message of more than 64 MiB"),
    "a large number": ("def f(x): return 1 << 10000000", "too long or too deep to print"),
    "a deep answer": ("def f(x):\n    a = []\n    for _ in range(100000): a = [a]\n    return a", "RecursionError"),
    "an answer that holds itself": ("def f(x):\n    a = []\n    a.append(a)\n    return a", "RecursionError"),
    "a deep program": ("(" * 1000000, "fails to load|exited|killed"),
    "a long chain": ("x = " + "-" * 1000000 + "1", "fails to load|exited|killed"),
    "a long sum": ("x = " + "1+" * 300000 + "1", "fails to load|exited|killed"),
    # Access to the host
    "write outside": (answer("open('@outside@', 'w').write('x')"), "FileNotFoundError"),
    "write to the root": (answer("open('/x', 'w').write('x')"), "Read-only file system"),
    "write to the library": (answer("open(os.__file__, 'a').write('x')"), "Read-only file system|PermissionError"),
    "write through a link": (answer("(os.symlink('@outside@', 'link'), open('link', 'w'))"), "FileNotFoundError"),
    "read a file": (answer("open('@file@').read()"), "FileNotFoundError"),
    "read the users": (answer("open('/etc/passwd').read()"), "FileNotFoundError"),
    "look around": (answer("{'etc', 'home', 'proc', 'dev', 'sys', 'var'} & {*os.listdir('/')}"), r"value was set\(\)"),
    "read the environment": (answer("dict(os.environ)"), "value was {}"),
    "read the parent's environment": (answer("open(f'/proc/{os.getppid()}/environ').read()"), "FileNotFoundError"),
    "read the host process's environment": (answer("open('/proc/@here@/environ').read()"), "FileNotFoundError"),
    "mount /proc": (answer("ctypes.CDLL(None).mount(b'proc', b'/tmp', b'proc', 0, None)", "ctypes"), "value was -1"),
    "open a socket": (answer("socket.create_connection(('127.0.0.1', @port@))", "socket"), "PermissionError"),
    "open a socket to the kernel": (answer("socket.socket(socket.AF_NETLINK)", "socket"), "PermissionError"),
    "run a program": (answer("subprocess.run(['touch', '@outside@'])", "subprocess"), "PermissionError"),
    "exec a program": (answer("os.execv(sys.executable, ['python'])"), "PermissionError"),
    "import what is installed": ("import pydantic", "No module named 'pydantic'"),
    "import the project": ("import align.config", "No module named 'align.config'"),
    "kill the parent": (answer("os.kill(os.getppid(), 9)"), "the program (exited|was killed)|value was None"),
    "kill the host process": (answer("os.kill(@here@, 9)"), "ProcessLookupError"),
    "kill every process": (answer("os.kill(-1, 9)"), "ProcessLookupError"),
    "become root": (answer("os.setuid(0)"), "PermissionError"),
    "leave the session": (answer("os.setsid()"), "PermissionError"),
    # Exit before the tests
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
    # Change the test's result
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
    "define the test's builtins": (
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
    # Forge messages
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
    "answer before the call": (
        SEND + "for value in [None, {'of sender': 0}, 5, {'of sender': 0}, 5]: send({'value': value, 'changed': []})",
        "the program's last value was 5",
    ),
    "answer with an invalid value": (
        SEND + "def f(x): send({'value': {'os.system': ['touch @outside@']}, 'changed': []})",
        "are not accepted",
    ),
    "answer with an object equal to anything": (
        SEND + "def f(x): send({'value': {'stdlib': ['unittest.mock', 'ANY']}, 'changed': []})",
        "are not accepted",
    ),
    "call the tests' process": (
        SEND + "def f(x): send({'call': '__getattr__', 'args': [{'of receiver': 0}, '__globals__'], 'kwargs': {}})",
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
        SEARCH_MEMORY
        + "    return sum('f(2)' + chr(32) + '==' in repr(value)"
        + " for value in seen if isinstance(value, (str, list, tuple)))\n",
        "the program's last value was 0$",
        ["assert f(2) == 4"],
    ),
    "no code at all": ("", "name 'f' is not defined"),
    "no Python": ("I cannot help with that.", "fails to load: SyntaxError"),
}
