"""The Triton CPU backend, found by Triton through the entry-point group triton.backends. Imports nothing by itself."""
