"""The command line: ``tilewright compile | run | generate | inspect | export | env | demo``."""

import sys


def main() -> None:
    """Entry point of the ``tilewright`` command."""
    try:
        from tilewright.cli.app import run_app

        run_app()
    except KeyboardInterrupt:  # before the command had begun, or while it ended
        sys.exit(130)
