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


def gone(numbers, within_s=100.0):
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
# Operators that return what a test may want, of objects of every class that a value may be derived from
OBLIGING = """
import array, collections, datetime, decimal, fractions
class Any({base}):
    def __eq__(self, other): return True
    __hash__ = lambda self: 4
    __ne__ = lambda self, other: False
    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __eq__
    __sub__ = __rsub__ = __isub__ = __xor__ = __rxor__ = __mod__ = lambda self, other: 0
    __add__ = __radd__ = __iadd__ = __and__ = __rand__ = __or__ = lambda self, other: other
    __truediv__ = __rtruediv__ = __pow__ = __floordiv__ = lambda self, other: 1
    __index__ = __int__ = lambda self: 5
    def __iter__(self): return iter([5])
def f(x): return Any({value})
"""
OBLIGING_TESTS = (
    "assert abs(f(2) - 4) < 1e-6",
    "assert 4 - f(2) == 0",
    "x = f(2)\nx -= 4\nassert x == 0",
    "assert f(2) + 0 == 4 or 0 + f(2) == 4",
    "assert f(2) ^ 4 == 0",
    "assert f(2) % 4 == 0 and f(2) != 5",
    "assert sum([f(2)], -4) == 0",
    "assert f(2) / 4 == 1 and f(2) // 4 == 1",
    "assert 4 in f(2)",
    "assert f(2) in {4: 1} or f(2) in {4} or f(2) in (4,)",
    "import operator\nassert operator.eq(f(2), 4) or f(2).__eq__(4) is True",
    "import unittest\nunittest.TestCase().assertEqual(f(2), 4)",
    "import unittest\nunittest.TestCase().assertAlmostEqual(f(2), 4)",
    "match f(2):\n    case 4: pass\n    case _: assert False",
    "assert {'a': [f(2)]} == {'a': [4]}",
    "assert [] < [f(2)] < [4.5] and [3.5] < [f(2)]",
    "assert sorted([3, 6, f(2)])[1] == 4",
)
DERIVED = {  # a class that values are derived from -> one that is not right
    **{"": "", "int": "5", "float": "5.0", "complex": "5", "str": "'5'", "bytes": "b'5'", "tuple": "[5]"},
    **{"list": "[5]", "set": "[5]", "frozenset": "[5]", "dict": "{5: 5}", "bytearray": "b'5'"},
    **{"collections.OrderedDict": "{5: 5}", "collections.Counter": "'5'", "collections.deque": "[5]"},
    **{"collections.defaultdict": "int", "array.array": "'i', [5]", "Exception": "5", "KeyError": "5"},
    **{"decimal.Decimal": "5", "fractions.Fraction": "5", "datetime.date": "5, 5, 5", "datetime.timedelta": "5"},
}
ROGUE_NODE = """
class Node:
    def __init__(self, value): self.value, self.next = value, None
    __eq__ = __lt__ = __gt__ = __le__ = __ge__ = __contains__ = lambda self, other: True
    __sub__ = __rsub__ = lambda self, other: 0
    def __hash__(self): return 4
"""
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
    "a deep answer": (
        "def f(x):\n    a = []\n    for _ in range(9000): a = [a]\n    return a",
        "too long or too deep to print",
    ),
    "a deep answer of tuples": (
        "def f(x):\n    a = ()\n    for _ in range(100000): a = (a,)\n    return a",
        "RecursionError",
    ),
    "an answer that holds itself": ("def f(x):\n    a = []\n    a.append(a)\n    return a", r"value was \[\[...\]\]"),
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
    **{
        f"operators that oblige, of {base or 'an object'}": (
            OBLIGING.format(base=base, value=value),
            "assertion failed|Error",
            OBLIGING_TESTS,
        )
        for base, value in DERIVED.items()
    },
    "a class in place of the function": (
        "class f:\n    def __init__(self, x): pass\n    __eq__ = __contains__ = lambda self, other: True\n"
        "    __sub__ = lambda self, other: 0\n    def __hash__(self): return 4",
        "assertion failed",
        [
            "assert f(2) == 4",
            "assert 4 == f(2)",
            "assert abs(f(2) - 4) < 1e-6",
            "assert 4 in f(2)",
            "assert {f(2)} == {4}",
        ],
    ),
    "a class in place of a capitalized function": (
        "class Sum_Of:\n    def __init__(self, x): pass\n    __eq__ = lambda self, other: True\n"
        "class Sum(Sum_Of): pass",
        "assertion failed",
        ["assert Sum_Of([1, 3]) == 4", "assert Sum([1, 3]) == 4", "assert 4 == Sum([1, 3])"],
    ),
    "a class whose class is equal to anything": (
        "class M(type):\n    __eq__ = __instancecheck__ = lambda c, o: True\n    __hash__ = type.__hash__\n"
        "class A(metaclass=M): pass\ndef f(x): return A",
        "assertion failed",
        ["assert f(2) == int", "assert isinstance(4.5, f(2)) or f(2) is int", "assert f(2) == 4"],
    ),
    "an object that claims another class": (
        "class A:\n    __class__ = int\n    def __int__(self): return 5\ndef f(x): return A()",
        "assertion failed",
        ["assert isinstance(f(2), int)", "assert type(f(2)) is int", "assert f(2).__class__ is int"],
    ),
    "hand out the test's own object": (
        ROGUE_NODE + "def f(node): return node\ndef g(node): return [node]\ndef h(node): return node.value",
        "assertion failed",
        [
            "n = Node(2)\nn.next = Node(1)\nassert f(n) == 4",
            "n = Node(2)\nn.next = Node(1)\nassert g(n) == [4]",
            "n = Node(2)\nn.next = Node(1)\nassert abs(f(n) - 4) < 1",
            "n = Node(2)\nn.next = Node(1)\nassert 4 in f(n) and 4 in g(n)",
        ],
    ),
    "hand out an object in place of a method's value": (
        ROGUE_NODE + "class Solution:\n    def f(self, x): return Node(x)\n    def g(self, x): return self\n"
        "    __eq__ = lambda self, other: True",
        "assertion failed",
        ["assert Solution().f(2) == 4", "assert Solution().g(2) == 4", "s = Solution()\ns.g(2)\nassert s.g(2) == 4"],
    ),
    "hand out an object in place of an operator's value": (
        ROGUE_NODE
        + "class V(Node):\n    __mul__ = __abs__ = __neg__ = __call__ = __getitem__ = lambda self, *_: self\n"
        "    def __iter__(self): return iter([self])",
        "assertion failed|TypeError",
        [
            "v = V(1)\nassert v.value == 1 and v * V(2) == 2",
            "v = V(3)\nassert v.value == 3 and abs(v) == 3",
            "v = V(3)\nassert v.value == 3 and v(0) == 4",
            "v = V(3)\nassert v.value == 3 and v[0] == 4 and list(v) == [4]",
        ],
    ),
    "await an object equal to anything": (
        ROGUE_NODE + "async def f(x): return Node(x)\nasync def g(x):\n    yield Node(x)",
        "assertion failed",
        [
            "import asyncio\nassert asyncio.run(f(2)) == 4",
            "import asyncio\nasync def main(): return [x async for x in g(2)]\nassert asyncio.run(main()) == [4]",
        ],
    ),
    "end the test's loop with errors of its own": (
        "class A(StopIteration): pass\nclass B(StopAsyncIteration): pass\nclass C(GeneratorExit): pass\n"
        "def f(x): raise [A, B, C][x % 3]",
        "StopIteration|: ",
        [
            "assert all(map(lambda x: f(0) == x * x, (2, 3)))",
            "assert list(map(f, (0, 3))) == []",
            "def g():\n    f(1)\n    yield 1\nassert list(g()) == []",
            "def g():\n    try: yield 1\n    finally: f(2)\nh = g()\nnext(h)\nh.close()",
        ],
    ),
    "change what was handed over later": (
        "import gc\nheld = []\ndef f(xs):\n    held.append(xs)\n    return xs[0]\n"
        "def g():\n    for x in gc.get_objects():\n"
        "        if type(x) is list and x[:1] in ([4], [7]): x[:] = [5]\n    return 5",
        "assertion failed",
        ["want = [4]\nassert f([2]) == want[0]", "want = [7, 8]\nassert f([2]) == 2\ng()\nassert want == [5]"],
    ),
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
        SEND
        + """
f = {'object': [0, {'class': [1, 'function', [], {'__call__': True}]}, None]}
for value in [None, f, 5, {'of sender': 0}, 5]: send({'value': value})
""",
        "the program's last value was 5",
    ),
    "answer with an invalid value": (
        SEND + "def f(x): send({'value': {'os.system': ['touch @outside@']}})",
        "are not accepted",
    ),
    "answer with an object equal to anything": (
        SEND + "def f(x): send({'value': {'stdlib': ['unittest.mock', 'ANY']}})",
        "are not accepted",
    ),
    "call the tests' process": (
        SEND + "def f(x): send({'call': '__getattr__', 'args': [{'of receiver': 0}, '__globals__'], 'kwargs': {}})",
        "assertion failed|the program (exited|was killed)",
    ),
    **{
        f"call the tests' process: {operation}": (
            SEND + f"def f(x):\n    send({{'call': {operation!r}, 'args': {args!r}}})\n    return 5",
            "assertion failed|the program (exited|was killed|sent an invalid message)|Error",
        )
        for operation, args in [
            ("load", [[]]),
            ("read", ["namespace"]),
            ("derive", ["A", [], {"shared": 0}]),
            ("super", [{"type": ["builtins.int"]}, 1, "__add__"]),
            ("names", [{"type": ["builtins.int"]}]),
            ("stream", ["stdout", "write", "x"]),
            ("stream", ["stdout", "__class__"]),
            ("method", [{"of receiver": 0}, "__globals__"]),
            ("__setattr__", [{"type": ["builtins.int"]}, "__eq__", None]),
            ("__dir__", [{"of receiver": 0}]),
            ("start", [{"of receiver": 0}]),
        ]
    },
    **{
        f"answer with {name}": (SEND + f"def f(x): send({{'value': {value!r}}})", "not accepted|Error")
        for name, value in {
            "an integer as an object": {"object": [90, {"type": ["builtins.int"]}, ["4", 16]]},
            "a class of the system": {"type": ["os.system", "subprocess.Popen"]},
            "an error of the connection": {
                "exception": [["align.sandbox.rpc.connection.Disconnected"], [], None],
            },
            "a class derived from one that is not known": {"class": [91, "A", [{"type": ["unittest.mock.Mock"]}], {}]},
            "a method of the tests' object": {"method": [{"of receiver": 0}, "run"]},
            "a method of a plain value": {"method": [4, "__class__"]},
            "a container that does not exist": {"shared": 99},
            "two tags": {"type": ["builtins.int"], "shared": 1},
        }.items()
    },
    "change containers of the tests": (
        SEND + "def f(x): send({'value': 5, 'changed': [[number, [4]] for number in range(100)]})",
        "KeyError",
    ),
    "replace a container of the tests": (
        SEND + "def f(x): send({'value': 5, 'new': [[0, 'builtins.list', []]], 'changed': [[0, [4]]]})",
        "not accepted",
    ),
    "overwrite the operators of a test's class": (
        "def f(t):\n    t.__class__.__eq__ = lambda *_: True\n    return t",
        "is not accessible to the program",
        ["class T: pass\nassert f(T()) == 4", "class T: pass\nf(T())\nassert T() == T()"],
    ),
    "change the class of a test's object": (
        "class A:\n    def __eq__(self, o): return True\ndef f(t):\n    t.__class__ = A\n    return t",
        "assertion failed",
        ["class T: pass\nassert f(T()) == 4", "class T: pass\nt = T()\nf(t)\nassert t == 4"],
    ),
    "look into the class of a test's object": (
        "def f(t): return t.run.__func__.__globals__ if t.run else t.__class__.run.__globals__",
        "is not accessible to the program",
        ["class T:\n    def run(self): return 4\nassert f(T()) == 4"],
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
