"""Pages: any sequence of changes keeps what tables say and what pages hold; never more pages than there are."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tilewright.runtime.serving.kv_pages import PageAllocator, PageTable

SIZE = 4


class Sequences(RuleBasedStateMachine):
    """Sequences over two token ids, so that prefixes meet often; a page's memory holds the ids themselves."""

    @initialize(count=st.integers(1, 9))
    def start(self, count: int) -> None:
        self.allocator = PageAllocator(count, SIZE)
        self.memory = np.full((count, SIZE), -1)
        self.live: list[tuple[PageTable, list[int]]] = []

    def write(self, table: PageTable, tokens: list[int], start: int) -> bool:
        before = list(table.pages)
        copies = table.reserve(start, len(tokens))
        if copies is None:
            assert table.pages == before
            return False
        for source, target in copies:
            assert self.allocator.holders(target) == 1
            self.memory[target] = self.memory[source]
        for slot in range(start, len(tokens)):
            page = table.pages[slot // SIZE]
            assert self.allocator.holders(page) == 1, "a shared page is written"
            self.memory[page, slot % SIZE] = tokens[slot]
        table.publish(np.array(tokens), len(tokens))
        return True

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20))
    def begin(self, tokens: list[int]) -> None:
        table = PageTable(self.allocator)
        known = table.adopt_prefix(np.array(tokens))
        assert known < len(tokens)
        if self.write(table, tokens, known):
            self.live.append((table, tokens))
        else:
            table.release()

    @precondition(lambda self: self.live)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def extend(self, data: st.DataObject, more: list[int]) -> None:
        table, tokens = data.draw(st.sampled_from(self.live))
        longer = tokens + more
        if self.write(table, longer, len(tokens)):
            tokens += more

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        table, tokens = data.draw(st.sampled_from(self.live))
        self.live.append((table.fork(), list(tokens)))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        table, _ = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        table.release()

    @rule()
    def interrupt(self) -> None:
        lost = self.allocator.take()  # held by no table: as if the caller had been stopped before it took note
        self.allocator.recount([page for table, _ in self.live for page in table.pages])
        assert lost is None or self.allocator.holders(lost) == 0

    @invariant()
    def tables_read_what_was_written(self) -> None:
        for table, tokens in self.live:
            read = self.memory[table.pages].reshape(-1)[: len(tokens)]
            assert read.tolist() == tokens

    @invariant()
    def every_page_is_counted_once(self) -> None:
        held = [page for table, _ in self.live for page in table.pages]
        for page in range(self.allocator.count):
            assert self.allocator.holders(page) == held.count(page)
        assert self.allocator.available == self.allocator.count - len(set(held))

    @invariant()
    def found_pages_hold_what_was_published(self) -> None:
        digests = self.allocator._by_digest
        assert len(set(digests.values())) == len(digests)
        for digest, page in digests.items():
            assert self.allocator._digests[page] == digest


TestSequences = Sequences.TestCase
TestSequences.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def _filled(allocator: PageAllocator, tokens: list[int]) -> PageTable:
    table = PageTable(allocator)
    assert table.reserve(table.adopt_prefix(np.array(tokens)), len(tokens)) is not None
    table.publish(np.array(tokens), len(tokens))
    return table


def test_a_prompt_finds_the_pages_of_a_finished_one() -> None:
    allocator = PageAllocator(8, SIZE)
    first = _filled(allocator, [*range(10)])
    pages = list(first.pages)
    first.release()
    assert allocator.available == 8
    again = PageTable(allocator)
    assert again.adopt_prefix(np.arange(12)) == 8
    assert again.pages == pages[:2]


def test_one_token_is_left_to_compute() -> None:
    allocator = PageAllocator(8, SIZE)
    _filled(allocator, [*range(8)])
    assert PageTable(allocator).adopt_prefix(np.arange(8)) == 4


def test_equal_pages_behind_different_beginnings_are_different() -> None:
    allocator = PageAllocator(8, SIZE)
    _filled(allocator, [1, 1, 1, 1, 5, 5, 5, 5])
    assert PageTable(allocator).adopt_prefix(np.array([2, 2, 2, 2, 5, 5, 5, 5, 0])) == 0


def test_what_was_left_longest_ago_goes_first_and_tails_before_heads() -> None:
    allocator = PageAllocator(4, SIZE)
    old, new = _filled(allocator, [1] * 8), _filled(allocator, [2] * 8)
    old.release()
    new.release()
    for expected in ((4, 8), (0, 8), (0, 4), (0, 0)):
        assert allocator.take() is not None
        left = tuple(_known(allocator, [token] * 9) for token in (1, 2))
        assert left == expected
    assert allocator.take() is None


def _known(allocator: PageAllocator, tokens: list[int]) -> int:
    """Slots known of these tokens, without a change to what is left longest."""
    digests, table, known = allocator._by_digest, PageTable(allocator), 0
    for index in range((len(tokens) - 1) // SIZE):
        table._digests.append(table._digest(np.array(tokens), index))
        if table._digests[index] not in digests:
            break
        known += SIZE
    return known


@pytest.mark.parametrize("length", [3, 4])
def test_a_fork_copies_only_a_page_that_it_writes(length: int) -> None:
    allocator = PageAllocator(8, SIZE)
    table = _filled(allocator, [*range(length)])
    twin = table.fork()
    copies = twin.reserve(length, length + 1)
    assert copies == ([(table.pages[0], twin.pages[0])] if length % SIZE else [])
    assert table.reserve(length, length + 1) == []
