"""Other weights while it serves: gathered, pruned by, loaded, and switched to between requests.

Used as: python reload_test.py SERVER_BINARY MODEL, as harness.py says; the `espalier` command lies
beside the server.
"""

import concurrent.futures
import pathlib
import subprocess
import tempfile
import threading
import time
import unittest

import grpc

from harness import Server, arguments, calibrate, detail, error_details_pb2, pb, text_request

BINARY, MODEL = arguments()
ESPALIER = pathlib.Path(BINARY).parent / "espalier"
DATA = pathlib.Path(MODEL).parent
OTHER = DATA / "tiny-llama-quantized.gguf"  # of the same shape, with another embedding
TOKENS = 360


def espalier(*words):
    return subprocess.run([ESPALIER, *map(str, words)], capture_output=True, text=True, timeout=120)


def answer(server, text, tokens=TOKENS):
    """The tokens of a greedy answer."""
    request = text_request(text, tokens)
    request.sampling.temperature = 0
    return [i for m in server.stub.Generate(request, timeout=120) for i in m.token_ids]


def prompts(count):
    return [f"{'once upon a time ' * (1 + i % 3)}there were {i}" for i in range(count)]


class Reload(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory(prefix="espalier-reload-")
        cls.pruned = pathlib.Path(cls.folder.name) / "pruned.gguf"
        made = espalier("prune", "--model", MODEL, "--method", "magnitude", "--pattern", "0.5",
                        "--compensate", "none", "--store", "f32", "--out", cls.pruned)
        assert made.returncode == 0, made.stderr
        cls.prompts = prompts(24)
        with Server(BINARY, MODEL) as server:
            cls.old = [answer(server, p) for p in cls.prompts]
        with Server(BINARY, cls.pruned) as server:
            cls.new = [answer(server, p) for p in cls.prompts]
        assert all(o != n for o, n in zip(cls.old, cls.new)), "the two models answer alike"

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    def code(self, server, code, field="", **asked):
        with self.assertRaises(grpc.RpcError) as raised:
            server.stub.ReloadModel(pb.ReloadModelRequest(**asked), timeout=60)
        error = raised.exception
        self.assertEqual(error.code(), code, error.details())
        if field:
            bad = detail(error, error_details_pb2.BadRequest)
            self.assertEqual([v.field for v in bad.field_violations], [field])
        return error.details()

    def wait_for_log(self, server, line, times=1, seconds=60):
        until = time.monotonic() + seconds
        while server.log().count(line) < times:
            self.assertLess(time.monotonic(), until, f"{line}: {server.log()}")
            time.sleep(0.01)

    def test_running_requests_finish_on_the_old_weights(self):
        with Server(BINARY, MODEL, "--admin", "--max-sequences", "1", "--metrics-port", "0") as server, \
                concurrent.futures.ThreadPoolExecutor(64) as pool:
            before = [pool.submit(answer, server, p) for p in self.prompts]
            self.assertIsNotNone(server.wait_for_load(
                lambda load: load.running_requests == 1 and load.waiting_requests >= 12))
            name = server.stub.GetModel(pb.GetModelRequest(), timeout=9).name
            reloaded = server.stub.ReloadModel(pb.ReloadModelRequest(model=str(self.pruned)),
                                               timeout=60)
            # They are as many as it says, but for those that ended within the call.
            self.assertGreater(reloaded.requests_before, 0)
            self.assertGreater(reloaded.loading.ToNanoseconds(), 0)
            # Callers go on calling it as they did.
            self.assertEqual(server.stub.GetModel(pb.GetModelRequest(), timeout=9).name, name)
            self.assertEqual(reloaded.name, name)
            self.code(server, grpc.StatusCode.ABORTED)
            weights = server.load().memory.weights
            after = [pool.submit(answer, server, p) for p in self.prompts]
            # Each by one of the two throughout; a call that had not come in yet by the new ones.
            answers = [f.result() for f in before]
            for got, *either in zip(answers, self.old, self.new):
                self.assertIn(got, either)
            old = sum(got == old for got, old in zip(answers, self.old))
            self.assertGreaterEqual(old, reloaded.requests_before)
            self.assertGreaterEqual(old, 12)
            self.assertEqual([f.result() for f in after], self.new)
            self.wait_for_log(server, "weights before released")
            self.assertIsNotNone(server.wait_for_load(
                lambda load: load.running_requests == 0 and load.memory.weights < weights))
            load = server.load().memory
            self.assertEqual(load.kv_used + load.kv_reusable + load.kv_free, load.kv_allowed)
            self.assertEqual([answer(server, p) for p in self.prompts[:3]], self.new[:3])
            metrics = server.metrics()
            self.assertIn("espalier_reloads_total 1", metrics)
            self.assertEqual(metrics.count("espalier_build_info{"), 1)
            self.assertEqual(server.terminate(), 0)

    def test_no_request_is_lost_under_load(self):
        with Server(BINARY, MODEL, "--admin", "--kv-memory", "2MiB") as server:
            stop = threading.Event()
            wrong = []

            def ask(number):
                i = number
                while not stop.is_set():
                    i = (i + 5) % len(self.prompts)
                    try:
                        got = answer(server, self.prompts[i])
                    except grpc.RpcError as error:
                        wrong.append(error.details())
                        return
                    if got not in (self.old[i], self.new[i]):
                        wrong.append((i, got))

            callers = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
            for caller in callers:
                caller.start()
            try:
                for turn in range(6):
                    model = str(self.pruned) if turn % 2 == 0 else str(MODEL)
                    server.stub.ReloadModel(pb.ReloadModelRequest(model=model), timeout=60)
                    self.wait_for_log(server, "weights before released", turn + 1)
            finally:  # or the threads would keep this process
                stop.set()
            for caller in callers:
                caller.join(60)
            self.assertEqual(wrong, [])
            self.assertEqual([answer(server, p) for p in self.prompts[:3]], self.old[:3])

    def test_what_cannot_be_reloaded_is_named_and_changes_nothing(self):
        with Server(BINARY, MODEL) as server:
            self.code(server, grpc.StatusCode.PERMISSION_DENIED)
        folder = pathlib.Path(self.folder.name)
        garbage = folder / "garbage.gguf"
        garbage.write_bytes(pathlib.Path(MODEL).read_bytes()[:5000])
        ladder = folder / "served.ladder"
        calibrate(BINARY, MODEL, ladder)
        with Server(BINARY, MODEL, "--admin", "--ladder", ladder) as server:
            missing = self.code(server, grpc.StatusCode.NOT_FOUND, "model", model="/nowhere.gguf")
            self.assertIn("/nowhere.gguf", missing)
            self.assertIn("garbage.gguf", self.code(
                server, grpc.StatusCode.INVALID_ARGUMENT, "model", model=str(garbage)))
            other = self.code(server, grpc.StatusCode.FAILED_PRECONDITION, "model",
                              model=str(DATA / "tiny-qwen2-quantized.gguf"))
            self.assertIn("architecture: the served model has llama, this one qwen2", other)
            self.assertIn("without_ladder", self.code(
                server, grpc.StatusCode.FAILED_PRECONDITION, "ladder", model=str(self.pruned)))
            self.assertIn("made for another model", self.code(
                server, grpc.StatusCode.INVALID_ARGUMENT, "ladder", model=str(self.pruned),
                ladder=str(ladder)))
            self.code(server, grpc.StatusCode.INVALID_ARGUMENT, "without_ladder", ladder="x",
                      without_ladder=True)
            self.code(server, grpc.StatusCode.INVALID_ARGUMENT, "model", model="a\nb")
            self.code(server, grpc.StatusCode.INVALID_ARGUMENT, "ladder", ladder="a" * 2000)
            held = server.load().memory
            server.stub.SetMemoryBudget(pb.SetMemoryBudgetRequest(
                bytes=held.weights + held.workspace), timeout=9)
            # With so little, weights that rung 0 does not need may have left as well.
            self.assertRegex(self.code(
                server, grpc.StatusCode.RESOURCE_EXHAUSTED, "model", model=str(self.pruned),
                without_ladder=True), "MiB are left|MiB of the served weights have left memory")
            server.stub.SetMemoryBudget(pb.SetMemoryBudgetRequest(bytes=0), timeout=9)
            self.assertIsNotNone(server.wait_for_load(
                lambda load: load.memory.weights_released == 0))
            rungs = ladder.read_text().count("\nrung ")
            self.assertEqual(len(server.stub.GetModel(pb.GetModelRequest(), timeout=9).rungs), rungs)
            self.assertEqual(answer(server, self.prompts[1]), self.old[1])
            # The same model, read anew, keeps its ladder; the other has none.
            self.assertEqual(server.stub.ReloadModel(pb.ReloadModelRequest(), timeout=60).rungs,
                             ladder.read_text().count("\nrung "))
            self.assertEqual(answer(server, self.prompts[1]), self.old[1])
            self.wait_for_log(server, "weights before released")
            command = espalier("reload", self.pruned, "--without-ladder", "--address",
                               server.address)
            self.assertEqual(command.returncode, 0, command.stderr)
            self.assertIn("1 rungs", command.stdout)
            self.assertEqual(answer(server, self.prompts[1]), self.new[1])
            self.assertEqual(len(server.stub.GetModel(pb.GetModelRequest(), timeout=9).rungs), 1)

    def test_a_policy_that_does_not_fit_the_ladder_is_refused_before_loading(self):
        folder = pathlib.Path(self.folder.name)
        ladder, shorter = folder / "some-rungs.ladder", folder / "one-rung.ladder"
        calibrate(BINARY, MODEL, ladder, "--compensate", "none")
        shorter.write_text("".join(line for line in ladder.read_text().splitlines(keepends=True)
                                   if not line.startswith("rung ") or line.startswith("rung 0")))
        refused = grpc.StatusCode.FAILED_PRECONDITION
        with Server(BINARY, MODEL, "--admin", "--ladder", ladder, "--policy", "fixed:1") as server:
            self.assertIn("--policy: fixed:1", self.code(server, refused, "ladder",
                                                         without_ladder=True))
            self.assertIn("has rungs 0 to 0", self.code(server, refused, "ladder",
                                                        ladder=str(shorter)))
            self.assertEqual(server.log().count("model reloaded"), 0)
            self.assertEqual(server.stub.ReloadModel(pb.ReloadModelRequest(), timeout=60).rungs,
                             ladder.read_text().count("\nrung "))
        log = folder / "decisions"
        with Server(BINARY, MODEL, "--admin", "--ladder", ladder, "--policy", "ladder",
                    "--decision-log", log) as server:
            pathlib.Path(f"{log}.1").mkdir()  # where the next one's would be
            told = self.code(server, grpc.StatusCode.UNAVAILABLE)
            self.assertTrue(told.startswith("--decision-log: "), told)

    def test_a_signal_ends_a_reload_and_the_server(self):
        with Server(BINARY, MODEL, "--admin", "--drain-timeout", "5") as server, \
                concurrent.futures.ThreadPoolExecutor(1) as pool:
            def reload_until_the_end():
                while True:
                    try:
                        server.stub.ReloadModel(pb.ReloadModelRequest(), timeout=60)
                    except grpc.RpcError as error:
                        if error.code() != grpc.StatusCode.ABORTED:
                            return error.code()

            last = pool.submit(reload_until_the_end)
            self.wait_for_log(server, "weights before released", 3)
            began = time.monotonic()
            self.assertEqual(server.terminate(), 0)
            self.assertLess(time.monotonic() - began, 5)
            # gRPC cuts off by CANCELLED what comes between our last answer and the end of its listener.
            self.assertIn(last.result(),
                          (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED))

    def test_a_server_prunes_itself_by_what_it_served(self):
        moments = pathlib.Path(self.folder.name) / "served.moments"
        pruned = pathlib.Path(self.folder.name) / "by-moments.gguf"
        with Server(BINARY, MODEL, "--admin", "--moments-file", moments, "--metrics-port", "0",
                    "--prefix-cache", "false") as server:
            for i in range(40):
                answer(server, f"{i} of what people ask, some twenty tokens of a prompt", 4)
            tokens = float(server.metrics().split("\nespalier_moments_tokens ")[1].split()[0])
            self.assertGreaterEqual(tokens, 2 * 16)
            self.assertEqual(server.terminate(), 0)
        with Server(BINARY, MODEL, "--admin", "--moments-file", moments, "--metrics-port", "0") as server:
            self.assertIn(f"tokens={tokens:.0f}", server.log())
            made = espalier("prune", "--model", MODEL, "--moments", moments, "--out", pruned)
            self.assertEqual(made.returncode, 0, made.stderr)
            self.assertIn(f"{tokens:.0f} tokens of calibration", made.stdout)
            before = answer(server, self.prompts[0])
            server.stub.ReloadModel(pb.ReloadModelRequest(model=str(pruned)), timeout=60)
            self.assertNotEqual(answer(server, self.prompts[0]), before)
            self.wait_for_log(server, "weights before released")
            # The pruned one is of the same lineage: it goes on with the sums.
            for i in range(40):
                answer(server, f"{i} of what else people ask, some twenty tokens of a prompt", 4)
            more = float(server.metrics().split("\nespalier_moments_tokens ")[1].split()[0])
            self.assertGreater(more, tokens)
            self.assertEqual(server.terminate(), 0)
        # What the pruned one was fed prunes the one it was made from anew.
        made = espalier("prune", "--model", MODEL, "--moments", moments, "--out", pruned)
        self.assertEqual(made.returncode, 0, made.stderr)
        self.assertIn(f"{more:.0f} tokens of calibration", made.stdout)
        with Server(BINARY, pruned, "--admin", "--moments-file", moments) as server:
            self.assertIn(f"tokens={more:.0f}", server.log())
            server.stub.ReloadModel(pb.ReloadModelRequest(model=str(OTHER)), timeout=60)
            self.wait_for_log(server, "moments are gathered no more")
        refused = subprocess.run([BINARY, "--model", OTHER, "--moments-file", moments, "--port", "0",
                                  "--metrics-port", "-1"], capture_output=True, text=True, timeout=60)
        self.assertEqual(refused.returncode, 1)
        self.assertIn("served.moments: made for another model", refused.stdout + refused.stderr)

    def test_a_server_calibrates_itself_by_what_it_served(self):
        folder = pathlib.Path(self.folder.name)
        moments, ladder = folder / "served.channels", folder / "by-moments.ladder"

        def gathered(server):
            line = "\nespalier_channel_moments_tokens "
            return float(server.metrics().split(line)[1].split()[0])

        def ask(server, count):
            for i in range(count):  # steps of 128 rows, most of them
                answer(server, f"{i} of what people ask, " * 18 + "which is a long prompt", 2)

        options = ["--admin", "--channel-moments-file", moments, "--metrics-port", "0",
                   "--prefix-cache", "false"]
        with Server(BINARY, MODEL, *options) as server:
            before = answer(server, self.prompts[1])
            self.assertEqual(before, self.old[1])
            ask(server, 1)
            self.assertEqual(server.terminate(), 0)
        made = espalier("calibrate", "--model", MODEL, "--moments", moments, "--text",
                        DATA / "prose.txt", "--dense-layers", "0", "--rungs", "0.6", "--out", ladder)
        self.assertEqual(made.returncode, 1)
        self.assertIn("served.channels: layer 1 was seen for 0 tokens, and 96 channels take 384",
                      made.stderr)
        with Server(BINARY, MODEL, *options) as server:
            self.assertIn("channel moments are gathered", server.log())
            ask(server, 60)
            tokens = gathered(server)
            self.assertGreater(tokens, 96)
            # Another's channels are others, though it was pruned from this one.
            server.stub.ReloadModel(pb.ReloadModelRequest(model=str(self.pruned)), timeout=60)
            self.wait_for_log(server, "channel moments are gathered no more")
            self.wait_for_log(server, "weights before released")
            ask(server, 20)
            self.assertEqual(gathered(server), tokens)
            server.stub.ReloadModel(pb.ReloadModelRequest(model=str(MODEL)), timeout=60)
            self.wait_for_log(server, "channel moments are gathered again")
            self.assertEqual(answer(server, self.prompts[1]), before)
            ask(server, 90)
            tokens = gathered(server)
            self.assertGreaterEqual(tokens, 16 * 96)
            self.assertEqual(server.terminate(), 0)
        calibrate(BINARY, MODEL, ladder, "--moments", moments)
        with Server(BINARY, MODEL, *options, "--ladder", ladder, "--policy", "fixed:1") as server:
            self.assertIn(f"tokens={tokens:.0f}", server.log())
            pruned = answer(server, self.prompts[1])
            self.assertNotEqual(pruned, before)
            self.assertEqual(pruned, answer(server, self.prompts[1]))
            ask(server, 20)  # rows of harder rungs say nothing
            self.assertEqual(gathered(server), tokens)
        refused = subprocess.run([BINARY, "--model", self.pruned, "--channel-moments-file", moments,
                                  "--port", "0", "--metrics-port", "-1"],
                                 capture_output=True, text=True, timeout=60)
        self.assertEqual(refused.returncode, 1)
        self.assertIn("served.channels: made for another model", refused.stdout + refused.stderr)


if __name__ == "__main__":
    unittest.main()
