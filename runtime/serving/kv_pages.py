"""Pages of keys and values: who holds which, which can be found again by content, and when one is copied.

A page holds the keys of ``page_size`` consecutive slots of a sequence, in every layer. This file only does the
bookkeeping: the memory is the model's. A full page is known by a digest of all tokens up to its end (a hash chain, as
in vLLM's prefix cache), so a prompt that begins like an earlier one finds its pages. A page that nobody holds stays
findable until its memory is needed: the one left longest ago goes first.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np


class PageAllocator:
    """Shares out ``count`` pages; a page may have several holders.

    Attributes:
        count: N, pages of the pool; never more are given out.
        page_size: slots in a page.
    """

    def __init__(self, count: int, page_size: int) -> None:
        self.count = count
        self.page_size = page_size
        self._holders = [0] * count
        self._digests: list[bytes | None] = [None] * count
        self._by_digest: dict[bytes, int] = {}
        self._blank = list(range(count - 1, -1, -1))  # not held, content of no use
        self._left: OrderedDict[int, None] = OrderedDict()  # not held, findable; longest left first

    @property
    def available(self) -> int:
        """Pages that can be taken."""
        return len(self._blank) + len(self._left)

    def holders(self, page: int) -> int:
        """How many tables hold the page."""
        return self._holders[page]

    def pages_for(self, slots: int) -> int:
        """Pages that so many slots fill or begin."""
        return -(-slots // self.page_size)

    def take(self) -> int | None:
        """A page for one holder, its content unknown; None if all are held."""
        if self._blank:
            page = self._blank.pop()
        elif self._left:
            page, _ = self._left.popitem(last=False)
            self._forget(page)
        else:
            return None
        self._holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """One more holder of a page that is held or findable."""
        self._left.pop(page, None)
        self._holders[page] += 1

    def let_go(self, pages: Iterable[int]) -> None:
        """One holder less of each page. Of pages left together the last is given away first: heads are shared more."""
        for page in reversed(list(pages)):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._leave(page)

    def find(self, digest: bytes) -> int | None:
        """The page with this content, or None; the caller holds it afterwards."""
        page = self._by_digest.get(digest)
        if page is not None:
            self.hold(page)
        return page

    def publish(self, page: int, digest: bytes) -> None:
        """Makes a full page findable. Of pages with equal content the first stays the one that is found."""
        if digest not in self._by_digest:
            self._by_digest[digest] = page
            self._digests[page] = digest

    def recount(self, held: Sequence[int]) -> None:
        """Takes holders anew from the pages of all tables: after an interruption in the middle of a change."""
        self._holders = [0] * self.count
        for page in held:
            self._holders[page] += 1
        known = {page: digest for digest, page in self._by_digest.items()}
        self._digests = [known.get(page) for page in range(self.count)]
        order = [*self._left, *known]
        self._left = OrderedDict.fromkeys(p for p in order if p in known and not self._holders[p])
        self._blank = [p for p in range(self.count) if not self._holders[p] and p not in known]

    def _leave(self, page: int) -> None:
        if self._digests[page] is None:
            self._blank.append(page)
        else:
            self._left[page] = None

    def _forget(self, page: int) -> None:
        digest = self._digests[page]
        if digest is not None:
            del self._by_digest[digest]
            self._digests[page] = None


class PageTable:
    """The pages of one sequence, in the order of its slots.

    Pages may be shared with other tables. A shared page is never written: ``reserve`` puts a copy in its place.

    Args:
        allocator: of the pages.
        root: stands for what the keys of all tokens depend on besides: only pages of the same root are found.

    Attributes:
        pages: page p holds slots [p * page_size, (p + 1) * page_size).
    """

    def __init__(self, allocator: PageAllocator, root: bytes = b"") -> None:
        self.pages: list[int] = []
        self._allocator = allocator
        self._root = root
        self._digests: list[bytes] = []  # of the full pages published so far

    def adopt_prefix(self, tokens: np.ndarray) -> int:
        """Takes over the pages that hold the longest known beginning of ``tokens`` [n] int64; the table is empty.

        Returns:
            How many slots are filled by it, a multiple of the page size below n: one token is left to be computed.
        """
        allocator = self._allocator
        for index in range((len(tokens) - 1) // allocator.page_size):
            digest = self._digest(tokens, index)
            page = allocator.find(digest)
            if page is None:
                break
            self.pages.append(page)
            self._digests.append(digest)
        return len(self.pages) * allocator.page_size

    def reserve(self, start: int, stop: int) -> list[tuple[int, int]] | None:
        """Makes slots [start, stop) writable.

        Returns:
            Pages to be copied, (source, target), before anything is written; None, and nothing changed, if there are
            not enough pages.
        """
        allocator = self._allocator
        needed = allocator.pages_for(stop)
        shared = [i for i in range(start // allocator.page_size, len(self.pages)) if self._is_shared(i)]
        if len(shared) + max(0, needed - len(self.pages)) > allocator.available:
            return None
        copies = []
        for index in shared:
            source, target = self.pages[index], self._take()
            copies.append((source, target))
            self.pages[index] = target
            allocator.let_go([source])
        while len(self.pages) < needed:
            self.pages.append(self._take())
        return copies

    def publish(self, tokens: np.ndarray, computed: int) -> None:
        """Makes the full pages among the first ``computed`` slots findable; they are not written again."""
        for index in range(len(self._digests), computed // self._allocator.page_size):
            self._digests.append(self._digest(tokens, index))
            self._allocator.publish(self.pages[index], self._digests[index])

    def fork(self) -> "PageTable":
        """A second table over the same pages."""
        twin = PageTable(self._allocator, self._root)
        for page in self.pages:
            self._allocator.hold(page)
            twin.pages.append(page)
        twin._digests = list(self._digests)
        return twin

    def release(self) -> None:
        """Lets all pages go; the table is empty afterwards."""
        pages, self.pages, self._digests = self.pages, [], []
        self._allocator.let_go(pages)

    def clear(self) -> None:
        """Names no pages any more; they are not let go, but about to be counted anew."""
        self.pages, self._digests = [], []

    def _is_shared(self, index: int) -> bool:
        return self._allocator.holders(self.pages[index]) > 1

    def _take(self) -> int:
        page = self._allocator.take()
        assert page is not None, "counted before"
        return page

    def _digest(self, tokens: np.ndarray, index: int) -> bytes:
        """Of page ``index``, whose predecessors have theirs in ``_digests``."""
        size = self._allocator.page_size
        before = self._digests[index - 1] if index else self._root
        return hashlib.blake2b(before + tokens[index * size : (index + 1) * size].tobytes(), digest_size=16).digest()
