#!/usr/bin/env python3
"""What live answers' told loss is worth: texts scored at whatever rung the policy gives them while
others load the server, and again in full once it is calm.

usage, with the Python of build/venv: live_loss.py ADDRESS SECONDS TEXT...; prints a JSON object:
told and measured, nats per token above the full model, means over texts of one length, the standard
error of measured, and tokens by rung. A text that is refused is tried again later, as callers would.
"""

import json
import pathlib
import statistics
import sys
import time

import grpc

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "e2e"))
from harness import pb, rpc  # noqa: E402

TOKENS = 192  # of a text
EVERY = 0.25  # seconds between texts: a small part of the load


def windows(stub, paths):
    """Token ids, kinds of text in turns."""
    kinds = []
    for path in paths:
        ids = stub.Tokenize(pb.TokenizeRequest(text=pathlib.Path(path).read_text())).token_ids
        kinds.append([ids[i:i + TOKENS] for i in range(0, len(ids) - TOKENS + 1, TOKENS)])
    return [kind[i] for i in range(max(map(len, kinds))) for kind in kinds if i < len(kind)]


def score(stub, ids, never):
    """None if it is refused."""
    request = pb.ScoreRequest(token_ids=pb.TokenIds(ids=ids))
    request.prune.never = never
    try:
        return stub.Score(request, timeout=60)
    except grpc.RpcError as error:
        if error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise
    return None


def main():
    address, seconds, *paths = sys.argv[1:]
    stub = rpc.EspalierServiceStub(grpc.insecure_channel(address))
    texts, live = windows(stub, paths), []
    end = time.monotonic() + float(seconds)
    while texts and time.monotonic() < end:
        began = time.monotonic()
        answer = score(stub, texts[0], False)
        if answer is not None:
            live.append((texts.pop(0), answer))
        time.sleep(max(0, began + EVERY - time.monotonic()))
    told, measured, rungs = [], [], {}
    for ids, answer in live:
        while (full := score(stub, ids, True)) is None:
            time.sleep(1)  # the last of the load still run
        assert full.served.estimated_loss == 0
        told.append(answer.served.estimated_loss)
        measured.append((full.total_logprob - answer.total_logprob) / (len(ids) - 1))
        rung = answer.served.rungs[0].rung if answer.served.rungs else 0
        rungs[rung] = rungs.get(rung, 0) + len(ids) - 1
    error = statistics.stdev(measured) / len(measured) ** 0.5 if len(measured) > 1 else 0
    print(json.dumps({"told": statistics.fmean(told), "measured": statistics.fmean(measured),
                      "standard_error": error, "texts": len(told), "rung_tokens": rungs}))


if __name__ == "__main__":
    main()
