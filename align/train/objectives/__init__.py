"""Objectives: what a training step minimizes, for each kind of training."""
