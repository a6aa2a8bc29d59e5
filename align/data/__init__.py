"""Data: readers, chat encoding, the batch plan, mixtures and the token store."""
