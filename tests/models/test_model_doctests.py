import doctest
import importlib

import pytest

MODULES = {  # with their number of examples
    "align.accounting.flops": 1,
    "align.losses.preference": 4,
    "align.losses.table": 2,
    "align.models.model_card": 1,
    "align.models.tree.batch": 6,
}


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_run(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert (result.failed, result.attempted >= MODULES[name]) == (0, True), result
