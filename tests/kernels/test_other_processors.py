"""Kernels for instruction sets other than this machine's best: run here where it has them, else in an emulator."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from foreign_processor import missing_tools, run_on_arm64
from random_operations import random_kernel
from test_random_kernels import check, copies, load_kernel, run_and_check

from tilewright import settings
from tilewright.codegen.cpu.target import CpuTarget

pytestmark = pytest.mark.usefixtures("one_thread")
_HOST = CpuTarget.host()
# Code for a set runs where the processor has all of it.
RUNS = {"avx2": _HOST.vector_bits >= 256, "avx512": _HOST.bf16_dot and _HOST.int8_dot}
# Random kernels that the tests of this machine's own instruction set do not run.
FIRST, COUNT = 1000, 24


@pytest.mark.parametrize("name", [name for name, runs in RUNS.items() if runs])
def test_random_kernels_on_narrower_sets(name: str, tmp_path: Path) -> None:
    with settings.scope(cpu_features=name):
        run_and_check(range(FIRST, FIRST + COUNT), tmp_path)


@pytest.mark.parametrize(
    ("name", "files"), [(name, files) for name, files in (("avx2", ["math", "dot"]), ("avx512", ["dot"])) if RUNS[name]]
)
def test_suites_on_narrower_sets(name: str, files: list[str]) -> None:
    """Dot products and mathematical functions have code of their own for a set."""
    paths = [str(Path(__file__).with_name(f"test_lower_{file}.py")) for file in files]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    result = subprocess.run(
        [*command, *paths],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**environment, "TILEWRIGHT_CPU_FEATURES": name},
    )
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.skipif(bool(missing_tools()), reason=f"not installed: {', '.join(missing_tools())}")
@pytest.mark.parametrize("start", range(FIRST, FIRST + COUNT, 4))
def test_random_kernels_on_arm64(start: int, tmp_path: Path) -> None:
    for seed in range(start, start + 4):
        made = random_kernel(seed)
        arguments = copies(made)
        run_on_arm64(load_kernel(made, tmp_path / f"arm64_{seed}.py"), made.grid[0], arguments, tmp_path)
        check(made, arguments, f"seed {seed} on arm64")


def test_the_sets_differ() -> None:
    assert {CpuTarget.named(name).vector_bits for name in ("avx512", "avx2", "neon")} == {512, 256, 128}
