#!/usr/bin/env python3
"""Holds the tree to its include table, and to what its pure folders may not know.

Run from anywhere: python3 tests/layering_test.py [root]. Prints one line per offence.
"""

import pathlib
import re
import sys

# Who may include whom. A key is a folder, or a file without its suffix; the longest key that a file
# lies under is its own. A value allows a folder and all below, or one file. Every file may include
# its own folder.
MAY_INCLUDE = {
    "policy": [],
    "kernels": [],
    "kernels/cpu": ["kernels"],
    "kernels/cuda": [],
    "proto": [],
    "engine/model_config": ["policy"],
    "engine/ledger": [],
    "engine/machine_memory": ["kernels/cgroup"],
    "engine/executor": ["engine/scheduling", "policy"],
    "engine/weight_keeper": ["engine/scheduling", "policy"],
    "engine/engine": ["engine/executor", "engine/weight_keeper", "engine/scheduling", "policy"],
    "engine/scheduling": ["policy"],
    "engine/pruning": ["kernels", "policy", "engine/model_config"],
    "engine/sim": ["engine/engine", "engine/executor", "engine/scheduling", "policy"],
    "engine/model": ["engine/pruning", "engine/scheduling", "engine/executor", "engine/ledger",
                     "engine/machine_memory", "engine/model/files", "engine/model_config", "kernels", "policy"],
    "engine/model/text": [],
    "engine/model/chat": [],
    "engine/model/files": ["engine/model/text", "engine/model_config"],
    # Kernels: their types are option values, and the composition root picks the backend.
    "server": ["engine", "policy", "proto", "kernels"],
    "tools": ["engine", "kernels", "policy", "proto"],
    "tests": ["engine", "kernels", "policy", "proto", "server", "tools"],
}

# Libraries that only some may know, by the start of the included path.
ONLY_IN = {
    r"grpc|google/|espalier/v1/": ["server", "tools", "tests", "proto"],
    r"prometheus/": ["server/metrics"],
    r"spdlog/": ["server/logging"],
    r"CLI/": ["server/options", "tools"],
    r"absl/": ["engine", "kernels", "server", "tools", "tests"],
    r"nlohmann/": ["engine/model", "tools", "tests"],
    r"cuda|cublas": ["kernels/cuda/arch"],
}

# No thread, lock, clock or unseeded randomness: whoever drives these passes time and seeds in.
PURE = ["policy", "engine/scheduling", "engine/engine", "engine/weight_keeper", "engine/sim", "engine/pruning"]
IMPURE = re.compile(
    r"std::(j?thread|this_thread|async|(\w+_)?mutex|lock_guard|unique_lock|scoped_lock|atomic\w*"
    r"|condition_variable\w*|counting_semaphore|latch|barrier|random_device)\b"
    r"|<(thread|mutex|shared_mutex|atomic|condition_variable|future|semaphore|latch|barrier)>"
    r"|\b(steady|system|high_resolution)_clock\b|\bclock_gettime\b|\bgettimeofday\b|\bpthread_\w+"
    r"|\bs?rand\s*\(|(?<![\w.:>])time\s*\(")

TOP = ["policy", "kernels", "engine", "server", "tools", "proto", "tests"]
HAVE_README = ["policy", "kernels", "engine", "server", "tools", "proto"]
INCLUDE = re.compile(r'^\s*#\s*include\s*["<]([^">]+)[">]')
COMMENT_OR_STRING = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.S)


def under(path, place):
    """True if `path` is `place`, lies in it, or is one of its files (place.h, place.cc)."""
    return path == place or path.startswith(place + "/") or path.rsplit(".", 1)[0] == place


def home(path):
    """The table's key that `path` lies under."""
    return max((key for key in MAY_INCLUDE if under(path, key)), key=len, default=None)


def check_include(path, included):
    """Why `path` may not include `included`; None if it may."""
    for library, places in ONLY_IN.items():
        if re.match(library, included):
            if any(under(path, place) for place in places):
                return None
            return f"only {', '.join(places)} may include {included}"
    if included.split("/")[0] not in TOP:
        return None
    key = home(path)
    target = home(included)
    own = target == key and "/" in included
    if own or any(under(included, place) for place in MAY_INCLUDE[key]):
        return None
    return f"{key} may not include {included}; it may include: {', '.join(MAY_INCLUDE[key]) or 'nothing of ours'}"


def check_file(path, text):
    """Yields (line, offence)."""
    if home(path) is None:
        yield 1, "lies in no folder of the include table"
        return
    for number, line in enumerate(text.splitlines(), 1):
        include = INCLUDE.match(line)
        offence = check_include(path, include[1]) if include else None
        if offence:
            yield number, offence
    if path.endswith((".h", ".cuh")) and not re.search(r"^#pragma once$", text, re.M):
        yield 1, "header without #pragma once"
    if any(under(path, place) for place in PURE):
        code = COMMENT_OR_STRING.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)
        for number, line in enumerate(code.splitlines(), 1):
            impure = IMPURE.search(line)
            if impure:
                yield number, f"`{impure[0].strip()}`: no thread, lock, clock or chance here"


def check_tree(root):
    offences = []
    folders = set()
    for top in TOP:
        for file in sorted((root / top).rglob("*")):
            path = file.relative_to(root).as_posix()
            if any(part in ("common", "util", "utils") for part in file.relative_to(root).parts):
                offences.append(f"{path}: a folder is named after its noun, not common or util")
            if file.suffix in (".h", ".cc", ".cu", ".cuh"):
                folders.add(file.parent)
                offences += [f"{path}:{number}: {offence}"
                             for number, offence in check_file(path, file.read_text("utf-8"))]
    for folder in sorted(folders):
        path = folder.relative_to(root).as_posix()
        if path.split("/")[0] in HAVE_README and not (folder / "README.md").exists():
            offences.append(f"{path}: source folder without README.md")
    return offences


def self_check():
    """The rules must bite: each line is (file, text, whether it is an offence)."""
    cases = [
        ("policy/a.cc", '#include "policy/policy.h"', False),
        ("policy/a.cc", '#include "engine/engine.h"', True),
        ("policy/a.cc", '#include "absl/status/status.h"', True),
        ("kernels/cpu/a.cc", '#include "kernels/backend.h"', False),
        ("kernels/a.cc", '#include "kernels/cpu/cpu_backend.h"', True),
        ("kernels/cuda/a.cu", '#include "kernels/cuda/arch.cuh"', False),
        ("kernels/cuda/a.cu", '#include "kernels/backend.h"', True),
        ("kernels/cuda/a.cu", "#include <cuda_runtime.h>", True),
        ("engine/scheduling/a.cc", '#include "engine/model_config.h"', True),
        ("engine/scheduling/a.cc", '#include "kernels/tensor.h"', True),
        ("engine/engine.cc", '#include "engine/scheduling/scheduler.h"', False),
        ("engine/engine.cc", '#include "engine/model/decoder.h"', True),
        ("engine/model/decoder.cc", '#include "engine/engine.h"', True),
        ("engine/model/decoder.cc", '#include "engine/model/text/tokenizer.h"', True),
        ("engine/model/files/a.cc", '#include "engine/model/text/vocabulary.h"', False),
        ("engine/model/a.cc", "#include <grpcpp/grpcpp.h>", True),
        ("server/a.cc", "#include <grpcpp/grpcpp.h>", False),
        ("server/a.cc", '#include "tools/command.h"', True),
        ("server/a.cc", "#include <spdlog/spdlog.h>", True),
        ("tools/a.cc", '#include "server/options.h"', True),
        ("engine/scheduling/a.cc", "std::mutex m;", True),
        ("engine/scheduling/a.cc", "// std::mutex m;", False),
        ("engine/engine.cc", "auto t = std::chrono::steady_clock::now();", True),
        ("policy/a.cc", "std::random_device d;", True),
        ("policy/a.cc", "double prefill_time(int rows); x.time(3);", False),
        ("server/a.cc", "std::mutex m;", False),
        ("server/a.h", "int x;", True),
        ("server/a.h", "#pragma once", False),
        ("stray/a.cc", "int x;", True),
    ]
    wrong = [case for case in cases if any(True for _ in check_file(case[0], case[1])) != case[2]]
    return [f"self-check: {path}: {text!r} should{'' if bad else ' not'} be an offence"
            for path, text, bad in wrong]


def main():
    root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else __file__).resolve()
    root = root if len(sys.argv) > 1 else root.parent.parent
    offences = self_check() or check_tree(root)
    print("\n".join(offences) if offences else "layering: every include and every folder as agreed")
    return 1 if offences else 0


if __name__ == "__main__":
    sys.exit(main())
