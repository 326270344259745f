"""Continuous batching over a cached model: requests, pages of keys and values, tokens out of logits."""
