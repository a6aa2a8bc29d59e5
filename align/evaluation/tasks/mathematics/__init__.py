"""Tasks with a final answer that a program compares: GSM8K, SVAMP, MATH."""
