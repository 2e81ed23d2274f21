"""usage: make_quant_blocks.py OUT: random blocks of every format and what they hold, OUT/TYPE.*.bin"""

import pathlib
import sys

import numpy as np

from block_formats import BYTES, VALUES, dequantize

# +-0, the smallest and largest subnormal half, 1, -1, 2.5.
SCALES = [0x0000, 0x8000, 0x0001, 0x03FF, 0x3C00, 0xBC00, 0x4100]
SCALE_OFFSETS = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q4_K": [0, 2], "Q6_K": [208]}
SCALE_OFFSETS |= {"Q5_0": [0], "Q5_1": [0, 2], "Q5_K": [0, 2]}

out = pathlib.Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
random = np.random.RandomState(7)
for kind, size in BYTES.items():
    blocks = 128 if VALUES[kind] == 1 else len(SCALES) + 1
    raw = random.randint(0, 256, (blocks, size)).astype(np.uint8)
    if VALUES[kind] == 1:
        raw[: len(SCALES)] = np.array(SCALES, "<u2")[:, None].view(np.uint8)
        finite = np.isfinite(dequantize(kind, raw))[:, 0]
        raw[~finite, 1] &= 0x3F  # no NaN: its bits are nobody's promise
    for at in SCALE_OFFSETS.get(kind, []):
        raw[: len(SCALES), at : at + 2] = random.permutation(np.array(SCALES, "<u2"))[:, None].view(np.uint8)
        raw[len(SCALES), at : at + 2] = [0x66, 0x2E]  # 0.1: products that need every bit
    (out / f"{kind}.raw.bin").write_bytes(raw.tobytes())
    (out / f"{kind}.f32.bin").write_bytes(dequantize(kind, raw).astype("<f4").tobytes())
