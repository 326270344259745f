"""Weights in block formats as kernels read them: a row's elements one by one, and panels of rows.

``element_*`` reads single elements where rows lie as in ``tilewright.ops.blocks``. ``unpack_*`` reads a panel of P rows
whose fields lie side by side (``tilewright.ops.block_panels``): numbers 4 * w to 4 * w + 3 of a group are neighbouring
bytes for each row, as products of bytes want them. A block is read in
turns; the number of a group is that in its turn. It returns the group's numbers [K, P] int8, and scales and minimums
[1, P]. Only what all lanes share decides anything, so no branch is left in a kernel.
"""

import triton
import triton.language as tl


@triton.jit
def load_half(ptr, mask):
    return tl.load(ptr.to(tl.pointer_type(tl.float16), bitcast=True), mask=mask, other=0).to(tl.float32)


@triton.jit
def scale_of_k(ptr, group, mask):
    # 6 bits: of the first four groups in bytes of their own, of the others 4 bits in bytes 8 to 11 and 2 above.
    low = tl.load(ptr + group, mask=mask, other=0).to(tl.int32)
    shared = tl.load(ptr + 4 + group, mask=mask, other=0).to(tl.int32)
    above = tl.load(ptr + tl.where(group < 4, group, group - 4), mask=mask, other=0).to(tl.int32)
    return tl.where(group < 4, low & 63, (shared & 15) | ((above >> 2) & 48))


@triton.jit
def minimum_of_k(ptr, group, mask):
    least = tl.load(ptr + 4 + group, mask=mask, other=0).to(tl.int32)
    above = tl.load(ptr + tl.where(group < 4, group + 4, group), mask=mask, other=0).to(tl.int32)
    return tl.where(group < 4, least & 63, (least >> 4) | ((above >> 2) & 48))


@triton.jit
def element_q4_0(row, k, mask):
    block = row + k // 32 * 18
    packed = tl.load(block + 2 + k % 16, mask=mask, other=0).to(tl.int32)
    return load_half(block, mask) * (((packed >> (k % 32 // 16 * 4)) & 15) - 8)


@triton.jit
def element_q5_0(row, k, mask):
    block = row + k // 32 * 22
    packed = tl.load(block + 6 + k % 16, mask=mask, other=0).to(tl.int32)
    high = tl.load(block + 2 + k % 32 // 8, mask=mask, other=0).to(tl.int32) >> (k % 8)
    return load_half(block, mask) * ((((packed >> (k % 32 // 16 * 4)) & 15) | ((high & 1) << 4)) - 16)


@triton.jit
def element_q8_0(row, k, mask):
    block = row + k // 32 * 34
    return load_half(block, mask) * tl.load(block + 2 + k % 32, mask=mask, other=0).to(tl.int8, bitcast=True)


@triton.jit
def element_q4_k(row, k, mask):
    block, group = row + k // 256 * 144, k % 256 // 32
    packed = tl.load(block + 16 + group // 2 * 32 + k % 32, mask=mask, other=0).to(tl.int32)
    scale = load_half(block, mask) * scale_of_k(block + 4, group, mask)
    return scale * ((packed >> (group % 2 * 4)) & 15) - load_half(block + 2, mask) * minimum_of_k(
        block + 4, group, mask
    )


@triton.jit
def element_q5_k(row, k, mask):
    block, group = row + k // 256 * 176, k % 256 // 32
    packed = tl.load(block + 48 + group // 2 * 32 + k % 32, mask=mask, other=0).to(tl.int32)
    high = (tl.load(block + 16 + k % 32, mask=mask, other=0).to(tl.int32) >> group) & 1
    scale = load_half(block, mask) * scale_of_k(block + 4, group, mask)
    number = ((packed >> (group % 2 * 4)) & 15) | (high << 4)
    return scale * number - load_half(block + 2, mask) * minimum_of_k(block + 4, group, mask)


@triton.jit
def element_q6_k(row, k, mask):
    block, half, part = row + k // 256 * 210, k % 256 // 128, k % 128 // 32
    packed = tl.load(block + half * 64 + k % 64, mask=mask, other=0).to(tl.int32)
    high = tl.load(block + 128 + half * 32 + k % 32, mask=mask, other=0).to(tl.int32)
    number = ((packed >> (part // 2 * 4)) & 15) | (((high >> (part * 2)) & 3) << 4)
    scale = tl.load(block + 192 + k % 256 // 16, mask=mask, other=0).to(tl.int8, bitcast=True)
    return load_half(block + 208, mask) * scale * (number - 32)


@triton.jit
def element_int4(row, k, mask):
    block = row + k // 64 * 36
    packed = tl.load(block + 4 + k % 32, mask=mask, other=0).to(tl.int32)
    return load_half(block, mask) * ((packed >> (k % 64 // 32 * 4)) & 15) + load_half(block + 2, mask)


@triton.jit
def element_int8(row, k, mask):
    first = row + 0 * k
    scale = tl.load(first.to(tl.pointer_type(tl.float32), bitcast=True), mask=mask, other=0)
    return scale * tl.load(row + 4 + k, mask=mask, other=0).to(tl.int8, bitcast=True)


@triton.jit
def load_bytes(ptr, words: tl.constexpr, P: tl.constexpr):
    return tl.load(ptr + tl.arange(0, words)[:, None] * (4 * P) + tl.arange(0, 4 * P)[None, :])


@triton.jit
def as_group(numbers, P: tl.constexpr):
    words: tl.constexpr = numbers.shape[0]
    return numbers.to(tl.int8, bitcast=True).reshape(words, P, 4).permute(0, 2, 1).reshape(words * 4, P)


@triton.jit
def panel_halves(ptr, P: tl.constexpr):
    halves = ptr.to(tl.pointer_type(tl.float16), bitcast=True)
    return tl.load(halves + tl.arange(0, P)[None, :]).to(tl.float32)


@triton.jit
def panel_words(ptr, P: tl.constexpr):
    return tl.load(ptr.to(tl.pointer_type(tl.int32), bitcast=True) + tl.arange(0, P)[None, :])


@triton.jit
def unpack_q4_0(block, turn, group: tl.constexpr, P: tl.constexpr):
    packed = load_bytes(block + 2 * P, 4, P)[None, :, :] >> (4 * tl.arange(0, 2)).to(tl.uint8)[:, None, None]
    return as_group(((packed & 15) - 8).reshape(8, 4 * P), P), panel_halves(block, P), 0.0


@triton.jit
def unpack_q5_0(block, turn, group: tl.constexpr, P: tl.constexpr):
    packed = load_bytes(block + 6 * P, 4, P)[None, :, :] >> (4 * tl.arange(0, 2)).to(tl.uint8)[:, None, None]
    high = load_bytes(block + 2 * P, 1, P) >> tl.arange(0, 8).to(tl.uint8)[:, None]
    numbers = (packed & 15).reshape(8, 4 * P) | ((high & 1) << 4)
    return as_group(numbers - 16, P), panel_halves(block, P), 0.0


@triton.jit
def unpack_q8_0(block, turn, group: tl.constexpr, P: tl.constexpr):
    return as_group(load_bytes(block + 2 * P, 8, P), P), panel_halves(block, P), 0.0


@triton.jit
def panel_scales_k(block, group, P: tl.constexpr):
    shift = 8 * (group % 4)
    low, least = panel_words(block + 4 * P, P) >> shift, panel_words(block + 8 * P, P) >> shift
    shared = panel_words(block + 12 * P, P) >> shift
    low = tl.where(group < 4, low, (shared & 15) | ((low >> 2) & 48))
    least = tl.where(group < 4, least, ((shared >> 4) & 15) | ((least >> 2) & 48))
    scale = panel_halves(block, P) * (low & 63).to(tl.float32)
    return scale, panel_halves(block + 2 * P, P) * (least & 63).to(tl.float32)


@triton.jit
def unpack_q4_k(block, turn, group: tl.constexpr, P: tl.constexpr):
    packed = load_bytes(block + (16 + turn * 32) * P, 8, P)
    scale, minimum = panel_scales_k(block, 2 * turn + group, P)
    return as_group((packed >> (4 * group)) & 15, P), scale, minimum


@triton.jit
def unpack_q5_k(block, turn, group: tl.constexpr, P: tl.constexpr):
    packed = load_bytes(block + (48 + turn * 32) * P, 8, P)
    high = load_bytes(block + 16 * P, 8, P) >> (2 * turn).to(tl.uint8)
    scale, minimum = panel_scales_k(block, 2 * turn + group, P)
    return as_group(((packed >> (4 * group)) & 15) | (((high >> group) & 1) << 4), P), scale, minimum


@triton.jit
def unpack_q6_k(block, turn, group: tl.constexpr, P: tl.constexpr):
    part: tl.constexpr = group // 2
    packed = load_bytes(block + (turn * 64 + part % 2 * 32 + group % 2 * 16) * P, 4, P)
    high = load_bytes(block + (128 + turn * 32 + group % 2 * 16) * P, 4, P)
    numbers = ((packed >> (part // 2 * 4)) & 15) | (((high >> (part * 2)) & 3) << 4)
    scale = (panel_words(block + (192 + turn * 8 + group // 4 * 4) * P, P) << (24 - 8 * (group % 4))) >> 24
    return as_group(numbers - 32, P), panel_halves(block + 208 * P, P) * scale.to(tl.float32), 0.0


@triton.jit
def unpack_int4(block, turn, group: tl.constexpr, P: tl.constexpr):
    packed = load_bytes(block + 4 * P, 8, P)
    return as_group((packed >> (4 * group)) & 15, P), panel_halves(block, P), -panel_halves(block + 2 * P, P)
