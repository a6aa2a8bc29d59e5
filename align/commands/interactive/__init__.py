"""Commands that begin and end the work with a model: `init` writes a recipe, `chat` talks to a policy."""
