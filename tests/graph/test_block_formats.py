"""Block formats: what the bytes stand for, against the gguf package, and how far rounding goes."""

import gguf
import numpy as np
import pytest
import torch

from tilewright.errors import InputError, OptionError
from tilewright.ops.blocks import FORMATS, block_format, dequantize, quantize, unpack

GGUF = [name for name in FORMATS if name.isupper()]


def random_rows(name: str, rows: int, k: int, seed: int = 0) -> torch.Tensor:
    """Random bytes as rows of that format."""
    generator = torch.Generator().manual_seed(seed)
    size = (rows, FORMATS[name].row_bytes(k))
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("k", [256, 2816])
@pytest.mark.parametrize("name", GGUF)
def test_elements_are_those_that_gguf_decodes(name: str, k: int) -> None:
    data = random_rows(name, 37, k)
    with np.errstate(invalid="ignore"):
        want = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[name])
    got = dequantize(name, data)
    assert got.shape == (37, k)
    # Bits, so that -0, infinities and denormals count; any NaN is as good as another.
    same = got.view(torch.int32) == torch.from_numpy(want).view(torch.int32)
    assert (same | got.isnan() & torch.from_numpy(want).isnan()).all()


@pytest.mark.parametrize("name", GGUF)
def test_block_sizes_are_those_of_gguf(name: str) -> None:
    form = FORMATS[name]
    assert (form.block, form.nbytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert form.columns(form.row_bytes(512)) == 512


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.decode])
def test_parts_make_the_elements(name: str) -> None:
    data = random_rows(name, 3, 512)
    parts = unpack(name, data)
    each = parts.values.view(3, -1, parts.group) * parts.scales[..., None]
    each = each if parts.minimums is None else each - parts.minimums[..., None]
    assert torch.equal(each.view(3, 512).nan_to_num(7), dequantize(name, data).nan_to_num(7))
    assert parts.scales.shape == (3, 512 // parts.group)


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e4])
@pytest.mark.parametrize("name", ["int4", "int8"])
def test_rounding_stays_within_half_a_step(name: str, size: float) -> None:
    weight = torch.randn(5, 320) * size
    weight[0] = 0.0
    weight[1] = weight[1].abs() + size
    error = (dequantize(name, quantize(name, weight)) - weight).abs()
    if name == "int8":
        step = weight.abs().amax(1, keepdim=True) / 127
    else:
        groups = weight.view(5, -1, 64)
        # The scale and the minimum are themselves rounded to fp16: 1 part in 2048, at least 2**-25.
        slack = 2**-10 * groups.abs().amax(-1) + 16 * 2**-24
        step = ((groups.amax(-1) - groups.amin(-1)) / 15 + 2 * slack).repeat_interleave(64, dim=1)
    assert (error <= step * 0.5001).all()


def test_numbers_are_kept() -> None:
    weight = torch.randn(3, 7)
    assert torch.equal(dequantize("F32", quantize("F32", weight)), weight)
    assert torch.equal(dequantize("BF16", quantize("BF16", weight)), weight.bfloat16().float())


def test_no_rows_and_no_columns() -> None:
    for name, form in FORMATS.items():
        assert dequantize(name, torch.empty(0, form.row_bytes(256), dtype=torch.uint8)).shape == (0, 256)
        if form.block:
            assert dequantize(name, torch.empty(4, 0, dtype=torch.uint8)).shape == (4, 0)


def test_bad_input_says_what_is_wrong() -> None:
    with pytest.raises(OptionError, match="no block format 'Q3_X'"):
        block_format("Q3_X")
    with pytest.raises(InputError, match="a row of 145 bytes is not in Q4_K"):
        dequantize("Q4_K", torch.zeros(2, 145, dtype=torch.uint8))
    with pytest.raises(InputError, match="must be bytes"):
        dequantize("Q8_0", torch.zeros(2, 34))
    with pytest.raises(InputError, match="a row of 100 elements has no form in int4"):
        quantize("int4", torch.zeros(2, 100))
    with pytest.raises(OptionError, match="Q4_K is only read"):
        quantize("Q4_K", torch.zeros(2, 256))
    with pytest.raises(OptionError, match="have no scales"):
        unpack("F16", torch.zeros(2, 256, dtype=torch.uint8))
