"""Load-time layouts of weights."""

import pytest
import torch

from tilewright.errors import TilewrightError
from tilewright.ir.program import Weight
from tilewright.ops.block_panels import panel_bytes, to_panels
from tilewright.runtime.weights import PackedLinear, lay_out, load_weights, vendor_packs


@pytest.mark.parametrize(("n", "k"), [(1, 1), (64, 8), (65, 3), (130, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(n: int, k: int, dtype: torch.dtype) -> None:
    weight = torch.randn(n, k).to(dtype)
    kn = lay_out(weight, "kn")
    assert torch.equal(kn, weight.t())
    assert kn.is_contiguous()
    panels = lay_out(weight, "panels:64")
    assert panels.shape == (-(-n // 64), k, 64)
    flat = panels.transpose(1, 2).reshape(-1, k)
    assert torch.equal(flat[:n], weight)
    assert not flat[n:].any()
    assert panels.is_contiguous()


def test_as_is_shares_memory_unless_it_is_strided_or_misaligned() -> None:
    weight = torch.randn(8, 8)
    assert lay_out(weight, "as_is").data_ptr() == weight.data_ptr()
    for other in (weight.t(), weight.view(-1)[1:]):
        copy = lay_out(other, "as_is")
        assert torch.equal(copy, other)
        assert copy.is_contiguous()
        assert copy.data_ptr() % 16 == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_vendor_linear(dtype: torch.dtype, rows: int) -> None:
    weight, x, bias = torch.randn(24, 16).to(dtype), torch.randn(rows, 16).to(dtype), torch.randn(24).to(dtype)
    packed = lay_out(weight, "vendor")
    assert isinstance(packed, PackedLinear) == vendor_packs(dtype)
    if isinstance(packed, PackedLinear):
        for given in (bias, None):
            expected = torch.nn.functional.linear(
                x.double(), weight.double(), None if given is None else given.double()
            )
            tolerance = 16 * torch.finfo(dtype).eps
            torch.testing.assert_close(packed.apply(x, given).double(), expected, rtol=tolerance, atol=tolerance)


def test_tied_weights_are_laid_out_once() -> None:
    weight = torch.randn(32, 16)
    tied = torch.nn.Parameter(weight)
    loaded = load_weights({"a": Weight(weight, "kn"), "b": Weight(tied, "kn"), "c": Weight(weight[:16], "kn")})
    assert loaded["a"] is loaded["b"]
    assert loaded["c"] is not loaded["a"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
@pytest.mark.parametrize("group", [2, 4])
def test_panels_with_neighbours_together(dtype: torch.dtype, group: int) -> None:
    weight = torch.arange(70 * 12).reshape(70, 12).remainder(101).to(dtype)
    panels = lay_out(weight, f"panels:64:{group}")
    assert panels.shape == (2, 12 // group, 64, group)
    assert panels.is_contiguous()
    flat = panels.permute(0, 2, 1, 3).reshape(-1, 12)
    assert torch.equal(flat[:70], weight)
    assert (flat[70:] == 0).all()


@pytest.mark.parametrize("layout", ["panels:", "panels:0", "panels:64:5", "nk", "kn:4"])
def test_an_unknown_layout_is_refused(layout: str) -> None:
    with pytest.raises(TilewrightError, match="laid out"):
        lay_out(torch.zeros(4, 4), layout)
    with pytest.raises(TilewrightError, match="laid out"):
        lay_out(torch.zeros(4), "kn")


def test_panels_of_blocks() -> None:
    data = torch.randint(0, 256, (70, 2 * 144), dtype=torch.uint8)
    found = lay_out(data, "blocks:Q4_K:64")
    want = torch.empty(panel_bytes("Q4_K", (70, 2 * 144), 64), dtype=torch.uint8)
    to_panels("Q4_K", data, 64, want)
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, want)
    for layout in ("blocks:Q4_K", "blocks:F32:64", "blocks:Q9:64"):
        with pytest.raises(TilewrightError, match="cannot be laid out"):
            lay_out(data, layout)
