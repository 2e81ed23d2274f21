"""Memory taken away and given back at random while calls come and go: none is lost, cut or wrong.

8 s; 30 minutes with ESPALIER_LONG=1. SEED in the environment draws another run.
"""

import os
import pathlib
import random
import tempfile
import threading
import time
import unittest

import grpc

import harness
from harness import Server, detail, error_details_pb2, pb, text_request

BINARY, MODEL = harness.arguments()
SECONDS = 1800 if os.environ.get("ESPALIER_LONG") == "1" else 8
CALLERS = 12
# Rungs of whole blocks, which need no calibration: an MLP, then an attention block and its KV.
LADDER = """espalier-ladder 1
model layers=2 heads=4 channels=96
rung 0 loss=0 kv_bytes=2
rung 1 loss=0.1 kv_bytes=2 channels=96,0
rung 2 loss=0.2 kv_bytes=1 kv=int4 channels=96,0
rung 3 loss=0.5 kv_bytes=0.5 kv=int4 heads=4,0 channels=96,0
"""


class Soak(unittest.TestCase):
    def setUp(self):
        self.seed = int(os.environ.get("SEED", "1"))
        self.folder = tempfile.TemporaryDirectory(prefix="espalier-soak-")
        self.ladder = pathlib.Path(self.folder.name, "three.ladder")
        self.ladder.write_text(LADDER)
        self.ended = threading.Event()
        self.lock = threading.Lock()
        self.failures, self.counts = [], {"served": 0, "pruned": 0, "refused": 0, "cancelled": 0}

    def tearDown(self):
        self.folder.cleanup()

    def test_random_squeezes_lose_nothing(self):
        with Server(BINARY, MODEL, "--admin", "--ladder", self.ladder, "--policy", "ladder",
                    "--ttft-target", "0.05", "--max-sequences", "8", "--kv-memory", "2MiB",
                    "--metrics-port", "0") as server:
            whole = server.load().memory
            # At rung 0 the same prompt has one answer, whatever happens around it.
            exact = self.answer(server, self.request(random.Random(0), never=True))[0]
            callers = [threading.Thread(target=self.call, args=(server, exact, i))
                       for i in range(CALLERS)]
            for caller in callers:
                caller.start()
            try:
                least = self.squeeze(server, whole)
            finally:  # or the threads would keep this process
                self.ended.set()
            for caller in callers:
                caller.join(60)
                self.assertFalse(caller.is_alive(), "a call hangs")
            print(f"{self.counts}, at least {least} of {whole.kv_allowed} bytes of KV", flush=True)
            self.assertEqual(self.failures[:3], [])
            self.assertLess(least, whole.kv_allowed / 2)
            for what, count in self.counts.items():
                self.assertGreater(count, 0, what)
            # All is as it was: pages, the rung, and an answer.
            self.assertIsNotNone(server.wait_for_load(
                lambda load: load.running_requests == 0 and load.memory.kv_used == 0))
            self.assertEqual(server.load().memory.kv_allowed, whole.kv_allowed)
            time.sleep(1)
            for _ in range(2):  # the first ends the quiet time with a report
                _, served = self.answer(server, self.request(random.Random(0)))
            self.assertEqual([use.rung for use in served.rungs], [0])
            self.assertEqual(server.terminate(), 0)

    def squeeze(self, server, whole):
        """Another budget now and then; the least KV that was ever allowed."""
        draw, least = random.Random(self.seed), whole.kv_allowed
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            kind = draw.random()
            if kind < 0.25:
                budget = 0  # all again
            elif kind < 0.35:
                budget = 1  # nothing
            else:
                held = server.load().memory
                budget = held.resident + int(draw.uniform(-1, 1) * whole.kv_allowed)
            told = server.stub.SetMemoryBudget(
                pb.SetMemoryBudgetRequest(bytes=max(1, budget) if budget else 0), timeout=10)
            least = min(least, told.memory.kv_allowed)
            time.sleep(draw.uniform(0.02, 0.3))
        server.stub.SetMemoryBudget(pb.SetMemoryBudgetRequest(), timeout=10)
        return least

    @staticmethod
    def request(draw, never=False):
        request = text_request("memory comes and goes " * (1 if never else draw.randint(1, 12)),
                               150 if never else draw.randint(1, 200))
        request.sampling.temperature = 0
        request.prune.never = never
        request.priority = 0 if never else draw.choice([-1, 0, 0, 1])
        return request

    @staticmethod
    def answer(server, request):
        messages = list(server.stub.Generate(request, timeout=60))
        finished = messages[-1].finished
        tokens = [token for message in messages for token in message.token_ids]
        assert len(tokens) == request.stop.max_tokens == finished.usage.completion_tokens, finished
        assert sum(use.tokens for use in finished.served.rungs) == len(tokens), finished
        return tokens, finished.served

    def call(self, server, exact, number):
        draw = random.Random(self.seed * 1000 + number)
        while not self.ended.is_set():
            never = draw.random() < 0.3
            request = self.request(draw, never)
            try:
                if draw.random() < 0.1:
                    stream = server.stub.Generate(request, timeout=60)
                    next(stream)
                    stream.cancel()
                    self.count("cancelled")
                    continue
                tokens, served = self.answer(server, request)
                if never and (tokens != exact or [use.rung for use in served.rungs] != [0]):
                    self.failures.append(f"another answer at rung 0: {served}")
                self.count("served")
                if any(use.rung > 0 for use in served.rungs):
                    self.count("pruned")
            except grpc.RpcError as error:
                info = detail(error, error_details_pb2.ErrorInfo)
                if (error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED
                        or info.reason not in ("NO_MEMORY", "OVERLOADED", "QUEUE_FULL")
                        or detail(error, error_details_pb2.RetryInfo) is None):
                    self.failures.append(f"{error.code()}: {error.details()}")
                self.count("refused")
                time.sleep(0.02)
            except Exception as failure:  # noqa: BLE001: told by the main thread
                self.failures.append(repr(failure))

    def count(self, what):
        with self.lock:
            self.counts[what] += 1


if __name__ == "__main__":
    unittest.main(verbosity=2)
