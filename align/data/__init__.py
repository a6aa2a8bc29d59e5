"""Rows to token groups: readers, chat templates, the batch plan."""
