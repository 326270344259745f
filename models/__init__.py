"""Capture, Hugging Face hooks and weights: everything that knows where a model comes from."""
