"""usage: pruned_reference.py ESPALIER MODEL TEXT: calibrates a model on a text and checks what
`espalier eval` measures on pruned rungs, with prefill, paged KV and decode steps, against a slow
forward pass in numpy, position by position, that shares no line with the C++.

Losses of prompts that were decoded on two rungs, with other profiles for prefill and decode rows and
an attention block dropped on one of them, agree to 1e-3 nats/token.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

from block_formats import dequantize
from model_formats import read_gguf

PROMPT, DECODE, TOLERANCE = 40, 30, 1e-3


def values(kind, shape, raw):
    if kind == "F32":
        return np.frombuffer(raw, np.float32)[: np.prod(shape)].reshape(shape).astype(np.float64)
    raw = np.frombuffer(raw, np.uint8)
    size = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[kind]
    blocks = raw[: np.prod(shape) // 32 * size].reshape(-1, size)
    return dequantize(kind, blocks).reshape(shape).astype(np.float64)


class Model:
    def __init__(self, model, panels):
        keys, tensors = read_gguf(model)
        self.keys = {key.split(".", 1)[1]: v for key, v in keys.items() if key.startswith("llama.")}
        self.w = {name: values(*tensor) for name, tensor in tensors.items()}
        keys, tensors = read_gguf(panels)
        self.ranking = {
            int(key.rsplit(".", 1)[1]): np.array(v)
            for key, v in keys.items()
            if key.startswith("espalier.ranking.")
        }
        self.refits = {name: values(*tensor) for name, tensor in tensors.items()}

    def norm(self, x, name):
        eps = self.keys["attention.layer_norm_rms_epsilon"]
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * self.w[name]

    def rotate(self, x):
        """[positions, heads, dim]; pairs (2i, 2i + 1), as GGUF files of llamas have them."""
        half = x.shape[-1] // 2
        angles = np.arange(len(x))[:, None] * self.keys["rope.freq_base"] ** (-np.arange(half) / half)
        cos, sin = np.cos(angles)[:, None, :], np.sin(angles)[:, None, :]
        a, b = x[..., 0::2], x[..., 1::2]
        out = np.empty_like(x)
        out[..., 0::2], out[..., 1::2] = a * cos - b * sin, b * cos + a * sin
        return out

    def losses(self, ids, profiles):
        """Of each next token; profiles[position][layer] = (heads, channels) kept, heads all or none."""
        heads, kv_heads = self.keys["attention.head_count"], self.keys["attention.head_count_kv"]
        x, n = self.w["token_embd.weight"][ids], len(ids)
        dim = x.shape[1] // heads
        future = np.triu(np.full((n, n), -np.inf), 1)
        for layer in range(self.keys["block_count"]):
            p = f"blk.{layer}."
            h = self.norm(x, p + "attn_norm.weight")
            q, k, v = ((h @ self.w[f"{p}attn_{part}.weight"].T).reshape(n, -1, dim) for part in "qkv")
            q, k = self.rotate(q), self.rotate(k)
            k, v = (np.repeat(each, heads // kv_heads, axis=1) for each in (k, v))
            scores = np.einsum("qhd,khd->hqk", q, k) / dim**0.5 + future
            e = np.exp(scores - scores.max(axis=-1, keepdims=True))
            attended = np.einsum("hqk,khd->qhd", e / e.sum(axis=-1, keepdims=True), v).reshape(n, -1)
            attends = np.array([profile[layer][0] > 0 for profile in profiles])
            x = x + attends[:, None] * (attended @ self.w[p + "attn_output.weight"].T)
            h = self.norm(x, p + "ffn_norm.weight")
            gate, up = h @ self.w[p + "ffn_gate.weight"].T, h @ self.w[p + "ffn_up.weight"].T
            hidden = gate / (1 + np.exp(-gate)) * up
            for position, profile in enumerate(profiles):
                count = profile[layer][1]
                if count == hidden.shape[1]:
                    x[position] += self.w[p + "ffn_down.weight"] @ hidden[position]
                elif count > 0:
                    kept = hidden[position, self.ranking[layer][:count]]
                    refit = f"blk.{layer}.ffn_down.{count}"
                    x[position] += self.refits[refit + ".weight"] @ kept
                    x[position] += np.ravel(self.refits[refit + ".bias"])
        logits = self.norm(x, "output_norm.weight") @ self.w["token_embd.weight"].T
        most = logits.max(axis=-1)
        total = most + np.log(np.exp(logits - most[:, None]).sum(axis=-1))
        return total[:-1] - logits[np.arange(n - 1), ids[1:]]


def main(espalier, model, text):
    with tempfile.TemporaryDirectory() as folder:
        ladder = pathlib.Path(folder) / "tiny.ladder"

        def run(*arguments):
            command = [espalier, *arguments, "--model", model, "--text", text]
            command += ["--weights", "f32", "--kv", "f32"]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        run("calibrate", "--tokens", "4000", "--dense-layers", "0", "--last-dense-layers", "0",
            "--slope", "0", "--rungs", "0.6,0.7", "--out", str(ladder))  # fmt: skip
        # Its refits, of 64 and 32 channels, under profiles that calibration does not make; rungs of
        # so small a model may be no faster, and then it leaves them out of its ladder.
        ladder.write_text(
            "espalier-ladder 1\nmodel layers=2 heads=4 channels=96\nrung 0 loss=0\n"
            "rung 1 loss=0.1 prefill.channels=96,64 decode.channels=64*2\n"
            "rung 2 loss=0.2 heads=4,0 prefill.channels=64*2 decode.channels=64,32\n"
        )
        whole, attends = (4, 96), 4
        phases = {
            0: ([whole] * 2, [whole] * 2),
            1: ([whole, (attends, 64)], [(attends, 64)] * 2),
            2: ([(attends, 64), (0, 64)], [(attends, 64), (0, 32)]),
        }
        reference = Model(pathlib.Path(model), pathlib.Path(str(ladder) + ".gguf"))
        worst = 0.0
        for mixed in ([], ["--mixed"]):
            report = json.loads(
                run("eval", "--ladder", str(ladder), "--prompt", str(PROMPT), "--decode", str(DECODE),
                    "--count", "6", "--batch", "4", "--json", *mixed)  # fmt: skip
            )
            assert [rung["rung"] for rung in report["rungs"]] == [0, 1, 2], report["rungs"]
            means = [[], [], []]
            for each in report["texts"]:
                ids = np.array(each["tokens"])
                for rung, got in enumerate(each["loss"]):
                    prefill, decode = phases[rung]
                    profiles = [prefill] * PROMPT + [decode] * (len(ids) - PROMPT)
                    want = reference.losses(ids, profiles)[PROMPT:].mean()
                    means[rung].append(want)
                    worst = max(worst, abs(got - want))
                    assert abs(got - want) < TOLERANCE, (rung, mixed, got, want)
            spread = [float(np.mean(m)) for m in means]
            assert max(spread) - min(spread) > 10 * TOLERANCE, f"rungs do not differ: {spread}"
        print(f"losses on three rungs, apart and mixed, are within {worst:.1e} of the reference")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
