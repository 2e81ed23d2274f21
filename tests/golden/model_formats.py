"""Writers of GGUF v3 and safetensors, as small as their formats allow."""

import json
import struct

TYPE_IDS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "BF16": 30}
ALIGNMENT = 32


def _string(text):
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value):
    """Type number and bytes; ints are uint32 alone and int32 in lists, as converters write them."""
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return 4, struct.pack("<I", value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str):
        return 8, _string(value)
    count = struct.pack("<Q", len(value))
    if isinstance(value[0], str):
        return 9, struct.pack("<I", 8) + count + b"".join(map(_string, value))
    return 9, struct.pack("<I", 5) + count + struct.pack(f"<{len(value)}i", *value)


def _padded(raw):
    return raw + bytes(-len(raw) % ALIGNMENT)


def gguf_bytes(keys, tensors):
    """`tensors`: name -> (type, shape as numpy has it, raw bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    for key, value in keys.items():
        kind, raw = _value(value)
        head += _string(key) + struct.pack("<I", kind) + raw
    offset = 0
    for name, (kind, shape, raw) in tensors.items():
        dims = shape[::-1]  # fastest first
        head += _string(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        head += struct.pack("<IQ", TYPE_IDS[kind], offset)
        offset += len(_padded(raw))
    return _padded(head) + b"".join(_padded(raw) for _, _, raw in tensors.values())


def safetensors_bytes(tensors):
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, (kind, shape, raw) in tensors.items():
        end = offset + len(raw)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(raw for _, _, raw in tensors.values())


def _read(raw, at, kind):
    """A metadata value and where it ends."""
    if kind == 8:
        (size,) = struct.unpack_from("<Q", raw, at)
        return bytes(raw[at + 8 : at + 8 + size]).decode(), at + 8 + size
    if kind == 9:
        element, count = struct.unpack_from("<IQ", raw, at)
        values, at = [], at + 12
        for _ in range(count):
            value, at = _read(raw, at, element)
            values.append(value)
        return values, at
    form = "<" + {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}[kind]
    (value,) = struct.unpack_from(form, raw, at)
    return value, at + struct.calcsize(form)


def read_gguf(path):
    """Keys, and tensors as name -> (type, shape as numpy has it, raw bytes)."""
    raw = memoryview(path.read_bytes())
    magic, version, tensor_count, key_count = struct.unpack_from("<4sIQQ", raw, 0)
    assert magic == b"GGUF" and version == 3, path
    at, keys, heads = 24, {}, []
    for _ in range(key_count):
        key, at = _read(raw, at, 8)
        (kind,) = struct.unpack_from("<I", raw, at)
        keys[key], at = _read(raw, at + 4, kind)
    for _ in range(tensor_count):
        name, at = _read(raw, at, 8)
        (rank,) = struct.unpack_from("<I", raw, at)
        *dims, kind, offset = struct.unpack_from(f"<{rank}QIQ", raw, at + 4)
        at += 4 + 8 * rank + 12
        heads.append((name, dims[::-1], kind, offset))
    data = -(-at // ALIGNMENT) * ALIGNMENT
    names = {number: name for name, number in TYPE_IDS.items()}
    ends = sorted(offset for *_, offset in heads) + [len(raw) - data]
    return keys, {
        name: (names[kind], shape, raw[data + offset : data + ends[ends.index(offset) + 1]])
        for name, shape, kind, offset in heads
    }
