"""Fusion regions: which ops share a kernel, and which variant of it runs."""
