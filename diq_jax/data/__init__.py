"""Rows: read, checked, tokenised, batched, and kept as gradients."""
