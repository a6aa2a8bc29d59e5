"""Readers: one module for each family of row formats, and the table of all formats."""
