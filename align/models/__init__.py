"""The policy, its tree forward and its log-probabilities."""
