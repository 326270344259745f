"""The written specification of each level, and the pass that checks a graph against it."""
