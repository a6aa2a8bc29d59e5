"""The examples in docstrings are correct."""

import doctest
import importlib
import pkgutil

import align.data
import align.records


def test_docstring_examples_of_the_data_package_run():
    names = [module.name for module in pkgutil.walk_packages(align.data.__path__, "align.data.")]
    attempted = 0
    for module in (align.records, *map(importlib.import_module, names)):
        result = doctest.testmod(module)
        assert not result.failed, module.__name__
        attempted += result.attempted
    assert attempted >= 35
