"""The tree forward: batches that compute shared prefixes once, and attention over root paths."""
