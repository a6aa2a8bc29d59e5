"""Sentence embeddings: of a policy's hidden states, of sentence-transformers models, and of static word vectors."""
