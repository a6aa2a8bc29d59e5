"""Executed tests on honest programs, extraction of code from responses, and grading."""

import ast
import itertools
import json
import os
import sys
import types
import warnings
from pathlib import Path

import pytest
from sandbox_mark import needs_sandbox

from align.errors import InputError
from align.records import Message, Prompt
from align.rewards.builtin_judges import ExecutedTestsSettings
from align.rewards.code_extraction import candidates
from align.rewards.unit_tests import (
    executed_tests_judge,
    grade_humaneval,
    grade_mbpp,
    in_parallel,
    pass_at_k,
    run_tests,
)
from align.sandbox.process import Limits

MBPP = Path(__file__).parents[2] / ".." / "shared" / "data" / "mbpp" / "mbpp_train.jsonl"
pytestmark = needs_sandbox


def failures(code, tests, **more):
    """Return the reasons of the tests that fail."""
    return [why for passed, why in run_tests(code, tests, **more) if not passed]


VALUES = """
None; True; -3; 1 << 200; -(10 ** 40); 0.1; float('inf'); -0.0; 2 - 3j; ''; 'ü \\ud800 \\n'; b'\\x00\\xff'
(); (1,); ((1, 2), [3]); [[1], []]; {1, 2}; frozenset({'a'}); {'a': [1], 2: {'b': None}}; {(1, 2): {3}}; int; str
range(1, 9, 2); bytearray(b'ab'); collections.Counter('abca'); collections.OrderedDict([(2, 1), (1, 2)])
collections.defaultdict(list, {'a': [1]}); collections.deque([1, 2], 3); array.array('i', [1, 2])
decimal.Decimal('1.10'); fractions.Fraction(1, 3); datetime.date(2024, 2, 29); datetime.time(1, 2, 3)
datetime.datetime(2024, 2, 29, 1, 2, 3, 4); datetime.timedelta(1, 2, 3)
"""
MODULES = "import array, collections, datetime, decimal, fractions\n"


def test_plain_values_are_exchanged_unchanged():
    values = [value.strip() for value in VALUES.replace("\n", ";").split(";") if value.strip()]
    tests = [f"x = {value}\nassert f(x) == x and repr(f(x)) == repr(x) and type(f(x)) is type(x)" for value in values]
    tests += [f"x = {value}\nassert g(repr(x), x)" for value in values if "Counter" not in value]
    code = "def f(x): return x\ndef g(text, x): return repr(x) == text"
    assert failures(code, tests, setup=MODULES) == []
    assert len(tests) > 60


# name -> (program, tests that plain Python passes)
SOUND = {
    "several calls": (
        "def f(x): return x + 1",
        ["assert f(1) == 2 and f(f(1)) == 3", "assert [f(x) for x in (1, 2)] == [2, 3]"],
    ),
    "keywords and defaults": ("def f(x, *, by=1): return x * by", ["assert f(2, by=3) == 6", "assert f(x=2) == 2"]),
    "keywords of any name": (
        "def f(**named): return sorted(named)",
        ["assert f(self=1, operation=2, target=3, name=4) == ['name', 'operation', 'self', 'target']"],
    ),
    "a tolerance": (
        "def f(x): return x / 3",
        ["assert abs(f(1) - 0.3333) < 1e-3", "import math\nassert math.isclose(f(3), 1)"],
    ),
    "a changed argument": (
        "def f(rows, seen):\n    rows[0].reverse()\n    rows.append([9])\n    seen.add(1)",
        ["rows, seen = [[1, 2]], set()\nassert f(rows, seen) is None\nassert rows == [[2, 1], [9]] and seen == {1}"],
    ),
    "a function as an argument": (
        "def f(call, xs): return [call(x) for x in xs]",
        [
            "assert f(lambda x: x * x, [1, 2]) == [1, 4]",
            "assert f(str.upper, ['a']) == ['A']",
            "assert f(abs, [-1]) == [1]",
        ],
    ),
    "a function as an answer": ("def f(n): return lambda x: x + n", ["assert f(2)(3) == 5", "assert callable(f(2))"]),
    "iterators": (
        "def f(xs):\n    for x in xs: yield x + 1\ndef g(xs): return map(str, xs)",
        [
            "assert list(f([1, 2])) == [2, 3]",
            "assert next(f(iter([4]))) == 5",
            "assert ' '.join(g(x for x in (1, 2))) == '1 2'",
        ],
    ),
    "classes": (
        """
class Node:
    size = 0
    def __init__(self, value): self.value, self.left = value, None
    def grow(self, value): self.left = Node(value); return self.left
    def __len__(self): return 1 + (len(self.left) if self.left else 0)
    def __eq__(self, other): return isinstance(other, Node) and self.value == other.value
    def __add__(self, other): return Node(self.value + other.value)
    def __repr__(self): return f'Node({self.value})'
    def __getitem__(self, place): return [self.value][place]
def depth(node): return 0 if node is None else 1 + depth(node.left)
""",
        [
            "root = Node(1)\nroot.left = Node(2)\nassert depth(root) == 2 and root.left.value == 2",
            "root = Node(1)\nassert root.grow(5).value == 5 and root.left is root.left and len(root) == 2",
            "assert Node(1) == Node(1) and Node(1) != Node(2) and Node(1) + Node(2) == Node(3)",
            "assert repr(Node(4)) == 'Node(4)' and isinstance(Node(4), Node) and not isinstance(4, Node)",
            "assert Node(4)[0] == 4 and Node.size == 0 and list(Node(7)) == [7]",
        ],
    ),
    "named tuples and enumerations": (
        "import collections, enum\nPair = collections.namedtuple('Pair', 'a b')\nclass Level(enum.IntEnum): LOW = 1\n"
        "def f(): return Pair(1, 2)\ndef g(): return Level.LOW",
        ["assert f() == (1, 2)", "assert g() == 1"],
    ),
    "the tests' own classes": (
        "def f(node): node.seen = True; return node.value + (f(node.next) if node.next else 0)",
        [
            "class Node:\n    def __init__(self, value, next=None): self.value, self.next = value, next\n"
            "node = Node(1, Node(2))\nassert f(node) == 3 and node.next.seen is True"
        ],
    ),
    "errors": (
        "class Mine(ValueError): pass\ndef f(x):\n    if x < 0: raise Mine('below')\n    return {}[x]",
        [
            "try: f(-1)\nexcept ValueError as error: assert str(error) == 'below'\nelse: assert False",
            "try: f(1)\nexcept KeyError: pass\nelse: assert False",
        ],
    ),
    "a name of Python's own": ("def sum(a, b): return a + b", ["assert sum(1, 2) == 3", "assert sum(-1, 1) == 0"]),
    "a name of a module": ("def bisect(x): return x", ["assert bisect(3) == 3"]),
    "modules that only the program imports": (
        "import sys, math\ndef f(x): return math.sqrt(x)",
        ["assert f(4) == math.sqrt(4)"],
    ),
    "a constant": ("LIMIT = [3]\ndef f(): LIMIT[0] += 1", ["assert LIMIT == [3]", "f()", "assert LIMIT == [4]"]),
    "windows' line ends": ("def f(x):\r\n\tif x:\r\n\t\treturn 1\r\n\treturn 0", ["assert f(1) == 1\r\n"]),
    "printing, and a main that reads": (
        "import sys\ndef f(x):\n    print(x)\n    return print(x, file=sys.stderr) or x\n"
        "if __name__ == '__main__': f(input())",
        ["assert f(1) == 1"],
    ),
    "annotations of its own module": (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass P:\n    x: int\n    y: P | None = None",
        ["assert P(1) == P(1) and P(1, P(2)).y.x == 2"],
    ),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_correct_program_passes_as_in_plain_python(name, monkeypatch):
    code, tests = SOUND[name]
    module = types.ModuleType("program")
    monkeypatch.setitem(sys.modules, "program", module)
    exec(compile(code, name, "exec", dont_inherit=True), module.__dict__)
    for test in tests:  # the expectation: what one plain interpreter says
        exec(compile(test, name, "exec", dont_inherit=True), module.__dict__)
    assert failures(code, tests) == []


WRONG = [  # program, test, the reason
    ("def f(x): return x", "assert f(2) == 4", "assertion failed: assert f(2) == 4; the program's last value was 2"),
    ("def f(x): return 1 / x", "assert f(0) == 0", "ZeroDivisionError: division by zero, in assert f(0) == 0"),
    ("def g(x): return x", "assert f(0) == 0", "NameError: name 'f' is not defined, in assert f(0) == 0"),
    (
        "def f(): return 1",
        "assert f(0) == 1",
        "TypeError: f() takes 0 positional arguments but 1 was given, in assert f(0) == 1",
    ),
    (
        "def f(x) return x",
        "assert f(0) == 0",
        "the program fails to load: SyntaxError: expected ':' (<program>, line 1)",
    ),
    ("import numpy", "assert f(0) == 0", "the program fails to load: ModuleNotFoundError: No module named 'numpy'"),
    ("def f(x): return input()", "assert f(0) == 0", "EOFError: EOF when reading a line, in assert f(0) == 0"),
    (
        "def f(x): return f(x)",
        "assert f(0) == 0",
        "RecursionError: maximum recursion depth exceeded, in assert f(0) == 0",
    ),
    (
        "class A: pass\ndef f(x): return A()",
        "assert f(0) == 0",
        "assertion failed: assert f(0) == 0; the program's last value was an object of one of its classes",
    ),
    (
        "def f(x): return [1, 2]",
        "assert f(0) == (1, 2)",
        "assertion failed: assert f(0) == (1, 2); the program's last value was [1, 2]",
    ),
]


@pytest.mark.parametrize(("code", "test", "message"), WRONG)
def test_an_incorrect_program_fails_with_a_reason_in_one_line(code, test, message):
    assert run_tests(code, [test]) == ((False, message),)


def test_each_test_has_an_outcome_and_the_setup_runs_first():
    outcomes = run_tests(
        "def f(x): return x % 3", ["assert f(n) == 1", "assert f(5) == 5", "n = 5\nassert f(n) == 2"], setup="n = 4"
    )
    assert [outcome.passed for outcome in outcomes] == [True, False, True]
    (outcome,) = run_tests("def f(x): return x", ["assert f(1) == 1"], setup="import numpy")
    assert outcome == (
        False,
        "the setup of the tests fails: ModuleNotFoundError: No module named 'numpy', in import numpy",
    )
    assert run_tests("def f(x): return x", []) == ()


def test_an_invalid_test_is_an_input_error():
    with pytest.raises(InputError, match="test 2 is not Python: .*assert f"):
        run_tests("def f(x): return x", ["assert f(1) == 1", "assert f(1 == 1"])


def test_the_entry_point_is_the_programs_function_whatever_else_has_its_name():
    code = "def max(a): return a[0]\ndef min(a): return a[0]"
    tests = ["assert max([1, 2]) == 1 and min(1, 2) == 1"]
    assert failures(code, tests, entry_point="max", setup="def max(a): pass") == []


def test_outcomes_are_deterministic():
    code = "def f(): return [*{'ant', 'bee', 'cow', 'dog', 'elk'}]\ndef g(x): return hash(x)"
    shown = {run_tests(code, ["assert f() == 0", "assert g('ant') == 0"]) for _ in range(4)}
    assert len(shown) == 1


def test_correct_programs_pass_on_a_busy_machine():
    """Each program needs half of its CPU time, and several run on each core."""
    code = "import time\ndef f():\n    while time.process_time() < 0.5: pass\n    return 1"
    judge = executed_tests_judge(ExecutedTestsSettings(num_workers=4 * (os.cpu_count() or 1), limits=Limits(cpu_s=1)))
    prompt = asked(tests=["assert f() == 1"])
    ((*verdicts,),) = judge([(prompt, [code] * 4 * (os.cpu_count() or 1))])
    assert [verdict.why for verdict in verdicts] == ["1 of 1 tests pass"] * len(verdicts)


def asked(**metadata):
    return Prompt((Message("user", "Write f."),), metadata)


SQUARE = "def f(x):\n    return x * x"
RESPONSES = [  # response, whether its program squares
    (SQUARE, True),
    (f"```python\n{SQUARE}\n```", True),
    (f"Sure!\n\n```py\n{SQUARE}\n```\nIt runs in O(1).", True),
    (f"```\n{SQUARE}\n```", True),
    (f"~~~~Python\n{SQUARE}\n~~~~", True),
    (f"```python\n{SQUARE}", True),
    (f"```bash\npip install f\n```\n```python\n{SQUARE}\n```", True),
    (f"```python\n{SQUARE}\n```\nUse it so:\n```python\nprint(f(2))\nprint(f(3), 'which is nine')\n```", True),
    (f"First try:\n```python\ndef f(x): return x\n```\nNo, it must be\n```python\n{SQUARE}\n```", True),
    (f"{SQUARE}\n\nThis function squares its argument.", True),
    (f"Here is the code:\n\n{SQUARE}\n\nI hope that it's of help!", True),
    ("1. Like so:\n\n   ```python\n   def f(x):\n       return x * x\n   ```", True),
    (f"import math\n\n{SQUARE}\n\nif __name__ == '__main__':\n    raise SystemExit", True),
    (f"N = 2\r\n{SQUARE}".replace("return x * x", "return x ** N"), True),
    ("f = lambda x: x * x", True),
    (f"```python\n{SQUARE} +\n```", False),
    ("I do not know.", False),
    ("", False),
    ("```python\n```", False),
]


@pytest.mark.parametrize(("response", "right"), RESPONSES)
def test_the_program_in_a_response_is_found(response, right):
    outcomes = run_tests(candidates(response), ["assert f(3) == 9", "assert f(-2) == 4"])
    assert [outcome.passed for outcome in outcomes] == [right, right]


def test_the_judge_rewards_shares_keeps_the_order_and_abstains_without_tests():
    half = "def f(x): return 9"
    groups = [
        (asked(tests=["assert f(3) == 9", "assert f(2) == 4"]), [SQUARE, half, "no"]),
        (asked(), [SQUARE]),
        (asked(tests="assert f(n) == 16", setup="n = 4"), [half, SQUARE]),
        (asked(tests=["assert f(3 == 9"]), [SQUARE]),
        (
            asked(tests="def check(candidate):\n    assert candidate(3) == 9", entry_point="f"),
            [SQUARE, "def f(x): return x"],
        ),
        (asked(tests=[]), []),
    ]
    share = [*executed_tests_judge()(groups)]
    assert [[verdict.reward for verdict in verdicts] for verdicts in share] == [
        [1, 0.5, 0],
        [None],
        [0, 1],
        [None],
        [1, 0],
        [],
    ]
    every = [*executed_tests_judge(ExecutedTestsSettings(reward="all", num_workers=1))(groups[:1])]
    assert [verdict.reward for verdict in every[0]] == [1, 0, 0]
    assert share[0][1].raw == [
        {"passed": True, "why": ""},
        {"passed": False, "why": "assertion failed: assert f(2) == 4; the program's last value was 9"},
    ]
    assert share[0][1].why == "1 of 2 tests pass; assertion failed: assert f(2) == 4; the program's last value was 9"
    assert share[1][0].why == "the prompt has no tests"
    assert share[3][0].why.startswith("test 1 is not Python")


@pytest.mark.parametrize("metadata", [{"tests": 3}, {"tests": [3]}, {"tests": ["pass"], "setup": 1}])
def test_tests_that_are_not_strings_are_rejected(metadata):
    with pytest.raises(InputError, match="a string or a list of strings"):
        [*executed_tests_judge()([(asked(**metadata), [SQUARE])])]


# A row of HumanEval's form, with a helper in the prompt that the test uses too.
PROMPT = '''from typing import List


def value(xs: List[int], at: int):
    return sum(x * at**n for n, x in enumerate(xs))


def root(xs: List[int]) -> int:
    """A whole number at which `value` is 0.
    >>> root([-2, 1])
    2
    """
'''
CHECK = """
METADATA = {"author": "own"}


def check(candidate):
    for xs in ([-2, 1], [6, -5, 1], [0, 7]):
        assert value(xs, candidate(xs)) == 0
    assert candidate([3, 1]) == -3, "below zero"
"""
HUMANEVAL = {"task_id": "Own/0", "prompt": PROMPT, "entry_point": "root", "test": CHECK}
BODY = "    for at in range(-9, 10):\n        if value(xs, at) == 0:\n            return at\n"
WHOLE = "def root(xs):\n" + BODY
COMPLETIONS = [
    (BODY, 1.0),
    (WHOLE, 1.0),
    (f"```python\n{WHOLE}```", 1.0),
    (f"```python\n{BODY}```", 1.0),
    (f"Here:\n```python\nfrom typing import List\n{PROMPT}{BODY}```", 1.0),
    (BODY + "\n\nprint(root([-2, 1]))\n\n\ndef unfinished(x", 1.0),
    ("    return 2\n", 0.0),
    ("    pass\n", 0.0),
    ("", 0.0),
    ("    return 2\n\n\ndef value(xs, at):\n    return 0\n", 0.0),
    ("    return 2\n\n\ndef check(candidate):\n    pass\n", 0.0),
    ("    import sys\n    sys.exit(0)\n", 0.0),
    ("I cannot help with that.", 0.0),
]


@pytest.mark.parametrize(("completion", "reward"), COMPLETIONS)
def test_a_completion_is_graded_as_in_humaneval(completion, reward):
    verdict = grade_humaneval(HUMANEVAL, completion)
    assert (verdict.reward, len(verdict.raw)) == (reward, 1), verdict.why


def test_a_prompt_without_a_docstring_is_graded_too():
    row = {**HUMANEVAL, "prompt": PROMPT[: PROMPT.index('    """A whole')]}
    assert [grade_humaneval(row, text).reward for text in (BODY, "    return 2\n")] == [1, 0]


def test_a_row_without_its_columns_is_rejected():
    with pytest.raises(InputError, match="row Own/0 has no string 'test'"):
        grade_humaneval({**HUMANEVAL, "test": None}, BODY)
    with pytest.raises(InputError, match="row 7 has None"):
        grade_mbpp({"task_id": 7}, BODY)


def test_mbpp_uses_setup_and_imports_but_not_the_challenge_tests():
    row = {
        "task_id": 1,
        "text": "Write a function to sum the values of a tree.",
        "test_list": ["assert total(root) == 3", "assert math.isclose(total(Tree(2)), 2)"],
        "test_setup_code": "root = Tree(1)\r\nroot.left = Tree(2)",
        "test_imports": ["import math"],
        "challenge_test_list": ["assert total(None) == 0"],
    }
    code = """
class Tree:
    def __init__(self, value): self.value, self.left = value, None
def total(tree): return tree.value + (total(tree.left) if tree.left else 0)
"""
    assert grade_mbpp(row, f"```python{code}```").reward == 1
    without = {**row, "test_list": row["test_list"][:1], "test_imports": None}
    assert grade_mbpp(without, f"```python{code}```").reward == 1
    assert grade_mbpp(row, code.replace("+ (", "- (")).attributes == {"tests_passed": 0.5}


class Tagged(ast.NodeTransformer):
    """Returns (value, "mutated") for every value: equal to no value that the original returns."""

    def visit_Return(self, node):
        value = self.generic_visit(node).value or ast.Constant(None)
        return ast.Return(ast.Tuple([value, ast.Constant("mutated")], ast.Load()))


def tagged(code):
    return ast.unparse(ast.fix_missing_locations(Tagged().visit(ast.parse(code))))


@pytest.mark.slow
@pytest.mark.skipif(not MBPP.is_file(), reason=f"MBPP is not at {MBPP}")
def test_every_published_solution_passes_and_every_mutated_one_fails_every_test():
    published = [json.loads(line) for line in MBPP.read_text().splitlines()]
    assert len(published) == 474
    rows = published[::4]
    workers = os.cpu_count() or 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in published code
        mutated = [tagged(row["code"]) for row in rows]
    right = [*in_parallel(lambda row: grade_mbpp(row, row["code"]), rows, num_workers=workers)]
    wrong = [*in_parallel(lambda pair: grade_mbpp(*pair), [*zip(rows, mutated, strict=True)], num_workers=workers)]
    assert [row["task_id"] for row, verdict in zip(rows, right, strict=True) if verdict.reward != 1] == []
    assert [
        row["task_id"] for row, verdict in zip(rows, wrong, strict=True) if verdict.attributes["tests_passed"]
    ] == []
    assert sum(len(verdict.raw) for verdict in right) == 3 * len(rows)


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 6), (4, 1, 4), (7, 5, 3)])
def test_pass_at_k_is_the_share_of_draws_with_a_correct_sample(n, c, k):
    draws = [*itertools.combinations([True] * c + [False] * (n - c), k)]
    assert pass_at_k(n, c, k=k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 6), (5, 2, 0), (5, 6, 1), (5, -1, 1)])
def test_pass_at_k_rejects_impossible_counts(n, c, k):
    with pytest.raises(InputError, match=f"pass@{k} needs at least {k} samples per problem"):
        pass_at_k(n, c, k=k)
