"""Recipes: the file as written, hints for wrong keys, expansion into steps, and checks before the first step."""
