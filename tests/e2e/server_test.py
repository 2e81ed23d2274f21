"""The server as a foreign client sees it."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest

import grpc

import harness
from harness import NOT_SERVING, SERVICE, SERVING, Server, detail, error_details_pb2, pb, rpc
from harness import text_request
import stream_clients

BINARY, MODEL = harness.arguments()


def code_of(call):
    """The RpcError that a call ends with."""
    try:
        list(call) if hasattr(call, "__iter__") else call.result()
    except grpc.RpcError as error:
        return error
    return None


class Memory(unittest.TestCase):
    def test_budget_falls_while_streams_run_and_comes_back(self):
        with Server(BINARY, MODEL, "--admin", "--max-sequences", "4", "--metrics-port",
                    "0") as server:
            whole = server.load().memory
            self.assertEqual((whole.budget, whole.kv_allowed > 0), (0, True))
            calls = [server.stub.Generate(text_request("x", 200), timeout=60) for _ in range(8)]
            server.wait_for_load(lambda load: load.running_requests == 4)
            low = server.stub.SetMemoryBudget(pb.SetMemoryBudgetRequest(bytes=1)).memory
            self.assertEqual((low.budget, low.kv_allowed), (1, 0))
            for call in calls:  # waiting or running, what was accepted is served whole
                self.assertEqual(list(call)[-1].finished.usage.completion_tokens, 200)
            server.wait_for_load(lambda load: load.running_requests == 0)
            error = code_of(server.stub.Generate(text_request("x", 8), timeout=20))
            self.assertEqual(error.code(), grpc.StatusCode.RESOURCE_EXHAUSTED)
            self.assertIn("there may be 0 at present", error.details())
            self.assertEqual(detail(error, error_details_pb2.ErrorInfo).reason, "NO_MEMORY")
            retry = detail(error, error_details_pb2.RetryInfo).retry_delay
            self.assertGreater(retry.ToMilliseconds(), 0)
            back = server.stub.SetMemoryBudget(pb.SetMemoryBudgetRequest()).memory
            self.assertEqual((back.budget, back.kv_allowed), (0, whole.kv_allowed))
            answer = list(server.stub.Generate(text_request("x", 8), timeout=20))
            self.assertEqual(answer[-1].finished.usage.completion_tokens, 8)
            self.assertIn('espalier_requests_refused_total{reason="no_memory"} 1', server.metrics())

    def test_only_an_admin_sets_it(self):
        with Server(BINARY, MODEL) as server:
            with self.assertRaises(grpc.RpcError) as refused:
                server.stub.SetMemoryBudget(pb.SetMemoryBudgetRequest(bytes=1), timeout=10)
            self.assertEqual(refused.exception.code(), grpc.StatusCode.PERMISSION_DENIED)
            self.assertEqual(server.load().memory.budget, 0)

    def test_command_tells_what_a_budget_means(self):
        with Server(BINARY, MODEL, "--admin") as server:
            def told(*size):
                done = subprocess.run([pathlib.Path(BINARY).with_name("espalier"), "budget", *size,
                                       "--address", server.address], capture_output=True, text=True)
                self.assertEqual(done.returncode, 0, done.stderr)
                return done.stdout, done.stderr

            self.assertIn("budget none", told()[0])
            for wrong in ("5", "-1", "1.5GB", "0%", "101%", "x%", "%", "9" * 16):
                refused = subprocess.run(
                    [pathlib.Path(BINARY).with_name("espalier"), "budget", "--address",
                     server.address, "--", wrong], capture_output=True, text=True)
                self.assertNotEqual(refused.returncode, 0, wrong)
                self.assertIn("from 1MiB", refused.stderr)
            budgets = []
            for share in ("50%", "100%"):
                told(share)
                budgets.append(server.load().memory.budget)
            self.assertAlmostEqual(budgets[0] / budgets[1], 0.5, places=6)
            with self.assertRaises(grpc.RpcError) as refused:
                server.stub.SetMemoryBudget(pb.SetMemoryBudgetRequest(share=0.5, bytes=1))
            self.assertEqual(refused.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)
            self.assertIn("share", refused.exception.details())
            out, warned = told("1MiB")
            self.assertIn("KV 0.0 MiB of 0.0 MiB", out)
            self.assertIn("new requests are refused", warned)
            with self.assertRaises(grpc.RpcError) as refused:
                list(server.stub.Generate(text_request("x", 5)))
            self.assertEqual(refused.exception.code(), grpc.StatusCode.RESOURCE_EXHAUSTED)
            self.assertEqual(told("0")[1], "")
            list(server.stub.Generate(text_request("x", 5)))


class Calls(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = Server(BINARY, MODEL)
        cls.stub = cls.server.stub

    @classmethod
    def tearDownClass(cls):
        cls.server.__exit__()

    def test_stream_of_a_chat(self):
        request = pb.GenerateRequest(request_id="e2e", chat=pb.ChatPrompt(
            messages=[pb.ChatMessage(role="user", content="Hello")]))
        request.sampling.temperature = 0
        request.stop.max_tokens = 30
        request.stop.ignore_eos = True
        answers = []
        for _ in range(2):
            messages = list(self.stub.Generate(request, timeout=30))
            self.assertEqual(messages[0].request_id, "e2e")
            self.assertEqual([m.HasField("finished") for m in messages].count(True), 1)
            finished = messages[-1].finished
            self.assertEqual(finished.reason, pb.FINISH_REASON_LENGTH)
            self.assertEqual(finished.usage.completion_tokens, 30)
            ids = [i for m in messages for i in m.token_ids]
            text = "".join(m.text for m in messages)
            decoded = self.stub.Detokenize(pb.DetokenizeRequest(token_ids=ids, skip_special=True))
            self.assertEqual(text, decoded.text)
            answers.append((ids, text))
        self.assertEqual(answers[0], answers[1])
        tokens = self.stub.Tokenize(pb.TokenizeRequest(chat=request.chat))
        self.assertEqual(finished.usage.prompt_tokens, len(tokens.token_ids))

    def test_stop_string_and_logprobs(self):
        request = text_request("once", 60)
        request.sampling.seed = 3
        request.logprobs.enabled = True
        request.logprobs.top = 4
        messages = list(self.stub.Generate(request))
        text = "".join(m.text for m in messages)
        logprobs = [p for m in messages for p in m.logprobs]
        self.assertEqual(len(logprobs), 60)
        for item in logprobs:
            self.assertLessEqual(item.logprob, 0)
            self.assertEqual(len(item.top), 4)
            self.assertGreaterEqual(item.top[0].logprob, item.logprob)
        stop = next(text[i:i + 3] for i in range(20, len(text)) if "\ufffd" not in text[i:i + 3])
        request.stop.stop.append(stop)
        messages = list(self.stub.Generate(request))
        self.assertEqual("".join(m.text for m in messages), text[:text.index(stop)])
        self.assertEqual(messages[-1].finished.reason, pb.FINISH_REASON_STOP)
        self.assertEqual(messages[-1].finished.stop, stop)

    def test_score_agrees_with_generate(self):
        request = text_request("score me", 20)
        request.sampling.temperature = 0
        request.logprobs.enabled = True
        messages = list(self.stub.Generate(request))
        ids = [i for m in messages for i in m.token_ids]
        logprobs = [p.logprob for m in messages for p in m.logprobs]
        prompt = list(self.stub.Tokenize(pb.TokenizeRequest(text="score me")).token_ids)
        scored = self.stub.Score(pb.ScoreRequest(token_ids=pb.TokenIds(ids=prompt + ids)))
        self.assertEqual(len(scored.logprobs), len(prompt) + len(ids) - 1)
        for got, expected in zip(scored.logprobs[-len(ids):], logprobs):
            self.assertAlmostEqual(got.logprob, expected, places=3)

    def test_cancel_gives_everything_back(self):
        call = self.stub.Generate(text_request("cancel me", 400))
        next(call)
        call.cancel()
        self.assertIsNotNone(self.server.wait_for_load(
            lambda load: load.running_requests == 0 and load.kv_utilization == 0))

    def test_bad_input_is_named(self):
        def sampling(**values):
            request = text_request("x", 5)
            for name, value in values.items():
                setattr(request.sampling, name, value)
            return request

        bad_token = text_request("x", 5)
        bad_token.token_ids.ids.append(1 << 30)
        bad_template = pb.GenerateRequest(chat=pb.ChatPrompt())
        cases = [
            ("sampling.top_p", sampling(top_p=1.5)),
            ("sampling.temperature", sampling(temperature=float("nan"))),
            ("sampling.top_k", sampling(top_k=-1)),
            ("stop.max_tokens", text_request("x", 0)),
            ("token_ids.ids[0]", bad_token),
            ("chat.messages", bad_template),
            ("prompt", pb.GenerateRequest()),
        ]
        for field, request in cases:
            error = code_of(self.stub.Generate(request))
            self.assertIsNotNone(error, field)
            self.assertEqual(error.code(), grpc.StatusCode.INVALID_ARGUMENT, field)
            violations = detail(error, error_details_pb2.BadRequest).field_violations
            self.assertEqual(violations[0].field, field)
        error = code_of(self.stub.Generate(text_request("x", 1 << 30)))
        self.assertEqual(error.code(), grpc.StatusCode.OUT_OF_RANGE)
        error = code_of(self.stub.Generate(text_request("x", 5, model="other")))
        self.assertEqual(error.code(), grpc.StatusCode.NOT_FOUND)

    def test_garbage_on_the_wire(self):
        raw = self.server.channel.unary_stream(
            f"/{SERVICE}/Generate", request_serializer=lambda data: data,
            response_deserializer=lambda data: data)
        self.assertIsNotNone(code_of(raw(b"\xff\xff\xff\xff garbage")))
        self.assertEqual(list(self.stub.Generate(text_request("x", 1)))[-1].finished.reason,
                         pb.FINISH_REASON_LENGTH)

    def test_reflection_by_buf(self):
        buf = pathlib.Path(sys.executable).parent / "buf"
        if not buf.exists():
            self.skipTest("buf is not installed beside this Python")

        def curl(*words):
            return subprocess.run([buf, "curl", "--http2-prior-knowledge", "--protocol", "grpc",
                                   *words], capture_output=True, text=True, timeout=60)

        url = f"http://{self.server.address}"
        listed = curl("--list-services", url).stdout.split()
        self.assertIn(SERVICE, listed)
        self.assertIn("grpc.health.v1.Health", listed)
        health = curl("-d", "{}", f"{url}/grpc.health.v1.Health/Check")
        self.assertEqual(json.loads(health.stdout), {"status": "SERVING"}, health.stderr)
        answer = curl("-d", '{"text": "hi", "stop": {"maxTokens": 3, "ignoreEos": true}}',
                      f"{url}/{SERVICE}/Generate")
        self.assertIn("FINISH_REASON_LENGTH", answer.stdout, answer.stderr)


class Pruning(unittest.TestCase):
    """By ladders of the tiny model, with refits and without."""

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory(prefix="espalier-ladders-")
        folder = pathlib.Path(cls.folder.name)
        cls.refitted, cls.plain = folder / "refitted.ladder", folder / "plain.ladder"
        for path, extra in ((cls.refitted, ()), (cls.plain, ("--compensate", "none"))):
            harness.calibrate(BINARY, MODEL, path, *extra)

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    @staticmethod
    def served(server, rung, tokens=20):
        request = text_request("the quick brown fox jumps over the lazy dog " * 3, tokens)
        request.prune.rung = rung
        finished = list(server.stub.Generate(request, timeout=30))[-1].finished
        return finished.usage.prompt_tokens - finished.usage.cached_tokens, finished.served.stages

    @staticmethod
    def metric(server, name):
        found = re.search(rf"^{re.escape(name)} (\S+)$", server.metrics(), re.M)
        return float(found[1]) if found else None

    def test_stages_of_a_calibrated_ladder(self):
        with Server(BINARY, MODEL, "--ladder", self.refitted, "--metrics-port", "0") as server:
            prompt, stages = self.served(server, 0)
            self.assertEqual((stages.full, stages.probed, stages.history), (prompt + 19, 0, 0))
            prompt, stages = self.served(server, 1)
            self.assertEqual((stages.full, stages.probed, stages.history), (0, 0, prompt + 19))
            self.assertEqual(
                self.metric(server, 'espalier_rows_by_stage_total{stage="history"}'), prompt + 19)
            self.assertEqual(self.metric(server, "espalier_probe_rows_total"), 0)

    def test_policy_prunes_while_requests_wait_and_recovers(self):
        decisions = pathlib.Path(self.folder.name) / "decisions"
        ladder = pathlib.Path(self.folder.name) / "three.ladder"
        ladder.write_text(self.refitted.read_text() + "rung 2 loss=0.3 channels=32*2\n")
        shutil.copyfile(f"{self.refitted}.gguf", f"{ladder}.gguf")
        options = ("--ladder", ladder, "--policy", "ladder", "--ttft-target", "0.02",
                   "--load-loss", "0.3", "--max-sequences", "2", "--metrics-port", "0",
                   "--decision-log", decisions, "--quality-check", "0")
        with Server(BINARY, MODEL, *options) as server:
            pruned, hardest = 0, None
            for _ in range(5):  # a burst may be over before the level is on the last rung
                calls = []
                for i in range(40):
                    request = text_request("x", 400)
                    request.prune.never = i % 4 == 0
                    calls.append((request, server.stub.Generate(request, timeout=60)))
                for request, call in calls:
                    try:
                        finished = list(call)[-1].finished
                    except grpc.RpcError as refused:  # came when the last rung was not enough
                        self.assertEqual(detail(refused, error_details_pb2.ErrorInfo).reason,
                                         "OVERLOADED")
                        self.assertIsNotNone(detail(refused, error_details_pb2.RetryInfo))
                        continue
                    served = finished.served
                    tokens = {use.rung: use.tokens for use in served.rungs}
                    self.assertEqual(sum(tokens.values()), finished.usage.completion_tokens)
                    loss = (0.1 * tokens.get(1, 0) + 0.3 * tokens.get(2, 0)) / 400
                    self.assertAlmostEqual(served.estimated_loss, loss, 5)
                    if request.prune.never:
                        self.assertEqual(tokens, {0: 400})
                    elif 1 in tokens or 2 in tokens:
                        pruned += 1
                        self.assertEqual(served.reason, "ladder: queue")
                hardest = self.metric(server, 'espalier_tokens_by_rung_total{rung="2"}')
                if (hardest or 0) > 400:
                    break
            self.assertGreater(pruned, 3)
            self.assertGreater(hardest or 0, 400)
            # Two quiet seconds later, which a report ends that comes with the next request. Where
            # the machine holds that one up for 20 ms, it is pressure again.
            for _ in range(5):
                time.sleep(2.5)
                list(server.stub.Generate(text_request("x", 8)))
                last = list(server.stub.Generate(text_request("x", 8)))[-1].finished.served
                if last.rungs[0].rung == 0 and self.metric(server, "espalier_policy_rung") == 0:
                    break
            self.assertEqual([(use.rung, use.tokens) for use in last.rungs], [(0, 8)])
            self.assertEqual(self.metric(server, "espalier_policy_rung"), 0)
            told = server.stub.GetDecisions(pb.GetDecisionsRequest(last=50)).log.splitlines()
            with self.assertRaises(grpc.RpcError) as refused:
                server.stub.GetDecisions(pb.GetDecisionsRequest(last=-1))
            violations = detail(refused.exception, error_details_pb2.BadRequest).field_violations
            self.assertEqual(violations[0].field, "last")
            self.assertEqual(server.terminate(), 0)
            self.assertIn(" policy ", server.log())
        written = decisions.read_text().splitlines()
        self.assertEqual(told, [written[0], f'{{"dropped":{len(written) - 51}}}',
                                '{"losses":[0,0.1,0.3]}', *written[-50:]])
        replay = [pathlib.Path(BINARY).with_name("espalier"), "replay", decisions, "--ladder",
                  ladder]
        again = subprocess.run(replay, capture_output=True, text=True)
        self.assertEqual(again.returncode, 0, again.stderr)
        self.assertRegex(again.stdout, r"^\d{3,} decisions, [2-9]\d* changes .*, 0 not as logged")
        lines = decisions.read_text().splitlines(keepends=True)
        kinds = ["losses", "request", "refuses_behind_s", "free_memory"]
        self.assertEqual([k for k in kinds if not any(f'"{k}":' in line for line in lines)], [])
        self.assertRegex(again.stdout, r", [1-9]\d* rungs of requests,")
        decisions.write_text(lines[0].replace('"version":3', '"version":2'))
        again = subprocess.run(replay, capture_output=True, text=True)
        self.assertIn("line 1: of another policy or version", again.stderr)
        for told, instead, error in (
                ('"rung":1,"hardest":2,', '"rung":0,"hardest":2,',
                 r"line \d+: rung 1 of 2 by queue, logged rung 0 of 2 by queue"),
                ('"wanted":1,', '"wanted":2,', r"line \d+: rung 1, logged 2"),
                (',"refuses_behind_s":0.005', "",
                 r"line \d+: .*refusing behind 0.005 s, logged rung 2 of 2 by")):
            decisions.write_text("".join(lines).replace(told, instead, 1))
            again = subprocess.run(replay, capture_output=True, text=True)
            self.assertEqual(again.returncode, 1, told)
            self.assertRegex(again.stderr, error)
        decisions.write_text("".join(lines)[:-9])
        again = subprocess.run(replay, capture_output=True, text=True)
        self.assertEqual(again.returncode, 0, again.stderr)
        self.assertRegex(again.stderr, r"warning: .*line \d+: is cut, and left out")
        decisions.write_text("no log\n")
        again = subprocess.run(replay, capture_output=True, text=True)
        self.assertIn("is no decision log", again.stderr)
        decisions.write_text("".join(lines[:5]) + '{"dropped":7}\n')
        again = subprocess.run(replay, capture_output=True, text=True)
        self.assertRegex(again.stderr, r"line 6: 7 decisions are missing")

    def test_learned_policy_is_trained_served_and_replayed(self):
        folder = pathlib.Path(self.folder.name)
        espalier = pathlib.Path(BINARY).with_name("espalier")
        ladder, costs, decisions = folder / "dqn.ladder", folder / "costs", folder / "dqn-decisions"
        ladder.write_text(self.refitted.read_text().replace(
            "rung 0 ", "rung 0 kv_bytes=64 ") + "rung 2 loss=0.3 channels=32*2\n")
        shutil.copyfile(f"{self.refitted}.gguf", f"{ladder}.gguf")
        costs.write_text("espalier-costs 1\n" + "".join(
            f"rung {rung} fixed={18000 - 6000 * rung} decode=1800 prefill=800\n" for rung in range(3)))
        simulated = ("--ladder", ladder, "--costs", costs, "--kv-memory", "0.1")
        report = json.loads(subprocess.run(
            [espalier, "simulate", *simulated, "--policy", "fixed:2", "--rate", "2", "--duration",
             "5", "--json"], check=True, capture_output=True).stdout)
        self.assertEqual(report["rung_tokens"][:2], [0, 0])
        self.assertAlmostEqual(report["told_loss"], 0.3, 5)
        network = folder / "dqn.dqn"  # beside the ladder: found there
        for path in (network, folder / "again.dqn"):
            subprocess.run([espalier, "train", "--task", "serve", *simulated, "--episodes", "6",
                            "--traces", "2", "--figures", "", "--out", path], check=True,
                           capture_output=True)
        self.assertEqual(network.read_bytes(), (folder / "again.dqn").read_bytes())
        told = subprocess.run(
            [espalier, "simulate", *simulated, "--policy", "dqn", "--load-loss", "0.3", "--rate",
             "2", "--duration", "5"], check=True, capture_output=True, text=True).stderr
        self.assertRegex(told, r"warning: .*dqn\.dqn was trained for --load-loss 0\.2, not 0\.3")
        # Another load loss than it was trained for: a warning, and replay knows of it, too.
        options = ("--ladder", ladder, "--policy", "dqn", "--ttft-target", "0.02", "--load-loss",
                   "0.3", "--max-sequences", "2", "--decision-log", decisions)
        with Server(BINARY, MODEL, *options) as server:
            calls = [server.stub.Generate(text_request("x", 200), timeout=60) for _ in range(12)]
            for call in calls:
                try:
                    self.assertEqual(list(call)[-1].finished.usage.completion_tokens, 200)
                except grpc.RpcError as refused:
                    self.assertEqual(detail(refused, error_details_pb2.ErrorInfo).reason,
                                     "OVERLOADED")
            self.assertEqual(server.terminate(), 0)
            self.assertRegex(server.log(), r"another --load-loss .*trained_for=0\.2 "
                             r"served_with=0\.3")
        replay = [espalier, "replay", decisions, "--ladder", ladder]
        again = subprocess.run(replay, capture_output=True, text=True)
        self.assertEqual(again.returncode, 0, again.stderr)
        self.assertIn(", 0 not as logged", again.stdout)
        lines = decisions.read_text()
        self.assertIn('"scores":[', lines)
        decisions.write_text(lines.replace('"scores":[', '"scores":[9,', 1))
        again = subprocess.run(replay, capture_output=True, text=True)
        self.assertRegex(again.stderr, r"line \d+: scores")
        changed = bytearray(network.read_bytes())
        changed[200] ^= 1
        network.write_bytes(changed)
        refused = subprocess.run(
            [BINARY, "--model", MODEL, "--port", "0", *map(str, options)], capture_output=True,
            text=True, timeout=30)
        self.assertEqual(refused.returncode, 1)
        self.assertIn("dqn.dqn: its checksum is of other bytes", refused.stderr + refused.stdout)

    def test_a_rung_that_loses_more_than_told_is_served_no_more(self):
        ladder = pathlib.Path(self.folder.name) / "lies.ladder"
        ladder.write_text("espalier-ladder 1\nmodel layers=2 heads=4 channels=96\n"
                          "rung 0 loss=0\nrung 1 loss=0 channels=32*2\n")
        shutil.copyfile(f"{self.plain}.gguf", f"{ladder}.gguf")
        with Server(BINARY, MODEL, "--ladder", ladder, "--policy", "fixed:1", "--metrics-port", "0",
                    "--quality-check", "1", "--quality-bound", "0") as server:
            self.assertEqual(self.metric(server, "espalier_hardest_rung"), 1)
            with self.assertRaises(grpc.RpcError) as refused:
                server.stub.GetDecisions(pb.GetDecisionsRequest())
            self.assertEqual(refused.exception.code(), grpc.StatusCode.FAILED_PRECONDITION)
            # What the full model writes, it finds likelier than the pruned one does.
            request = text_request("x", 250)
            request.prune.never = True
            bounded = text_request("x", 4)
            bounded.prune.max_quality_loss = 0
            bounded.prune.rung = 1
            served = list(server.stub.Generate(bounded, timeout=30))[-1].finished.served
            self.assertEqual((served.rungs[0].rung, served.estimated_loss), (1, 0))
            written = pb.GenerateRequest()
            for part in server.stub.Generate(request, timeout=30):
                written.token_ids.ids.extend(part.token_ids)
            written.stop.max_tokens = 4
            deadline = time.monotonic() + 60
            while self.metric(server, "espalier_hardest_rung") == 1:
                self.assertLess(time.monotonic(), deadline, server.metrics())
                list(server.stub.Generate(written, timeout=30))
                time.sleep(0.5)  # two passes, each after a fifth of a second in which nothing is done
            self.assertGreater(self.metric(
                server, 'espalier_measured_loss_nats{of="prompts",rung="1"}'), 0)
            finished = list(server.stub.Generate(text_request("x", 4), timeout=30))[-1].finished
            self.assertEqual(finished.served.rungs[0].rung, 0)
            self.assertIn("quality", finished.served.reason)
            # Bounds are held against what it was found to lose, which is what others are told.
            served = list(server.stub.Generate(bounded, timeout=30))[-1].finished.served
            self.assertEqual((served.rungs[0].rung, served.estimated_loss), (0, 0))
            bounded.prune.ClearField("max_quality_loss")
            served = list(server.stub.Generate(bounded, timeout=30))[-1].finished.served
            self.assertEqual(served.rungs[0].rung, 1)
            self.assertGreater(served.estimated_loss, 0)

    def test_a_decision_log_is_written_over_no_other_file(self):
        ladder = pathlib.Path(self.folder.name) / "kept.ladder"
        ladder.write_text(self.refitted.read_text())
        shutil.copyfile(f"{self.refitted}.gguf", f"{ladder}.gguf")
        done = subprocess.run([BINARY, "--model", MODEL, "--port", "0", "--metrics-port", "-1",
                               "--ladder", ladder, "--policy", "ladder", "--decision-log", ladder],
                              capture_output=True, text=True, timeout=60)
        self.assertEqual(done.returncode, 1)
        self.assertIn("kept.ladder: is no decision log", done.stdout + done.stderr)
        self.assertEqual(ladder.read_text(), self.refitted.read_text())

    def test_shadow_policy_serves_the_full_model(self):
        options = ("--ladder", self.refitted, "--policy", "ladder", "--policy-mode", "shadow",
                   "--ttft-target", "0.001", "--max-sequences", "1")
        with Server(BINARY, MODEL, *options) as server:
            calls = [server.stub.Generate(text_request("x", 200), timeout=60) for _ in range(12)]
            served = [list(call)[-1].finished.served for call in calls]
            self.assertEqual({(use.rung, use.tokens) for each in served for use in each.rungs},
                             {(0, 200)})
            self.assertRegex(server.log(), r"policy rung=1 was=0 reason=queue")

    def test_probe_ranks_and_remembers(self):
        history = pathlib.Path(self.folder.name) / "history.gguf"
        heads = pathlib.Path(self.folder.name) / "heads.ladder"
        harness.calibrate(BINARY, MODEL, heads, "--compensate", "none", rung="0.6h0.5",
                          kept="heads=2*2 channels=64*2")
        self.probe_ranks_and_remembers(self.plain, history, sites=1)
        # What was learned without heads is of use with them.
        self.probe_ranks_and_remembers(heads, history, sites=2, starts=("history read",))

    def probe_ranks_and_remembers(self, ladder, history, sites,
                                  starts=("history begins anew", "history read")):
        options = ("--ladder", ladder, "--probe", "spread", "--probe-least-rows", "8",
                   "--probe-refresh", "5", "--probe-whole", "7", "--history-file", history,
                   "--metrics-port", "0")
        for start in starts:
            with Server(BINARY, MODEL, *options) as server:
                self.assertIn(start, server.log())
                prompt, stages = self.served(server, 1)
                # Of 19 decode steps two keep all.
                self.assertEqual((stages.full, stages.probed, stages.history), (2, prompt, 17))
                self.assertGreater(self.metric(server, "espalier_probe_rows_total"), 0)
                # One a layer's site in the prefill step, and one every five of 19 decode steps, as
                # soon as a whole one has shown what had left.
                rankings = self.metric(server, "espalier_rankings_total")
                self.assertEqual(rankings % (2 * sites), 0)
                self.assertGreater(rankings, 2 * 2 * sites)
                self.assertIsNotNone(self.metric(server, "espalier_ranking_age_steps"))
                self.assertGreater(
                    self.metric(server, 'espalier_step_phase_seconds_total{phase="probe"}'), 0)
                self.assertEqual(server.terminate(), 0)
            self.assertTrue(history.exists())

    def test_probe_refuses_a_history_that_is_not_there_or_cannot_be_kept(self):
        folder = pathlib.Path(self.folder.name)
        for options, told in (
                (("--probe", "spread", "--history-file", folder / "no" / "history"),
                 "--history-file: "),
                (("--probe", "spread", "--history", "frozen", "--history-file", folder / "typo"),
                 f"{folder / 'typo'}: "),
                (("--history-file", folder / "h"), "--history-file: only a --probe")):
            done = subprocess.run([BINARY, "--model", MODEL, "--port", "0", "--ladder", self.plain,
                                   *options], capture_output=True, text=True, timeout=60)
            self.assertNotEqual(done.returncode, 0)
            self.assertIn(told, done.stderr)

    def test_probe_refuses_weights_of_other_channels(self):
        done = subprocess.run(
            [BINARY, "--model", MODEL, "--port", "0", "--ladder", self.refitted, "--probe", "all"],
            capture_output=True, text=True, timeout=60)
        self.assertEqual(done.returncode, 1)
        self.assertIn("calibrate --compensate none", done.stderr)

    def test_dashboard_names_what_is_there(self):
        board = (harness.ROOT / "deploy/grafana/espalier.json").read_text()
        named = set(re.findall(r"\b(?:espalier|vllm:)[a-z_:]*[a-z]\b(?=\{|, job)", board))
        self.assertGreater(len(named), 25)
        with Server(BINARY, MODEL, "--ladder", self.plain, "--metrics-port", "0",
                    "--quality-check", "1") as server:
            self.served(server, 1)
            while not self.metric(server, "espalier_quality_checks_total"):
                time.sleep(0.1)
            there = set(re.findall(r"^([\w:]+)(?:\{| )", server.metrics(), re.M))
        self.assertEqual(named - there, set())


class Lifecycle(unittest.TestCase):
    def test_deadline_in_the_queue(self):
        with Server(BINARY, MODEL, "--max-sequences", "1") as server:
            holding = threading.Event()
            stop = threading.Event()

            def hold():  # the one place, again and again
                while not stop.is_set():
                    for _ in server.stub.Generate(text_request("long", 440)):
                        holding.set()

            holder = threading.Thread(target=hold)
            holder.start()
            holding.wait(20)
            began = time.monotonic()
            error = code_of(server.stub.Generate(text_request("late", 400), timeout=0.005))
            self.assertEqual(error.code(), grpc.StatusCode.DEADLINE_EXCEEDED)
            self.assertLess(time.monotonic() - began, 5)
            stop.set()
            holder.join()
            self.assertIsNotNone(server.wait_for_load(lambda load: load.kv_utilization == 0))

    def test_health_watch_across_a_drain(self):
        with Server(BINARY, MODEL) as server:
            watch = harness.watch_health(server.channel, SERVICE)
            self.assertEqual(next(watch), SERVING)
            call = server.stub.Generate(text_request("still running", 440))
            next(call)
            exit_status = []
            stopper = threading.Thread(target=lambda: exit_status.append(server.terminate()))
            stopper.start()
            self.assertEqual(next(watch), NOT_SERVING)
            last = list(call)[-1]
            self.assertEqual(last.finished.usage.completion_tokens, 440)
            stopper.join()
            self.assertEqual(exit_status, [0], server.log())

    def test_drain_waits_for_a_slow_reader(self):
        with Server(BINARY, MODEL) as server:
            # More than a small window holds, less than the server buffers.
            channel = grpc.insecure_channel(server.address, [
                ("grpc.http2.lookahead_bytes", 16384), ("grpc.http2.bdp_probe", 0)])
            request = text_request("slowly", 440)
            request.logprobs.enabled = True
            request.logprobs.top = 20
            call = rpc.EspalierServiceStub(channel).Generate(request)
            tokens = len(next(call).token_ids)
            self.assertIsNotNone(server.wait_for_load(lambda load: load.running_requests == 0))
            server.process.send_signal(signal.SIGTERM)
            time.sleep(2)
            messages = list(call)
            self.assertEqual(tokens + sum(len(m.token_ids) for m in messages), 440)
            self.assertEqual(messages[-1].finished.reason, pb.FINISH_REASON_LENGTH)
            self.assertEqual(server.process.wait(20), 0, server.log())
            channel.close()

    def test_drain_refuses_the_new(self):
        # Sanitizers on a slow machine need more than the default's 30 s for all of them.
        with Server(BINARY, MODEL, "--max-sequences", "2", "--drain-timeout", "300") as server:
            # Enough behind each other to keep the drain going for a while.
            calls = [server.stub.Generate(text_request(f"{i}", 440)) for i in range(120)]
            server.wait_for_load(lambda load: load.running_requests > 0)
            other = grpc.insecure_channel(server.address)
            stub = rpc.EspalierServiceStub(other)
            stub.GetModel(pb.GetModelRequest())
            server.process.send_signal(signal.SIGTERM)
            self.assertIsNotNone(server.wait_for_load(lambda load: load.draining))
            load = server.load()
            refused = code_of(stub.Generate(text_request("new", 1)))
            self.assertEqual(refused.code(), grpc.StatusCode.UNAVAILABLE)
            self.assertIsNotNone(detail(refused, error_details_pb2.RetryInfo))
            served = 0
            for call in calls:
                try:
                    self.assertEqual(list(call)[-1].finished.usage.completion_tokens, 440)
                    served += 1
                except grpc.RpcError as error:  # came after the signal, on a slow machine
                    self.assertEqual(error.code(), grpc.StatusCode.UNAVAILABLE)
            self.assertGreaterEqual(served, load.running_requests + load.waiting_requests)
            self.assertGreater(served, 0)
            self.assertEqual(server.process.wait(60), 0, server.log())

    def test_second_signal_ends_at_once(self):
        with Server(BINARY, MODEL, "--max-sequences", "1") as server:
            calls = [server.stub.Generate(text_request(f"{i}", 440)) for i in range(200)]
            server.wait_for_load(lambda load: load.running_requests > 0)
            server.process.send_signal(signal.SIGTERM)
            server.wait_for_load(lambda load: load.draining)
            server.process.send_signal(signal.SIGTERM)
            self.assertEqual(server.process.wait(5), 128 + signal.SIGTERM)
            for call in calls:
                call.cancel()

    def test_what_cannot_start_says_why(self):
        def run(*words):
            done = subprocess.run([BINARY, *words], capture_output=True, text=True, timeout=60)
            return done.returncode, done.stderr.strip()

        status, error = run("--model", "/nowhere/model.gguf", "--port", "0", "--metrics-port", "-1")
        self.assertEqual(status, 1)
        self.assertIn("/nowhere/model.gguf", error)
        status, error = run("--model", MODEL, "--max-waiting", "none")
        self.assertEqual(status, 2)
        self.assertIn("max-waiting", error)
        self.assertEqual(len(error.splitlines()), 1)
        with Server(BINARY, MODEL) as server:
            status, error = run("--model", MODEL, "--port", str(server.port))
            self.assertEqual(status, 1)
            self.assertIn(str(server.port), error)

    def test_tokens_of_the_warm_up_are_nobodys(self):
        with Server(BINARY, MODEL, "--metrics-port", "0") as server:
            def generated():
                return float(re.search(r"^vllm:generation_tokens_total\{.*\} (\S+)$",
                                       server.metrics(), re.MULTILINE)[1])

            self.assertEqual(generated(), 0)
            list(server.stub.Generate(text_request("x", 5)))
            until = time.monotonic() + 10  # the step is told after its tokens
            while generated() < 5 and time.monotonic() < until:
                time.sleep(0.01)
            self.assertEqual(generated(), 5)

    def test_kill_half_of_the_clients(self):
        clients, killed = 32, 16
        with Server(BINARY, MODEL, "--max-sequences", "64") as server, \
                tempfile.NamedTemporaryFile("w", suffix=".json") as expected:
            # Alone, one after the other: what each client must get in company.
            alone = [[i for m in server.stub.Generate(stream_clients.request_of(index))
                      for i in m.token_ids] for index in range(clients)]
            json.dump(alone, expected)
            expected.flush()
            nest = subprocess.Popen(
                [sys.executable, stream_clients.__file__, server.address, expected.name,
                 str(clients)], stdout=subprocess.PIPE, text=True)
            try:
                pids, right, wrong = {}, {}, []
                while len(pids) < clients:
                    self.read_line(nest, pids, right, wrong)
                for index in range(killed):
                    os.kill(pids[index], signal.SIGKILL)
                gone = time.monotonic()
                took = server.wait_for_load(lambda load: load.running_requests <= clients - killed)
                self.assertIsNotNone(took, "requests of dead clients go on")
                print(f"kill -9 of {killed} of {clients}: theirs are gone after "
                      f"{1e3 * (time.monotonic() - gone):.0f} ms", flush=True)
                # Only the survivors' pages are in use: at most what their contexts take.
                pages_each = 2 * -(-(440 + 32) // 16)
                total = self.total_pages(server)
                self.assertLessEqual(server.load().kv_utilization,
                                     (clients - killed) * pages_each / total)
                survivors = range(killed, clients)
                before = {index: right.get(index, 0) for index in survivors}
                while any(right.get(index, 0) < before[index] + 2 for index in survivors):
                    self.read_line(nest, pids, right, wrong)
                self.assertEqual(wrong, [])
            finally:
                for pid in pids.values():
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        pass
                nest.stdout.close()
                nest.wait(20)
            self.assertIsNotNone(server.wait_for_load(lambda load: load.kv_utilization == 0))

    @staticmethod
    def total_pages(server):
        return int(server.log().split("kv_pages=")[1].split()[0])

    def read_line(self, nest, pids, right, wrong):
        words = nest.stdout.readline().split()
        self.assertTrue(words, "the clients ended")
        if words[0] == "streaming":
            pids[int(words[1])] = int(words[2])
        elif words[0] == "right":
            right[int(words[1])] = right.get(int(words[1]), 0) + 1
        else:
            wrong.append(words)


if __name__ == "__main__":
    unittest.main(verbosity=2)
