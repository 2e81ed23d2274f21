#!/usr/bin/env python3
"""usage: make_seeds.py OUT: small right inputs to start the fuzzers from, in OUT/TARGET/.

Made from the data of the other tests and from models a few numbers wide: the less of a file is
weights, the more of its changes say something.
"""

import json
import pathlib
import struct
import sys

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path += [str(TESTS / "golden"), str(TESTS / "engine/chat")]

import written_templates
from model_formats import gguf_bytes, safetensors_bytes

HIDDEN, KV_WIDTH, CHANNELS = 8, 4, 4
TOKENS = ["t", "h", "th", "e", "the", "<|im_start|>", "<|im_end|>", "<added>"]
MERGES = ["t h", "th e"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"

GGUF_KEYS = {
    "general.architecture": "llama",
    "general.name": "seed",
    "llama.block_count": 1,
    "llama.context_length": 128,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": CHANNELS,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "llama.rope.dimension_count": 4,
    "llama.vocab_size": len(TOKENS),
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [1, 1, 1, 1, 1, 3, 3, 4],
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 5,
    "tokenizer.ggml.eos_token_id": 6,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": TEMPLATE,
}
SHAPES = {
    "token_embd": (len(TOKENS), HIDDEN),
    "output_norm": (HIDDEN,),
    "blk.0.attn_norm": (HIDDEN,),
    "blk.0.attn_q": (HIDDEN, HIDDEN),
    "blk.0.attn_k": (KV_WIDTH, HIDDEN),
    "blk.0.attn_v": (KV_WIDTH, HIDDEN),
    "blk.0.attn_output": (HIDDEN, HIDDEN),
    "blk.0.ffn_norm": (HIDDEN,),
    "blk.0.ffn_gate": (CHANNELS, HIDDEN),
    "blk.0.ffn_up": (CHANNELS, HIDDEN),
    "blk.0.ffn_down": (HIDDEN, CHANNELS),
}
QWEN2_SHAPES = {"blk.0.attn_q.bias": (HIDDEN,), "blk.0.attn_k.bias": (KV_WIDTH,),
                "blk.0.attn_v.bias": (KV_WIDTH,)}
QWEN3_SHAPES = {"blk.0.attn_q_norm.weight": (4,), "blk.0.attn_k_norm.weight": (4,)}
BLOCK_BYTES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24}  # of 32 values

CONFIG = {
    "model_type": "llama", "num_hidden_layers": 2, "max_position_embeddings": 128,
    "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "rope_scaling": None, "vocab_size": 260, "tie_word_embeddings": True, "hidden_act": "silu",
    "bos_token_id": 257, "eos_token_id": [258, 256],
}  # of the model in tests/support/model_writer.cc
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

QWEN2_REGEX = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
SPLIT = {"type": "Split", "pattern": {"Regex": QWEN2_REGEX}, "behavior": "Isolated",
         "invert": False}
PIPELINES = {  # name: normalizer, pre-tokenizer
    "gpt2": (None, BYTE_LEVEL),
    "smollm": (None, {"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]}),
    "qwen2": ({"type": "NFC"}, {"type": "Sequence", "pretokenizers": [
        SPLIT, {**BYTE_LEVEL, "use_regex": False}]}),
}

# Fields of the same: a length-delimited one is its number * 8 + 2, its length, its bytes.
MESSAGES = [
    b"",
    b"\x0a\x04tiny\x12\x01a\x1a\x05hello\x30\x01",  # model, request_id, text, parse_special
    b"\x22\x0c\x0a\x0a\x0a\x04user\x12\x02hi",  # chat of one message
    b"\x22\x09\x0a\x07\x0a\x04user\x12\xff",  # which ends too early
    b"\x2a\x05\x0a\x03\x01\x02\x03\x42\x05\x1a\x03a\xffb",  # token_ids; a stop that is no UTF-8
]

LADDERS = [
    "espalier-ladder 1\nmodel layers=2 heads=3 channels=64\nrung 0\n",
    "espalier-ladder 1\n# by hand\n\nmodel layers=4 heads=3 channels=128\n"
    "rung 0 loss=0 prefill_us=480.5 decode_us=3300 kv_bytes=11520\n"
    "rung 1 loss=0.05 channels=128*1,96*3\n"
    "rung 2 loss=3e-1 heads=3,0*1,3*2 prefill.channels=128,96*3 decode.channels=96,64*3\n",
]

POLICIES = [
    "bespalier-blocks 1\n# found\nmodel layers=4\norder tokens=512 a3 m0 a1\norder tokens=4096\n",
    "cespalier-costs 1\nattended 0.5\nrung 0 fixed=4800 decode=635.5 prefill=4e2\n"
    "rung 1 fixed=1 decode=0 prefill=3\n",
    "tcall 0.5 10 20 -1\nmemory 1 0.25 # taken\n\ncall 0 1 1\n",
]

REQUESTS = [
    'model: "tiny" request_id: "a" text: "hello <|im_end|>" parse_special: true priority: -1 '
    'sampling { temperature: 0.5 top_k: 40 top_p: 0.9 min_p: 0.1 repetition_penalty: 1.1 '
    'presence_penalty: -1 frequency_penalty: 2 logit_bias { key: 5 value: -100 } seed: 7 } '
    'stop { max_tokens: 5 min_tokens: 1 stop: "x" stop_token_ids: 2 ignore_eos: true } '
    'logprobs { enabled: true top: 3 } prune { max_prune_ratio: 0.5 max_quality_loss: 1 }',
    'chat { messages { role: "user" content: "hi <|im_start|>" } messages { role: "x" } }',
    'token_ids { ids: [1, 2, 3] } stop { min_tokens: 60 }',
    'text: "th" top: 20 prune { never: true }',
    'token_ids { ids: 319 } top: 1',
    'token_ids: [1, 319] skip_special: true',
]


def f32(shape):
    count = 1
    for size in shape:
        count *= size
    return "F32", shape, struct.pack(f"<{count}f", *(i / 64 for i in range(count)))


def ggufs():
    tensors = {f"{name}.weight": f32(shape) for name, shape in SHAPES.items()}
    yield "model", gguf_bytes(GGUF_KEYS, tensors)
    untied = {**tensors, "output.weight": f32(SHAPES["token_embd"])}
    yield "untied", gguf_bytes({**GGUF_KEYS, "llama.attention.key_length": 4,
                                "llama.rope.scaling.type": "none"}, untied)
    for architecture, shapes in [("qwen2", QWEN2_SHAPES), ("qwen3", QWEN3_SHAPES)]:
        keys = {key.replace("llama.", architecture + "."): v for key, v in GGUF_KEYS.items()}
        keys.update({"general.architecture": architecture, "tokenizer.ggml.pre": "qwen2",
                     f"{architecture}.attention.key_length": 4})
        more = {name: f32(shape) for name, shape in shapes.items()}
        yield architecture, gguf_bytes(keys, {**tensors, **more})
    blocks = {kind: (kind, (2, 32), bytes(range(2 * size))) for kind, size in BLOCK_BYTES.items()}
    yield "blocks", gguf_bytes({"general.alignment": 32}, blocks)


def tokenizers():
    for name, (normalizer, pre) in PIPELINES.items():
        yield name, {
            "added_tokens": [{"id": 6, "content": "<|im_end|>", "special": True, "lstrip": False},
                             {"id": 7, "content": "<added>", "special": False}],
            "normalizer": normalizer, "pre_tokenizer": pre, "post_processor": None,
            "model": {"type": "BPE", "dropout": None, "byte_fallback": False,
                      "vocab": {text: i for i, text in enumerate(TOKENS[:6])},
                      "merges": MERGES if name == "gpt2" else [m.split(" ") for m in MERGES]}}


def seeds():
    """Yields (target, name, bytes)."""
    for name, raw in ggufs():
        yield "gguf", name, raw

    tensors = {"model.norm.weight": f32((4,)), "lm_head.weight": f32((3, 2)),
               "half": ("F16", (2, 2), bytes(8)), "brain": ("BF16", (1,), bytes(2))}
    yield "safetensors", "four", safetensors_bytes(tensors)
    yield "safetensors", "one", safetensors_bytes({"a": f32((1, 1))})

    def folder(letter, name, content):
        return "hf_folder", f"{letter}_{name}", letter.encode() + json.dumps(content).encode()
    yield folder("c", "plain", CONFIG)
    yield folder("c", "llama3", {**CONFIG, "rope_scaling": LLAMA3_ROPE})
    yield folder("c", "parameters", {**CONFIG, "rope_parameters": {"rope_type": "default",
                                                                   "rope_theta": 5e5}})
    yield folder("g", "list", {"eos_token_id": [258, 256]})
    yield folder("g", "one", {"eos_token_id": 258})
    yield folder("t", "template", {"bos_token": "<|im_start|>", "add_bos_token": True,
                                   "eos_token": {"content": "<|im_end|>"},
                                   "chat_template": TEMPLATE})
    yield folder("t", "templates", {"chat_template": [{"name": "default", "template": TEMPLATE}]})
    yield folder("i", "shard", {"weight_map": {"model.norm.weight": "model.safetensors"}})

    for name, tokenizer in tokenizers():
        yield "hf_tokenizer", name, json.dumps(tokenizer, ensure_ascii=False).encode()

    with open(TESTS / "engine/text/data/vectors.jsonl", encoding="utf-8") as vectors:
        for i, line in enumerate(vectors):
            text = json.loads(line).get("text", "")
            if 0 < len(text) < 200:
                yield "text", str(i), bytes([i % 3 | (i & 8) << 4]) + text.encode(errors="replace")

    templates = [template for template, _ in written_templates.TEMPLATES]
    for i, template in enumerate([TEMPLATE, *templates]):
        yield "chat_template", str(i), template.encode() + b"\0Hi <|im_end|>\n"

    for i, ladder in enumerate(LADDERS):
        yield "ladder", str(i), ladder.encode()

    for i, text in enumerate(POLICIES):
        yield "policy", str(i), text.encode()
    network = (b"espalier-q-network 2 2 1 2\nload-loss 0.2 ttft-target 1 tpot-target 0.1\nsmall\n"
               + struct.pack("<7f", *range(7)))
    checksum = 0xcbf29ce484222325  # FNV-1a
    for byte in network:
        checksum = (checksum ^ byte) * 0x100000001b3 % 2**64
    yield "policy", "network", b"n" + network + struct.pack("<Q", checksum)

    for i, request in enumerate(REQUESTS):
        yield "request", str(i), request.encode()

    for i, message in enumerate(MESSAGES):
        for kind in b"gstd":
            yield "wire", f"{chr(kind)}{i}", bytes([kind, 100]) + message


def main():
    out = pathlib.Path(sys.argv[1])
    for target, name, raw in seeds():
        (out / target).mkdir(parents=True, exist_ok=True)
        (out / target / name).write_bytes(raw)


if __name__ == "__main__":
    main()
