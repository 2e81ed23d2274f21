"""usage: weight_masks_reference.py ESPALIER MODEL: prunes a made-up model by `espalier prune` and
checks its first layer against Wanda and SparseGPT in numpy, in float64, written from the papers'
formulas: the inputs of all seven matrices by a slow forward pass, the masks column by column. No line
is shared with the C++.

Prints the share of masks that agree. Where both keep a weight, SparseGPT's update of it agrees too.
MODEL lends its tokenizer; the layer is 256 wide with 384 channels, so that columns fill three of
SparseGPT's blocks of 128.
"""

import pathlib
import subprocess
import sys
import tempfile

import numpy as np

from model_formats import gguf_bytes, read_gguf
from pruned_reference import Model, values

HIDDEN, CHANNELS, HEADS, KV_HEADS, BLOCK = 256, 384, 8, 4, 128
WINDOW, WINDOWS = 128, 12
AGREE = {"wanda": 0.9999, "sparsegpt": 0.999}  # rounding turns a mask over, and then its row's rest
MATRICES = {"attn_q": "qkv", "attn_k": "qkv", "attn_v": "qkv", "attn_output": "o", "ffn_gate": "mlp",
            "ffn_up": "mlp", "ffn_down": "down"}


def made_up(lender):
    """A llama of one layer, as GGUF bytes."""
    random = np.random.default_rng(5)
    keys, tensors = read_gguf(lender)
    vocabulary = tensors["token_embd.weight"][1][0]
    for key, value in {"block_count": 1, "embedding_length": HIDDEN, "feed_forward_length": CHANNELS,
                       "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS,
                       "rope.dimension_count": HIDDEN // HEADS}.items():
        keys[f"llama.{key}"] = value
    for gone in ("llama.attention.key_length", "llama.attention.value_length"):
        keys.pop(gone, None)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {"token_embd": (vocabulary, HIDDEN), "output_norm": (HIDDEN,), "blk.0.attn_norm": (HIDDEN,),
              "blk.0.ffn_norm": (HIDDEN,), "blk.0.attn_q": (HIDDEN, HIDDEN), "blk.0.attn_k": (kv, HIDDEN),
              "blk.0.attn_v": (kv, HIDDEN), "blk.0.attn_output": (HIDDEN, HIDDEN),
              "blk.0.ffn_gate": (CHANNELS, HIDDEN), "blk.0.ffn_up": (CHANNELS, HIDDEN),
              "blk.0.ffn_down": (HIDDEN, CHANNELS)}
    made = {}
    for name, shape in shapes.items():
        drawn = random.standard_normal(shape)
        drawn = np.exp(0.5 * drawn) if len(shape) == 1 else drawn / shape[-1] ** 0.5
        made[name + ".weight"] = ("F32", shape, drawn.astype(np.float32).tobytes())
    return gguf_bytes(keys, made)


class Watched(Model):
    """The slow forward pass of pruned_reference.py, which keeps what each matrix met."""

    def __init__(self, model):
        keys, tensors = read_gguf(model)
        self.keys = {key.split(".", 1)[1]: v for key, v in keys.items() if key.startswith("llama.")}
        self.w = {name: values(*tensor) for name, tensor in tensors.items()}

    def inputs(self, ids):
        x, n = self.w["token_embd.weight"][ids], len(ids)
        met = {"qkv": self.norm(x, "blk.0.attn_norm.weight")}
        q, k, v = ((met["qkv"] @ self.w[f"blk.0.attn_{part}.weight"].T).reshape(n, -1, HIDDEN // HEADS)
                   for part in "qkv")
        q, k = self.rotate(q), self.rotate(k)
        k, v = (np.repeat(each, HEADS // KV_HEADS, axis=1) for each in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / (HIDDEN // HEADS) ** 0.5
        e = np.exp(scores - scores.max(axis=-1, keepdims=True)) * np.tril(np.ones((n, n)))
        met["o"] = np.einsum("hqk,khd->qhd", e / e.sum(axis=-1, keepdims=True), v).reshape(n, -1)
        x = x + met["o"] @ self.w["blk.0.attn_output.weight"].T
        met["mlp"] = self.norm(x, "blk.0.ffn_norm.weight")
        gate, up = (met["mlp"] @ self.w[f"blk.0.ffn_{part}.weight"].T for part in ("gate", "up"))
        met["down"] = gate / (1 + np.exp(-gate)) * up
        return met


def least(scores, pattern):
    """Which go, True, along each row: a share of it, or all but N of every M."""
    if ":" in pattern:
        keep, group = map(int, pattern.split(":"))
        grouped = scores.reshape(len(scores), -1, group)
        rank = grouped.argsort(axis=-1, kind="stable").argsort(axis=-1, kind="stable")
        return (rank < group - keep).reshape(scores.shape)
    rank = scores.argsort(axis=-1, kind="stable").argsort(axis=-1, kind="stable")
    return rank < round(float(pattern) * scores.shape[-1])


def wanda(w, x, pattern):
    gone = least(np.abs(w) * np.linalg.norm(x, axis=0), pattern)
    return np.where(gone, 0, w)


def sparsegpt(w, x, pattern):
    w, columns = w.copy(), w.shape[1]
    hessian = 2 * x.T @ x / len(x)
    hessian += 0.01 * np.mean(np.diag(hessian)) * np.eye(columns)
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).T  # upper: H^-1 = U^T U
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        errors = np.zeros((len(w), end - begin))
        if ":" not in pattern:  # one threshold for all rows of the block
            scores = (w[:, begin:end] / np.diag(factor)[begin:end]) ** 2
            gone = least(scores.reshape(1, -1), pattern).reshape(scores.shape)
        else:
            group = int(pattern.split(":")[1])
            gone = np.zeros((len(w), end - begin), bool)
        for j in range(begin, end):
            if ":" in pattern and j % group == 0:
                scores = (w[:, j : j + group] / np.diag(factor)[j : j + group]) ** 2
                gone[:, j - begin : j - begin + group] = least(scores, pattern)
            kept = np.where(gone[:, j - begin], 0, w[:, j])
            errors[:, j - begin] = (w[:, j] - kept) / factor[j, j]
            w[:, j + 1 : end] -= np.outer(errors[:, j - begin], factor[j, j + 1 : end])
            w[:, j] = kept
        w[:, end:] -= errors @ factor[begin:end, end:]
    return w


def main(espalier, lender):
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        model, text, out = folder / "model.gguf", folder / "text", folder / "out.gguf"
        model.write_bytes(made_up(pathlib.Path(lender)))
        random = np.random.default_rng(6)
        text.write_text("".join(chr(c) for c in random.integers(97, 123, WINDOW * WINDOWS * 2)))

        def run(*arguments):
            command = [espalier, *map(str, arguments), "--model", str(model)]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        ids = np.array(list(map(int, run("tokenize", "--ids", "--file", text).split())))
        # As many whole windows as there are, spread evenly, as `--calibration` takes them.
        whole = len(ids) // WINDOW
        assert whole >= WINDOWS, whole
        starts = [i * whole // WINDOWS * WINDOW for i in range(WINDOWS)]
        reference = Watched(model)
        met = [reference.inputs(ids[start : start + WINDOW]) for start in starts]
        inputs = {point: np.concatenate([each[point] for each in met]) for point in met[0]}

        for method, prune in (("wanda", wanda), ("sparsegpt", sparsegpt)):
            for pattern in ("0.5", "2:4", "4:8"):
                run("prune", "--method", method, "--pattern", pattern, "--calibration", text, "--window",
                    WINDOW, "--tokens", WINDOW * WINDOWS, "--weights", "f32", "--store", "f32",
                    "--activations", "dense", "--out", out)  # fmt: skip
                _, tensors = read_gguf(out)
                agree, count, off = 0, 0, 0.0
                for matrix, point in MATRICES.items():
                    ours = values(*tensors[f"blk.0.{matrix}.weight"])
                    dense = reference.w[f"blk.0.{matrix}.weight"]
                    theirs = prune(dense, inputs[point], pattern)
                    same = (ours == 0) == (theirs == 0)
                    agree, count = agree + same.sum(), count + same.size
                    rows = same.all(axis=1)  # the others took another way
                    assert rows.mean() > 0.2, (method, pattern, matrix, rows.mean())
                    off = max(off, np.abs(ours - theirs)[rows].max() / np.abs(dense).max())
                print(f"{method} {pattern}: {100 * agree / count:.3f} % of {count} masks agree with the "
                      f"reference; weights are within {off:.1e} of the largest")
                assert agree / count >= AGREE[method], (method, pattern, agree / count)
                assert off < 1e-3, (method, pattern, off)
        # What would not agree: the same masks from inputs that are another layer's.
        other = prune(reference.w["blk.0.ffn_up.weight"], inputs["qkv"], "2:4")
        ours = sparsegpt(reference.w["blk.0.ffn_up.weight"], inputs["mlp"], "2:4")
        assert ((other == 0) == (ours == 0)).mean() < 0.98


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
