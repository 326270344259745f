"""The pages that hold what a model has made of a source: filled once, held by every sequence written behind it."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tilewright.ir.steps import CachedModel, SourceBatch, SourceModel
from tilewright.runtime.serving.kv_pages import PageAllocator


class SourcePages:
    """One holder's hold of the pages of a source.

    A source is known by a digest of all its tokens, as what is made of each depends on all. So an equal source finds
    the pages of an earlier one, as long as none of them had to be given away.

    Attributes:
        tokens: [n] int64, the source.
        digest: stands for it; keys of tokens written behind another source are others.
        pages: in the order of the source's tokens.
        ready: whether they hold what they are to hold.
    """

    def __init__(self, allocator: PageAllocator, tokens: np.ndarray) -> None:
        self.tokens = tokens
        self.digest = hashlib.blake2b(b"source" + tokens.tobytes(), digest_size=16).digest()
        self.pages: list[int] = []
        self.ready = False
        self._allocator = allocator

    @property
    def count(self) -> int:
        """Pages that the source takes."""
        return self._allocator.pages_for(len(self.tokens))

    def adopt(self) -> bool:
        """Takes over the pages of an equal source that has been read; False, and nothing is held, if one is gone."""
        for index in range(self.count):
            page = self._allocator.find(self._digest(index))
            if page is None:
                self.release()
                return False
            self.pages.append(page)
        self.ready = True
        return True

    def reserve(self) -> None:
        """Takes pages that are to be filled; so many are free."""
        while len(self.pages) < self.count:
            page = self._allocator.take()
            assert page is not None, "counted before"
            self.pages.append(page)

    def publish(self) -> None:
        """The pages are filled; they can be found from now on, and are not written again."""
        self.ready = True
        for index, page in enumerate(self.pages):
            self._allocator.publish(page, self._digest(index))

    def fork(self) -> "SourcePages":
        """A second hold of the same pages."""
        twin = SourcePages(self._allocator, self.tokens)
        for page in self.pages:
            self._allocator.hold(page)
            twin.pages.append(page)
        twin.ready = self.ready
        return twin

    def release(self) -> None:
        """Lets all pages go."""
        pages, self.pages, self.ready = self.pages, [], False
        self._allocator.let_go(pages)

    def clear(self) -> None:
        """Names no pages any more; they are not let go, but about to be counted anew."""
        self.pages, self.ready = [], False

    def _digest(self, index: int) -> bytes:
        return hashlib.blake2b(self.digest + index.to_bytes(8, "little"), digest_size=16).digest()


def read_sources(model: CachedModel, pool: Any, sources: Sequence[SourcePages]) -> None:
    """Fills the pages that sources have reserved, all in one run."""
    assert isinstance(model, SourceModel), "only sequences of such a model have sources"
    size, longest = model.page_size, max(len(source.tokens) for source in sources)
    ids = np.zeros((len(sources), longest), np.int64)
    table = np.zeros((len(sources), -(-longest // size)), np.int32)
    for row, source in enumerate(sources):
        ids[row, : len(source.tokens)] = source.tokens
        table[row, : len(source.pages)] = source.pages
    lengths = np.array([len(source.tokens) for source in sources], np.int32)
    model.read_sources(pool, SourceBatch(*map(torch.from_numpy, (ids, lengths, table))))
    for source in sources:
        source.publish()
