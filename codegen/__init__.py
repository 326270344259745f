"""Code generation: regions become Triton source, Triton source becomes kernels. Imports nothing by itself."""
