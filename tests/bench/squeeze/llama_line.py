"""llama-server under the calls that a traffic file tells: open loop, streamed, timed as `espalier
load` times them, in so many bytes of KV.

Its KV is q8_0, which takes 34 bytes for 32 numbers as our int8 does, so the same bytes hold the same
tokens.
"""

import contextlib
import http.client
import json
import pathlib
import random
import socket
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "peers"))
import engines  # noqa: E402

# llama.cpp rounds a KV, and a slot's own, up to a multiple of this: it is given one that fits.
PIECE = 256
KINDS = ("unified", "slots")


def options(kind, kv_tokens, streams, call_tokens):
    """The server's options, of `kv_tokens` tokens of KV in all."""
    kv = ["-ctk", "q8_0", "-ctv", "q8_0", "--cache-ram", 0]
    if kind == "unified":  # all sequences share it
        return [*kv, "--kv-unified", "-np", streams, "-c", max(1, kv_tokens // PIECE) * PIECE]
    slot = -(-call_tokens // PIECE) * PIECE
    slots = max(1, min(streams, kv_tokens // slot))
    return [*kv, "--no-kv-unified", "-np", slots, "-c", slots * slot]


def arrivals(traffic):
    """Seconds, of a traffic file's calls."""
    words = (line.split() for line in pathlib.Path(traffic).read_text().splitlines())
    return sorted(float(each[1]) for each in words if each and each[0] == "call")


class Call(threading.Thread):
    """One streamed call of random ids; `good` once it came within both targets."""

    def __init__(self, port, prompt, output, ttft, tpot):
        super().__init__(daemon=True)
        self.prompt, self.output, self.ttft, self.tpot = prompt, output, ttft, tpot
        self.connection = engines.connect(port)
        self.began = self.first = None
        self.finished = self.good = self.failed = False

    def may_be_good(self):
        """As `espalier load --give-up` has it."""
        age = time.perf_counter() - self.began - 0.5
        first = self.first
        return not (self.finished or self.failed) and (
            age <= self.ttft if first is None else
            first <= self.ttft and age <= first + self.tpot * (self.output - 1))

    def start(self):
        self.began = time.perf_counter()
        super().start()

    def abandon(self):
        """Or the server waits for its end before it ends itself."""
        with contextlib.suppress(OSError, AttributeError):  # it is not connected, or no more
            self.connection.sock.shutdown(socket.SHUT_RDWR)

    def run(self):
        try:
            self._call()
        except (OSError, ValueError, http.client.HTTPException):
            self.failed = True

    def _call(self):
        with contextlib.closing(self.connection) as connection:
            connection.request("POST", "/completion", json.dumps({
                "prompt": self.prompt, "n_predict": self.output, "stream": True,
                "ignore_eos": True, "temperature": 0, "samplers": ["temperature"],
                "cache_prompt": False}), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise ValueError(response.status)
            for line in response:
                if line.startswith(b"error: "):
                    raise ValueError(line)
                if not line.startswith(b"data: "):
                    continue
                last = time.perf_counter() - self.began
                if self.first is None:
                    self.first = last
                message = json.loads(line[len(b"data: "):])
                if not message.get("stop"):
                    continue
                tokens = message["tokens_predicted"]
                # A context that is full to the last place ends it a token early: let it.
                if tokens < self.output - 1:
                    raise ValueError(f"{tokens} tokens")
                self.good = (self.first <= self.ttft
                             and (last - self.first) / max(1, tokens - 1) <= self.tpot)
                self.finished = True
                return
        raise ValueError("ended before its last message")


def run(setup, kind, traffic, kv_tokens, shape, targets):
    """{calls, good, finished, failed} of the traffic's calls, when none that still runs can become
    good. shape: (streams, prompt, output); targets: (ttft, tpot)."""
    streams, prompt, output = shape
    ids = random.Random(1)
    with engines.llama_server(setup, "on",
                              *options(kind, kv_tokens, streams, prompt + output)) as port:
        with contextlib.closing(engines.connect(port)) as connection:
            connection.request("GET", "/v1/models")
            vocabulary = json.load(connection.getresponse())["data"][0]["meta"]["n_vocab"]

        def call():
            return Call(port, [ids.randrange(vocabulary) for _ in range(prompt)], output, *targets)

        warm = call()
        warm.start()
        warm.join()
        calls, began = [], time.perf_counter()
        for at in arrivals(traffic):
            calls.append(call())
            time.sleep(max(0, began + at - time.perf_counter()))
            calls[-1].start()
        while any(each.may_be_good() for each in calls):
            time.sleep(0.1)
        report = {"calls": len(calls), "good": sum(each.good for each in calls),
                  "finished": sum(each.finished for each in calls),
                  "failed": sum(each.failed for each in calls)}
        for each in calls:
            each.abandon()
        for each in calls:
            each.join()
        return report
