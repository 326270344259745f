"""Views as strides: random chains of views agree with torch, on symbolic sizes too."""

import random

import pytest
import torch
from tests.graphs import SIZES, GraphBuilder

from tilewright.ir.facts import TensorType, fact
from tilewright.ir.sizes import BATCH, SEQ, TOKENS, Size, compile_sizes
from tilewright.ir.views import Strided, apply_view, contiguous, is_contiguous, reshape, row_stride, same_size

aten = torch.ops.aten
SYMBOLS = tuple(SIZES)


def numbers(*sizes: Size) -> tuple[int, ...]:
    """Sizes at the lengths of test graphs."""
    return compile_sizes(SYMBOLS, sizes)(*SIZES.values()) if sizes else ()


def test_chains_of_views_have_torchs_strides() -> None:
    for seed in range(100):
        draw = random.Random(seed)
        g = GraphBuilder(seed=seed)
        node = g.input("x", *draw.choice([(BATCH, SEQ, 24), (TOKENS, 4, 6), (SEQ, 3, 2, 5)]))
        layout = contiguous(fact(node, TensorType).shape)
        for _ in range(draw.randint(1, 5)):
            shape = list(g.values[node].shape)
            axis = draw.randrange(len(shape))
            calls = [
                (aten.permute.default, draw.sample(range(len(shape)), len(shape))),
                (aten.unsqueeze.default, axis),
                (aten.squeeze.dims, [axis]),
                (aten.slice.Tensor, axis, shape[axis] // 3, shape[axis], draw.choice([1, 2])),
                (aten.expand.default, [*shape[:axis], 3 if shape[axis] == 1 else shape[axis], *shape[axis + 1 :]]),
            ]
            if len(shape) > 2:
                calls.append((aten.select.int, axis, draw.randrange(shape[axis])))
            target, *args = draw.choice(calls)
            node = g.call(target, node, *args)
            moved = apply_view(node, layout)
            assert moved is not None
            layout = moved
            value = g.values[node]
            assert numbers(*layout.shape) == tuple(value.shape)
            assert numbers(layout.offset) == (value.storage_offset(),)
            strides = zip(value.shape, value.stride(), numbers(*layout.strides), strict=True)
            assert all(ours == theirs for size, theirs, ours in strides if size != 1)


def test_reshapes_are_views_exactly_where_torch_says_so() -> None:
    draw = random.Random(0)
    seen = set()
    for _ in range(300):
        shape = draw.choice([(6, 4, 5), (2, 3, 4, 5), (12, 10), (1, 12, 1, 10)])
        dims = draw.sample(range(len(shape)), len(shape)) if draw.random() < 0.6 else list(range(len(shape)))
        x = torch.empty(shape).permute(dims)
        new = draw.choice([(6, 20), (120,), (24, 5), (2, 3, 20), (4, 3, 10), (10, 12), (1, 6, 1, 4, 5), (20, 6)])
        layout = reshape(Strided(tuple(x.shape), tuple(x.stride())), new)
        try:
            expected = x.view(new)
        except RuntimeError:
            expected = None
        assert (layout is None) == (expected is None)
        seen.add(layout is None)
        if layout is not None and expected is not None:
            strides = zip(new, layout.strides, expected.stride(), strict=True)
            assert all(ours == theirs for size, ours, theirs in strides if size != 1)
    assert seen == {True, False}


def test_symbolic_reshapes() -> None:
    heads = Strided((BATCH, SEQ, 2, 12), (SEQ * 24, 24, 12, 1))
    merged = reshape(heads, (BATCH * SEQ, 24))
    assert merged is not None
    assert is_contiguous(merged)
    by_head = Strided((BATCH, 2, SEQ, 12), (SEQ * 24, 12, 24, 1))
    assert reshape(by_head, (BATCH, 2 * SEQ, 12)) is None
    assert reshape(by_head, (BATCH, 2, SEQ, 3, 4)) == Strided((BATCH, 2, SEQ, 3, 4), (SEQ * 24, 12, 24, 4, 1))
    assert same_size(2 * (BATCH + 1), 2 * BATCH + 2)
    assert not same_size(BATCH, SEQ)


@pytest.mark.parametrize(
    ("layout", "stride"),
    [
        (contiguous((BATCH, SEQ, 24)), 24),
        (contiguous((24,)), 24),
        (Strided((BATCH, 24), (SEQ * 24, 1)), SEQ * 24),
        (Strided((TOKENS, 12), (24, 1), 12), 24),
        (Strided((BATCH, SEQ, 24), (24, BATCH * 24, 1)), None),
        (Strided((24, TOKENS), (1, 24)), None),
        (Strided((BATCH, SEQ, 24), (0, 24, 1)), None),
    ],
)
def test_rows_of_a_matrix_operand(layout: Strided, stride: Size | None) -> None:
    assert row_stride(layout) == stride
