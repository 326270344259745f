"""Programs: planned memory, steps and their execution. No fx graphs here."""
