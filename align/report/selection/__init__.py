"""Steps that choose their rows, beside uniform training."""
