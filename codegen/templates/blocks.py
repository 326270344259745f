"""Weights in block formats as kernels read them: a row's elements one by one, and panels of rows.

``element_*`` reads single elements where rows lie as in ``tilewright.ops.blocks``. ``unpack_*`` reads a panel of P rows
whose fields lie side by side (``tilewright.ops.block_panels``): numbers 4 * w to 4 * w + 3 of a group are neighbouring
bytes for each row, as products of bytes want them. It returns the numbers [K, P] int8 of one group of a block, and
scales and minimums [1, P]. Panels are read once, front to back, which is what ``evict_first`` says.
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
def stream(ptr):
    return tl.load(ptr, eviction_policy="evict_first")


@triton.jit
def panel_bytes(ptr, words: tl.constexpr, P: tl.constexpr):
    return stream(ptr + tl.arange(0, words)[:, None] * (4 * P) + tl.arange(0, 4 * P)[None, :])


@triton.jit
def as_group(numbers, P: tl.constexpr):
    words: tl.constexpr = numbers.shape[0]
    return numbers.to(tl.int8, bitcast=True).reshape(words, P, 4).permute(0, 2, 1).reshape(words * 4, P)


@triton.jit
def panel_halves(ptr, P: tl.constexpr):
    return stream(ptr.to(tl.pointer_type(tl.float16), bitcast=True) + tl.arange(0, P)[None, :]).to(tl.float32)


@triton.jit
def panel_scales(ptr, P: tl.constexpr):
    return stream(ptr + tl.arange(0, P)[None, :])


@triton.jit
def lowest_bits(ptr, words: tl.constexpr, P: tl.constexpr):
    shifts = (4 * tl.arange(0, 2)).to(tl.uint8)[None, :, None]
    return ((panel_bytes(ptr, words // 2, P)[:, None, :] >> shifts) & 15).reshape(words, 4 * P)


@triton.jit
def upper_bits(ptr, words: tl.constexpr, P: tl.constexpr):
    bits: tl.constexpr = 8 // words
    shifts = (bits * tl.arange(0, words)).to(tl.uint8)[:, None]
    return ((panel_bytes(ptr, 1, P) >> shifts) & ((1 << bits) - 1)) << 4


@triton.jit
def unpack_q4_0(block, group, P: tl.constexpr):
    return as_group(lowest_bits(block + 2 * P, 8, P) - 8, P), panel_halves(block, P), 0.0


@triton.jit
def unpack_q5_0(block, group, P: tl.constexpr):
    numbers = lowest_bits(block + 6 * P, 8, P) | upper_bits(block + 2 * P, 8, P)
    return as_group(numbers - 16, P), panel_halves(block, P), 0.0


@triton.jit
def unpack_q8_0(block, group, P: tl.constexpr):
    return as_group(panel_bytes(block + 2 * P, 8, P), P), panel_halves(block, P), 0.0


@triton.jit
def scale_and_minimum(block, start, P: tl.constexpr):
    scale = panel_halves(block, P) * panel_scales(start, P).to(tl.float32)
    return scale, panel_halves(block + 2 * P, P) * panel_scales(start + P, P).to(tl.float32)


@triton.jit
def unpack_q4_k(block, group, P: tl.constexpr):
    start = block + (4 + 18 * group) * P
    scale, minimum = scale_and_minimum(block, start, P)
    return as_group(lowest_bits(start + 2 * P, 8, P), P), scale, minimum


@triton.jit
def unpack_q5_k(block, group, P: tl.constexpr):
    start = block + (4 + 22 * group) * P
    scale, minimum = scale_and_minimum(block, start, P)
    return as_group(lowest_bits(start + 6 * P, 8, P) | upper_bits(start + 2 * P, 8, P), P), scale, minimum


@triton.jit
def unpack_q6_k(block, group, P: tl.constexpr):
    start = block + (2 + 13 * group) * P
    scale = panel_halves(block, P) * panel_scales(start, P).to(tl.int8, bitcast=True).to(tl.float32)
    return as_group((lowest_bits(start + 5 * P, 4, P) | upper_bits(start + P, 4, P)) - 32, P), scale, 0.0


@triton.jit
def unpack_int4(block, group, P: tl.constexpr):
    numbers = lowest_bits(block + (4 + 16 * group) * P, 8, P)
    return as_group(numbers, P), panel_halves(block, P), -panel_halves(block + 2 * P, P)
