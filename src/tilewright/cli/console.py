"""Where commands write: results to standard output, progress and errors beside it."""

from rich.console import Console

out = Console()
err = Console(stderr=True)
