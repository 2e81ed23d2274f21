"""Many client processes that stream answers for ever: python stream_clients.py ADDRESS EXPECTED COUNT.

EXPECTED is a JSON file: the ids that prompt i must be answered with. Client i writes a line to
standard output when its first token comes ("streaming i PID") and when an answer is complete
("right i" or "wrong i"). SIGTERM: each ends after its answer.
"""

import json
import os
import signal
import sys

import grpc

from harness import rpc, text_request


def request_of(index):
    request = text_request(f"client {index} says", 440)
    request.sampling.seed = index
    request.sampling.temperature = 0.9
    return request


def run(index, address, expected):
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    # One connection each, as separate clients have.
    stub = rpc.EspalierServiceStub(grpc.insecure_channel(address))
    told = False
    while not stopping:
        ids = []
        for message in stub.Generate(request_of(index)):
            ids += message.token_ids
            if not told:
                told = True
                os.write(1, f"streaming {index} {os.getpid()}\n".encode())
        os.write(1, f"{'right' if ids == expected else 'wrong'} {index}\n".encode())


def main():
    address, expected, count = sys.argv[1], json.load(open(sys.argv[2])), int(sys.argv[3])
    children = []
    for index in range(count):
        child = os.fork()  # before any channel is made: gRPC has no threads yet
        if child == 0:
            try:
                run(index, address, expected[index])
            finally:
                os._exit(0)
        children.append(child)
    signal.signal(signal.SIGTERM, lambda *_: None)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
