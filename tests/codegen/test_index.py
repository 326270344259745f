"""Index algebra: against numpy on random reshapes, and the simplifications that kernels rely on."""

import random
from itertools import pairwise

import numpy as np
import pytest

from tilewright.codegen.index import Div, Index, Leaf, Mod, constant, linear, reshape, unravel, variable
from tilewright.ir.sizes import BATCH, SEQ, TOKENS, contiguous_strides, product

SIZES = {"B": 3, "S": 5, "T": 7}


def number(size: object) -> int:
    return int(size) if isinstance(size, int) else int(size.subs({BATCH: 3, SEQ: 5, TOKENS: 7}))  # type: ignore[attr-defined]


def evaluate(index: Index, values: dict[str, int]) -> int:
    total = number(index.const)
    for atom, factor in index.terms:
        if isinstance(atom, Leaf):
            value = values[atom.name]
        elif isinstance(atom, Div):
            value = evaluate(atom.value, values) // number(atom.divisor)
        else:
            assert isinstance(atom, Mod)
            value = evaluate(atom.value, values) % number(atom.divisor)
        total += number(factor) * value
    return total


SHAPES = {
    "numbers": [(4, 6, 5), (24, 5), (120,), (4, 30), (2, 2, 3, 10), (8, 15), (60, 2), (1, 120, 1)],
    "sizes": [
        (BATCH, SEQ, 12, 4),
        (BATCH * SEQ, 48),
        (BATCH, SEQ, 48),
        (BATCH * SEQ * 12, 4),
        (BATCH, SEQ * 4, 12),
        (BATCH * SEQ * 48,),
    ],
}


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("seed", range(8))
def test_chain_of_reshapes_addresses_the_same_element(family: str, seed: int) -> None:
    rng = random.Random(seed)
    shapes = [rng.choice(SHAPES[family]) for _ in range(4)]
    index = tuple(variable(f"i{axis}", size) for axis, size in enumerate(shapes[0]))
    for new, old in pairwise(shapes):
        index = reshape(index, old, new)
    first, last = ([number(size) for size in shape] for shape in (shapes[0], shapes[-1]))
    for place in np.ndindex(*first):
        values = {f"i{axis}": part for axis, part in enumerate(place)}
        got = tuple(evaluate(part, values) for part in index)
        assert got == np.unravel_index(np.ravel_multi_index(place, first), last)


def test_splitting_and_merging_heads_leaves_plain_indices() -> None:
    t, h, d = variable("t", TOKENS), variable("h", 12), variable("d", 64)
    merged = reshape((t, h, d), (TOKENS, 768), (TOKENS, 12, 64))
    assert merged == (t, h * 64 + d)
    assert reshape(merged, (TOKENS, 12, 64), (TOKENS, 768)) == (t, h, d)


def test_splitting_and_merging_batch_leaves_plain_indices() -> None:
    row, column = variable("row", BATCH * SEQ), variable("c", 7)
    split = reshape((row, column), (BATCH, SEQ, 7), (BATCH * SEQ, 7))
    assert split[0] == row // SEQ
    assert split[1] == row % SEQ
    assert linear(split, contiguous_strides((BATCH, SEQ, 7))) == row * 7 + column


def test_unravel_of_three_axes_is_undone() -> None:
    shape = (BATCH, 6, SEQ, 10)
    position = variable("p", product(shape))
    assert linear(unravel(position, shape), contiguous_strides(shape)) == position


def test_unknown_bounds_keep_the_remainder() -> None:
    loaded = variable("id", None)
    assert (loaded % 5) != loaded
    assert (loaded // 5) != constant(0)
    assert variable("i", 5) % 5 == variable("i", 5)
    assert variable("i", 5) // 5 == constant(0)
