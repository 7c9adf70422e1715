"""
Does a server with half of the experts resident keep up with transformers' own with all of them?

Both serve the model that ships over HTTP with continuous batching and stay up together; the same
clients ask now the one, now the other, in rounds of half a minute, so that whatever else the
machine does meets both. A client sends prompts of mixed lengths one after another and reads each
stream to its end. Bad news would be an error, memory that grows by more than 2 % after the warm-up,
clients that are served unequally (the slowest over the mean), or less than .9 of transformers'
tokens a second. The floor is transformers' own server: it moves no expert.

Temperature is 0, so that both write the same texts. Each computes with one thread: the clients and
the server's own loop keep the second core busy, and with two threads both were slower.
The first fifth of the rounds warms up and is not counted. Memory is read each second; its growth
is from its median in the first counted round to that in the last. Not measured: several processes
of clients (here threads of one share the two cores with the server), a GPU, a model whose experts
do not fit into memory.

    python benchmarks/serving.py [--minutes 10] [--clients 16] [--out FILE]

Minutes are those of each server.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from common import publish

from melinoe.shipped import TINY_OLMOE
from melinoe.stats import bootstrap

WORDS = "the sea was calm and the island lay before us as the ship went on".split()  # noqa: SIM905
WARM_UP = 0.2  # of the rounds
ROUND_S = 30.0
OURS, THEIRS = "melinoe, half of the experts", "transformers, all experts"


class Server:
    """A server process, and what its clients and its memory did in each round."""

    def __init__(self, name: str, port: int, command: list[str]) -> None:
        self.name, self.port = name, port
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, env=environment)
        self.memory: list[list[int]] = []
        self.rounds: list[list[Client]] = []
        self.seconds: list[float] = []

    def wait(self) -> None:
        until = time.perf_counter() + 120
        while time.perf_counter() < until and self.process.poll() is None:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                time.sleep(0.2)
        raise SystemExit(f"{self.name} did not start")

    def resident_bytes(self) -> int:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", text)
        assert found is not None
        return int(found[1]) * 1024

    def round(self, clients: int, seconds: float) -> None:
        """Let each client ask until the time is over, and finish what it has begun."""
        began = time.perf_counter()
        first = clients * len(self.rounds)
        made = [Client(self.port, first + at, began + seconds) for at in range(clients)]
        for one in made:
            one.start()
        memory = []
        while any(one.is_alive() for one in made):
            memory.append(self.resident_bytes())
            time.sleep(1.0)
        ends = [end for one in made for end, _, _ in one.done]
        self.rounds.append(made)
        self.memory.append(memory)
        self.seconds.append(max(ends, default=time.perf_counter()) - began)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def tokens_per_s(self, warm: int) -> list[float]:
        """Tokens a second of each counted round."""
        return [
            sum(tokens for one in made for _, tokens, _ in one.done) / seconds
            for made, seconds in zip(self.rounds[warm:], self.seconds[warm:], strict=True)
        ]

    def result(self, warm: int) -> dict[str, Any]:
        counted = self.rounds[warm:]
        times = [s for made in counted for one in made for _, _, s in one.done]
        rates = [  # of each client, over all counted rounds: the same seat in each
            sum(n for one in seat for _, n, _ in one.done)
            / max(1e-9, sum(s for one in seat for _, _, s in one.done))
            for seat in zip(*counted, strict=True)
        ]
        before, after = (statistics.median(self.memory[at]) for at in (warm, -1))
        errors = [error for made in self.rounds for one in made for error in one.errors]
        return {
            "server": self.name,
            "requests": len(times),
            "errors": len(errors),
            "first_error": errors[0] if errors else None,
            "tokens_per_s": bootstrap(self.tokens_per_s(warm)).to_dict(),
            "seconds_median": statistics.median(times),
            "seconds_worst": max(times),
            "slowest_client_over_mean": min(rates) / statistics.mean(rates),
            "memory_bytes": before,
            "memory_growth": after / before - 1,
            "memory_by_round_bytes": [statistics.median(one) for one in self.memory],
        }


class Client(threading.Thread):
    """Sends one request after another, and notes how long each took and how many tokens came."""

    def __init__(self, port: int, seed: int, until: float) -> None:
        super().__init__(daemon=True)
        self.port, self.until, self.random = port, until, random.Random(seed)
        self.done: list[tuple[float, int, float]] = []  # at, tokens, seconds
        self.errors: list[str] = []

    def run(self) -> None:
        while time.perf_counter() < self.until:
            words = self.random.choices(WORDS, k=self.random.choice((8, 32, 128)))
            body = {
                "model": str(TINY_OLMOE), "prompt": " ".join(words), "stream": True,
                "max_tokens": self.random.choice((16, 32, 64)), "temperature": 0,
                "stream_options": {"include_usage": True},
            }  # fmt: skip
            began, tokens = time.perf_counter(), None
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
                headers = {"content-type": "application/json"}
                connection.request("POST", "/v1/completions", json.dumps(body), headers)
                for line in connection.getresponse():
                    if b'"completion_tokens"' in line:
                        tokens = json.loads(line[6:])["usage"]["completion_tokens"]
                    elif line.startswith(b'data: {"error"'):
                        self.errors.append(line.decode())
                connection.close()
            except (OSError, http.client.HTTPException) as error:
                self.errors.append(repr(error))
            if tokens is None:
                self.errors.append("a stream ended without its usage")
            now = time.perf_counter()
            self.done.append((now, tokens or 0, now - began))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="of each server")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)  # as each server is given; the record says so
    model, python = str(TINY_OLMOE), sys.executable
    commands = {
        OURS: [
            python, "-m", "melinoe", "serve", model, "--slots", "16", "--requests", "16",
            "--name", model, "--port",
        ],
        THEIRS: [
            str(Path(python).parent / "transformers"), "serve", model, "--continuous-batching",
            "--device", "cpu", "--cb-num-blocks", "64", "--cb-max-batch-tokens", "256", "--port",
        ],
    }  # fmt: skip
    servers = [
        Server(name, 8731 + at, [*command, str(8731 + at)])
        for at, (name, command) in enumerate(commands.items())
    ]
    rounds = max(3, round(60 * options.minutes / ROUND_S))
    seconds, warm = 60 * options.minutes / rounds, max(1, round(WARM_UP * rounds))
    try:
        for one in servers:
            one.wait()
            one.round(1, 0.1)  # loads what is loaded lazily
            for kept in (one.rounds, one.memory, one.seconds):
                kept.clear()
        for number in range(rounds):
            # Each is first as often as second.
            for one in servers if number % 2 == 0 else reversed(servers):
                one.round(options.clients, seconds)
    finally:
        for one in servers:
            one.stop()
    ours, theirs = (one.tokens_per_s(warm) for one in servers)
    ratio = bootstrap([one / other for one, other in zip(ours, theirs, strict=True)])
    counted = [one.result(warm) for one in servers]
    result = {
        "benchmark": "serving",
        "title": "A server with half of the experts beside transformers' own with all of them",
        "minutes": options.minutes,
        "clients": options.clients,
        "result": [
            {
                "server": one["server"],
                "requests": one["requests"],
                "errors": one["errors"],
                "tokens a second": one["tokens_per_s"],
                "over transformers'": ratio.to_dict() if one is counted[0] else 1,
                "slowest client over mean": one["slowest_client_over_mean"],
                "memory (GiB)": one["memory_bytes"] / (1 << 30),
                "memory growth": one["memory_growth"],
            }
            for one in counted
        ],
        "servers": counted,
    }
    publish(result, options.out)


if __name__ == "__main__":
    main()
