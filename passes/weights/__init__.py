"""Weights in fewer bits, multiplied as they are stored, and the rows that meet them; rows by their experts."""
