"""Tests of EvalPlus (HumanEval+, MBPP+; Liu et al. 2023, arXiv:2305.01210) without NumPy, which the sandbox lacks.

These tests compare floats by `np.allclose` and ask for `np.ndarray`, `np.float32` and `np.float64`, and use nothing
else of NumPy. Programs return plain Python values there.
"""

from __future__ import annotations

import re

from align.errors import InputError

IMPORT = re.compile(r"^import numpy as np[ \t]*$", re.MULTILINE)
USED = re.compile(r"\bnp\.(\w+)")
STUB = '''
class np:
    """The part of NumPy that EvalPlus uses, for numbers and nested sequences of them."""

    class ndarray: pass
    class float32(float): pass
    class float64(float): pass

    @staticmethod
    def allclose(a, b, rtol=1e-05, atol=1e-08):
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            return len(a) == len(b) and all(np.allclose(x, y, rtol, atol) for x, y in zip(a, b))
        return a == b or abs(a - b) <= atol + rtol * abs(b) < float("inf")
'''
KNOWN = ("allclose", "ndarray", "float32", "float64")


def without_numpy(test: str) -> str:
    """Return the test with a stand-in for the part of NumPy that EvalPlus uses; any other test as it is.

    Raise `InputError` for a test that imports NumPy and uses more of it.

    >>> without_numpy("assert f(1) == 2")
    'assert f(1) == 2'
    """
    if not IMPORT.search(test):
        return test
    if others := set(USED.findall(test)) - set(KNOWN):
        raise InputError(f"a test uses numpy.{sorted(others)[0]}; tests run without NumPy, except {', '.join(KNOWN)}")
    return IMPORT.sub(lambda _: STUB, test, count=1)
