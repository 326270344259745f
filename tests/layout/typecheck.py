"""Type check: mypy cannot follow the folder mapping, so it is given one tree of links, as the package is installed."""

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Runs mypy over the whole package; returns its exit code."""
    mapping = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    with tempfile.TemporaryDirectory() as folder:
        for package, source in sorted(mapping.items()):
            target = Path(folder, *package.split("."))
            target.mkdir(parents=True, exist_ok=True)
            for file in (ROOT / source).glob("*.py*"):
                (target / file.name).symlink_to(file)
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", "tilewright"]
        return subprocess.run(command, cwd=folder, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
