"""Verifiable instructions: the 25 kinds of IFEval and a user's own."""
