"""Synthetic data: families of made rows, verifiable constraints on prompts, and scored groups of responses."""
