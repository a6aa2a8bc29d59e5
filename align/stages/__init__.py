"""Stages: the kinds of steps that a recipe can have, one module for each."""
