#!/usr/bin/env python3
"""Makes data/tokenizer.json and data/vectors.jsonl: a small vocabulary and what Hugging Face's
`tokenizers` (PyPI, 0.23.3) says of it. Needs that package; the result is checked in.

The vocabulary is trained on the texts below. Some bytes have no token, as in SmolLM's vocabulary.
Each line of vectors.jsonl is one text or one list of ids:
  {"text", "gpt2" | "smollm" | "qwen2": {"ids", "pieces", ["special"]}}   special: specials parsed
  {"decode", "chunks", "flush", "skipped"}   chunks: text complete after each id; skipped: all of
                                             it, special tokens left out
"smollm" and "qwen2" are left out where they equal "gpt2".
"""
import json
import pathlib
import random

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

OUT = pathlib.Path(__file__).parent / "data"
MISSING = {0x04, 0x06, 0x1D, 0xC0, 0xC1, 0xF1, *range(0xF5, 0x100)}
CONTROL = ["<|begin|>", "<|end|>", "<|end|>!"]
ADDED = ["<tool>", "</tool>"]
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
PROSE = """The gardener trains the pear against the wall, and the wall gives back the day's heat
in the night. What isn't needed is cut; what's cut doesn't come again this year. They're patient
people: they've waited for the tree, they'll wait for the fruit. In 1999 there were 12 trees, now
there are 1,024.
  for (int i = 0; i < 10; ++i) {
    row[i] = 2.5 * i;   // half of it
  }
Der Gärtner schneidet die Äste, die stören, und läßt die übrigen blühen. L'été, l'espalier
produit déjà; où est-elle, la forêt? Садовник подрезает ветви весной. 剪枝之后，树会长得更好。
庭師は春に枝を切る。 😀 🌳🌳 👩‍🌾
"""


def byte_characters():
    """GPT-2's printable character of each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def set_pre_tokenizer(tokenizer, kind):
    byte_level = pre_tokenizers.ByteLevel
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        steps = [pre_tokenizers.Split(Regex(QWEN2), behavior="isolated"),
                 byte_level(add_prefix_space=False, use_regex=False)]
    else:
        steps = [byte_level(add_prefix_space=False)]
        if kind == "smollm":
            steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)


def train():
    alphabet = [c for b, c in byte_characters().items() if b not in MISSING]
    tokenizer = Tokenizer(models.BPE())
    set_pre_tokenizer(tokenizer, "smollm")
    trainer = trainers.BpeTrainer(vocab_size=440, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([PROSE] * 2, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ADDED])
    return tokenizer


def texts():
    yield from PROSE.splitlines()
    yield from ["", "a", " ", "  ", "   a", "a   ", "\n", "\r\n", "\n\n a", " \n \n  x", "\t\ta",
                "a\u00a0\u00a0b", "\u3000\u3000", "x \u2028\u2029 y", "\x1c\x1fa", "\u200b a", "\ufeffa",
                "a\x85b", " \t\r\n\t b", "!\n\n!", "a !\r\nb", "...   \n", " '", "'' '"]
    yield from ["it's IT'S we'll WE'LL I'd I'D you've you'Ve they're 'tis 'm'm", "'\u017fa x'\u017f",
                "'s't're've'm'll'd", "'sa 'r 'v 'l 'e", "x's'", "'", "\u2019s"]
    yield from ["1", "12", " 1", "  1", "a1b22", "1 2  3", "\u00bd\u00b2\u2460\u2163\u0663", " \u00bd",
                "1,024.50", "1\n2", "v2.0-rc1", "9" * 20]
    yield from ["<|begin|>hi<|end|>", "<|end|>!", "<|end|>?", " <|end|> x", "<|en<|end|>",
                "<tool>1</tool>", "a<tool> b", "<|end|><|end|>!<tool>", "<tool", "<<tool>>",
                "  <|begin|>  1"]
    yield from ["\x04", "a\x04b", "th\x06e", "\x1d\x1d", "\U00040000 a", "t\U00050000he"]
    yield from ["e\u0301te\u0301", "\u212b", "\ufb01", "\u1100\u1161\u11a8", "a\u0323\u0301", "a\u0301\u0323",
                "\u0344", "q\u0307\u0323 s\u0323\u0307"]
    yield from ["🌳", "👩\u200d🌾🌳", "العربية ٣", "ไทย", "हिन्दी १२", "🇩🇪!", "\U0010ffff"]
    words = ["the", " ", "  ", "\n", "\r\n", "\t", "1", "42", "'s", "'LL", "'", "!", "->", "é", "e\u0301", "剪枝",
             "🌳", "\u00a0", "\u3000", "\u0663", "<|end|>", "<tool>", "trees", "There", "\x04", "x"]
    rng = random.Random(3)
    for _ in range(70):
        yield "".join(rng.choices(words, k=rng.randint(3, 12)))


def settled_length(data, beginnings):
    """Bytes at the front of `data` that no further byte can change the meaning of."""
    for tail in range(1, min(3, len(data)) + 1):
        if data[-tail:] in beginnings:
            return len(data) - tail
    return len(data)


def decode_vectors(tokenizer, token_bytes):
    # Python's incremental decoder would do, but holds a surrogate's first two bytes back.
    encoded = (chr(c).encode() for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    beginnings = {e[:n] for e in encoded for n in range(1, len(e))}
    rng = random.Random(5)
    control = {tokenizer.token_to_id(t) for t in CONTROL}
    high = [i for i, b in enumerate(token_bytes) if b[0] >= 0x80]
    ids_of = lambda data: [token_bytes.index(bytes([b])) for b in data]
    lists = [[], [9999, -1, 40], ids_of(b"\xf0\x9f\x8c\xb3"), ids_of(b"\xf0\x9f\x8c"),
             ids_of(b"a\xe2\x82"), ids_of(b"\xe0\x80\x80"), ids_of(b"\xed\xa0\x80"),
             ids_of(b"\xf4\x90\x80\x80"), ids_of(b"\xc3") + [min(control)] + ids_of(b"\xa9")]
    lists += [rng.choices(range(len(token_bytes)), k=rng.randint(1, 10)) for _ in range(20)]
    lists += [rng.choices(high, k=rng.randint(1, 10)) for _ in range(40)]
    for ids in lists:
        known = [token_bytes[i] if 0 <= i < len(token_bytes) else b"" for i in ids]
        skipped = b"".join(b for i, b in zip(ids, known) if i not in control)
        chunks, data, done = [], b"", 0
        for token in known:
            data += token
            settled = settled_length(data, beginnings)
            chunks.append(data[done:settled].decode("utf-8", "replace"))
            done = settled
        yield {"decode": ids, "chunks": chunks, "flush": data[done:].decode("utf-8", "replace"),
               "skipped": skipped.decode("utf-8", "replace")}


def main():
    tokenizer = train()
    OUT.mkdir(exist_ok=True)
    layout = json.loads(tokenizer.to_str())
    (OUT / "tokenizer.json").write_text(json.dumps(layout, separators=(",", ":")) + "\n")

    lines = []
    for text in dict.fromkeys(texts()):
        line = {"text": text}
        for kind in ("gpt2", "smollm", "qwen2"):
            tokenizer = Tokenizer.from_file(str(OUT / "tokenizer.json"))
            set_pre_tokenizer(tokenizer, kind)
            tokenizer.encode_special_tokens = True
            plain = tokenizer.encode(text).ids
            tokenizer.encode_special_tokens = False
            special = tokenizer.encode(text).ids
            normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
            pieces = [len(p) for p, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)]
            line[kind] = {"ids": plain, "pieces": pieces}
            if special != plain:
                line[kind]["special"] = special
        for kind in ("smollm", "qwen2"):
            if line[kind] == line["gpt2"]:
                del line[kind]
        lines.append(line)

    byte_of = {c: b for b, c in byte_characters().items()}
    added = {t["id"]: t["content"].encode() for t in layout["added_tokens"]}
    spelled = {i: t for t, i in layout["model"]["vocab"].items()}
    token_bytes = [added[i] if i in added else bytes(byte_of[c] for c in spelled[i])
                   for i in range(len(spelled) + len(added))]
    lines += decode_vectors(tokenizer, token_bytes)
    with open(OUT / "vectors.jsonl", "w") as out:
        for line in lines:
            out.write(json.dumps(line, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
