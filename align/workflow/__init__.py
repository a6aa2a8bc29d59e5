"""Recipes: loading, validation, expansion of rounds, estimates, the runner and the launcher."""
