"""Measures of made data: diversity and coverage, and `measures.json` for the report."""

from align.synth.measures.written import write_measures

__all__ = ["write_measures"]
