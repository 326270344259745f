"""200 random graphs through the whole compiler: native kernels agree with the reference kernels and with fp64.

The error rule is applied to errors relative to the largest value of their row, over 20 graphs together.
"""

import pytest
import torch
from numerics.random_graphs import (
    RandomGraph,
    assert_same_at_real_tokens,
    copy_of,
    in_double,
    random_graph,
    real_places,
    run,
    to_double,
)
from references import ErrorRule, masks
from torch import Tensor

from tilewright import settings
from tilewright.driver.compile_graph import CompiledGraph, compile_graph
from tilewright.driver.options import CompileOptions

pytestmark = pytest.mark.usefixtures("one_thread")
GRAPHS, CHUNK = 200, 20
GEMMS = ("triton", "vendor", "auto")
# The example has 7 rows of up to 13 tokens, more than the row count where "auto" turns to the vendor's GEMM; these
# have fewer.
SHAPES = ((3, 6), (1, 1), (5, 4), (1, 17))
PATTERNS = ("left", "holes", "full", "one_token", "uneven")


def calls(made: RandomGraph, seed: int) -> list[tuple[Tensor, ...]]:
    """The example, and inputs of another size with a mask of another pattern."""
    batch, length = SHAPES[seed % len(SHAPES)]
    mask = masks(batch, length, PATTERNS[seed % len(PATTERNS)], torch.Generator().manual_seed(seed))
    return [made.inputs, made.fresh_inputs(batch, length, seed, mask)]


def compiled(made: RandomGraph, opt_level: int, gemm: str) -> CompiledGraph:
    return compile_graph(copy_of(made.graph), CompileOptions(opt_level=opt_level, gemm=gemm))


def add_relative(rule: ErrorRule, ours: Tensor, reference: Tensor, exact: Tensor) -> None:
    """Rows scaled by their largest value, so that graphs with large values do not hide the errors of others."""
    if exact.numel() and exact.dtype.is_floating_point:
        scale = exact.abs().amax(-1, keepdim=True).clamp(min=1.0)
        rule.add((ours / scale).float(), (reference / scale).float(), exact / scale)


def check(seed: int, opt_level: int, rule: ErrorRule) -> None:
    """Compiles one graph and compares its calls."""
    made = random_graph(seed, torch.float32, few=True)
    double = in_double(made)
    with settings.scope(verify=seed % 4 == 0):  # it takes a third of the time of the passes
        oracle = compiled(made, 0, "auto")
        ours = compiled(made, opt_level, GEMMS[seed % len(GEMMS)])
    assert ours.spec is not None
    # A reduction over the padded sequence axis has no kernel; nothing else runs eager.
    reasons = ours.spec.notes["eager"]
    assert all("it reduces axes" in reason for reason in reasons.values()), reasons  # type: ignore[attr-defined]
    for inputs in calls(made, seed):
        before = ours.stats.rows_computed
        got, expected = ours(*inputs), oracle(*inputs)
        exact = run(double.graph, to_double(inputs))
        mask = inputs[1]
        assert_same_at_real_tokens(made.graph, expected, got, mask, 1e-4)
        assert int(mask.sum()) <= ours.stats.rows_computed - before <= int(mask.sum()) + len(mask)
        parts = zip(*(real_places(made.graph, values, mask) for values in (got, expected, exact)), strict=True)
        for (mine, _), (reference, _), (truth, _) in parts:
            add_relative(rule, mine, reference, truth)


@pytest.mark.parametrize("start", range(0, GRAPHS, CHUNK))
def test_fused_agrees(start: int) -> None:
    rule = ErrorRule()
    for seed in range(start, start + CHUNK):
        check(seed, 2, rule)
    rule.check()


def test_a_kernel_for_each_op_agrees() -> None:
    rule = ErrorRule()
    for seed in range(2, GRAPHS, 5):
        check(seed, 1, rule)
    rule.check()
