"""Families of synthetic rows: `FAMILIES` in `table`, the contract of a family in `family`, one module per subject."""
