"""Many programs in one sandbox: their answers, and that none can do harm or read or change another one."""

import os
import re
import time

from attacks import ATTACKS, SEARCH_MEMORY, answer, descendants, gone
from sandbox_mark import needs_sandbox

from align.sandbox.calls_worker import MAX_ANSWER, MAX_ANSWERS
from align.sandbox.function_calls import Program, run_programs
from align.sandbox.process import Limits

LIMITS = Limits(cpu_s=1, wall_s=5, memory_mb=256, folder_mb=4)
SQUARE = Program("f = lambda x: x * x", ("2", "3"))
pytestmark = needs_sandbox


def test_answers_are_the_repr_of_results():
    inputs = ("[1, 'a', None, (2.5,), {3: True}]", "''", "-7")
    assert run_programs([Program("def f(x): return x", inputs)]) == {
        Program("def f(x): return x", inputs): ["[1, 'a', None, (2.5,), {3: True}]", "''", "-7"]
    }


WRONG = [  # program, results in place of the two answers
    ("def f(x): return 1 / (x - 2)", ["!ZeroDivisionError", "1.0"]),
    ("f = lambda", ["!SyntaxError", "!no answer"]),
    ("g = 1", ["!KeyError", "!no answer"]),
    ("", ["!KeyError", "!no answer"]),
    ("import os\ndef f(x): os._exit(0)", ["!no answer"] * 2),
    ("import os\ndef f(x): return os._exit(0) if x > 2 else x", ["2", "!no answer"]),
    ("import os\ndef f(x): return os._exit(3) if x > 2 else x", ["2", "!killed"]),
    ("def f(x):\n    while x > 2: pass\n    return x", ["2", "!killed"]),
    ("import time\ndef f(x): time.sleep(99)", ["!killed"] * 2),
    ("f = lambda x: 'x' * 2000", ["'" + "x" * (MAX_ANSWER - 1)] * 2),
    ("f = lambda x: 'a\\nb'", ["'a\\nb'"] * 2),
    ("class A:\n    def __repr__(self): return '1\\n2\\n3'\ndef f(x): return A()", ["1 2 3"] * 2),
    ("def f(x): return '\\ud800'", ["'\\ud800'"] * 2),
    ("class A:\n    def __repr__(self): return '\\ud800'\ndef f(x): return A()", ["?"] * 2),
    ("import sys\ndef f(x): sys.exit(0)", ["!SystemExit"] * 2),
]


def test_a_failing_program_reports_each_input_and_affects_no_other():
    programs = [Program(source, ("2", "3")) for source, _ in WRONG]
    mixed = [SQUARE, *(each for program in programs for each in (program, Program(f"{program.source}\n#", ("2",))))]
    found = run_programs(mixed, limits=LIMITS, num_workers=1)
    assert [found[program] for program in programs] == [expected for _, expected in WRONG]
    assert found[SQUARE] == ["4", "9"]


def test_each_distinct_program_runs_once_whatever_the_number_of_workers():
    programs = [Program(f"f = lambda x: x + {number}", ("1",)) for number in range(150)]
    found = run_programs([*programs, *programs], num_workers=3)
    assert found == {program: [str(number + 1)] for number, program in enumerate(programs)}
    assert run_programs([]) == {}


def test_no_attack_gives_a_correct_answer_or_affects_the_next_program(host):
    programs = {}
    for name, (source, *_) in ATTACKS.items():
        for place, value in host.items():
            source = source.replace(f"@{place}@", str(value))
        programs[name] = Program(source, ("2", "3"))
    found = run_programs([*programs.values(), SQUARE], limits=LIMITS)
    for name, program in programs.items():
        assert len(found[program]) == 2
        assert not {"4", "9"} & set(found[program]), (name, found[program])
    assert found[SQUARE] == ["4", "9"]
    assert len(programs) > 60


# name -> (program, pattern of its answer to 2)
TROUBLE = {
    "kill every process": (answer("os.kill(-1, 9)"), "ProcessLookupError"),
    "kill the first process": (answer("os.kill(1, 9)"), "None"),
    "interrupt the first process": (answer("os.kill(1, 2)"), "None"),
    "stop the first process": (answer("os.kill(1, 19)"), "None"),
    "every signal to the first process": (answer("[os.kill(1, number) for number in range(1, 32)]"), r"\[None"),
    "limit the first process": (
        answer("resource.prlimit(1, resource.RLIMIT_CPU, (0, 0))", "os, resource"),
        "Permission",
    ),
    "limit the files of the first process": (
        answer("resource.prlimit(1, resource.RLIMIT_NOFILE, (0, 0))", "os, resource"),
        "Permission",
    ),
    "start a process": (answer("os.fork()"), "PermissionError"),
    "read the orders": (answer("os.read(3, 99)"), "OSError"),
    "write the results": (answer("os.write(4, bytes(99))"), "OSError"),
    "use every other descriptor": (
        answer("[number for number in range(3, 1000) if number != 3 and os.isatty(number) is None]"),
        r"\[\]",
    ),
    "leave a file": (answer("open('left', 'w')"), "Read-only file system"),
    "leave a folder": (answer("os.mkdir('/tmp/left')"), "Read-only file system"),
    "look for leftover files": (answer("os.listdir('/tmp')"), r"\[\]"),
    "make the folder writable": (
        answer("ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None)", "ctypes"),
        "-1",
    ),
    "shared memory": (answer("open('/dev/shm/left', 'w')"), "FileNotFoundError"),
    "list processes": (answer("os.listdir('/proc')"), r"\[\]|FileNotFoundError"),
    "forge a report": (
        "import os, struct\nos.write(3, struct.pack('>I?', 5, True) + b'4\\n9\\n' * 9)\nos._exit(0)",
        r"^(?!4$)",
    ),
    "widen the pipe": (
        "import fcntl, os\ndef f(x):\n    fcntl.fcntl(3, 1031, 1 << 20)\n    os.write(3, b'4\\n' * 100000)\n"
        "    os._exit(0)",
        "!no answer",
    ),
    "fill the pipe": ("import os\ndef f(x): os.write(3, b'4\\n' * 100000)", "!killed"),
    "find another program in memory": (
        SEARCH_MEMORY
        + """    return sum('se' 'cret' in value for value in seen if isinstance(value, str)) - sum(
        'se' 'cret' in value.decode('latin-1') for value in seen if isinstance(value, bytes))
""",
        "^0$",
    ),
    "change Python for the next program": (
        "import builtins, ast\nbuiltins.repr = lambda _: '4'\nast.literal_eval = lambda _: 2\ndef f(x): return x",
        "4|2",
    ),
}


def test_no_program_reads_or_affects_others_in_its_sandbox():
    before, programs = Program("secret = 1\nf = lambda x: 'secret'", ("2",)), [SQUARE]
    for number, (source, _) in enumerate(TROUBLE.values()):
        programs += [before, Program(source, ("2",)), Program(f"f = lambda x: x * x + {number}", ("2", "3"))]
        before = Program(f"secret = {number}\nf = lambda x: 'secret'", ("2",))
    found = run_programs(programs, limits=LIMITS, num_workers=1)
    for number, (name, (source, may_be)) in enumerate(TROUBLE.items()):
        assert re.search(may_be, found[Program(source, ("2",))][0]), (name, found[Program(source, ("2",))])
        after = found[Program(f"f = lambda x: x * x + {number}", ("2", "3"))]
        assert after == [str(4 + number), str(9 + number)], name


def test_answers_are_bounded_in_number_and_length():
    endless = Program("f = lambda x: 'x' * 5000", tuple(map(str, range(60))))
    (lines,) = run_programs([endless]).values()
    assert len(lines) == 60
    assert sum(line[0] != "!" for line in lines) == MAX_ANSWERS // (MAX_ANSWER + 1)


def test_no_process_remains_after_an_endless_program():
    before = descendants(os.getpid())
    started = time.monotonic()
    run_programs([Program("while True: pass", ("1",)), SQUARE], limits=LIMITS)
    assert time.monotonic() - started < 100
    assert gone(descendants(os.getpid()) - before)
