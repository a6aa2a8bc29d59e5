"""The trials of searches of settings."""
