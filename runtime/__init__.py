"""Runs programs: planned memory, weights laid out at load time, and lists of steps executed without a graph."""
