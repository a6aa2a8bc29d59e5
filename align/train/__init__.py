"""Objectives, the one loop, the reference cache."""
