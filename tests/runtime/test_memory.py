"""The arena plan: no two live values share memory, whatever the sizes, and memory is reused."""

import random

import pytest
import torch
from program_specs import Builder

from tilewright.ir.program import Choice, Storage
from tilewright.ir.sizes import BATCH, SEQ, TOKENS, compile_sizes
from tilewright.runtime.memory import ALIGNMENT, Arena, Lifetime, MemoryPlan, touched

SYMBOLS = (BATCH, SEQ, TOKENS)
SIZES = (4, TOKENS * 4, TOKENS * 1536, TOKENS * 6144, BATCH * 128, BATCH * SEQ * 4, BATCH * SEQ**2 * 48, BATCH + 1)


def random_lifetimes(seed: int) -> list[Lifetime]:
    draw = random.Random(seed)
    made = []
    for value in range(draw.randint(0, 40)):
        first = draw.randrange(30)
        made.append(Lifetime(value, draw.choice(SIZES), first, first + draw.choice((0, 1, 1, 2, 3, 20))))
    return made


@pytest.mark.parametrize("seed", range(40))
def test_live_values_never_overlap(seed: int) -> None:
    lifetimes = random_lifetimes(seed)
    plan = MemoryPlan(SYMBOLS, lifetimes)
    bytes_of = compile_sizes(SYMBOLS, [life.size for life in lifetimes])
    draw = random.Random(seed)
    for _ in range(10):
        batch, length = draw.choice((0, 1, 3, 64)), draw.choice((1, 7, 512))
        sizes = (batch, length, draw.randint(0, batch * length))
        offsets, total = plan.place(sizes)
        needed = bytes_of(*sizes)
        assert total <= plan.bytes_without_reuse(sizes)
        for i, a in enumerate(lifetimes):
            assert offsets[i] % ALIGNMENT == 0
            assert 0 <= offsets[i] <= offsets[i] + needed[i] <= total
            for j, b in enumerate(lifetimes[:i]):
                if a.first <= b.last and b.first <= a.last:
                    apart = offsets[i] + needed[i] <= offsets[j] or offsets[j] + needed[j] <= offsets[i]
                    assert apart, (a, b, sizes)


def encoder_lifetimes(layers: int, hidden: int = 384) -> list[Lifetime]:
    """Values of a post-norm encoder: qkv, attention, sum, norm, inner, sum, norm in each layer."""
    row = TOKENS * hidden * 4
    made = [Lifetime(0, row, 0, 3)]
    for layer in range(layers):
        step, value = 7 * layer + 1, 7 * layer + 1
        # (size, steps from its writer to its last reader); the norms are read again by the next residual sum.
        widths = ((3, 1), (1, 1), (1, 1), (1, 2), (4, 1), (1, 1), (1, 3))
        for k, (width, lasts) in enumerate(widths):
            made.append(Lifetime(value + k, width * row, step + k, step + k + lasts))
    return made


def test_layers_reuse_the_same_buffers() -> None:
    two, many = (MemoryPlan((TOKENS,), encoder_lifetimes(layers)) for layers in (2, 24))
    assert len(many.buffers) <= 5
    assert two.place((1000,))[1] == many.place((1000,))[1]
    # A layer needs 6 rows of hidden size at its widest point (input, inner and output of the second GEMM).
    assert many.place((1000,))[1] <= 8 * 1000 * 384 * 4


def test_scratch_of_table_entries_is_shared_and_what_the_table_reads_is_kept() -> None:
    b = Builder((BATCH,))
    x, h, first, second, out, last = (b.value(Storage.ARENA, (BATCH, 8)) for _ in range(6))
    b.eager(print, [], [x])
    steps = [b.eager(print, [x], [first]), b.eager(print, [first], [out])]
    other = [b.eager(print, [x], [second]), b.eager(print, [second, x], [out])]
    del b.steps[1:]
    table = ((4, "a", tuple(steps)), (None, "b", tuple(other)))
    b.steps.append(Choice(BATCH, table, (x.value,), (out.value,)))
    b.eager(print, [out], [last])
    spans = touched(b.steps)
    assert spans[x.value] == (0, 4)
    assert spans[out.value] == (2, 5)
    assert spans[first.value] == (1, 2)
    assert spans[second.value] == (3, 4)
    plan = MemoryPlan((BATCH,), [Lifetime(v, BATCH * 32, *spans[v]) for v in sorted(spans)])
    assert h.value not in spans
    offsets = dict(zip(plan.values, plan.place((2,))[0].tolist(), strict=True))
    assert offsets[first.value] == offsets[second.value]


def test_arena_grows_and_keeps_its_high_water_mark() -> None:
    arena = Arena()
    assert arena.reserve(0)
    assert arena.address % 4096 == 0
    assert arena.reserve(10_000)
    grown = arena.bytes
    assert grown >= 10_000
    assert not arena.reserve(5_000)
    assert arena.bytes == grown
    whole = arena.tensor(torch.float64)
    assert whole.data_ptr() == arena.address
    assert whole.numel() * 8 >= grown
