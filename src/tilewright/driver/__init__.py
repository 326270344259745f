"""The driver: the only place that sees every folder."""
