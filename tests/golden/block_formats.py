"""The quantised formats in numpy, written apart from the C++: the other opinion in the tests.

Every function works on whole arrays of blocks: raw bytes are uint8 [blocks, bytes of a block], values
are float32 [blocks, values of a block].
"""

import numpy as np

# In the order in which make_quant_blocks.py draws them: new ones last.
VALUES = {"F16": 1, "BF16": 1, "Q8_0": 32, "Q4_0": 32, "Q4_1": 32, "Q4_K": 256, "Q6_K": 256}
VALUES |= {"Q5_0": 32, "Q5_1": 32, "Q5_K": 256}
BYTES = {"F16": 2, "BF16": 2, "Q8_0": 34, "Q4_0": 18, "Q4_1": 20, "Q4_K": 144, "Q6_K": 210}
BYTES |= {"Q5_0": 22, "Q5_1": 24, "Q5_K": 176}


def to_bf16(values):
    """uint16 bits of float32 values, rounded to nearest even. No NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits):
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def _half(raw, at):
    """float32 [blocks, 1] of the halfs at byte `at`."""
    return np.ascontiguousarray(raw[:, at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(raw, at, count):
    """Low nibbles of `count` bytes, then their high ones."""
    packed = raw[:, at : at + count]
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _bits(raw, at, count):
    """The bits of `count` bytes, lowest first."""
    return np.unpackbits(raw[:, at : at + count], axis=1, bitorder="little")


def dequantize(kind, raw):
    raw = np.ascontiguousarray(raw, np.uint8)
    f32 = np.float32
    if kind == "F16":
        return _half(raw, 0)
    if kind == "BF16":
        return from_bf16(raw.view(np.uint16))
    if kind == "Q8_0":
        return _half(raw, 0) * raw[:, 2:].view(np.int8).astype(f32)
    if kind == "Q4_0":
        return _half(raw, 0) * (_nibbles(raw, 2, 16).astype(f32) - f32(8))
    if kind == "Q4_1":
        return _half(raw, 0) * _nibbles(raw, 4, 16).astype(f32) + _half(raw, 2)
    if kind == "Q5_0":
        return _half(raw, 0) * ((_nibbles(raw, 6, 16) | _bits(raw, 2, 4) << 4).astype(f32) - f32(16))
    if kind == "Q5_1":
        return _half(raw, 0) * (_nibbles(raw, 8, 16) | _bits(raw, 4, 4) << 4).astype(f32) + _half(raw, 2)
    if kind in ("Q4_K", "Q5_K"):
        s = raw[:, 4:16]
        upper = s >> 6 << 4
        scales = np.concatenate([s[:, 0:4] & 63, s[:, 8:12] & 15 | upper[:, 0:4]], axis=1)
        minima = np.concatenate([s[:, 4:8] & 63, s[:, 8:12] >> 4 | upper[:, 4:8]], axis=1)
        steps = (_half(raw, 0) * scales.astype(f32))[:, :, None]
        offsets = (_half(raw, 2) * minima.astype(f32))[:, :, None]
        packed = raw[:, -128:].reshape(-1, 4, 1, 32)
        q = np.concatenate([packed & 15, packed >> 4], axis=2).reshape(-1, 8, 32)
        if kind == "Q5_K":  # bit r of byte i belongs to value i of run r
            q = q | _bits(raw, 16, 32).reshape(-1, 32, 8).swapaxes(1, 2) << 4
        return (steps * q.astype(f32) - offsets).reshape(-1, 256)
    if kind == "Q6_K":
        low = raw[:, :128].reshape(-1, 2, 1, 2, 32)
        low = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
        shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
        high = raw[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3
        q = (low | high << 4).astype(f32).reshape(-1, 16, 16) - f32(32)
        scales = _half(raw, 208) * raw[:, 192:208].view(np.int8).astype(f32)
        return (scales[:, :, None] * q).reshape(-1, 256)
    raise ValueError(kind)


def quantize(kind, values):
    """Plain nearest-value quantisers; the K types are only read."""
    v = np.ascontiguousarray(values, np.float32).reshape(-1, VALUES[kind])
    if kind == "F16":
        return v.astype(np.float16).view(np.uint8)
    if kind == "BF16":
        return to_bf16(v).view(np.uint8)

    def halfs(x):
        return np.ascontiguousarray(x.astype(np.float16)[:, None]).view(np.uint8)

    def codes(scale, offset, low, high):
        d = scale.astype(np.float16).astype(np.float32)[:, None]
        return np.clip(np.rint((v - offset) / np.where(d == 0, 1, d)), low, high)

    def packed(q):
        q = q.astype(np.uint8) & 15
        return q[:, :16] | q[:, 16:] << 4

    def fifth_bits(q):
        return np.packbits(q.astype(np.uint8) >> 4, axis=1, bitorder="little")

    if kind == "Q8_0":
        d = np.abs(v).max(axis=1) / 127
        return np.concatenate([halfs(d), codes(d, 0, -127, 127).astype(np.int8).view(np.uint8)], axis=1)
    top = {"4": 15, "5": 31}[kind[1]]
    if kind in ("Q4_0", "Q5_0"):  # the value furthest from 0 becomes the code that has no opposite
        half = (top + 1) // 2
        d = np.take_along_axis(v, np.abs(v).argmax(axis=1)[:, None], axis=1)[:, 0] / -half
        q, head = codes(d, 0, -half, half - 1) + half, [halfs(d)]
    elif kind in ("Q4_1", "Q5_1"):
        low = v.min(axis=1)
        d = (v.max(axis=1) - low) / top
        offset = low.astype(np.float16).astype(np.float32)[:, None]
        q, head = codes(d, offset, 0, top), [halfs(d), halfs(low)]
    else:
        raise ValueError(kind)
    if top == 31:
        head.append(fifth_bits(q))
    return np.concatenate([*head, packed(q)], axis=1)
