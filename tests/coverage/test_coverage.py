"""Every public name of ``triton.language`` and every dtype: right, or refused when the kernel is compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.coverage.names import names_without_a_row
from tests.coverage.run import CASES
from tests.coverage.table import page

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "coverage.md"


def test_every_public_name_is_accounted_for() -> None:
    assert names_without_a_row({case.name for case in CASES}) == []


def test_every_function_for_every_dtype(request: pytest.FixtureRequest) -> None:
    command = [sys.executable, "-m", "tests.coverage.run"]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    states: dict[tuple[str, str], str] = {}
    failures = []
    running = ""
    for line in run.stdout.splitlines():
        if not line.startswith('{"tilewright"'):
            continue
        record = json.loads(line)
        if "running" in record:
            running = line
            continue
        key = record["name"], record["dtype"]
        if record["state"] not in ("yes", "no", "refused"):
            failures.append(f"{record['name']} of {record['dtype']}: {record['detail']}\n{record['code']}")
        # A row of several cases is as good as the worst of them.
        elif states.get(key) != "no":
            states[key] = record["state"]
    assert run.returncode == 0, f"the process died with {run.returncode} in {running}\n{run.stderr[-2000:]}"
    assert not failures, "\n".join(failures)
    text = page(CASES, states)
    if request.config.getoption("--accept-golden"):
        PAGE.write_text(text)
    assert PAGE.read_text() == text, (
        "docs/coverage.md is not what the code does: look at the change, then --accept-golden"
    )
