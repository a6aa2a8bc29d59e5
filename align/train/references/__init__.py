"""Reference log-probabilities: their cache, and the pass that computes missing ones."""
