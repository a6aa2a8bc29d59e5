"""Loading of configurations, weights and tokenizers from Hub IDs, folders and GGUF files."""
