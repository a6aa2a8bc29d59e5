"""Rows that the project generates itself, with the programs that check responses to them."""
