"""Memory in large pages: of the size asked for, writable to the end, and at a large page where it holds one."""

import pytest

from tilewright.runtime import pages
from tilewright.runtime.pages import LARGE_PAGE, empty_bytes


@pytest.mark.parametrize("size", [0, 1, LARGE_PAGE - 1, LARGE_PAGE, 3 * LARGE_PAGE + 5])
@pytest.mark.parametrize("refused", [False, True])
def test_size_and_place(size: int, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if refused:
        monkeypatch.setattr(pages, "_madvise", lambda: None)
    block = empty_bytes(size)
    block.fill_(7)
    assert block.numel() == size
    assert int(block.sum()) == 7 * size
    assert size < LARGE_PAGE or block.data_ptr() % LARGE_PAGE == 0


def test_only_whole_pages_within_are_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    advised: list[tuple[int, int]] = []
    monkeypatch.setattr(pages, "_madvise", lambda: lambda address, size, _: advised.append((address, size)))
    block = empty_bytes(2 * LARGE_PAGE + 100)
    assert advised == [(block.data_ptr(), 2 * LARGE_PAGE)]
