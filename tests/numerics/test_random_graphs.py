"""200 random graphs: packed, they agree with the normalized graph at real tokens."""

import pytest
import torch
from numerics.random_graphs import RandomGraph, assert_same_at_real_tokens, copy_of, random_graph, run
from references import masks

from tilewright.passes.base import run_pass
from tilewright.passes.packing.remove_padding import RemovePadding

pytestmark = pytest.mark.usefixtures("one_thread")
GRAPHS, CHUNK = 200, 20


def check(made: RandomGraph, seed: int, tolerance: float) -> None:
    """Packs, and compares on the example and on inputs of other sizes."""
    packed, record = run_pass(RemovePadding("on"), copy_of(made.graph))
    assert record.counts["attention"] > 0
    pattern = ("left", "holes", "empty_row", "one_token")[seed % 4]
    mask = masks(3, 6, pattern, torch.Generator().manual_seed(seed))
    for inputs in (made.inputs, made.fresh_inputs(3, 6, seed, mask)):
        assert_same_at_real_tokens(made.graph, run(made.graph, inputs), run(packed, inputs), inputs[1], tolerance)


@pytest.mark.parametrize("start", range(0, GRAPHS, CHUNK))
def test_packed_agrees_with_normalized(start: int) -> None:
    for seed in range(start, start + CHUNK):
        if seed % 5 == 4:
            check(random_graph(seed, torch.float32), seed, 1e-4)
        else:
            check(random_graph(seed), seed, 1e-10)


def test_equal_seeds_give_equal_graphs() -> None:
    one, two = random_graph(3), random_graph(3)
    assert str(one.graph.graph) == str(two.graph.graph)
    assert all(torch.equal(a, b) for a, b in zip(run(one.graph, one.inputs), run(two.graph, one.inputs), strict=True))
