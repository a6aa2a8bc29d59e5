"""Cleaning of rows: duplicates, groups of equal prompts, near-duplicates, and test items among the rows."""
