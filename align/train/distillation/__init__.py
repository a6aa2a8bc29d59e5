"""Distillation: the objective, and the teacher's log-probabilities, which are computed once."""
