"""Three times what the server can do, open loop: early refusals, no late answers, flat memory.

5 s of load; 30 s with ESPALIER_LONG=1.
"""

import asyncio
import json
import os
import random
import time
import unittest

import grpc

import harness
from harness import Server, detail, error_details_pb2, rpc, text_request

BINARY, MODEL = harness.arguments()
SECONDS = 30 if os.environ.get("ESPALIER_LONG") == "1" else 5
DEADLINE = 1.0  # seconds
TOKENS = 120


class Overload(unittest.TestCase):
    def test_three_times_the_capacity(self):
        # One thread and few places, so that the load generator is not the bottleneck.
        with Server(BINARY, MODEL, "--threads", "1", "--max-sequences", "4", "--max-waiting", "16",
                    "--log-format", "json") as server:
            asyncio.run(self.run_load(server))
            self.check_served_in_time(server)
            self.assertIsNotNone(server.wait_for_load(lambda load: load.kv_utilization == 0))
            self.assertEqual(server.terminate(), 0)

    def check_served_in_time(self, server):
        """No request that went well took longer than its deadline, by the server's own clock."""
        lines = [json.loads(line) for line in server.log().splitlines() if line.startswith("{")]
        served = [line["total_s"] for line in lines if line.get("outcome") == "length"]
        self.assertGreater(len(served), 0)
        self.assertLess(max(served), DEADLINE + 0.1)  # a timer may be late on a busy machine

    async def run_load(self, server):
        channel = grpc.aio.insecure_channel(server.address)
        stub = rpc.EspalierServiceStub(channel)

        async def call(index, timeout=None):
            tokens = 0
            began = time.monotonic()
            async for message in stub.Generate(text_request(f"request {index}", TOKENS),
                                               timeout=timeout):
                tokens += len(message.token_ids)
            self.assertEqual(tokens, TOKENS)
            return time.monotonic() - began

        # Capacity: closed loop, as many callers as places.
        async def caller(until, done):
            while time.monotonic() < until:
                await call(len(done))
                done.append(1)

        done = []
        began = time.monotonic()
        await asyncio.gather(*(caller(began + 1.5, done) for _ in range(8)))
        capacity = len(done) / (time.monotonic() - began)

        random.seed(1)
        rate = 3 * capacity
        before = server.resident_bytes()
        outcomes = {}
        slowest_refusal = 0.0
        slowest_answer = 0.0

        async def one(index):
            nonlocal slowest_refusal, slowest_answer
            began = time.monotonic()
            try:
                slowest_answer = max(slowest_answer, await call(index, timeout=DEADLINE))
                outcome = "OK"
            except grpc.aio.AioRpcError as error:
                outcome = error.code().name
                if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
                    retry = detail(error, error_details_pb2.RetryInfo)
                    if retry is None:
                        outcome = "refused without RetryInfo: " + error.details()
                    elif not 0.05 <= retry.retry_delay.ToMilliseconds() / 1e3 <= 60:
                        outcome = "refused with a delay out of range"
                    slowest_refusal = max(slowest_refusal, time.monotonic() - began)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1

        tasks = []
        start = time.monotonic()
        due = start
        while due < start + SECONDS:
            await asyncio.sleep(max(0, due - time.monotonic()))
            tasks.append(asyncio.create_task(one(len(tasks))))
            due += random.expovariate(rate)
        await asyncio.gather(*tasks)
        grown = server.resident_bytes() - before
        print(f"capacity {capacity:.0f}/s, offered {rate:.0f}/s for {SECONDS} s: {outcomes}; "
              f"slowest answer {slowest_answer:.2f} s, slowest refusal {slowest_refusal:.2f} s, "
              f"memory {grown / 2**20:+.1f} MiB", flush=True)

        self.assertLessEqual(set(outcomes), {"OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"})
        self.assertGreater(outcomes.get("RESOURCE_EXHAUSTED", 0), len(tasks) / 4)
        self.assertGreater(outcomes.get("OK", 0), 0)
        self.assertLess(grown, 32 << 20)
        await channel.close()


if __name__ == "__main__":
    unittest.main(verbosity=2)
