"""Attention kernels in each form, packed and padded, against the op's own definition in fp64."""

from collections.abc import Sequence

import pytest
import torch
from tests.codegen.bodies import Body, assert_matches
from torch import Tensor
from torch.fx import GraphModule, Node

from tilewright.errors import CodegenError
from tilewright.ir.regions import ATTENTION_VARIANTS, Anchor
from tilewright.ir.sizes import BATCH, SEQ, TOKENS

aten = torch.ops.aten
ops = torch.ops.tilewright
FLOATS = {torch.float32: 3e-6, torch.float64: 1e-13, torch.float16: 3e-3, torch.bfloat16: 2e-2}
BIAS = {"head": (1, 2, SEQ, SEQ), "batch": (BATCH, 1, SEQ, SEQ), "key": (1, 1, 1, SEQ)}


@pytest.fixture(params=["online", "short", "long"], autouse=True)
def form(request: pytest.FixtureRequest) -> str:
    """The form that the kernels of a test have."""
    return str(request.param)


def variant_of(form: str, length: int) -> str:
    """The variant of a form that takes sequences of this length with the least tile."""
    fitting = [name for name, most in ATTENTION_VARIANTS.items() if most is None or most >= length]
    return next(name for name in fitting if name.startswith(form))


def bias_tensor(name: str, batch: int, length: int) -> Tensor:
    sizes = {BATCH: batch, SEQ: length}
    bias = torch.randn([sizes.get(size, size) for size in BIAS[name]])  # type: ignore[call-overload]
    return torch.where(torch.rand_like(bias) < 0.1, float("-inf"), bias)


def packed(
    form: str,
    valid: Tensor,
    *,
    heads: tuple[int, int] = (2, 2),
    sizes: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
    columns: Sequence[Tensor] = (),
    window: tuple[bool, int, int] = (False, -1, -1),
    softcap: float = 0.0,
    bias: str | None = None,
    sinks: bool = False,
    nans: bool = False,
    tables: tuple[int, int] = (0, 0),
    uniform: bool = False,
) -> None:
    """Operands are slices of one [T, ...] tensor, as behind a joint projection; heads are merged again behind.

    ``columns`` are those the row index keeps. With ``nans`` keys and values of rows that are no keys hold NaN.
    """
    batch, length = valid.shape
    row_index, slots, *offsets, _ = ops.pack_index(valid, columns)
    (query_heads, key_heads), (size, value_size) = heads, sizes
    widths = [query_heads * size, key_heads * size, key_heads * value_size]
    body = Body()
    x = body.input((TOKENS, sum(widths)), dtype)
    tensors = [torch.randn(row_index.shape[0], sum(widths)).to(dtype), *offsets, slots]
    if nans:
        number = torch.arange(row_index.shape[0])[:, None]
        _, key_start, seqlens_k = offsets
        dead = ((number < key_start) | (number >= key_start + seqlens_k)).all(dim=1)
        assert dead.any()
        tensors[0][dead, widths[0] :] = float("nan")
    parts, start = [], 0
    for width, count in zip(widths, (query_heads, key_heads, key_heads), strict=True):
        part = body.call(aten.slice.Tensor, x, 1, start, start + width)
        parts.append(body.call(aten.reshape.default, part, [TOKENS, count, width // count]))
        start += width
    index = [body.input((BATCH + 1,), torch.int32)] + [body.input((BATCH,), torch.int32) for _ in range(2)]
    index.append(body.input((TOKENS,), torch.int32))
    extra = [None, None]
    if bias:
        extra[0] = body.input(BIAS[bias], dtype)
        tensors.append(bias_tensor(bias, batch, length).to(dtype))
    if sinks:
        extra[1] = body.input((query_heads,), dtype)
        tensors.append(torch.randn(query_heads).to(dtype))
    looked_up: list[Node | None] = []
    for entries in tables:
        given = entries > 0
        looked_up.append(body.input((TOKENS, query_heads, entries), dtype) if given else None)
        looked_up.append(body.input((SEQ, SEQ), torch.int64) if given else None)
        if given:
            tensors.append(torch.randn(row_index.shape[0], query_heads, entries).to(dtype))
            tensors.append(torch.randint(0, entries, (length, length)))
    options = (SEQ, SEQ, size**-0.5, *window, softcap, *looked_up, uniform)
    out = body.call(ops.attention_packed.default, *parts, *index, index[-1], *extra, *options)
    merged = body.call(aten.reshape.default, out, [TOKENS, query_heads * value_size])
    gm = body.module(body.call(aten.mul.Tensor, merged, 2.0))
    run_sizes = {BATCH: batch, SEQ: length, TOKENS: row_index.shape[0]}
    assert_matches(gm, tensors, run_sizes, FLOATS[dtype], anchor=Anchor.ATTENTION, variant=variant_of(form, length))


def lengths(*values: int) -> Tensor:
    return torch.arange(max(values))[None] < torch.tensor(values)[:, None]


def ends(batch: int, length: int) -> list[Tensor]:
    """The first column, the last one, and one in between, of each sequence."""
    return [torch.zeros(batch).long(), torch.full((batch,), -1), torch.randint(length, (batch,))]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_packed_uneven_lengths(form: str, dtype: torch.dtype) -> None:
    packed(form, lengths(70, 1, 0, 64, 13), dtype=dtype)


def test_packed_grouped_heads_of_odd_sizes(form: str) -> None:
    packed(form, lengths(70, 3), heads=(4, 2), sizes=(24, 40))


@pytest.mark.parametrize("longest", [128, 500])
def test_packed_mixes_of_lengths(form: str, longest: int) -> None:
    valid = lengths(*(n for n in (1, 127, 16, 500, 0, 15, 129, 2, 128, 17) if n <= longest))
    packed(form, valid)
    if form == "online":
        packed("online_16", valid)


def test_dead_rows_may_hold_anything(form: str) -> None:
    """Rows that are queries and no keys, and rows that no sequence has, are not read as keys."""
    packed(
        form, torch.tensor([[0, 1, 1], [0, 0, 0], [0, 0, 1]]).repeat_interleave(20, 1), columns=ends(3, 60), nans=True
    )


def test_packed_one_token(form: str) -> None:
    packed(form, lengths(1))


def test_packed_one_head(form: str) -> None:
    packed(form, lengths(9, 40), heads=(1, 1), sizes=(8, 1))


def test_packed_causal_left_padding(form: str) -> None:
    packed(form, lengths(150, 7, 0, 80).flip(1).long(), window=(True, -1, -1), columns=ends(4, 150))


@pytest.mark.parametrize("window", [(True, 9, -1), (False, 0, 0), (False, -1, 3)], ids=str)
def test_packed_windows_count_slots_across_holes(form: str, window: tuple[bool, int, int]) -> None:
    packed(form, torch.rand(4, 150) < 0.6, window=window, columns=ends(4, 150))


@pytest.mark.parametrize("bias", BIAS)
def test_packed_bias_softcap_sinks(form: str, bias: str) -> None:
    packed(form, torch.rand(3, 90) < 0.6, bias=bias, softcap=5.0, sinks=True)


@pytest.mark.parametrize("tables", [(20, 0), (0, 9), (20, 33)], ids=str)
def test_packed_tables(form: str, tables: tuple[int, int]) -> None:
    packed(form, torch.rand(3, 90) < 0.6, tables=tables, bias="head" if tables[0] else None)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_packed_tables_of_any_type(form: str, dtype: torch.dtype) -> None:
    packed(form, lengths(40, 0, 13), tables=(5, 6), dtype=dtype, window=(False, 8, 3))


def test_packed_pads_weigh_all_alike(form: str) -> None:
    """Column 0 without a token stands for all such places of its sequence, also where there is no token at all."""
    valid = torch.stack((*(torch.arange(70) >= n for n in (0, 3, 69, 70)), torch.rand(70) < 0.5, torch.arange(70) < 9))
    if form == "long":
        with pytest.raises(CodegenError, match="padding"):
            packed(form, valid, uniform=True, columns=[torch.zeros(len(valid), dtype=torch.int64)])
        return
    packed(
        form,
        valid,
        heads=(4, 2),
        sizes=(16, 24),
        uniform=True,
        columns=[torch.zeros(len(valid), dtype=torch.int64)],
        tables=(4, 0),
    )


def padded(
    form: str,
    length: int,
    key_length: int,
    valid: Tensor | None,
    *,
    dtype: torch.dtype = torch.float32,
    window: tuple[bool, int, int] = (False, -1, -1),
    bias: str | None = None,
    sinks: bool = False,
    tolerance: float = 3e-6,
    tables: bool = False,
    uniform: bool = False,
) -> list[Tensor]:
    """Operands are [B, S, H * D] seen as [B, H, S, D]; keys and values that are not valid hold NaN where none reads
    them.
    """
    body = Body()
    keys = SEQ if length == key_length else key_length
    nodes, tensors = [], []
    for heads, size, rows, count in ((4, 32, SEQ, length), (2, 32, keys, key_length), (2, 24, keys, key_length)):
        x = body.input((BATCH, rows, heads * size), dtype)
        split = body.call(aten.reshape.default, x, [BATCH, rows, heads, size])
        nodes.append(body.call(aten.permute.default, split, [0, 2, 1, 3]))
        tensors.append(torch.randn(3, count, heads * size).to(dtype))
    extra = [None, None, None]
    if valid is not None:
        extra[0] = body.input((BATCH, keys), valid.dtype)
        for tensor in tensors[1:] if not uniform else ():
            tensor[valid == 0] = float("nan")
        tensors.append(valid)
    if bias:
        extra[1] = body.input(BIAS[bias], dtype)
        tensors.append(bias_tensor(bias, 3, length).to(dtype))
    if sinks:
        extra[2] = body.input((4,), dtype)
        tensors.append(torch.randn(4).to(dtype))
    looked_up: list[Node | None] = [None] * 4
    if tables:
        shapes = ((BATCH, 4, SEQ, 7), (SEQ, keys), (BATCH, 4, keys, 5), (keys, SEQ))
        kinds = (dtype, torch.int64) * 2
        looked_up = [body.input(shape, kind) for shape, kind in zip(shapes, kinds, strict=True)]
        tensors += [torch.randn(3, 4, length, 7).to(dtype), torch.randint(0, 7, (length, key_length))]
        tensors += [torch.randn(3, 4, key_length, 5).to(dtype), torch.randint(0, 5, (key_length, length))]
    options = (32**-0.5, *window, 0.0, *looked_up, uniform)
    gm: GraphModule = body.module(body.call(ops.attention.default, *nodes, *extra, *options))
    return assert_matches(
        gm, tensors, {BATCH: 3, SEQ: length}, tolerance, anchor=Anchor.ATTENTION, variant=variant_of(form, key_length)
    )


@pytest.mark.parametrize("length", [1, 70])
def test_padded_without_mask(form: str, length: int) -> None:
    padded(form, length, length, None)


@pytest.mark.parametrize("kind", [torch.bool, torch.int64], ids=str)
def test_padded_with_any_mask_never_reads_pads(form: str, kind: torch.dtype) -> None:
    valid = (torch.rand(3, 70) < 0.5).to(kind)
    valid[1] = 0
    out = padded(form, 70, 70, valid)[0]
    assert not out.isnan().any()
    assert (out[1] == 0).all()


@pytest.mark.parametrize("window", [(False, 9, 4), (True, 20, -1)], ids=str)
def test_padded_fewer_queries_than_keys(form: str, window: tuple[bool, int, int]) -> None:
    padded(form, 20, 150, torch.rand(3, 150) < 0.7, window=window)


def test_padded_bias_and_sinks(form: str) -> None:
    padded(form, 66, 66, None, bias="key", sinks=True, dtype=torch.float64, tolerance=1e-13)


def test_padded_tables(form: str) -> None:
    padded(form, 66, 66, torch.rand(3, 66) < 0.5, tables=True)
    padded(form, 20, 150, None, tables=True, bias=None)


def test_padded_pads_weigh_all_alike(form: str) -> None:
    valid = torch.rand(3, 70) < 0.5
    valid[1] = False
    if form != "long":
        padded(form, 70, 70, valid, uniform=True, tables=True)


def test_keys_and_queries_that_are_computed(form: str) -> None:
    """Norms of each head in front of the attention, whose names must not meet those of the softmax."""
    valid = lengths(40, 5)
    row_index, slots, *offsets, _ = ops.pack_index(valid, [])
    body = Body()
    q, k, v = (body.input((TOKENS, 2, 24)) for _ in range(3))
    index = [body.input((BATCH + 1,), torch.int32)] + [body.input((BATCH,), torch.int32) for _ in range(2)]
    index.append(body.input((TOKENS,), torch.int32))
    weight = body.input((24,))
    normed = [body.call(aten.rms_norm.default, x, [24], weight, 1e-6) for x in (q, k)]
    out = body.call(
        ops.attention_packed.default, *normed, v, *index, index[-1], None, None, SEQ, SEQ, 0.2, False, -1, -1, 0.0
    )
    tensors = [*torch.randn(3, row_index.shape[0], 2, 24), *offsets, slots, torch.randn(24)]
    sizes = {BATCH: 2, SEQ: 40, TOKENS: row_index.shape[0]}
    assert_matches(body.module(out), tensors, sizes, 3e-6, anchor=Anchor.ATTENTION, variant=variant_of(form, 40))


def test_selected_queries_with_tables_of_which_some_are_pads(form: str) -> None:
    """Column 0 of each sequence, as a head reads it: padding in three of them."""
    if form == "long":
        return
    valid = torch.stack([torch.arange(90) >= n for n in (0, 1, 60, 90, 0)])
    column = torch.zeros(5, dtype=torch.int64)
    row_index, slots, _, key_start, seqlens_k, rows_of = ops.pack_index(valid, [column])
    body = Body()
    q, k, v = body.input((BATCH, 2, 24)), body.input((TOKENS, 2, 24)), body.input((TOKENS, 2, 24))
    index = [body.input((BATCH + 1,), torch.int32)] + [body.input((BATCH,), torch.int32) for _ in range(3)]
    index.append(body.input((TOKENS,), torch.int32))
    tables = [body.input((BATCH, 2, 7)), body.input((SEQ, SEQ), torch.int64)]
    tables += [body.input((TOKENS, 2, 9)), body.input((SEQ, SEQ), torch.int64)]
    options = (None, None, 1, SEQ, 0.2, False, -1, -1, 0.0, *tables, True)
    out = body.call(ops.attention_packed.default, q, k, v, *index, *options)
    rows = torch.randn(2, row_index.shape[0], 2, 24)
    tensors = [torch.randn(5, 2, 24), *rows, torch.arange(6, dtype=torch.int32), key_start, seqlens_k]
    tensors += [slots[rows_of[0].long()], slots, torch.randn(5, 2, 7), torch.randint(0, 7, (90, 90))]
    tensors += [torch.randn(row_index.shape[0], 2, 9), torch.randint(0, 9, (90, 90))]
    sizes = {BATCH: 5, SEQ: 90, TOKENS: row_index.shape[0]}
    assert_matches(body.module(out), tensors, sizes, 3e-6, anchor=Anchor.ATTENTION, variant=variant_of(form, 90))


@pytest.mark.parametrize("window", [(False, 5, 7), (True, 9, -1)], ids=str)
def test_queries_that_are_some_of_the_tokens(form: str, window: tuple[bool, int, int]) -> None:
    """One query of each sequence, at any of its slots; keys are all valid tokens."""
    valid = torch.rand(5, 90) < 0.6
    valid[2] = False
    row_index, slots, _, key_start, seqlens_k, _ = ops.pack_index(valid, [])
    body = Body()
    q, k, v = body.input((BATCH, 2, 24)), body.input((TOKENS, 2, 24)), body.input((TOKENS, 2, 24))
    index = [body.input((BATCH + 1,), torch.int32)] + [body.input((BATCH,), torch.int32) for _ in range(3)]
    index.append(body.input((TOKENS,), torch.int32))
    out = body.call(ops.attention_packed.default, q, k, v, *index, None, None, 1, SEQ, 0.2, *window, 0.0)
    asked = torch.tensor([0, 89, 3, 45, 60], dtype=torch.int32)
    rows = torch.randn(2, row_index.shape[0], 2, 24)
    offsets = torch.arange(6, dtype=torch.int32)
    tensors = [torch.randn(5, 2, 24), *rows, offsets, key_start, seqlens_k, asked, slots]
    sizes = {BATCH: 5, SEQ: 90, TOKENS: row_index.shape[0]}
    assert_matches(body.module(out), tensors, sizes, 3e-6, anchor=Anchor.ATTENTION, variant=variant_of(form, 90))
