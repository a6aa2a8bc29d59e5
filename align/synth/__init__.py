"""Procedural tasks; later engines, judges and scored groups."""
