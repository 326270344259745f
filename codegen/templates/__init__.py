"""Triton kernel templates with named holes, one kernel family a file."""
