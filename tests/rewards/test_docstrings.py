"""Examples in docstrings of the rewards and the sandbox."""

import doctest
import importlib
import pkgutil

import pytest

import align.rewards
import align.sandbox

MODULES = [
    module.name
    for package in (align.rewards, align.sandbox)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_hold(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_examples_are_found():
    assert len(MODULES) > 20
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(found) > 15
