"""Tools for tests: a tiny policy and rows for smoke tests, and the properties of a preference loss.

Everything runs offline on a CPU in about a second. A test of your own loss, and a smoke test of your own recipe::

    import align
    from align.data.writing import write
    from align.testing import assert_loss, tiny_policy, tiny_preferences


    def test_my_loss():
        assert_loss(align.preference_loss("my_losses:squared", beta=0.1))


    def test_my_recipe_runs(tmp_path):
        align.save_policy(*tiny_policy(), tmp_path / "model")
        write(tmp_path / "pairs.jsonl", tiny_preferences())
        paths = [f"policy.path={tmp_path / 'model'}", f"data.pairs.path={tmp_path / 'pairs.jsonl'}"]
        align.run("recipes/my_recipe.yaml", [f"runs={tmp_path / 'runs'}", *paths])
"""

from align.testing.loss_checks import PropertyResult, assert_loss, check_loss
from align.testing.tiny import tiny_demonstrations, tiny_policy, tiny_preferences

__all__ = ["PropertyResult", "assert_loss", "check_loss", "tiny_demonstrations", "tiny_policy", "tiny_preferences"]
