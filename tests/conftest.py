"""Settings of every test run: each level is verified, and kernels are kept in a cache of this run alone."""

import os
from pathlib import Path

import pytest

os.environ["TILEWRIGHT_VERIFY"] = "1"


@pytest.fixture(scope="session", autouse=True)
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One kernel cache for the run, shared by its worker processes, so that each kernel is built once."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / "kernel-cache"
    folder.mkdir(exist_ok=True)
    os.environ["TILEWRIGHT_CACHE_DIR"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    return folder
