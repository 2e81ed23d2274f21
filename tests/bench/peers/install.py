"""Installs the peers, once: llama.cpp built from source, OpenVINO GenAI in a venv of its own.

What is made lies under one folder (build/peers) and is reused until its pin or recipe changes. A
step that fails is tried again from its beginning the next time; llama.cpp's build goes on where it
stopped.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile

HERE = pathlib.Path(__file__).resolve().parent

# Its source distribution carries all of llama.cpp; the wheel has only the library.
LLAMA_SOURCE = "llama-cpp-python==0.3.36"
LLAMA_PROGRAMS = ("llama-batched-bench", "llama-completion", "llama-quantize", "llama-server")
LLAMA_OPTIONS = ("-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_OPENSSL=OFF",
                 "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_APP=OFF",
                 "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF")


def openvino_pin():
    return (HERE / "requirements.txt").read_text().split()[-1]


class Failure(Exception):
    """One line for the caller."""


class Peers:
    """Where everything is, below `folder`."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.python = self.folder / "venv/bin/python3"
        self.programs = self.folder / "llama.cpp/build/bin"

    def llama(self, name):
        return str(self.programs / f"llama-{name}")

    def llama_model(self, model):
        return self.folder / "models" / f"{model.stem}.Q4_0.gguf"

    def openvino_model(self, model):
        return self.folder / "models" / f"{model.stem}.openvino"


def run(command, log):
    """Runs `command`; its output goes to `log`, the last lines of which tell of a failure."""
    with open(log, "ab") as file:
        if subprocess.run(list(map(str, command)), stdout=file, stderr=subprocess.STDOUT,
                          check=False).returncode == 0:
            return
    print(*log.read_text(errors="replace").splitlines()[-15:], sep="\n", file=sys.stderr)
    raise Failure(f"{pathlib.Path(command[0]).name} failed (above; all of it in {log}); "
                  "what is done already is kept")


def once(made, recipe, make):
    """Calls make() unless the file `made` says that `recipe` has been followed."""
    if made.exists() and made.read_text() == recipe:
        return
    make()
    made.write_text(recipe)


def install(folder):
    """Both peers into `folder`; returns where they are."""
    peers = Peers(folder)
    peers.folder.mkdir(parents=True, exist_ok=True)
    requirements = (HERE / "requirements.txt").read_text()
    once(peers.folder / "openvino.installed", requirements, lambda: _install_openvino(peers))
    return install_llama(folder)


def install_llama(folder):
    """llama.cpp alone into `folder`; returns where it is."""
    peers = Peers(folder)
    peers.folder.mkdir(parents=True, exist_ok=True)
    once(peers.folder / "llama.cpp.installed", "\n".join((LLAMA_SOURCE, *LLAMA_PROGRAMS,
                                                          *LLAMA_OPTIONS)),
         lambda: _install_llama(peers))
    return peers


def _install_openvino(peers):
    print("peers: installing OpenVINO GenAI", flush=True)
    log = peers.folder / "openvino.log"
    run([sys.executable, "-m", "venv", "--clear", peers.folder / "venv"], log)
    run([peers.python, "-m", "pip", "install", "--disable-pip-version-check", "--only-binary",
         ":all:", "--retries", 3, "-r", HERE / "requirements.txt"], log)


def _install_llama(peers):
    log = peers.folder / "llama.cpp.log"
    source = peers.folder / "llama.cpp/source"
    once(peers.folder / "llama.cpp.unpacked", LLAMA_SOURCE,
         lambda: _unpack_llama(peers, source, log))
    print("peers: building llama.cpp, some ten minutes on 2 cores", flush=True)
    build = peers.programs.parent
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    run(["cmake", "-S", source, "-B", build, *ninja, *LLAMA_OPTIONS], log)
    run(["cmake", "--build", build, "-j", len(os.sched_getaffinity(0)), "--target",
         *LLAMA_PROGRAMS], log)


def _unpack_llama(peers, source, log):
    print(f"peers: fetching {LLAMA_SOURCE}", flush=True)
    download = peers.folder / "llama.cpp/download"
    shutil.rmtree(download.parent, ignore_errors=True)
    download.mkdir(parents=True)
    run([sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps",
         "--no-binary", ":all:", "--retries", 3, "--dest", download, LLAMA_SOURCE], log)
    (archive,) = download.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(download)
    (carried,) = download.glob("*/vendor/llama.cpp")
    carried.rename(source)
    shutil.rmtree(download)


def _stamp(model):
    return f"{model.resolve()} {model.stat().st_size} {model.stat().st_mtime_ns}"


def convert_llama(peers, model):
    """The model as llama.cpp runs it best, made once per content of the file `model`."""
    quantised = peers.llama_model(model)
    quantised.parent.mkdir(exist_ok=True)
    log = peers.folder / "models.log"

    def quantise():
        print("peers: requantising the model to Q4_0 for llama.cpp", flush=True)
        run([peers.llama("quantize"), "--allow-requantize", model, quantised, "Q4_0"], log)

    once(quantised.with_suffix(".made"), f"{_stamp(model)} {LLAMA_SOURCE}", quantise)


def convert(peers, model):
    """As convert_llama, for both peers."""
    convert_llama(peers, model)
    folder = peers.openvino_model(model)
    log = peers.folder / "models.log"

    def save():
        print("peers: converting the model for OpenVINO", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        # The converted model is saved beside the file it was read from.
        file = folder / "model.gguf"
        file.symlink_to(model.resolve())
        run([peers.python, HERE / "openvino_engine.py", "--convert", file], log)
        file.unlink()

    once(folder.with_suffix(".made"), f"{_stamp(model)} {(HERE / 'requirements.txt').read_text()}", save)
