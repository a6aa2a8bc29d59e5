"""Smaller, merged and exported copies of trained models."""
