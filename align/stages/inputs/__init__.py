"""What a step reads: sources of rows, resolved inputs, and the context that it runs in."""
