"""usage: make_tiny_model.py OUT: random tiny models, and what they answer, from float64.

numpy only, and nothing of the C++: the forward pass below is the other opinion. README.md describes
what is written.
"""

import collections
import dataclasses
import json
import pathlib
import sys

import numpy as np

from block_formats import BYTES, VALUES, dequantize, from_bf16, quantize, to_bf16
from model_formats import gguf_bytes, safetensors_bytes

LAYERS, HIDDEN, HEADS, KV_HEADS, CHANNELS, CONTEXT = 2, 64, 4, 2, 96, 512
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>"]
BOS, EOS, MERGES = 1, 2, 60
VOCABULARY = len(SPECIAL) + 256 + MERGES
ROWS, GREEDY = 24, 32
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Model:
    architecture: str
    seed: int  # of 60 tried, one whose greedy answer is varied and hangs on no near-tie
    types: tuple  # of the quantised file: embedding, matrices of layer 0 and of layer 1
    head_dim: int = HIDDEN // HEADS
    theta: float = 1000000.0
    eps: float = 1e-6
    pre_tokenizer: str = "qwen2"
    qkv_bias: bool = False
    qk_norm: bool = False

    @property
    def name(self):
        return "tiny-" + self.architecture


LLAMA = Model(
    "llama", 41, ("Q8_0", "Q4_0", "Q4_1"), theta=10000.0, eps=1e-5, pre_tokenizer="smollm"
)
QWEN2 = Model("qwen2", 41, ("Q8_0", "Q5_0", "Q5_1"), qkv_bias=True)
QWEN3 = Model("qwen3", 21, ("Q8_0", "Q5_1", "Q5_0"), head_dim=32, qk_norm=True)
IDS_SEED = LLAMA.seed + 1

# For the merges alone.
TEXT = """an espalier is a tree that was trained and pruned to fit the wall that it has the gardener
ties the branches to the wires and cuts what grows out of the plane so that the light reaches every
leaf and the tree bears more fruit on less wood than the one that stands alone in the meadow"""


# --- the tokenizer -------------------------------------------------------------------------------


def byte_characters():
    """GPT-2's alphabet: bytes that print stand for themselves, the others for U+0100 and up."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printing]
    spelled = {b: chr(b) for b in printing}
    spelled.update({b: chr(256 + i) for i, b in enumerate(others)})
    return [spelled[b] for b in range(256)]


def train_merges(alphabet):
    """The most frequent pair, again and again; of equals the one that sorts first."""
    words = collections.Counter(tuple(alphabet[b] for b in (" " + w).encode()) for w in TEXT.split())
    merges = []
    for _ in range(MERGES):
        pairs = collections.Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append((left, right))
        merged = collections.Counter()
        for word, count in words.items():
            symbols = []
            for symbol in word:
                if symbol == right and symbols and symbols[-1] == left:
                    symbols[-1] = left + right
                else:
                    symbols.append(symbol)
            merged[tuple(symbols)] += count
        words = merged
    return merges


# --- the weights ---------------------------------------------------------------------------------


def draw_weights(model):
    """Hugging Face's names and row order. All values are BF16, so every form holds the same."""
    random = np.random.RandomState(model.seed)
    query_width, kv_width = HEADS * model.head_dim, KV_HEADS * model.head_dim

    def draw(*shape, scale, around=0.0):
        values = (around + scale * random.standard_normal(shape)).astype(np.float32)
        return from_bf16(to_bf16(values))

    weights = {"model.embed_tokens.weight": draw(VOCABULARY, HIDDEN, scale=0.5)}
    for layer in range(LAYERS):
        shapes = {
            "self_attn.q_proj": (query_width, HIDDEN),
            "self_attn.k_proj": (kv_width, HIDDEN),
            "self_attn.v_proj": (kv_width, HIDDEN),
            "self_attn.o_proj": (HIDDEN, query_width),
            "mlp.gate_proj": (CHANNELS, HIDDEN),
            "mlp.up_proj": (CHANNELS, HIDDEN),
            "mlp.down_proj": (HIDDEN, CHANNELS),
        }
        prefix = f"model.layers.{layer}."
        for name, shape in shapes.items():
            # Outputs that outweigh the embedding: a tied model would else repeat its last token.
            gain = 3.0 if name.endswith(("o_proj", "down_proj")) else 1.3
            weights[f"{prefix}{name}.weight"] = draw(*shape, scale=gain / shape[1] ** 0.5)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{name}.weight"] = draw(HIDDEN, scale=0.3, around=1.0)
        if model.qkv_bias:
            for part in "qkv":
                bias = draw(shapes[f"self_attn.{part}_proj"][0], scale=0.7)
                weights[f"{prefix}self_attn.{part}_proj.bias"] = bias
        if model.qk_norm:
            for part in "qk":
                norm = draw(model.head_dim, scale=0.3, around=1.0)
                weights[f"{prefix}self_attn.{part}_norm.weight"] = norm
    weights["model.norm.weight"] = draw(HIDDEN, scale=0.3, around=1.0)
    return weights


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def layer_of(name):
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


def gguf_name(name):
    stem, kind = name.rsplit(".", 1)
    layer = layer_of(name)
    if layer is None:
        return f"{GGUF_NAMES[stem]}.{kind}"
    return f"blk.{layer}.{GGUF_NAMES[stem.split('.', 3)[3]]}.{kind}"


def gguf_rows(model, name, value):
    """llama's q and k in GGUF: row i of a head's first half, then row i of its second half."""
    if model is not LLAMA or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return value
    heads = value.reshape(-1, 2, model.head_dim // 2, value.shape[1])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(value.shape)


def quantized_type(model, name):
    layer = layer_of(name)
    return model.types[0 if layer is None else 1 + layer]


# --- the forward pass, float64 -------------------------------------------------------------------


def rotate(x, theta):
    """x: [positions, heads, dim], pairs (i, i + dim / 2)."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None, :], np.sin(angles)[:, None, :]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def forward(model, weights, ids):
    """Logits [ids, VOCABULARY] of every position."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}

    def rms_norm(x, weight):
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + model.eps) * weight

    n = len(ids)
    x = w["model.embed_tokens.weight"][ids]
    future = np.triu(np.full((n, n), -np.inf), 1)
    for layer in range(LAYERS):
        p = f"model.layers.{layer}."
        h = rms_norm(x, w[p + "input_layernorm.weight"])
        q, k, v = (
            (h @ w[f"{p}self_attn.{part}_proj.weight"].T + w.get(f"{p}self_attn.{part}_proj.bias", 0))
            .reshape(n, -1, model.head_dim)
            for part in "qkv"
        )
        if model.qk_norm:
            q = rms_norm(q, w[p + "self_attn.q_norm.weight"])
            k = rms_norm(k, w[p + "self_attn.k_norm.weight"])
        q, k = rotate(q, model.theta), rotate(k, model.theta)
        k, v = (np.repeat(each, HEADS // KV_HEADS, axis=1) for each in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / model.head_dim**0.5 + future
        attended = np.einsum("hqk,khd->qhd", softmax(scores), v).reshape(n, -1)
        x = x + attended @ w[p + "self_attn.o_proj.weight"].T
        h = rms_norm(x, w[p + "post_attention_layernorm.weight"])
        gate = h @ w[p + "mlp.gate_proj.weight"].T
        up = h @ w[p + "mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[p + "mlp.down_proj.weight"].T
    return rms_norm(x, w["model.norm.weight"]) @ w["model.embed_tokens.weight"].T


def greedy(model, weights, prompt):
    ids, margins = list(prompt), []
    for _ in range(GREEDY):
        logits = forward(model, weights, np.array(ids))[-1]
        order = np.argsort(-logits)
        margins.append(round(float(logits[order[0]] - logits[order[1]]), 4))
        ids.append(int(order[0]))
    return ids[len(prompt) :], margins


# --- the files -----------------------------------------------------------------------------------


def write_json(path, value):
    path.write_text(json.dumps(value, indent=None, separators=(",", ":")) + "\n")


def gguf_keys(model, tokens, merges):
    sizes = {
        "block_count": LAYERS,
        "context_length": CONTEXT,
        "embedding_length": HIDDEN,
        "feed_forward_length": CHANNELS,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": model.eps,
        "rope.freq_base": model.theta,
    }
    # As converters write them: qwen2 leaves the heads' dimension to the reader.
    if model is LLAMA:
        sizes |= {"rope.dimension_count": model.head_dim, "vocab_size": VOCABULARY}
    if model is QWEN3:
        sizes |= {"attention.key_length": model.head_dim, "attention.value_length": model.head_dim}
    return {
        "general.architecture": model.architecture,
        "general.name": model.name,
        **{f"{model.architecture}.{key}": value for key, value in sizes.items()},
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": model.pre_tokenizer,
        "tokenizer.ggml.tokens": tokens,
        # <tool_call> is added but not special: matched in plain text too.
        "tokenizer.ggml.token_type": [3, 3, 3, 4] + [1] * (VOCABULARY - 4),
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in merges],
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def gguf_tensors(model, weights):
    """The plain file's tensors, the quantised one's, and the weights that the latter hold."""
    plain, quantized, rounded = {}, {}, {}
    for name, value in weights.items():
        rows = gguf_rows(model, name, value)
        plain[gguf_name(name)] = ("F32", rows.shape, rows.tobytes())
        if value.ndim == 1:
            quantized[gguf_name(name)] = plain[gguf_name(name)]
            rounded[name] = value
            continue
        kind = quantized_type(model, name)
        quantized[gguf_name(name)] = (kind, rows.shape, quantize(kind, rows).tobytes())
        # Blocks run along rows, so moving whole rows does not change what they round to.
        blocks = quantize(kind, value).reshape(-1, BYTES[kind])
        rounded[name] = dequantize(kind, blocks).reshape(value.shape)
        assert value.shape[1] % VALUES[kind] == 0
    return plain, quantized, rounded


def write_folder(folder, weights, tokens, merges):
    """The llama, as Hugging Face's tools write it."""
    folder.mkdir(parents=True, exist_ok=True)
    bf16 = {name: ("BF16", v.shape, to_bf16(v).tobytes()) for name, v in weights.items()}
    (folder / "model.safetensors").write_bytes(safetensors_bytes(bf16))

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "intermediate_size": CHANNELS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": LLAMA.eps,
        "rope_theta": LLAMA.theta,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "torch_dtype": "bfloat16",
    }
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS})
    tokenizer_config = {
        "bos_token": SPECIAL[BOS],
        "eos_token": SPECIAL[EOS],
        "add_bos_token": False,
        "chat_template": TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    plainly = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": text, **plainly, "special": i < 3} for i, text in enumerate(SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {text: i for i, text in enumerate(tokens)},
            "merges": [list(pair) for pair in merges],
        },
    }
    write_json(folder / "tokenizer.json", tokenizer)


def main(out):
    alphabet = byte_characters()
    merges = train_merges(alphabet)
    tokens = SPECIAL + alphabet + [left + right for left, right in merges]
    assert len(set(tokens)) == VOCABULARY
    ids = np.random.RandomState(IDS_SEED).randint(0, VOCABULARY, ROWS)
    expected = {"ids": ids.tolist()}

    def tell_answers(name, model, weights):
        forward(model, weights, ids).astype("<f4").tofile(out / f"{name}.logits.f32")
        answer, margins = greedy(model, weights, ids)
        expected[name] = {"greedy": answer, "margins": margins}

    for model in (LLAMA, QWEN2, QWEN3):
        weights = draw_weights(model)
        keys = gguf_keys(model, tokens, merges)
        plain, quantized, rounded = gguf_tensors(model, weights)
        if model is LLAMA:
            (out / f"{model.name}.gguf").write_bytes(gguf_bytes(keys, plain))
            write_folder(out / model.name, weights, tokens, merges)
            tell_answers(model.name, model, weights)
        name = f"{model.name}-quantized"
        (out / f"{name}.gguf").write_bytes(gguf_bytes(keys, quantized))
        tell_answers(name, model, rounded)
    write_json(out / "expected.json", expected)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
