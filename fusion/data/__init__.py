"""The input: tables, embeddings and the split of their rows."""
