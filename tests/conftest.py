"""Settings of every test run: each level is verified, GEMMs go by the rule, kernels are kept in a cache of the run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # One worker a core: threads of several workers would wait for one another. Tests of threads ask for their number.
    os.environ["OMP_NUM_THREADS"] = "1"

import torch

from tilewright import settings

# Folders whose kernels run in checked mode: an access outside of a tensor fails its test. TILEWRIGHT_CHECK=1 checks
# the others too, TILEWRIGHT_CHECK=0 checks none.
CHECKED = ("kernels", "codegen")
TESTS = Path(__file__).parent

os.environ["TILEWRIGHT_VERIFY"] = "1"
os.environ["TILEWRIGHT_TUNE"] = "0"  # the same kernels in every run; tests of tuning turn it on


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--accept-golden`` writes the golden files anew instead of comparing with them."""
    parser.addoption("--accept-golden", action="store_true", help="write golden files from what the code gives now")


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


@pytest.fixture(autouse=True)
def checked_mode(request: pytest.FixtureRequest) -> Iterator[None]:
    """On in the folders that ask for it, for the thread that runs a test."""
    if request.path.relative_to(TESTS).parts[0] in CHECKED and os.environ.get("TILEWRIGHT_CHECK") != "0":
        with settings.scope(check=True):
            yield
    else:
        yield


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Runs torch on one thread: on tensors of a few numbers, waking other threads takes longer than the work."""
    with _threads(1):
        yield


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Runs torch, and with it our kernels, on two threads, however many the run itself uses."""
    with _threads(2):
        yield
