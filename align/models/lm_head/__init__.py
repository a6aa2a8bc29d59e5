"""What a policy computes from hidden states and the LM head's weight without the logits of all tokens at once."""
