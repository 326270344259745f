"""From a forward pass to one step of generation."""
