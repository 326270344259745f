"""Kernel tests run in checked mode: an access outside of a tensor fails its test. TILEWRIGHT_CHECK=0 turns it off."""

import os
from collections.abc import Iterator

import pytest

from tilewright import settings


@pytest.fixture(autouse=True)
def checked_mode() -> Iterator[None]:
    """On for the thread that runs a test."""
    with settings.scope(check=os.environ.get("TILEWRIGHT_CHECK") != "0"):
        yield
