"""Removing padding: from batches and lengths to packed rows, and to the rows that outputs need."""
