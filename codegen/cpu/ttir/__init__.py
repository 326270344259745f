"""TTIR as records: its text, rewrites of kernels into simpler ones, and what is known before code is written."""
