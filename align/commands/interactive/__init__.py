"""Interactive commands: `init` writes a recipe, `chat` talks to a policy."""
