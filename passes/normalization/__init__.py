"""Normalizing: one form for each thing a model can mean, whatever it was written with."""
