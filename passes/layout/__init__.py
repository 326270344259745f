"""Layout analysis: which axes of a value are rows, sequences or lengths, and what is known of its padding."""
