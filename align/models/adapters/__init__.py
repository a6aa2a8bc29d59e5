"""Low-rank adapters: attaching them to a model, and their folders."""
