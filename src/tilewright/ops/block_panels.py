"""Panels of weights in block formats: the bytes of a file, moved so that vectors run over rows.

A panel holds P rows. For each block along K it has the fields of the block one after the other, each field cut into
units of 2 or 4 bytes, and unit u of all P rows side by side: ``[N / P, K / block, field, u, P, unit]``. So 4 neighbours
along K of 16 rows fill a vector of 64 bytes, scales of 16 rows are one load, and a program reads one contiguous piece
of memory, in the order it needs it. There are as many bytes as before, but for rows of zeros in the last panel.
"""

import torch
from torch import Tensor

from tilewright.errors import InputError
from tilewright.ops.blocks import block_format

# Offset, bytes and bytes of a unit of each field; fields are in the order they have in a block.
_FIELDS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "Q8_0": ((0, 2, 2), (2, 32, 4)),
    "Q5_0": ((0, 2, 2), (2, 4, 4), (6, 16, 4)),
    "Q4_0": ((0, 2, 2), (2, 16, 4)),
    "Q4_K": ((0, 2, 2), (2, 2, 2), (4, 140, 4)),
    "Q5_K": ((0, 2, 2), (2, 2, 2), (4, 172, 4)),
    "Q6_K": ((0, 208, 4), (208, 2, 2)),
    "int4": ((0, 2, 2), (2, 2, 2), (4, 32, 4)),
}
_HIGH_BITS = {"Q5_0": (2, 6)}  # 32 bits, one an element
_STEP_BYTES = 1 << 20  # of rows laid out at a time, so that what passes through memory stays in the caches


def has_panels(name: str) -> bool:
    """Whether a format has a form in panels: those of quantized elements in blocks along K."""
    return name in _FIELDS


def panel_bytes(name: str, shape: tuple[int, int], width: int) -> tuple[int, int]:
    """(number of panels, bytes of one) for data [N, bytes of a row] in panels of ``width`` rows."""
    return -(-shape[0] // width), shape[1] * width


def to_panels(name: str, data: Tensor, width: int, out: Tensor) -> None:
    """Lays out rows in panels.

    Args:
        name: a format for which ``has_panels``.
        data: [N, bytes of a row] uint8.
        width: rows of a panel, P.
        out: [panels, P * bytes of a row] uint8, contiguous; rows beyond N become zeros.

    Raises:
        InputError: the format has no panels.
    """
    if not has_panels(name):
        raise InputError(f"{name} has no form in panels", why="its elements are numbers, or its block is a whole row")
    nbytes = block_format(name).nbytes
    n, row = data.shape
    step = max(1, _STEP_BYTES // max(1, row * width)) * width
    for first in range(0, n, step):
        rows = data[first : first + step]
        count = -(-rows.shape[0] // width)
        if rows.shape[0] < count * width or not rows.is_contiguous():
            padded = torch.zeros(count * width, row, dtype=torch.uint8)
            padded[: rows.shape[0]] = rows
            rows = padded
        blocks = rows.view(count, width, row // nbytes, nbytes)
        panels = out[first // width : first // width + count].view(count, row // nbytes, nbytes * width)
        for offset, size, unit in _FIELDS[name]:
            field = _field(name, blocks, offset, size)
            target = panels[..., offset * width : (offset + size) * width]
            _copy_units(field, target, width, unit)


def _field(name: str, blocks: Tensor, offset: int, size: int) -> Tensor:
    field = blocks[..., offset : offset + size]
    if (offset, offset + size) == _HIGH_BITS.get(name):
        return _turn_bits(field)
    return field


def _copy_units(field: Tensor, target: Tensor, width: int, unit: int) -> None:
    """``field`` [panels, P, blocks, bytes] to ``target`` [panels, blocks, bytes * P]; all offsets are even."""
    halves = target.view(torch.int16).unflatten(-1, (field.shape[-1] // unit, width, unit // 2))
    source = field.view(torch.int16).unflatten(-1, (field.shape[-1] // unit, unit // 2))
    halves.copy_(source.permute(0, 2, 3, 1, 4))


def _turn_bits(field: Tensor) -> Tensor:
    """32 bits in 4 bytes, bit 4 w + b moved to bit w of byte b: then byte b has those of its own neighbours."""
    words = field.contiguous().view(torch.int32)
    turned = torch.zeros_like(words)
    for b in range(4):
        bits = (words >> b) & 0x11111111
        for shift, keep in ((3, 0x03030303), (6, 0x000F000F), (12, 0x000000FF)):
            bits = (bits | (bits >> shift)) & keep
        turned |= bits << (8 * b)
    return turned.view(torch.uint8)
