"""Block formats of weights: how the rows of a matrix lie in bytes, and what numbers they stand for.

A row of K elements is cut into blocks, each stored by itself: whole numbers of a few bits, with a scale for each group
of elements and, in some formats, a minimum. An element is ``scale * value - minimum``. Formats in capitals are those of
GGUF files, laid out as in ggml (``ggml-common.h``; the ``gguf`` package decodes them alike). ``int4`` is FlexGen's form
of compression (arXiv 2303.06865, section 4): groups of 64, from the least to the largest element; ``int8`` has one
scale a row.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tilewright.errors import InputError, OptionError

_TINY = 1e-30  # stands for the range of a group whose elements are equal


@dataclass(frozen=True)
class Quants:
    """The parts of decoded rows: element = ``scales * values - minimums``, each scale for ``group`` elements.

    Attributes:
        values: [N, K] int8.
        scales: [N, K / group] fp32.
        minimums: [N, K / group] fp32; None where they are zero by definition.
        group: elements of K that share a scale.
    """

    values: Tensor
    scales: Tensor
    minimums: Tensor | None
    group: int

    def dequantize(self) -> Tensor:
        """The elements, [N, K] fp32."""
        n, k = self.values.shape
        grouped = self.values.view(n, self.scales.shape[1], self.group).float() * self.scales[..., None]
        if self.minimums is not None:
            grouped -= self.minimums[..., None]
        return grouped.view(n, k)


@dataclass(frozen=True)
class BlockFormat:
    """One format.

    Attributes:
        name: as in GGUF files, or ``int4``, ``int8``.
        block: elements of K stored together; 0 for a whole row.
        nbytes: bytes of a block; for a whole row, those beside the elements' own.
        group: elements that share a scale; 0 for a whole row.
        has_minimums: groups have a minimum besides.
        decode: the parts of bytes [N, row bytes]; None for elements that are numbers already.
        dtype: of such elements.
    """

    name: str
    block: int
    nbytes: int
    group: int = 0
    has_minimums: bool = False
    decode: Callable[[Tensor], Quants] | None = None
    dtype: torch.dtype | None = None

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of ``k`` elements.

        Raises:
            InputError: ``k`` is no multiple of the block.
        """
        if self.block == 0:
            return k + self.nbytes
        if k % self.block:
            raise InputError(
                f"a row of {k} elements has no form in {self.name}",
                why=f"its blocks have {self.block} elements",
                hint="store this matrix in a format with a shorter block",
            )
        return k // self.block * self.nbytes

    def columns(self, row_bytes: int) -> int:
        """Elements of a row of so many bytes.

        Raises:
            InputError: no row has that many bytes.
        """
        whole = row_bytes >= self.nbytes if self.block == 0 else row_bytes % self.nbytes == 0
        if not whole:
            raise InputError(
                f"a row of {row_bytes} bytes is not in {self.name}",
                why=f"{'it begins with' if self.block == 0 else 'each block has'} {self.nbytes} bytes",
                hint="look at the format and the shape that came with the data",
            )
        return row_bytes - self.nbytes if self.block == 0 else row_bytes // self.nbytes * self.block


def block_format(name: str) -> BlockFormat:
    """The format of that name.

    Raises:
        OptionError: there is none.
    """
    if name not in FORMATS:
        raise OptionError(f"no block format '{name}'", hint=f"known are {', '.join(FORMATS)}")
    return FORMATS[name]


def unpack(name: str, data: Tensor) -> Quants:
    """The whole numbers, scales and minimums of stored rows.

    Args:
        name: a format of quantized elements.
        data: [N, row bytes] uint8.

    Raises:
        InputError: the data is of another type or size.
        OptionError: no such format, or its elements are numbers already.
    """
    form = block_format(name)
    if form.decode is None:
        raise OptionError(f"elements in {name} have no scales", hint="dequantize reads them")
    _check(form, data)
    return form.decode(data)


def dequantize(name: str, data: Tensor) -> Tensor:
    """The elements of stored rows, [N, K] fp32.

    Args:
        name: any format.
        data: [N, row bytes] uint8.

    Raises:
        InputError: the data is of another type or size.
        OptionError: no such format.
    """
    form = block_format(name)
    if form.dtype is None:
        return unpack(name, data).dequantize()
    _check(form, data)
    shape = (data.shape[0], form.columns(data.shape[1]))
    return data.flatten().view(form.dtype).view(shape).float()


def quantize(name: str, weight: Tensor) -> Tensor:
    """Rows [N, K] in bytes [N, row bytes], each element rounded to the nearest that its group has.

    Args:
        name: ``int4`` or ``int8``, or a format of numbers.
        weight: [N, K], any floating type.

    Raises:
        InputError: K is no multiple of the block.
        OptionError: a format that is only read.
    """
    form = block_format(name)
    form.row_bytes(weight.shape[-1])
    if form.dtype is not None:
        return weight.to(form.dtype).contiguous().view(torch.uint8)
    if name not in _QUANTIZE:
        raise OptionError(f"{name} is only read", hint=f"weights are quantized to {' or '.join(_QUANTIZE)}")
    return _QUANTIZE[name](weight.detach().float())


def _check(form: BlockFormat, data: Tensor) -> None:
    if data.dtype != torch.uint8 or data.ndim != 2:
        shape = ", ".join(map(str, data.shape))
        raise InputError(f"rows in {form.name} must be bytes, two axes", why=f"got {data.dtype} [{shape}]")
    form.columns(data.shape[1])


def _blocks(data: Tensor, nbytes: int) -> Tensor:
    return data.reshape(data.shape[0], data.shape[1] // nbytes, nbytes)


def _half(part: Tensor) -> Tensor:
    """Pairs of bytes as fp16, widened: [.., 2 n] to [.., n]."""
    return part.contiguous().view(torch.float16).float()


def _bits(part: Tensor, width: int, count: int) -> Tensor:
    """Fields of ``width`` bits of each byte, the lowest first: [.., n] to [.., count, n]."""
    shifts = torch.arange(0, count * width, width, dtype=torch.uint8)[:, None]
    return (part[..., None, :] >> shifts) & ((1 << width) - 1)


def _symmetric(values: Tensor, scales: Tensor, group: int) -> Quants:
    return Quants(values.flatten(1), scales.flatten(1), None, group)


def _decode_q4_0(data: Tensor) -> Quants:
    blocks = _blocks(data, 18)
    values = _bits(blocks[..., 2:], 4, 2).to(torch.int8) - 8
    return _symmetric(values, _half(blocks[..., :2]), 32)


def _decode_q5_0(data: Tensor) -> Quants:
    blocks = _blocks(data, 22)
    high = _bits(blocks[..., 2:6], 1, 8).transpose(-1, -2).reshape(*blocks.shape[:2], 2, 16)
    values = (_bits(blocks[..., 6:], 4, 2) | (high << 4)).to(torch.int8) - 16
    return _symmetric(values, _half(blocks[..., :2]), 32)


def _decode_q8_0(data: Tensor) -> Quants:
    blocks = _blocks(data, 34)
    return _symmetric(blocks[..., 2:].view(torch.int8), _half(blocks[..., :2]), 32)


def scales_of_k(part: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minimums of 6 bits of the 8 groups of a block in Q4_K or Q5_K: [.., 12] to twice [.., 8] uint8."""
    scale, least, high = part.reshape(*part.shape[:-1], 3, 4).unbind(-2)
    scales = torch.cat((scale & 63, (high & 15) | ((scale >> 2) & 48)), -1)
    minimums = torch.cat((least & 63, (high >> 4) | ((least >> 2) & 48)), -1)
    return scales, minimums


def _decode_k(blocks: Tensor, values: Tensor) -> Quants:
    scales, minimums = (part.float() for part in scales_of_k(blocks[..., 4:16]))
    scales, minimums = _half(blocks[..., :2]) * scales, _half(blocks[..., 2:4]) * minimums
    return Quants(values.to(torch.int8).flatten(1), scales.flatten(1), minimums.flatten(1), 32)


def _decode_q4_k(data: Tensor) -> Quants:
    blocks = _blocks(data, 144)
    return _decode_k(blocks, _bits(blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32), 4, 2))


def _decode_q5_k(data: Tensor) -> Quants:
    blocks = _blocks(data, 176)
    low = _bits(blocks[..., 48:].reshape(*blocks.shape[:2], 4, 32), 4, 2).flatten(2, 3)
    return _decode_k(blocks, low | (_bits(blocks[..., 16:48], 1, 8) << 4))


def _decode_q6_k(data: Tensor) -> Quants:
    blocks = _blocks(data, 210)
    low = _bits(blocks[..., :128].reshape(*blocks.shape[:2], 2, 64), 4, 2).flatten(3)
    high = _bits(blocks[..., 128:192].reshape(*blocks.shape[:2], 2, 32), 2, 4).flatten(3)
    values = (low.flatten(2) | (high.flatten(2) << 4)).to(torch.int8) - 32
    scales = _half(blocks[..., 208:]) * blocks[..., 192:208].view(torch.int8).float()
    return _symmetric(values, scales, 16)


def _decode_int4(data: Tensor) -> Quants:
    blocks = _blocks(data, 36)
    scale, least = _half(blocks[..., :4]).unbind(-1)
    return Quants(_bits(blocks[..., 4:], 4, 2).to(torch.int8).flatten(1), scale, -least, 64)


def _quantize_int4(weight: Tensor) -> Tensor:
    groups = weight.unflatten(-1, (weight.shape[-1] // 64, 64))
    least, most = groups.aminmax(dim=-1)
    # Rounding is to what is stored: the scale in fp16 reaches at least as far as the exact one, or nearly so.
    least, scale = least.half(), ((most - least.half().float()) / 15).half()
    steps = (groups - least.float()[..., None]) / scale.float().clamp(min=_TINY)[..., None]
    values = steps.round().clamp(0, 15).to(torch.uint8)
    packed = values[..., :32] | (values[..., 32:] << 4)
    return torch.cat((torch.stack((scale, least), -1).view(torch.uint8), packed), -1).flatten(1)


def _decode_int8(data: Tensor) -> Quants:
    scale = data[:, :4].contiguous().view(torch.float32)
    return Quants(data[:, 4:].contiguous().view(torch.int8), scale, None, data.shape[1] - 4)


def _quantize_int8(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(-1, keepdim=True) / 127
    values = (weight / scale.clamp(min=_TINY)).round().to(torch.int8)
    return torch.cat((scale.view(torch.uint8), values.view(torch.uint8)), -1)


FORMATS = {
    form.name: form
    for form in (
        BlockFormat("F32", 1, 4, dtype=torch.float32),
        BlockFormat("F16", 1, 2, dtype=torch.float16),
        BlockFormat("BF16", 1, 2, dtype=torch.bfloat16),
        BlockFormat("Q8_0", 32, 34, 32, decode=_decode_q8_0),
        BlockFormat("Q5_0", 32, 22, 32, decode=_decode_q5_0),
        BlockFormat("Q4_0", 32, 18, 32, decode=_decode_q4_0),
        BlockFormat("Q4_K", 256, 144, 32, True, _decode_q4_k),
        BlockFormat("Q5_K", 256, 176, 32, True, _decode_q5_k),
        BlockFormat("Q6_K", 256, 210, 16, decode=_decode_q6_k),
        BlockFormat("int4", 64, 36, 64, True, _decode_int4),
        BlockFormat("int8", 0, 4, decode=_decode_int8),
    )
}
_QUANTIZE = {"int4": _quantize_int4, "int8": _quantize_int8}
