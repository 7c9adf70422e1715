"""What a server withstands: a flood, a store that cannot be read, and its own violent end."""

import json
import re
import shutil
import socket
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from serving import Server, ask

from melinoe.shipped import TINY_OLMOE

LONG = {"prompt": "A long text", "max_tokens": 64, "stream": True, "logit_bias": {"0": -100}}


def post(server, body, read=True):
    """Send a request over a socket of its own; gives the status line, or None unread."""
    host, port = server.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = (f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
            f"connection: close\r\ncontent-length: {len(data)}\r\n\r\n")  # fmt: skip
    connection = socket.create_connection((host, int(port)), timeout=120)
    connection.sendall(head.encode() + data)
    if not read:
        return connection
    answer = b""
    while got := connection.recv(65536):
        answer += got
    connection.close()
    return answer.decode()


def settled(server, seconds=300):
    """Wait until nothing runs and nothing waits."""
    until = time.monotonic() + seconds
    while True:
        state = json.loads(ask(f"{server.url}/status")[2])
        if state["running"] == state["waiting"] == 0:
            return
        assert time.monotonic() < until, state
        time.sleep(0.1)


def resident_bytes(server):
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", status)[1])


def test_a_flood_is_answered_and_leaves_nothing_behind(server):
    """Of 300 requests at once a third vanishes; each other gets a text, or 429 with a time."""
    answers, lock, gate = [], threading.Lock(), threading.Barrier(300)
    settled(server)

    def one(at):
        gate.wait()
        if at % 3 == 0:  # leaves without reading a byte
            post(server, {**LONG, "stream": at % 2 == 0}, read=False).close()
            return
        answer = post(server, {**LONG, "max_tokens": 4, "stream": at % 2 == 0})
        with lock:
            answers.append(answer)

    def flood():
        threads = [threading.Thread(target=one, args=(at,)) for at in range(300)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        settled(server)
        return resident_bytes(server)

    before, after = flood(), flood()
    statuses = Counter(answer.split(" ", 2)[1] for answer in answers)
    assert set(statuses) == {"200", "429"} and sum(statuses.values()) == 400, statuses
    for answer in answers:
        if " 429 " in answer.split("\r\n")[0]:
            assert "retry-after: 1" in answer and "queue_full" in answer
    assert after < 1.02 * before
    body = {"prompt": "Once", "max_tokens": 2, "temperature": 0}
    assert ask(f"{server.url}/v1/completions", body)[0] == 200


def test_a_store_that_is_emptied_under_a_server_is_said_until_it_starts_again(tmp_path):
    """Each request is told why it was lost; a server on the files of before writes as before."""
    model = tmp_path / "model"
    shutil.copytree(TINY_OLMOE, model)
    files = {path: path.read_bytes() for path in model.glob("*.safetensors")}
    body = {"prompt": "The sea was", "max_tokens": 6, "temperature": 0}
    server = Server(tmp_path, "--store", "disk", model=model)
    try:
        status, _, first = ask(f"{server.url}/v1/completions", body)
        assert status == 200
        for path in files:
            path.write_bytes(b"")
        for prompt in ("def f", "Once"):
            status, _, answer = ask(f"{server.url}/v1/completions", {**body, "prompt": prompt})
            assert status == 500 and "was changed after it was opened" in answer
        assert "the worker failed and starts again; what ran is lost" in server.log.read_text()
    finally:
        server.stop()
    for path, content in files.items():
        path.write_bytes(content)
    server = Server(tmp_path, "--store", "disk", model=model)
    try:
        status, _, again = ask(f"{server.url}/v1/completions", body)
        assert json.loads(again)["choices"] == json.loads(first)["choices"]
    finally:
        server.stop()


def test_a_killed_server_loses_what_ran_and_its_log_names_it(tmp_path):
    """A stream breaks off; its request began and never ended; the next server begins as usual."""
    kept = tmp_path / "kept.json"
    server = Server(tmp_path, "--keep-residency", str(kept))
    connection = post(server, {**LONG, "max_tokens": 400}, read=False)
    assert connection.recv(1)
    server.process.kill()
    server.process.wait(300)
    with connection, suppress(ConnectionResetError):
        while got := connection.recv(65536):
            assert b"[DONE]" not in got
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line[0] == "{"]
    assert [line["status"] for line in lines] == ["begun"] and lines[0]["request"]
    again = Server(tmp_path, "--keep-residency", str(kept))
    try:
        assert ask(f"{again.url}/health")[0] == 200
        body = {"prompt": "Once", "max_tokens": 2}
        assert ask(f"{again.url}/v1/completions", body)[0] == 200
    finally:
        assert again.stop() == 0
        assert kept.exists()
