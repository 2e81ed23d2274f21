"""Runs each engine once, as it runs best, and tells what it did: one turn of one engine a call."""

import collections
import contextlib
import http.client
import json
import os
import pathlib
import random
import socket
import subprocess
import tempfile
import threading
import time

import figures
from install import Failure

HERE = pathlib.Path(__file__).resolve().parent
SECONDS = 1800  # no run takes longer unless it hangs
STREAMS, PROMPT, GENERATE = 32, 128, 128
TEXT = "The capital of France is"

Setup = collections.namedtuple("Setup", "model threads ours peers")  # ours: folder of binaries

# What is in the caller's environment must not change what runs.
_ENVIRONMENT = {key: value for key, value in os.environ.items()
                if not key.startswith(("ESPALIER_", "LLAMA_", "OMP_", "OV_"))}


def _run(command):
    """Standard output of a command that succeeds."""
    command = list(map(str, command))
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace",
                              timeout=SECONDS, env=_ENVIRONMENT, check=False,
                              stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as expired:
        raise Failure(f"{command[0]} has not ended after {SECONDS} s") from expired
    if done.returncode != 0:
        raise Failure(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def bench_ours(setup, seed):
    """(speeds, shares of the roofline, the whole figures file)."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        _run([setup.ours / "espalier", "bench", "--model", setup.model, "--threads", setup.threads,
              "--batch", ",".join(map(str, figures.BATCHES)), "--turns", 1, "--seed", seed,
              "--figures", file.name])
        text = pathlib.Path(file.name).read_text()
    return *figures.parse_bench(text), json.loads(text)


# Flash attention wins one prompt, its other attention wins batches: both run, the better counts.
LLAMA_ATTENTION = ("on", "off")


def _llama_options(setup, attention):
    # Its best on a CPU: the Q4_0 that it repacks, KV in f16.
    return ["-m", setup.peers.llama_model(setup.model), "-t", setup.threads, "-tb", setup.threads,
            "-b", 2048, "-ub", 512, "-fa", attention, "-ctk", "f16", "-ctv", "f16"]


def bench_llama(setup, _seed):
    """Its prompts are random and differ between sequences, by a generator that it seeds itself."""
    def bench(attention):
        lines = ""
        for context, prompt, generate, batches in ((16384, PROMPT, GENERATE, figures.BATCHES),
                                                   (2048, 512, 1, (1,))):
            lines += _run([setup.peers.llama("batched-bench"), *_llama_options(setup, attention),
                           "-c", context, "-npp", prompt, "-ntg", generate, "-npl",
                           ",".join(map(str, batches)), "--output-format", "jsonl"])
        return figures.parse_lines(lines)

    with_flash, without = map(bench, LLAMA_ATTENTION)
    return {what: max(speed, without[what]) for what, speed in with_flash.items()}


def bench_openvino(setup, seed):
    shapes = [f"{PROMPT}x{GENERATE}x{batch}" for batch in figures.BATCHES] + ["512x1x1"]
    return figures.parse_lines(_run([setup.peers.python, HERE / "openvino_engine.py",
                                     setup.peers.openvino_model(setup.model), setup.threads, seed,
                                     *shapes]))


@contextlib.contextmanager
def _server(command):
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log,
                                   stdin=subprocess.DEVNULL, env=_ENVIRONMENT)
        try:
            yield process
        except Exception as error:
            log.seek(0)
            raise Failure(f"{command[0]}: {error}\n"
                          f"{log.read()[-2000:].decode(errors='replace')}") from error
        finally:
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _until(ready, process):
    """Asks ready() every millisecond until it is true."""
    end = time.monotonic() + 300
    while not ready():
        if process.poll() is not None:
            raise Failure(f"ended with code {process.returncode} before it served")
        if time.monotonic() > end:
            raise Failure("does not serve after 300 s")
        time.sleep(0.001)


@contextlib.contextmanager
def _our_server(setup):
    """Yields its address once it serves."""
    with tempfile.TemporaryDirectory() as folder:
        port = pathlib.Path(folder) / "port"
        with _server([setup.ours / "espalier-server", "--model", setup.model, "--threads",
                      setup.threads, "--port", 0, "--port-file", port, "--metrics-port",
                      -1]) as process:
            _until(lambda: port.exists() and port.read_text().strip(), process)
            address = f"127.0.0.1:{port.read_text().strip()}"
            _run([setup.ours / "espalier", "health", "--wait", "--deadline", 300, "--address",
                  address])
            yield address


def serve_ours(setup, seed):
    """Tokens/s of STREAMS calls that begin together."""
    with _our_server(setup) as address:
        def load(prompt, generate):
            return json.loads(_run(
                [setup.ours / "espalier", "load", "--address", address, "--requests", STREAMS,
                 "--concurrency", STREAMS, "--prompt-tokens", prompt, "--max-tokens", generate,
                 "--seed", seed, "--deadline", 600, "--json"]))
        load(16, 8)  # warm, as the neighbour
        report = load(PROMPT, GENERATE)
    if report["tokens"] != STREAMS * GENERATE:
        raise Failure(f"espalier load: expected {STREAMS * GENERATE} tokens, got {report}")
    return report["tokens_per_s"]


def cold_start_ours(setup):
    """Seconds from the server's start to the end of a call for one token."""
    began = time.perf_counter()
    with _our_server(setup) as address:
        _run([setup.ours / "espalier", "generate", "--address", address, "--max-tokens", 1,
              "--quiet", TEXT])
        return time.perf_counter() - began


def connect(port):
    return http.client.HTTPConnection("127.0.0.1", port, timeout=600)


@contextlib.contextmanager
def llama_server(setup, attention, *options):
    """Yields its port once it serves."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def ready():
        connection = connect(port)
        with contextlib.suppress(OSError), contextlib.closing(connection):
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        return False

    with _server([setup.peers.llama("server"), *_llama_options(setup, attention), "--host",
                  "127.0.0.1", "--port", port, "--no-ui", *options]) as process:
        _until(ready, process)
        yield port


def _complete(port, prompt, tokens):
    """One streamed call; the tokens it brought."""
    with contextlib.closing(connect(port)) as connection:
        connection.request("POST", "/completion", json.dumps({
            "prompt": prompt, "n_predict": tokens, "stream": True, "ignore_eos": True,
            "temperature": 0, "samplers": ["temperature"], "cache_prompt": False}),
            {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"{response.status} {response.read(500)!r}")
        return figures.streamed_tokens(response)


def serve_llama(setup, seed):
    """As serve_ours."""
    return max(_serve_llama(setup, seed, attention) for attention in LLAMA_ATTENTION)


def _serve_llama(setup, seed, attention):
    # A slot has room for prompt and output; nothing is cached between calls.
    context = STREAMS * 2 * (PROMPT + GENERATE)
    with llama_server(setup, attention, "-np", STREAMS, "-c", context, "--cache-ram", 0) as port:
        with contextlib.closing(connect(port)) as connection:
            connection.request("GET", "/v1/models")
            models = json.load(connection.getresponse())
        vocabulary = models["data"][0]["meta"]["n_vocab"]
        ids = random.Random(seed)

        def burst(prompt, tokens):
            prompts = [[ids.randrange(vocabulary) for _ in range(prompt)]
                       for _ in range(STREAMS)]
            got = []

            def call(prompt):
                with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
                    got.append(_complete(port, prompt, tokens))

            threads = [threading.Thread(target=call, args=(prompt,)) for prompt in prompts]
            began = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if got != [tokens] * STREAMS:
                raise ValueError(f"expected {STREAMS} streams of {tokens} tokens, got {got}")
            return STREAMS * tokens / (time.perf_counter() - began)

        burst(16, 8)
        return burst(PROMPT, GENERATE)


def cold_start_llama(setup):
    """The quicker of its server and its command line, seconds; both without the warm-up run."""
    return min(_cold_start_llama(setup, attention) for attention in LLAMA_ATTENTION)


def _cold_start_llama(setup, attention):
    began = time.perf_counter()
    with llama_server(setup, attention, "--no-warmup", "-np", 1, "-c", 2048) as port:
        _complete(port, TEXT, 1)
        server = time.perf_counter() - began

    began = time.perf_counter()
    command = [setup.peers.llama("completion"), *_llama_options(setup, attention), "--no-warmup",
               "-c", 2048, "-no-cnv", "--no-display-prompt", "--simple-io", "--ignore-eos", "-n", 1,
               "-p", TEXT]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
                          env=_ENVIRONMENT) as process:
        token = process.stdout.read(1)
        completion = time.perf_counter() - began
        process.stdout.read()  # or the rest of its output kills it
    if not token or process.returncode != 0:
        raise Failure(f"llama-completion: exit code {process.returncode}, no token")
    return min(server, completion)


def perplexity_ours(setup, text, weights, kv):
    """Perplexity of the first 32 windows of 1,024 tokens of the file `text`."""
    return json.loads(_run([setup.ours / "espalier", "score", "--model", setup.model, "--threads",
                            setup.threads, "--text", text, "--window", 1024, "--windows", 32,
                            "--weights", weights, "--kv", kv, "--json"]))["ppl"]
