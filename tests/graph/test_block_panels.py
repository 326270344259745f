"""Panels of rows in block formats: every bit of a row is where a kernel looks for it."""

import pytest
import torch
from tests.graph.test_block_formats import random_rows

from tilewright.errors import InputError
from tilewright.ops.block_panels import has_panels, panel_bytes, panel_form, to_panels
from tilewright.ops.blocks import FORMATS, quantize, scales_of_k, unpack

PANELS = [name for name in FORMATS if has_panels(name)]
# Of a group: (bytes a row in front of the upper bits, bytes of these); the lowest four bits end the group.
UPPER = {"Q5_0": (2, 4), "Q5_K": (2, 4), "Q6_K": (1, 4)}


def laid_out(name: str, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows padded to whole panels; heads [panels, blocks, P * bytes]; groups [panels, blocks, groups, P * bytes]."""
    data, form = random_rows(name, rows, 512), panel_form(name)
    out = torch.full(panel_bytes(name, tuple(data.shape), width), 7, dtype=torch.uint8)
    to_panels(name, data, width, out)
    padded = torch.zeros(out.shape[0] * width, data.shape[1], dtype=torch.uint8)
    padded[:rows] = data
    blocks = out.view(out.shape[0], 512 // form.block, form.nbytes * width)
    head, groups = blocks.split([form.head * width, form.groups * form.group_bytes * width], -1)
    return padded, head, groups.unflatten(-1, (form.groups, form.group_bytes * width))


@pytest.mark.parametrize("rows", [1, 64, 70])
@pytest.mark.parametrize("name", PANELS)
def test_numbers_are_words_of_neighbours(name: str, rows: int) -> None:
    width, form = 32, panel_form(name)
    padded, _, groups = laid_out(name, rows, width)
    want = (unpack(name, padded).values.int() + form.offset).view(-1, width, 512 // form.block, form.groups, form.group)
    low = groups[..., -(form.group if name == "Q8_0" else form.group // 2) * width :].int()
    for element in range(form.group):
        word, byte = divmod(element, 4)
        for p in (0, width - 1):
            if name == "Q8_0":
                found = low[..., (word * width + p) * 4 + byte]
                assert torch.equal(found, want[:, p, ..., element] & 255)
                continue
            found = (low[..., (word // 2 * width + p) * 4 + byte] >> (4 * (word % 2))) & 15
            if name in UPPER:
                start, size = UPPER[name]
                bits = 32 // form.group
                above = groups[..., start * width : (start + size) * width][..., p * 4 + byte].int()
                found = found | (((above >> (bits * word)) & ((1 << bits) - 1)) << 4)
            assert torch.equal(found, want[:, p, ..., element])


@pytest.mark.parametrize("name", PANELS)
def test_scales_of_all_rows_lie_side_by_side(name: str) -> None:
    width = 16
    padded, head, groups = laid_out(name, 20, width)
    blocks = padded.view(-1, width, 512 // FORMATS[name].block, FORMATS[name].nbytes).transpose(1, 2)
    if name in ("Q8_0", "Q5_0", "Q4_0"):
        assert torch.equal(groups[:, :, 0, : 2 * width], blocks[..., :2].flatten(2))
        return
    halves = [(208, 210)] if name == "Q6_K" else [(0, 2), (2, 4)]
    assert torch.equal(head, torch.cat([blocks[..., first:last].flatten(2) for first, last in halves], -1))
    if name == "Q6_K":
        assert torch.equal(groups[..., :width], blocks[..., 192:208].transpose(2, 3))
    elif name != "int4":
        for place, part in enumerate(scales_of_k(blocks[..., 4:16])):
            assert torch.equal(groups[..., place * width : (place + 1) * width], part.transpose(2, 3))


def test_panels_take_about_the_bytes_of_the_file() -> None:
    for name in PANELS:
        form = FORMATS[name]
        stored = (64, form.row_bytes(512))
        assert stored[0] * stored[1] <= panel_bytes(name, stored, 64)[1] <= 1.03 * stored[0] * stored[1]


def test_formats_without_blocks_have_no_panels() -> None:
    data = quantize("int8", torch.randn(4, 8))
    with pytest.raises(InputError, match="no form in panels"):
        to_panels("int8", data, 16, torch.empty(1, 16 * 12, dtype=torch.uint8))
