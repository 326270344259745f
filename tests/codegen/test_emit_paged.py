"""Attention over pages of keys and values, in each form, against the op's own definition in fp64."""

from collections.abc import Sequence

import pytest
import torch
from tests.codegen.bodies import Body, assert_matches, reference, run
from torch import Tensor
from torch.fx import GraphModule

from tilewright.ir.regions import PAGED_VARIANTS, Anchor
from tilewright.ir.sizes import BATCH, PAGES, TABLE, TOKENS

aten = torch.ops.aten
ops = torch.ops.tilewright
FLOATS = {torch.float32: 3e-6, torch.float64: 1e-13, torch.float16: 3e-3, torch.bfloat16: 2e-2}
# Sequences' keys before the step and their new tokens; a longest table of more than 256 slots is read in stretches.
ONE = [(699, 1), (0, 1), (255, 1), (256, 1), (511, 1), (300, 1)]
FEW = [(530, 8), (0, 3), (250, 8), (1, 1), (767, 2)]
MANY = [(300, 40), (0, 9), (20, 1)]
SHORT = [(30, 1), (0, 1), (7, 1)]


def paged(
    shares: Sequence[tuple[int, int]],
    *,
    heads: tuple[int, int] = (4, 2),
    sizes: tuple[int, int] = (16, 16),
    slots: int = 32,
    dtype: torch.dtype = torch.float32,
    pages_dtype: torch.dtype | None = None,
    window: int = -1,
    softcap: float = 0.0,
    sinks: bool = False,
) -> tuple[GraphModule, list[Tensor], dict[object, int]]:
    """A step of these sequences: the body, its operands, sizes. Slots that nobody has written hold NaN."""
    (query_heads, key_heads), (size, value_size) = heads, sizes
    counts = torch.tensor([new for _, new in shares])
    first = torch.tensor([before for before, _ in shares])
    total, batch, longest = int(counts.sum()), len(shares), int((first + counts).max())
    width = -(-longest // slots)
    pages = batch * width
    table = torch.randperm(pages).reshape(batch, width).int()
    cu_seqlens = torch.cat((torch.zeros(1), counts.cumsum(0))).int()
    owner = torch.repeat_interleave(torch.arange(batch), counts)
    slot = first[owner] + torch.arange(total) - cu_seqlens[owner]
    places = table[owner, slot // slots] * slots + slot % slots
    stored = pages_dtype or dtype
    garbage = -128 if stored is torch.int8 else float("nan")
    pools = [
        torch.full((pages, key_heads, *shape), garbage).to(stored) for shape in ((size, slots), (slots, value_size))
    ]
    steps = [torch.full((pages, key_heads, slots), float("nan")) for _ in range(2)] if stored is torch.int8 else []
    old = torch.cat(
        [table[row, torch.arange(n) // slots] * slots + torch.arange(n) % slots for row, n in enumerate(first)]
    )
    ops.append_pages(*(torch.randn(len(old), key_heads, each) for each in sizes), *pools, old.int(), *steps)
    body = Body()
    shapes = ((query_heads, size), (key_heads, size), (key_heads, value_size))
    new = [body.input((TOKENS, *shape), dtype) for shape in shapes]
    held = [body.input((PAGES, *pool.shape[1:]), stored) for pool in pools]
    told = [body.input(shape, torch.int32) for shape in ((TOKENS,), (BATCH + 1,), (TOKENS,), (BATCH, TABLE))]
    tensors = [torch.randn(total, *shape).to(dtype) for shape in shapes]
    tensors[1][0] = 0.0  # the first new key has no magnitude
    tensors += [*pools, places.int(), cu_seqlens, slot.int(), table]
    sink = None
    if sinks:
        sink = body.input((query_heads,), dtype)
        tensors.append(torch.randn(query_heads).to(dtype))
    tensors += steps
    scales = [body.input((PAGES, key_heads, slots), torch.float32) for _ in steps]
    out = body.call(ops.attention_paged.default, *new, *held, *told, sink, size**-0.5, window, softcap, *scales)
    merged = body.call(aten.reshape.default, out, [TOKENS, query_heads * value_size])
    gm = body.module(body.call(aten.mul.Tensor, merged, 2.0))
    return gm, tensors, {BATCH: batch, TOKENS: total, TABLE: width, PAGES: pages}


def check(form: str, shares: Sequence[tuple[int, int]], dtype: torch.dtype = torch.float32, **options: object) -> None:
    gm, tensors, sizes = paged(shares, dtype=dtype, **options)  # type: ignore[arg-type]
    assert_matches(gm, tensors, sizes, FLOATS[dtype], anchor=Anchor.ATTENTION, variant=form)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_query_over_stretches(dtype: torch.dtype) -> None:
    check("paged_one", ONE, dtype)


@pytest.mark.parametrize("form", PAGED_VARIANTS)
def test_short_contexts(form: str) -> None:
    check(form, SHORT, heads=(6, 2), sizes=(24, 40))


def test_few_queries_over_stretches() -> None:
    check("paged_few", FEW, heads=(3, 1), sizes=(24, 40), sinks=True)


def test_many_queries() -> None:
    check("paged_many", MANY, softcap=4.0)


@pytest.mark.parametrize("window", [0, 5, 256, 300])
@pytest.mark.parametrize(("form", "shares"), [("paged_one", ONE), ("paged_few", FEW)], ids=["one", "few"])
def test_windows_over_stretches(form: str, shares: list[tuple[int, int]], window: int) -> None:
    check(form, shares, window=window, softcap=4.0, sinks=True)


@pytest.mark.parametrize("slots", [8, 512])
def test_pages_of_other_sizes_and_types(slots: int) -> None:
    check("paged_one", ONE, slots=slots, pages_dtype=torch.float64)


@pytest.mark.parametrize(
    ("form", "shares"), [("paged_one", ONE), ("paged_few", FEW), ("paged_many", MANY)], ids=PAGED_VARIANTS
)
def test_nothing_before_a_window_is_read(form: str, shares: list[tuple[int, int]]) -> None:
    window = 70
    gm, tensors, sizes = paged(shares, window=window)
    key_pages, value_pages, table = tensors[3], tensors[4], tensors[8]
    found = []
    for poison in (False, True):
        keys, values = key_pages.clone(), value_pages.clone()
        for sequence, (before, _) in enumerate(shares if poison else ()):
            unseen = table[sequence, : max(0, before - window) // 32].long()
            keys[unseen], values[unseen] = float("nan"), float("nan")
        given = [*tensors[:3], keys, values, *tensors[5:]]
        found += run(gm, given, sizes, anchor=Anchor.ATTENTION, variant=form)  # type: ignore[arg-type]
    assert not found[0].isnan().any()
    assert torch.equal(*found)


@pytest.mark.parametrize(("form", "shares"), [("paged_one", ONE), ("paged_few", FEW), ("paged_many", MANY)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pages_of_whole_numbers(form: str, shares: list[tuple[int, int]], dtype: torch.dtype) -> None:
    """The rounding is right to half a step, and what is computed from rounded keys is right as it is in other types."""
    options = {"dtype": dtype, "pages_dtype": torch.int8, "sizes": (24, 40), "softcap": 4.0, "sinks": True}
    gm, tensors, sizes = paged(shares, **options)  # type: ignore[arg-type]
    (found,) = run(gm, tensors, sizes, anchor=Anchor.ATTENTION, variant=form)  # type: ignore[arg-type]
    new_keys, new_values, key_pages, value_pages, places = (each.double() for each in tensors[1:6])
    key_steps, value_steps = tensors[-2].double(), tensors[-1].double()
    page, slot = places.long() // 32, places.long() % 32
    for new, steps, written in (
        (new_keys, key_steps[page, :, slot], key_pages[page, :, :, slot]),
        (new_values, value_steps[page, :, slot], value_pages[page, :, slot]),
    ):
        assert torch.allclose(steps * 127, new.abs().amax(-1).clamp(min=1e-30), rtol=1e-6, atol=0)
        assert float(((written - new / steps[..., None]).abs()).max()) < 0.5001
        assert float(written.abs().max()) == 127
    attention = next(node for node in gm.graph.nodes if node.target is ops.attention_paged.default)
    args = list(attention.args)
    args[1] = args[2] = args[5] = None  # the pages are as the kernels left them
    attention.args = tuple(args)
    (want,) = reference(gm, tensors, sizes)  # type: ignore[arg-type]
    assert float((found.double() - want).abs().max()) <= FLOATS[dtype] * float(want.abs().max())
