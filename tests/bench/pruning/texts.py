"""Eight kinds of text that a Debian machine has, for calibration and, of other files, for tests.

usage: texts.py OUT [WIKI]: OUT/calibrate/KIND.txt and OUT/test/KIND.txt. WIKI, prose, is cut in half;
without it there are seven kinds.
"""

import glob
import gzip
import hashlib
import os
import pathlib
import re
import subprocess
import sys

CALIBRATE_BYTES, TEST_BYTES = 220_000, 44_000  # of a kind
LEAST, MOST = 1_500, {"calibrate": 12_000, "test": 5_000}  # of a file


def find(folders, *tests):
    """Paths below the folders that exist."""
    folders = [folder for folder in folders if os.path.isdir(folder)]
    found = subprocess.run(["find", *folders, "-xdev", *tests], capture_output=True, text=True)
    return found.stdout.splitlines()


def read(path):
    """Empty if it is no UTF-8 text."""
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            return file.read().decode()
    except (OSError, UnicodeDecodeError, EOFError):
        return ""


def without_roff(text):
    """A manual page as words: requests and fonts taken out."""
    text = re.sub(r"(?m)^\.(SH|SS|TH|B|I|BR|IR|TP|PP|RS|RE|IP|nf|fi|RB|RI|BI|IB|P|LP|br|sp|EX|EE)\b ?",
                  "", re.sub(r"(?m)^[.']\\\".*$", "", text))
    text = re.sub(r"\\f.|\\&", "", re.sub(r"(?m)^\.[a-zA-Z]+.*$", "", text))
    return re.sub(r"\n{3,}", "\n\n", text.replace("\\-", "-").replace("\\(aq", "'"))


def kinds():
    """Kind: paths."""
    share = "/usr/share"
    return {
        "python": find(["/usr/lib/python3", *glob.glob("/usr/lib/python3.*")], "-name", "*.py"),
        "c": glob.glob("/usr/include/*.h") + glob.glob("/usr/include/linux/*.h"),
        "licence": glob.glob(f"{share}/doc/*/copyright") + glob.glob(f"{share}/common-licenses/*"),
        "french": glob.glob(f"{share}/man/fr/man*/*.gz"),
        "json": find([share, "/usr/lib", "/usr/local"], "-name", "*.json", "-size", "+2k", "-size",
                     "-400k"),
        "changelog": glob.glob(f"{share}/doc/*/changelog*.gz"),
        "pod": find([f"{share}/perl", "/usr/lib"], "-name", "*.pod")
               + find([f"{share}/perl"], "-name", "*.pm"),
    }


def gather(paths, prepare):
    """{part: text}; which part a file goes to hangs on its path alone."""
    parts = {"calibrate": [], "test": []}
    left = {"calibrate": CALIBRATE_BYTES, "test": TEST_BYTES}
    ordered = sorted(set(paths), key=lambda path: hashlib.md5(path.encode()).hexdigest())
    for i, path in enumerate(ordered):
        part = "test" if i % 4 == 0 else "calibrate"
        text = prepare(read(path)) if left[part] > 0 else ""
        if len(text) < LEAST:
            continue
        parts[part].append(text[: MOST[part]])
        left[part] -= len(parts[part][-1])
    return {part: "\n\n".join(texts) for part, texts in parts.items()}


def build(out, wiki=None):
    """Writes the files; returns the kinds that this machine has enough of."""
    made = []
    for kind, paths in kinds().items():
        parts = gather(paths, without_roff if kind == "french" else lambda text: text)
        if len(parts["calibrate"]) < CALIBRATE_BYTES / 4 or len(parts["test"]) < TEST_BYTES / 2:
            print(f"texts: this machine has too little of kind {kind}", file=sys.stderr)
            continue
        made.append((kind, parts))
    if wiki:
        text = pathlib.Path(wiki).read_text()
        half = len(text) // 2
        made.append(("wiki", {"calibrate": text[:half], "test": text[half:]}))
    for part in ("calibrate", "test"):
        folder = pathlib.Path(out) / part
        folder.mkdir(parents=True, exist_ok=True)
        for kind, parts in made:
            (folder / f"{kind}.txt").write_text(parts[part])
    return [kind for kind, _ in made]


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    print(*build(*sys.argv[1:]))
