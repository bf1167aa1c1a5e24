"""The device code: NF4 to and from 16 or 32 bit, int8 and NF3 to them, products of few rows, updates of many adapters.

Kernels know offsets and masks only; what is cut how is decided in `codes.py` and `products.py`. None uses inline
assembly, so that Triton's interpreter runs every line on a processor. Where a result must have the reference's bits,
the launch forbids fused multiply-add.

Terms: a word is 8 weights: of NF4 4 packed bytes, of int8 8, of NF3 3. `block_shift` and `nested_shift` are base-2
logarithms of the weights of a block and of the scales of a nested block. `WIDE` multiplies in float32: the interpreter
has no product in bfloat16.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "dequantize",
    "lora_expand",
    "lora_shrink",
    "multiply_rows",
    "quantize",
    "quantize_scales",
    "sum_parts",
]


@triton.jit
def _block_scales(
    scales, nested_scales, nested_offset, dynamic_map, block, mask, NESTED: tl.constexpr, nested_shift: tl.constexpr
):
    """float32 scales of the blocks numbered `block`, decoded if they are codes."""
    if NESTED:
        code = tl.load(scales + block, mask=mask, other=0).to(tl.int32)
        nested = tl.load(nested_scales + (block >> nested_shift), mask=mask, other=0.0)
        result = tl.load(dynamic_map + code) * nested + tl.load(nested_offset)
    else:
        result = tl.load(scales + block, mask=mask, other=0.0)
    return result


@triton.jit
def _words(packed, word, byte_count, mask, RAGGED: tl.constexpr):
    """Words as int32. RAGGED: byte by byte, where the last word is short or the first one is not aligned."""
    if RAGGED:
        result = tl.zeros(word.shape, tl.int32)
        for i in tl.static_range(4):
            at = word * 4 + i
            byte = tl.load(packed + at, mask=mask & (at < byte_count), other=0).to(tl.int32)
            result = result | (byte << (8 * i))
    else:
        result = tl.load(packed.to(tl.pointer_type(tl.int32)) + word, mask=mask, other=0)
    return result


@triton.jit
def _three_bytes(packed, word, mask):
    """NF3's words as int32; none is short, since its codes are filled up."""
    result = tl.zeros(word.shape, tl.int32)
    for i in tl.static_range(3):
        result = result | (tl.load(packed + word * 3 + i, mask=mask, other=0).to(tl.int32) << (8 * i))
    return result


@triton.jit
def _level(levels, code):
    """The levels of codes [n], out of a table in shared memory: its 16 entries lie in 16 banks, no two lanes collide.

    4.5 instructions a weight are left with the product and the rounding; a look-up in global memory takes two more
    (64-bit addresses), a tree of selects 15.
    """
    return tl.gather(tl.load(levels + tl.arange(0, 16)), code, 0)


@triton.jit
def dequantize(
    packed,
    scales,
    nested_scales,
    nested_offset,
    levels,
    dynamic_map,
    out,
    first,
    rows,
    width,
    stride,
    byte_count,
    count,
    BLOCK_WORDS: tl.constexpr,
    nested_shift: tl.constexpr,
    NESTED: tl.constexpr,
    RAGGED: tl.constexpr,
    WHOLE: tl.constexpr,
    BITS: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    """Words first + r · stride + c (r < rows, c < width) -> out [rows, 8 · width], of which `count` weights exist.

    A thread stores 8 weights of one word: 16 bytes in 16 bit. WHOLE: a program's rows start and end with a block, so
    that each scale is decoded once.
    """
    column_tiles = tl.cdiv(width, W)
    tile = tl.program_id(0)
    row0 = tile // column_tiles * R
    column0 = tile % column_tiles * W
    index = tl.arange(0, R * W)
    row, column = index // W, index % W
    mask = (row0 + row < rows) & (column0 + column < width)
    origin = first + row0 * stride + column0
    word = origin + row * stride + column
    if WHOLE:
        number = tl.arange(0, R * W // BLOCK_WORDS)
        block_row, block_column = number // (W // BLOCK_WORDS), number % (W // BLOCK_WORDS)
        block = origin // BLOCK_WORDS + block_row * (stride // BLOCK_WORDS) + block_column
        real = (row0 + block_row < rows) & (column0 + block_column * BLOCK_WORDS < width)
        scale = _block_scales(scales, nested_scales, nested_offset, dynamic_map, block, real, NESTED, nested_shift)
        scale = tl.broadcast_to(scale[:, None], (R * W // BLOCK_WORDS, BLOCK_WORDS)).reshape(R * W)
    else:
        block = word // BLOCK_WORDS
        scale = _block_scales(scales, nested_scales, nested_offset, dynamic_map, block, mask, NESTED, nested_shift)
    place = tl.arange(0, 8)
    if BITS == 8:
        at = word[:, None] * 8 + place[None, :]
        code = tl.load(packed + at, mask=mask[:, None] & (at < byte_count), other=0)
        weight = code.to(tl.float32) * tl.div_rn(scale, tl.full(scale.shape, 127.0, tl.float32))[:, None]
    else:
        if BITS == 4:
            value = _words(packed, word, byte_count, mask, RAGGED)
            shift = (place // 2) * 8 + 4 - (place % 2) * 4  # the first weight of a byte is its high half
            code = (value[:, None] >> shift[None, :]) & 15
        else:
            value = _three_bytes(packed, word, mask)
            code = (value[:, None] >> (3 * place)[None, :]) & 7
        weight = _level(levels, code.reshape(R * W * 8)).reshape(R * W, 8) * scale[:, None]
    base = (row0.to(tl.int64) * width + column0) * 8
    offset = (row * width + column)[:, None] * 8 + place[None, :]
    exists = mask[:, None]
    if RAGGED:
        exists = exists & (base + offset < count)
    tl.store(out + base + offset, weight.to(out.dtype.element_ty), mask=exists)


@triton.jit
def _code(value, borders, STEPS: tl.constexpr):
    """How many of the ascending 2^STEPS - 1 borders lie below the value: on a border the lower code, as in NF4."""
    code = tl.zeros(value.shape, tl.int32)
    for i in tl.static_range(STEPS):
        step = 1 << (STEPS - 1 - i)
        border = tl.load(borders + code + (step - 1))
        code += tl.where(border < value, step, 0)
    return code


@triton.jit
def _maximum(value):
    """Largest magnitude of each row. As integers, float32 magnitudes keep their order and a NaN is above all."""
    return tl.max(tl.abs(value).to(tl.int32, bitcast=True), axis=1).to(tl.float32, bitcast=True)


@triton.jit
def _inverse(maximum):
    """1 / maximum, correctly rounded; finite, so that a block of zeros stays zero."""
    return tl.minimum(tl.div_rn(tl.full(maximum.shape, 1.0, tl.float32), maximum), 3.4028234663852886e38)


@triton.jit
def quantize(x, packed, scales, borders, count, BLOCK: tl.constexpr, B: tl.constexpr):
    """B blocks a program: weights [count] -> codes, two a byte, and block maxima. What is over holds level 0."""
    block = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    index = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    exists = index < count
    value = tl.load(x + index, mask=exists, other=0.0).to(tl.float32)
    maximum = _maximum(value)
    tl.store(scales + block, maximum, mask=block * BLOCK < count)
    code = tl.where(exists, _code(value * _inverse(maximum)[:, None], borders, 4), 7)
    high, low = tl.split(tl.reshape(code, (B, BLOCK // 2, 2)))
    half = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    tl.store(packed + half, (high * 16 + low).to(tl.uint8), mask=half * 2 < count)


@triton.jit
def quantize_scales(scales, offset, codes, nested, borders, count, BLOCK: tl.constexpr, B: tl.constexpr):
    """B nested blocks a program: scales [count] less `offset` -> codes of the dynamic map, and block maxima."""
    block = tl.program_id(0) * B + tl.arange(0, B)
    index = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    exists = index < count
    value = tl.where(exists, tl.load(scales + index, mask=exists, other=0.0) - tl.load(offset), 0.0)
    maximum = _maximum(value)
    tl.store(nested + block, maximum, mask=block * BLOCK < count)
    code = _code(value * _inverse(maximum)[:, None], borders, 8)
    tl.store(codes + index, code.to(tl.uint8), mask=exists)


@triton.jit
def _dot(a, b, sums, WIDE: tl.constexpr):
    if WIDE:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def multiply_rows(
    x,
    packed,
    scales,
    nested_scales,
    nested_offset,
    levels,
    dynamic_map,
    y,
    rows,
    n,
    k,
    span,
    y_stride,
    part_stride,
    block_shift: tl.constexpr,
    nested_shift: tl.constexpr,
    NESTED: tl.constexpr,
    ADD: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """x [rows, k] times BN rows of the weight [n, k], over part `program_id(1)` of k -> that part of y [part, rows, n].

    The weight is the left side of the product, decoded in registers. Codes of even and of odd columns are multiplied
    apart, with the even and odd columns of x. BK divides the block, so that a tile has one scale a row; weights are
    rounded to x's type as `dequantize` rounds them.
    """
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    real = row < n
    m = tl.arange(0, BM)
    half, column = tl.arange(0, BK // 2), tl.arange(0, BK)
    start = tl.program_id(1) * span
    stop = tl.minimum(start + span, k)
    codes = packed + row.to(tl.int64)[:, None] * (k // 2) + half[None, :]
    values = x + m[:, None] * k + column[None, :]
    blocks = row.to(tl.int64) * k
    read, inside = real[:, None], (m < rows)[:, None]
    sums = tl.zeros((BN, BM), tl.float32)
    byte = tl.load(codes + start // 2, mask=read, other=0)
    scale = _block_scales(
        scales, nested_scales, nested_offset, dynamic_map, blocks + start >> block_shift, real, NESTED, nested_shift
    )
    value = tl.load(values + start, mask=inside, other=0.0)
    # What the next turn needs is fetched by hand: Triton's own pipeline would take the look-ups through shared memory.
    for at in tl.range(start, stop, BK, num_stages=1):
        ahead = tl.where(at + BK < stop, at + BK, start)
        next_byte = tl.load(codes + ahead // 2, mask=read, other=0)
        next_scale = _block_scales(
            scales, nested_scales, nested_offset, dynamic_map, blocks + ahead >> block_shift, real, NESTED, nested_shift
        )
        next_value = tl.load(values + ahead, mask=inside, other=0.0)
        code = byte.to(tl.int32)
        both = tl.join(code >> 4, code & 15).reshape(BN * BK)
        weight = _level(levels, both).reshape(BN, BK) * scale[:, None]
        high, low = tl.split(weight.to(x.dtype.element_ty).reshape(BN, BK // 2, 2))
        even, odd = tl.split(tl.reshape(value, (BM, BK // 2, 2)))
        sums = _dot(high, tl.trans(even), sums, WIDE)
        sums = _dot(low, tl.trans(odd), sums, WIDE)
        byte, scale, value = next_byte, next_scale, next_value
    target = y + tl.program_id(1) * part_stride + m[None, :] * y_stride + row[:, None]
    mask = real[:, None] & (m[None, :] < rows)
    if ADD:
        sums += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, sums.to(y.dtype.element_ty), mask=mask)


@triton.jit
def sum_parts(parts, y, count, width, y_stride, PARTS: tl.constexpr, ADD: tl.constexpr, B: tl.constexpr):
    """Sum of parts [PARTS, count] in a fixed order -> y, rows of `width` values y_stride apart, rounded once."""
    index = tl.program_id(0) * B + tl.arange(0, B)
    exists = index < count
    target = y + index // width * y_stride + index % width
    total = tl.zeros((B,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * count + index, mask=exists, other=0.0)
    if ADD:
        total += tl.load(target, mask=exists, other=0.0).to(tl.float32)
    tl.store(target, total.to(y.dtype.element_ty), mask=exists)


@triton.jit
def lora_shrink(
    table,
    x,
    parts,
    count,
    k,
    span,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """Rows of x [count, k] of a tile times its adapter's Aᵀ, over a part of k -> parts [part, count, BR].

    `table` int64 [tiles, 6]: addresses of A and B, rank, scale (bits of a float32), first row, rows. ALIGNED: all
    addresses are multiples of 16 and all ranks of 8, so that factors are read 16 bytes at a time.
    """
    entry = table + tl.program_id(0) * 6
    a = tl.load(entry).to(tl.pointer_type(x.dtype.element_ty))
    rank, first, rows = tl.load(entry + 2), tl.load(entry + 4), tl.load(entry + 5)
    if ALIGNED:
        a, rank = tl.multiple_of(a, 16), tl.multiple_of(rank, 8)
    m, r = tl.arange(0, BM), tl.arange(0, BR)
    start = tl.program_id(1) * span
    stop = tl.minimum(start + span, k)
    sums = tl.zeros((BM, BR), tl.float32)
    for at in range(start, stop, BK):
        column = at + tl.arange(0, BK)
        inside = column < stop
        values = tl.load(
            x + (first + m)[:, None] * k + column[None, :], mask=(m < rows)[:, None] & inside[None, :], other=0.0
        )
        factor = tl.load(
            a + r.to(tl.int64)[:, None] * k + column[None, :], mask=(r < rank)[:, None] & inside[None, :], other=0.0
        )
        sums = _dot(values, tl.trans(factor), sums, WIDE)
    target = parts + (tl.program_id(1) * count + first + m)[:, None] * BR + r[None, :]
    tl.store(target, sums, mask=(m < rows)[:, None])


@triton.jit
def lora_expand(
    table,
    parts,
    y,
    count,
    n,
    y_stride,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
):
    """y [count, n], rows y_stride apart, += scale · h Bᵀ for the rows of a tile and BN columns.

    h is the sum of `lora_shrink`'s parts, rounded to y's type. TRANSPOSED: each B lies as [rank, n].
    """
    entry = table + tl.program_id(0) * 6
    b = tl.load(entry + 1).to(tl.pointer_type(y.dtype.element_ty))
    rank, first, rows = tl.load(entry + 2), tl.load(entry + 4), tl.load(entry + 5)
    if ALIGNED:
        b, rank = tl.multiple_of(b, 16), tl.multiple_of(rank, 8)
    scale = tl.load(entry + 3).to(tl.int32).to(tl.float32, bitcast=True)
    m, r = tl.arange(0, BM), tl.arange(0, BR)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    h = tl.zeros((BM, BR), tl.float32)
    for part in tl.static_range(PARTS):
        h += tl.load(parts + (part * count + first + m)[:, None] * BR + r[None, :], mask=(m < rows)[:, None], other=0.0)
    if TRANSPOSED:
        inside = (r < rank)[:, None] & (column < n)[None, :]
        factor = tl.load(b + r.to(tl.int64)[:, None] * n + column[None, :], mask=inside, other=0.0)
    else:
        inside = (column < n)[:, None] & (r < rank)[None, :]
        factor = tl.trans(tl.load(b + column.to(tl.int64)[:, None] * rank + r[None, :], mask=inside, other=0.0))
    sums = tl.zeros((BM, BN), tl.float32)
    sums = _dot(h.to(y.dtype.element_ty), factor, sums, WIDE)
    target = y + (first + m)[:, None] * y_stride + column[None, :]
    mask = (m < rows)[:, None] & (column < n)[None, :]
    result = tl.load(target, mask=mask, other=0.0).to(tl.float32) + sums * scale
    tl.store(target, result.to(y.dtype.element_ty), mask=mask)
