"""Search of settings: trials of a step, which are ordinary steps, and successive halving by resuming them."""
