"""Charts of the same lines are drawn once for all pages of a test file: drawing takes most of the time of a page."""

import pytest

from align.report import charts


@pytest.fixture(scope="module", autouse=True)
def drawn():
    """The charts drawn so far, by what they show."""
    found, draw = {}, charts.curves

    def curves(*arguments, **options):
        key = repr((arguments, options))
        if key not in found:
            found[key] = draw(*arguments, **options)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "curves", curves)
        yield found
