"""The graph, its typed facts and the records the stages hand to one another."""
