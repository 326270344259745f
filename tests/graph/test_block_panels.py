"""Panels of rows in block formats: every byte of a row is where a kernel looks for it."""

import pytest
import torch
from tests.graph.test_block_formats import random_rows

from tilewright.errors import InputError
from tilewright.ops.block_panels import has_panels, panel_bytes, to_panels
from tilewright.ops.blocks import FORMATS, quantize

PANELS = [name for name in FORMATS if has_panels(name)]


@pytest.mark.parametrize("rows", [1, 64, 70])
@pytest.mark.parametrize("name", PANELS)
def test_units_of_all_rows_lie_side_by_side(name: str, rows: int) -> None:
    data, width = random_rows(name, rows, 512), 32
    out = torch.full(panel_bytes(name, tuple(data.shape), width), 7, dtype=torch.uint8)
    to_panels(name, data, width, out)
    nbytes = FORMATS[name].nbytes
    padded = torch.zeros(out.shape[0] * width, data.shape[1], dtype=torch.uint8)
    padded[:rows] = data
    blocks = padded.view(out.shape[0], width, -1, nbytes)
    chunks = out.view(out.shape[0], -1, nbytes * width)
    half = nbytes - 2 if name == "Q6_K" else 0
    scales = chunks[..., half * width : (half + 2) * width].unflatten(-1, (width, 2))
    assert torch.equal(scales, blocks[..., half : half + 2].transpose(1, 2))
    last = 0 if name == "Q6_K" else nbytes - 16
    words = chunks[..., last * width : (last + 16) * width].unflatten(-1, (4, width, 4))
    assert torch.equal(words, blocks[..., last : last + 16].unflatten(-1, (4, 4)).permute(0, 2, 3, 1, 4))


def test_high_bits_stand_with_their_bytes() -> None:
    data = random_rows("Q5_0", 16, 32)
    out = torch.empty(1, 22 * 16, dtype=torch.uint8)
    to_panels("Q5_0", data, 16, out)
    turned = out[0, 32 : 32 + 64].view(16, 4)
    bits = data[:, 2:6].contiguous().view(torch.int32)
    for element in range(32):
        w, b = divmod(element, 4)
        assert torch.equal((turned[:, b].int() >> w) & 1, (bits[:, 0] >> element) & 1)


def test_formats_without_blocks_have_no_panels() -> None:
    data = quantize("int8", torch.randn(4, 8))
    with pytest.raises(InputError, match="no form in panels"):
        to_panels("int8", data, 16, torch.empty(1, 16 * 12, dtype=torch.uint8))
