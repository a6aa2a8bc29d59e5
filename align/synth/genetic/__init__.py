"""Genetic-Instruct: programming tasks that are mutated and crossed, solved, and selected (Majumdar et al. 2024)."""
