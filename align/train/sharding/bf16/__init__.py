"""Training in bf16: weights, stochastic rounding, and communication."""
