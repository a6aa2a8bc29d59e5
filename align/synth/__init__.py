"""Synthetic data: verifiable constraints on real prompts, and scored groups of responses."""
