"""Panels of weights in block formats: the bytes of a file, laid out once so that vectors run over rows.

A panel holds P rows. Along K it is a row of blocks; a block has its head (scales that all its groups share), then its
groups of elements one after another, each with all that is its own: scales, bits above the lowest four, and the lowest
four. Each such field is cut into units of 1, 2 or 4 bytes, and unit u of all P rows lie side by side. So the scales of
16 rows are one load, 4 neighbours along K of 16 rows fill a vector of 64 bytes, and a program reads one contiguous
piece of memory in the order it needs it, a group at a time, with nothing to be kept from one group for the next.

The numbers of a group are words of 4 neighbours. Bits of a byte of a field belong to its place in the word: of word
2 w the lowest four bits are in the lower half of byte 4 w + b, of word 2 w + 1 in its upper half; the bits above, 1 or
2, are those of word w at bit w or 2 w of byte b. A scale of 6 bits has a byte of its own, so Q4_K and Q5_K take 148 and
180 bytes where a file has 144 and 176; all else takes what it took, but for rows of zeros in the last panel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tilewright.errors import InputError
from tilewright.ops.blocks import block_format, scales_of_k, unpack

_STEP_BYTES = 1 << 20  # of rows laid out at a time, so that what passes through memory stays in the caches
_UNITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
Field = tuple[Tensor, int]
"""Bytes [panels, P, blocks, bytes of the field], of a group [panels, P, blocks, groups, bytes], and bytes of a unit."""


@dataclass(frozen=True)
class PanelForm:
    """Sizes of a block in a panel.

    Attributes:
        block: elements of K of a block.
        head: bytes a row in front of the groups.
        group: elements of a group.
        group_bytes: bytes a row of a group.
        offset: what is added to the numbers so that none is below zero.
    """

    block: int
    head: int
    group: int
    group_bytes: int
    offset: int = 0

    @property
    def groups(self) -> int:
        """Groups of a block."""
        return self.block // self.group

    @property
    def nbytes(self) -> int:
        """Bytes a row of a block."""
        return self.head + self.groups * self.group_bytes


_FORMS = {
    "Q8_0": PanelForm(32, 0, 32, 34),
    "Q5_0": PanelForm(32, 0, 32, 22, offset=16),
    "Q4_0": PanelForm(32, 0, 32, 18, offset=8),
    "Q4_K": PanelForm(256, 4, 32, 18),
    "Q5_K": PanelForm(256, 4, 32, 22),
    "Q6_K": PanelForm(256, 2, 16, 13, offset=32),
    "int4": PanelForm(64, 4, 32, 16),
}


def has_panels(name: str) -> bool:
    """Whether a format has a form in panels: those of quantized elements in blocks along K."""
    return name in _FORMS


def panel_form(name: str) -> PanelForm:
    """Sizes of a format's blocks in panels.

    Raises:
        InputError: the format has no panels.
    """
    if name not in _FORMS:
        raise InputError(f"{name} has no form in panels", why="its elements are numbers, or its block is a whole row")
    return _FORMS[name]


def panel_bytes(name: str, shape: tuple[int, int], width: int) -> tuple[int, int]:
    """(number of panels, bytes of one) for data [N, bytes of a row] in panels of ``width`` rows."""
    return -(-shape[0] // width), shape[1] // block_format(name).nbytes * panel_form(name).nbytes * width


def to_panels(name: str, data: Tensor, width: int, out: Tensor) -> None:
    """Lays out rows in panels.

    Args:
        name: a format for which ``has_panels``.
        data: [N, bytes of a row] uint8.
        width: rows of a panel, P, a multiple of 4.
        out: uint8 in the shape of ``panel_bytes``, contiguous; rows beyond N become zeros.

    Raises:
        InputError: the format has no panels.
    """
    form, nbytes = panel_form(name), block_format(name).nbytes
    n, row = data.shape
    step = max(1, _STEP_BYTES // max(1, row * width)) * width
    for first in range(0, n, step):
        rows = data[first : first + step]
        count = -(-rows.shape[0] // width)
        if rows.shape[0] < count * width or not rows.is_contiguous():
            padded = torch.zeros(count * width, row, dtype=torch.uint8)
            padded[: rows.shape[0]] = rows
            rows = padded
        head, groups = _fields(name, form, rows.view(count, width, row // nbytes, nbytes))
        panels = out[first // width : first // width + count].view(count, row // nbytes, form.nbytes * width)
        _place(head, panels[..., : form.head * width], width)
        each = panels[..., form.head * width :].unflatten(-1, (form.groups, form.group_bytes * width))
        _place(groups, each, width)


def _place(fields: list[Field], target: Tensor, width: int) -> None:
    """Fields one after the other into the bytes of a head or a group, units of all rows side by side."""
    offset = 0
    for field, unit in fields:
        size = field.shape[-1] * width
        units = target[..., offset : offset + size].view(_UNITS[unit]).unflatten(-1, (-1, width))
        units.copy_(field.contiguous().view(_UNITS[unit]).movedim(1, -1))
        offset += size


def _fields(name: str, form: PanelForm, blocks: Tensor) -> tuple[list[Field], list[Field]]:
    """Fields of the head and of a group, in order, of rows of blocks [panels, P, blocks, bytes]."""
    if name == "Q8_0":
        return [], [(blocks[..., None, :2], 2), (blocks[..., None, 2:], 4)]
    values = unpack(name, blocks.flatten(0, 1).flatten(1)).values + form.offset
    numbers = values.view(torch.uint8).view(*blocks.shape[:-1], form.groups, form.group)
    low = (_lowest_bits(numbers), 4)
    if name in ("Q4_0", "Q5_0"):
        scale = (blocks[..., None, :2], 2)
        return [], [scale, low] if name == "Q4_0" else [scale, (_upper_bits(numbers), 4), low]
    if name == "Q6_K":
        return [(blocks[..., 208:], 2)], [(blocks[..., 192:208, None], 1), (_upper_bits(numbers), 4), low]
    head = [(blocks[..., :2], 2), (blocks[..., 2:4], 2)]
    if name == "int4":
        return head, [low]
    scales = [(part[..., None], 1) for part in scales_of_k(blocks[..., 4:16])]
    return head, [*scales, low] if name == "Q4_K" else [*scales, (_upper_bits(numbers), 4), low]


def _lowest_bits(numbers: Tensor) -> Tensor:
    """The lowest four bits of numbers [.., K], two a byte: [.., K / 2]."""
    pairs = (numbers & 15).unflatten(-1, (-1, 2, 4))
    return (pairs[..., 0, :] | (pairs[..., 1, :] << 4)).flatten(-2)


def _upper_bits(numbers: Tensor) -> Tensor:
    """The bits above the lowest four of numbers [.., K], 32 or 16 of them, those of all words together: [.., 4]."""
    words = (numbers >> 4).unflatten(-1, (-1, 4))
    shifts = torch.arange(0, 8, 8 // words.shape[-2], dtype=torch.uint8)[:, None]
    return (words << shifts).sum(-2, dtype=torch.uint8)
