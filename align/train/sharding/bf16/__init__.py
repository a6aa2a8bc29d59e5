"""What is in bf16: weights, their stochastic rounding, and what processes send each other."""
