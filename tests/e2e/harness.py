"""Starts the real espalier-server and talks to it as a stranger would: by the shipped protos only.

Used as: python X_test.py SERVER_BINARY MODEL, from `make test` with the Python of requirements.txt.
"""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request

import grpc
import grpc_tools
from grpc_tools import protoc

ROOT = pathlib.Path(__file__).resolve().parents[2]
_stubs = tempfile.TemporaryDirectory(prefix="espalier-stubs-")
_wellknown = pathlib.Path(grpc_tools.__file__).parent / "_proto"
if protoc.main(["protoc", f"-I{ROOT / 'proto'}", f"-I{_wellknown}", f"--python_out={_stubs.name}",
                f"--grpc_python_out={_stubs.name}", "espalier/v1/espalier.proto",
                "google/rpc/status.proto", "google/rpc/error_details.proto"]) != 0:
    sys.exit("protoc failed")
sys.path.insert(0, _stubs.name)
from espalier.v1 import espalier_pb2 as pb  # noqa: E402
from espalier.v1 import espalier_pb2_grpc as rpc  # noqa: E402
from google.rpc import error_details_pb2, status_pb2  # noqa: E402

SERVING, NOT_SERVING = 1, 2
SERVICE = "espalier.v1.EspalierService"


def _health_call(multi, channel, service, **kwargs):
    # HealthCheckRequest {string service = 1}, HealthCheckResponse {enum status = 1}: too small to
    # need stubs, whose package would hide the grpc module.
    name = service.encode()
    return multi(request_serializer=lambda _: bytes([10, len(name)]) + name if name else b"",
                 response_deserializer=lambda data: data[1] if data else 0)(None, **kwargs)


def check_health(channel, service=""):
    return _health_call(lambda **k: channel.unary_unary("/grpc.health.v1.Health/Check", **k),
                        channel, service, timeout=5)


def watch_health(channel, service=""):
    return _health_call(lambda **k: channel.unary_stream("/grpc.health.v1.Health/Watch", **k),
                        channel, service, timeout=60)


def detail(error, kind):
    """The google.rpc detail of type `kind` of an RpcError, or None."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for item in status_pb2.Status.FromString(value).details:
                found = kind()
                if item.Unpack(found):
                    return found
    return None


def calibrate(binary, model, path, *options, rung="0.6", kept="channels=64*2"):
    """A ladder of rungs 0 and 1 of the tiny model at `path`; its losses mean nothing."""
    done = subprocess.run(
        [pathlib.Path(binary).with_name("espalier"), "calibrate", "--model", model, "--text",
         ROOT / "tests/golden/data/prose.txt", "--tokens", "3000", "--dense-layers", "0",
         "--last-dense-layers", "0", "--slope", "0", "--rungs", rung, "--out", path, *options],
        capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"espalier calibrate: {done.stderr}")
    # So small a model may be timed no faster pruned, and calibration then leaves the rung out.
    path.write_text("espalier-ladder 1\nmodel layers=2 heads=4 channels=96\n"
                    f"rung 0 loss=0\nrung 1 loss=0.1 {kept}\n")


def text_request(text, max_tokens, **fields):
    request = pb.GenerateRequest(text=text, **fields)
    request.stop.max_tokens = max_tokens
    request.stop.ignore_eos = True
    return request


class Server:
    """A running server; `with Server(binary, model, "--max-waiting", "4") as server:`."""

    def __init__(self, binary, model, *options, ready=True):
        self._folder = tempfile.TemporaryDirectory(prefix="espalier-e2e-")
        folder = pathlib.Path(self._folder.name)
        self.log_path = folder / "log"
        port_file = folder / "port"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("ESPALIER_")}
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                [binary, "--model", model, "--port", "0", "--port-file", port_file,
                 *([] if "--metrics-port" in options else ["--metrics-port", "-1"]), *options],
                stdout=log, stderr=log, env=environment)
        self._wait(port_file.exists, "no port")
        self.port = int(port_file.read_text())
        self.address = f"127.0.0.1:{self.port}"
        self.channel = grpc.insecure_channel(self.address)
        self.stub = rpc.EspalierServiceStub(self.channel)
        if ready:
            self._wait(self._serving, "not SERVING")

    def _serving(self):
        try:
            return check_health(self.channel, SERVICE) == SERVING
        except grpc.RpcError:
            self._tell_if_ended()
            raise

    def _tell_if_ended(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)  # a sanitizer's report takes a while
            print(f"the server ended by {self.process.returncode}:\n{self.log()}", file=sys.stderr)

    def _wait(self, condition, complaint, seconds=60):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if condition():
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.01)
        self.kill()
        raise RuntimeError(f"{complaint}: {self.log()}")

    def log(self):
        return self.log_path.read_text(errors="replace")

    def metrics(self):
        """/metrics of a server with --metrics-port 0, in Prometheus' text format."""
        port = re.search(r"metrics.*port\D+(\d+)", self.log())[1]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            return answer.read().decode()

    def load(self):
        return self.stub.GetLoad(pb.GetLoadRequest(), timeout=10)

    def wait_for_load(self, condition, seconds=20):
        """Polls GetLoad until it fits; the seconds that took, or None."""
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            if condition(self.load()):
                return time.monotonic() - began
            time.sleep(0.002)
        return None

    def resident_bytes(self):
        for line in pathlib.Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        return 0

    def terminate(self, seconds=40):
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)

    def __enter__(self):
        return self

    def __exit__(self, failure=None, *unused):
        if failure and (issubclass(failure, grpc.RpcError) or self.process.poll() is not None):
            self._tell_if_ended()
        with contextlib.suppress(Exception):
            self.channel.close()
        self.kill()
        self._folder.cleanup()


def arguments():
    """(server binary, model) from the command line, which is left to unittest otherwise."""
    binary, model = sys.argv[1:3]
    del sys.argv[1:3]
    return binary, model
