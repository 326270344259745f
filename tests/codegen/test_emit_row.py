"""Row kernels against the region body itself in fp64: fusion, views, lookups, reductions, scatter, edges."""

import pytest
import torch
from tests.codegen.bodies import Body, assert_matches, emit, run

from tilewright.errors import CodegenError, KernelAssertion
from tilewright.ir.program import View
from tilewright.ir.sizes import BATCH, SEQ, TOKENS

aten = torch.ops.aten
packing = torch.ops.tilewright
FLOATS = {torch.float32: 3e-6, torch.float64: 1e-14, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("width", [1, 37, 300])
def test_residual_and_layer_norm(dtype: torch.dtype, width: int) -> None:
    body = Body()
    x, y = body.input((TOKENS, width), dtype), body.input((TOKENS, width), dtype)
    weight, bias = body.input((width,), dtype), body.input((width,), dtype)
    total = body.call(aten.add.Tensor, x, y)
    norm = body.call(aten.layer_norm.default, total, [width], weight, bias, 1e-5)
    gm = body.module(norm, total)
    tensors = [torch.randn(5, width).to(dtype) + 3, torch.randn(5, width).to(dtype), *torch.randn(2, width).to(dtype)]
    assert_matches(gm, tensors, {TOKENS: 5}, FLOATS[dtype] * 10)


def test_layer_norm_far_from_zero_keeps_its_digits() -> None:
    """The mean of squares minus the square of the mean would lose them all."""
    body = Body()
    x = body.input((TOKENS, 384))
    gm = body.module(body.call(aten.layer_norm.default, x, [384], None, None, 1e-12))
    assert_matches(gm, [torch.randn(4, 384) + 1000.0], {TOKENS: 4}, 2e-4)


@pytest.mark.parametrize("rows", [0, 1, 65])
def test_short_rows_share_a_program(rows: int) -> None:
    body = Body()
    x = body.input((TOKENS, 6, 24))
    norm = body.call(aten.rms_norm.default, x, [24], None, None)
    gm = body.module(body.call(aten.mul.Tensor, norm, 0.5))
    assert_matches(gm, [torch.randn(rows, 6, 24)], {TOKENS: rows}, 1e-6)


@pytest.mark.parametrize("op", [aten.softmax.int, aten.cumsum.default], ids=["softmax", "cumsum"])
@pytest.mark.parametrize("width", [7, 5000])
def test_last_axis_of_known_width(op: object, width: int) -> None:
    body = Body()
    x = body.input((TOKENS, width))
    gm = body.module(body.call(op, x, -1))
    assert_matches(gm, [torch.randn(3, width)], {TOKENS: 3}, 1e-5)


def test_rows_longer_than_registers_take_several_passes() -> None:
    body = Body()
    x, weight = body.input((TOKENS, 6000)), body.input((6000,))
    norm = body.call(aten.layer_norm.default, x, [6000], weight, None, 1e-5)
    gm = body.module(body.call(aten.gelu.default, norm, approximate="tanh"))
    assert_matches(gm, [torch.randn(2, 6000), torch.randn(6000)], {TOKENS: 2}, 3e-6)


@pytest.mark.parametrize("length", [1, 9, 2500])
def test_position_ids_from_a_running_count(length: int) -> None:
    body = Body()
    ids = body.input((BATCH, SEQ), torch.int64)
    real = body.call(aten.ne.Scalar, ids, 1)
    number = body.call(torch.ops.prims.convert_element_type.default, real, torch.int64)
    count = body.call(aten.mul.Tensor, body.call(aten.cumsum.default, number, 1), number)
    gm = body.module(body.call(aten.add.Tensor, count, 1))
    assert_matches(gm, [torch.randint(0, 3, (3, length))], {BATCH: 3, SEQ: length}, 0)


def test_lookups_of_gathered_rows() -> None:
    body = Body()
    ids, positions = body.input((BATCH, SEQ), torch.int64), body.input((1, 20000), torch.int64)
    rows = body.input((TOKENS,), torch.int32)
    words, places, weight = body.input((100, 48)), body.input((20000, 48)), body.input((48,))
    place = body.call(aten.expand.default, body.call(aten.slice.Tensor, positions, 1, 0, SEQ), [BATCH, SEQ])
    word = body.call(aten.embedding.default, words, body.call(packing.gather_rows.default, ids, rows))
    where = body.call(aten.embedding.default, places, body.call(packing.gather_rows.default, place, rows))
    total = body.call(aten.add.Tensor, word, where)
    gm = body.module(body.call(aten.layer_norm.default, total, [48], weight, None, 1e-5))
    tensors = [torch.randint(0, 100, (3, 7)), torch.arange(20000)[None], torch.tensor([0, 1, 5, 7, 9, 20]).int()]
    tensors += [torch.randn(100, 48), torch.randn(20000, 48), torch.randn(48)]
    assert_matches(gm, tensors, {BATCH: 3, SEQ: 7, TOKENS: 6}, 1e-6)


VALID = {
    "right": [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]],
    "left_and_holes": [[0, 1, 0, 1], [0, 0, 0, 1], [1, 0, 0, 1]],
    "empty_rows": [[0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]],
    "nothing": [[0, 0, 0, 0]] * 3,
}


@pytest.mark.parametrize("width", [(1,), (300,), (2, 3), (5000,)], ids=str)
@pytest.mark.parametrize("columns", [(), (0,), (-1, 1, 0)], ids=str)
@pytest.mark.parametrize("pattern", VALID)
def test_scatter_writes_rows_and_zeros(pattern: str, columns: tuple[int, ...], width: tuple[int, ...]) -> None:
    """Outputs start as NaN: a place that is not written shows, and so does a kept row that is not valid."""
    valid = torch.tensor(VALID[pattern])
    rows = packing.pack_index(valid, [torch.full((3,), column) for column in columns])[0]
    body = Body()
    x, index, mask = (
        body.input((TOKENS, *width)),
        body.input((TOKENS,), torch.int32),
        body.input((BATCH, SEQ), torch.int64),
    )
    total = body.call(aten.mul.Tensor, x, 2.0)
    gm = body.module(body.call(packing.scatter_rows.default, total, index, mask), total)
    sizes = {BATCH: 3, SEQ: 4, TOKENS: rows.shape[0]}
    assert_matches(gm, [torch.randn(rows.shape[0], *width), rows, valid], sizes, 1e-6)


def test_select_rows() -> None:
    body = Body()
    x, rows = body.input((TOKENS, 40)), body.input((BATCH,), torch.int32)
    gm = body.module(body.call(aten.tanh.default, body.call(packing.select_rows.default, x, rows)))
    assert_matches(gm, [torch.randn(6, 40), torch.tensor([5, 0]).int()], {TOKENS: 6, BATCH: 2}, 1e-6)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("width", [(), (40,), (2, 3000)], ids=str)
def test_select_column(width: tuple[int, ...], kind: torch.dtype) -> None:
    """Negative columns count from the end; the columns are computed in the same kernel."""
    body = Body()
    x, column = body.input((BATCH, SEQ, *width)), body.input((BATCH,), kind)
    last = body.call(aten.sub.Tensor, column, 1)
    gm = body.module(body.call(aten.neg.default, body.call(packing.select_column.default, x, last)))
    tensors = [torch.randn(5, 7, *width), torch.tensor([0, 7, 1, -6, 3], dtype=kind)]
    assert_matches(gm, tensors, {BATCH: 5, SEQ: 7}, 0)
    for outside in (8, -7, 2**33 if kind is torch.int64 else 2**30):
        tensors[1][3] = outside
        with pytest.raises(KernelAssertion, match="outside of the sequence"):
            run(gm, tensors, {BATCH: 5, SEQ: 7})


@pytest.mark.parametrize("shape", [(5, 1), (4, 7), (3, 300), (2, 5000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.bfloat16], ids=str)
def test_argmax_is_the_first_of_the_greatest(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = torch.randint(-4, 4, shape).to(dtype)
    if dtype.is_floating_point:
        x[0, -1], x[1] = float("nan"), float("-inf")
    body = Body()
    given = body.input((BATCH, SEQ), dtype)
    kept, gone = (body.call(aten.argmax.default, given, 1, keepdim) for keepdim in (True, False))
    assert_matches(body.module(kept, gone), [x], {BATCH: shape[0], SEQ: shape[1]}, 0)


def test_argmax_of_another_axis() -> None:
    body = Body()
    gm = body.module(body.call(aten.argmax.default, body.input((BATCH, SEQ, 40)), 1))
    assert_matches(gm, [torch.randn(3, 9, 40)], {BATCH: 3, SEQ: 9}, 0)


def test_reductions_over_any_axes() -> None:
    body = Body()
    x = body.input((BATCH, SEQ, 40))
    outputs = [
        body.call(aten.mean.dim, x, [1]),
        body.call(aten.sum.dim_IntList, x, [2], True),
        body.call(aten.amax.default, x, [-1]),
        body.call(aten.amin.default, x, [0]),
        body.call(aten.sum.dim_IntList, x, [1, 2]),
    ]
    assert_matches(body.module(*outputs), [torch.randn(3, 9, 40)], {BATCH: 3, SEQ: 9}, 1e-6)


@pytest.mark.parametrize("axes", [[-1], [0]], ids=str)
@pytest.mark.parametrize("op", [aten.amax.default, aten.amin.default], ids=str)
def test_extremes_return_nan_where_there_is_one(op: object, axes: list[int]) -> None:
    body = Body()
    x = body.input((TOKENS, 40))
    gm = body.module(body.call(op, x, axes))
    rows = torch.randn(5, 40)
    rows[2, 7] = float("nan")
    rows[4, 3], rows[1, 1] = float("inf"), float("-inf")
    assert_matches(gm, [rows], {TOKENS: 5}, 1e-6)


def test_views_are_arithmetic() -> None:
    body = Body()
    x, y = body.input((TOKENS, 64)), body.input((TOKENS, 32))
    joined = body.call(aten.cat.default, [x, y], 1)
    heads = body.call(aten.permute.default, body.call(aten.reshape.default, joined, [TOKENS, 4, 24]), [1, 0, 2])
    half = body.call(aten.slice.Tensor, heads, 2, 12, 24)
    picked = body.call(aten.select.int, heads, 2, -1)
    wide = body.call(aten.expand.default, body.call(aten.unsqueeze.default, picked, -1), [4, TOKENS, 12])
    gm = body.module(body.call(aten.add.Tensor, half, wide), heads)
    assert_matches(gm, [torch.randn(3, 64), torch.randn(3, 32)], {TOKENS: 3}, 1e-6)


def test_created_tensors_and_conditions() -> None:
    body = Body()
    x, cpu = body.input((BATCH, SEQ)), torch.device("cpu")
    count = body.call(aten.arange.start_step, 2, SEQ + 2, 1, dtype=torch.int64, device=cpu)
    fill = body.call(aten.full.default, [SEQ], -1.5, device=cpu)
    total = body.call(aten.add.Tensor, body.call(aten.add.Tensor, x, count), fill)
    positive = body.call(
        aten.logical_and.default, body.call(aten.gt.Scalar, total, 0), body.call(aten.lt.Scalar, count, 4)
    )
    gm = body.module(body.call(aten.where.self, positive, total, fill), positive, count)
    assert_matches(gm, [torch.randn(2, 6)], {BATCH: 2, SEQ: 6}, 1e-6)


POINTWISE = [
    (aten.tanh.default, ()),
    (aten.gelu.default, ()),
    (aten.silu.default, ()),
    (aten.sigmoid.default, ()),
    (aten.exp.default, ()),
    (aten.erf.default, ()),
    (aten.relu.default, ()),
    (aten.ceil.default, ()),
    (aten.expm1.default, ()),
    (aten.softplus.default, ()),
    (aten.softplus.default, (2.0, 1.5)),
    (aten.sign.default, ()),
    (aten.clamp.default, (None, 0.5)),
    (aten.clamp.default, (-0.5, 0.5)),
    (aten.pow.Tensor_Scalar, (2,)),
    (aten.pow.Tensor_Scalar, (3,)),
    (aten.pow.Tensor_Scalar, (7,)),
    (aten.pow.Tensor_Scalar, (2.5,)),
    (aten.sub.Tensor, (0.1,)),
    (aten.masked_fill.Scalar, None),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("op", "more"), POINTWISE, ids=lambda value: str(value))
def test_pointwise_ops_are_accurate(op: object, more: tuple[object, ...] | None, dtype: torch.dtype) -> None:
    body = Body()
    x = body.input((TOKENS, 11), dtype)
    if more is None:
        mask = body.input((11,), torch.bool)
        gm = body.module(body.call(op, x, mask, -1e30))
    else:
        gm = body.module(body.call(op, x, *more))
    special = torch.tensor([0.0, -0.0, 1e-20, -3e-5, 0.62499, 0.625, -0.7, 8.0, -9.5, float("inf"), float("nan")])
    rows = torch.cat((special[None], torch.randn(40, 11), torch.randn(20, 11) * 1e-3)).to(dtype)
    tensors = [rows] if more is not None else [rows, torch.rand(11) < 0.5]
    found = assert_matches(gm, tensors, {TOKENS: 61}, 2e-6 if dtype == torch.float32 else 2e-13)
    if op is aten.tanh.default:
        small = torch.tanh(rows[41:].double())
        assert ((found[0][41:].double() - small).abs() / small.abs()).max() < (
            1e-6 if dtype == torch.float32 else 1e-14
        )


@pytest.mark.parametrize("length", [1, 150])
def test_buckets_of_distances(length: int) -> None:
    """Integers to logarithms and back, as relative positions are grouped; the sign is one of integers."""
    body = Body()
    made = {"dtype": torch.int64, "device": torch.device("cpu")}
    place = body.call(aten.arange.start_step, 0, SEQ, 1, **made)
    apart = body.call(
        aten.sub.Tensor, body.call(aten.unsqueeze.default, place, 1), body.call(aten.unsqueeze.default, place, 0)
    )
    size = body.call(aten.add.Tensor, body.call(aten.abs.default, apart), 0.3)
    group = body.call(aten.ceil.default, body.call(aten.mul.Tensor, body.call(aten.log.default, size), 3.7))
    signed = body.call(aten.mul.Tensor, group, body.call(aten.sign.default, apart))
    gm = body.module(body.call(torch.ops.prims.convert_element_type.default, signed, torch.int64))
    assert_matches(gm, [], {SEQ: length}, 0)


def test_strided_inputs_are_read_in_place() -> None:
    body = Body()
    x = body.input((TOKENS, 5))
    gm = body.module(body.call(aten.mul.Tensor, x, 2.0))
    stored = torch.randn(4, 13)
    found = run(gm, [stored], {TOKENS: 4}, views={0: lambda value: View(value, (TOKENS, 5), (13, 2), 3)})
    assert torch.equal(found[0], stored[:, 3:13:2] * 2)


def test_what_has_no_kernel_says_why() -> None:
    body = Body()
    x = body.input((TOKENS, 5))
    gm = body.module(body.call(aten.flip.default, x, [1]))
    with pytest.raises(CodegenError, match="op aten.flip.default has no kernel".replace(".", r"\.")):
        emit(gm)


def test_names_of_values_do_not_meet_those_of_the_scatter() -> None:
    body = Body()
    x, y = body.input((TOKENS, 5)), body.input((TOKENS, 6))
    rows, mask = body.input((TOKENS,), torch.int32), body.input((BATCH, SEQ), torch.int64)
    joined = body.call(aten.cat.default, [x, y], 1)
    gm = body.module(body.call(packing.scatter_rows.default, joined, rows, mask))
    valid = torch.tensor(VALID["left_and_holes"])
    index = packing.pack_index(valid, [])[0]
    tensors = [torch.randn(len(index), 5), torch.randn(len(index), 6), index, valid]
    assert_matches(gm, tensors, {BATCH: 3, SEQ: 4, TOKENS: len(index)}, 0)


@pytest.mark.parametrize("rows", [1, 5])
def test_concatenated_columns_of_one_place(rows: int) -> None:
    """The address of a column of size 1 is a scalar in a tile of columns, and takes no mask of the tile."""
    body = Body()
    first, wide, last = body.input((1, 1)), body.input((TOKENS, 9)), body.input((TOKENS, 1))
    gm = body.module(body.call(aten.cat.default, [last, wide, body.call(aten.mul.Tensor, last, first)], 1))
    assert_matches(gm, [torch.randn(1, 1), torch.randn(rows, 9), torch.randn(rows, 1)], {TOKENS: rows}, 1e-6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_a_range_of_one_place(dtype: torch.dtype) -> None:
    body = Body()
    x = body.input((TOKENS, 1))
    places = body.call(aten.arange.start_step, 3, 4, 1, dtype=torch.int64)
    found = body.call(torch.ops.prims.convert_element_type.default, places, dtype)
    filled = body.call(aten.full.default, [1], 2, dtype=torch.int64)
    filled = body.call(torch.ops.prims.convert_element_type.default, filled, dtype)
    gm = body.module(found, filled, body.call(aten.add.Tensor, x, found))
    assert_matches(gm, [torch.randn(4, 1)], {TOKENS: 4}, 1e-6)
