"""Readers: rows of each known format to records."""
