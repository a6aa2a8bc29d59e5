"""Tools for tests: a tiny policy and rows for smoke tests, and the properties of a preference loss.

    from align.testing import assert_loss, check_loss, tiny_demonstrations, tiny_policy, tiny_preferences

Everything runs offline on a CPU in about a second.
"""

from align.testing.loss_checks import PropertyResult, assert_loss, check_loss
from align.testing.tiny import tiny_demonstrations, tiny_policy, tiny_preferences

__all__ = ["PropertyResult", "assert_loss", "check_loss", "tiny_demonstrations", "tiny_policy", "tiny_preferences"]
