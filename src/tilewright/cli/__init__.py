"""The command line: ``tilewright compile | run | inspect | export | env | demo``."""


def main() -> None:
    """Entry point of the ``tilewright`` command."""
    from tilewright.cli.app import run_app

    run_app()
