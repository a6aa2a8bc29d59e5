"""Pure functions of log-probabilities."""
