"""Templates that express each kind of verifiable instruction in words, with the settings to draw for it.

Counts suit responses of about fifty words, which small models and small token budgets can produce.
"""

from align.synth.constraint_templates import layout, wording
from align.synth.constraint_templates.template import Template

__all__ = ["TEMPLATES", "Template"]

# Kind, as in `align.rewards.verifiers` -> its templates
TEMPLATES: dict[str, tuple[Template, ...]] = {**wording.TEMPLATES, **layout.TEMPLATES}
