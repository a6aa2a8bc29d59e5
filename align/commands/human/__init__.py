"""A human evaluation: export of blinded forms, import of filled ones."""
