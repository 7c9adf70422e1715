"""
Does a server with half of the experts resident keep up with transformers' own with all of them?

Both serve the model that ships over HTTP with continuous batching, one after the other, to the same
clients: each sends prompts of mixed lengths one after another and reads the streams to their end.
Bad news would be an error, memory that grows by more than 2 % after the warm-up, clients that are
served unequally (the slowest over the mean), or less than .9 of transformers' tokens a second. The
floor is transformers' own server: it moves no expert.

Ours samples for each request by itself in Python; theirs shares the settings of the first request.
Not measured: several processes of clients (here threads of one share the two cores with the
server), a GPU, a model whose experts do not fit into memory.

    python benchmarks/serving.py [--minutes 10] [--clients 16] [--out FILE]
"""

from __future__ import annotations

import argparse
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
import urllib.request
from pathlib import Path
from typing import Any

from common import publish

from melinoe.shipped import TINY_OLMOE

WORDS = "the sea was calm and the island lay before us as the ship went on".split()  # noqa: SIM905
WARM_UP = 0.2  # of the time
PORT = 8731


def commands(model: str) -> dict[str, list[str]]:
    """Each server's command line."""
    python = sys.executable
    return {
        "melinoe, half of the experts": [
            python, "-m", "melinoe", "serve", model, "--port", str(PORT), "--slots", "16",
            "--requests", "16", "--waiting", "64", "--name", model,
        ],
        "transformers, all experts": [
            str(Path(python).parent / "transformers"), "serve", model, "--port", str(PORT),
            "--continuous-batching", "--device", "cpu", "--cb-num-blocks", "64",
            "--cb-max-batch-tokens", "256",
        ],
    }  # fmt: skip


def memory(pid: int) -> int:
    """Resident bytes of a process."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


class Client(threading.Thread):
    """Sends one request after another, and notes how long each took and how many tokens came."""

    def __init__(self, model: str, seed: int, until: float) -> None:
        super().__init__(daemon=True)
        self.model, self.until, self.random = model, until, random.Random(seed)
        self.done: list[tuple[float, int, float]] = []  # at, tokens, seconds
        self.errors: list[str] = []

    def run(self) -> None:
        while time.perf_counter() < self.until:
            words = self.random.choices(WORDS, k=self.random.choice((8, 32, 128)))
            body = {
                "model": self.model, "prompt": " ".join(words), "stream": True,
                "max_tokens": self.random.choice((16, 32, 64)),
            }  # fmt: skip
            began, tokens = time.perf_counter(), 0
            request = urllib.request.Request(
                f"http://127.0.0.1:{PORT}/v1/completions", json.dumps(body).encode(),
                {"content-type": "application/json"},
            )  # fmt: skip
            try:
                with urllib.request.urlopen(request, timeout=120) as answer:
                    for line in answer:
                        if line.startswith(b'data: {"error"'):
                            self.errors.append(line.decode())
                        tokens += line.startswith(b"data: {")
            except OSError as error:
                self.errors.append(str(error))
            now = time.perf_counter()
            self.done.append((now, tokens, now - began))


def measure(command: list[str], model: str, clients: int, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryFile("w") as log:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            wait(server)
            first = Client(model, 0, time.perf_counter() + 0.1)  # loads what is loaded lazily
            first.run()
            start = time.perf_counter()
            warm, end = start + WARM_UP * seconds, start + seconds
            made = [Client(model, seed, end) for seed in range(1, clients + 1)]
            for one in made:
                one.start()
            time.sleep(max(0.0, warm - time.perf_counter()))
            after_warm_up = memory(server.pid)
            for one in made:
                one.join(seconds + 150)
            grown = memory(server.pid) / after_warm_up - 1
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
    counted = [[one for one in client.done if one[0] >= warm] for client in made]
    tokens = [sum(n for _, n, _ in each) for each in counted]
    times = [s for each in counted for _, _, s in each]
    rate = [sum(n for _, n, _ in each) / max(1e-9, sum(s for *_, s in each)) for each in counted]
    return {
        "requests": len(times),
        "errors": sum(len(one.errors) for one in (first, *made)),
        "first_error": next((e for one in made for e in one.errors), None),
        "tokens_per_s": sum(tokens) / (max(one[0] for each in counted for one in each) - warm),
        "seconds_median": statistics.median(times),
        "seconds_worst": max(times),
        "slowest_client_over_mean": min(rate) / statistics.mean(rate),
        "memory_bytes": after_warm_up,
        "memory_growth": grown,
    }


def wait(server: subprocess.Popen) -> None:
    until = time.perf_counter() + 120
    while time.perf_counter() < until and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=2)
            return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("a server did not start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = str(TINY_OLMOE)
    rows = {
        name: measure(command, model, arguments.clients, 60 * arguments.minutes)
        for name, command in commands(model).items()
    }
    ours, theirs = rows.values()
    result = {
        "benchmark": "serving",
        "minutes": arguments.minutes,
        "clients": arguments.clients,
        "tokens_per_s_over_transformers": ours["tokens_per_s"] / theirs["tokens_per_s"],
        "results": [{"server": name, **row} for name, row in rows.items()],
    }
    publish(result, arguments.out)


if __name__ == "__main__":
    main()
