"""A hub of one's own: the few answers that huggingface_hub's client asks for, from a directory."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Answer(BaseHTTPRequestHandler):
    """A commit's files, and HEAD and GET of ``/<org>/<model>/resolve/<revision>/<file>``."""

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        server: Hub = self.server  # type: ignore[assignment]
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        server.asked.append((self.command, "/".join(parts)))
        if server.gone:
            return None  # the connection ends without a word
        if parts[:2] == ["api", "models"] and parts[4:5] == ["tree"]:
            return self._list(server, parts[2:])
        if len(parts) != 5 or parts[2] != "resolve" or "/".join(parts[:2]) != server.name:
            return self._send(404, {"X-Error-Code": "RepoNotFound"})
        commit = server.revisions.get(parts[3])
        if commit is None:
            return self._send(404, {"X-Error-Code": "RevisionNotFound"})
        if parts[4] in server.broken:
            return self._send(500, {})
        file = server.commits[commit] / parts[4]
        if not file.is_file():
            return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        data = file.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if parts[4] in server.torn:
            data = data[: len(data) // 2]
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": commit}
        self._send(200, headers, data, body, len(file.read_bytes()))

    def _list(self, server: "Hub", parts: list[str]) -> None:
        """The files of a commit, as ``/api/models/<org>/<model>/tree/<commit>`` tells them."""
        place = server.commits.get(parts[3]) if "/".join(parts[:2]) == server.name else None
        if place is None:
            return self._send(404, {"X-Error-Code": "RepoNotFound"})
        files = [
            {
                "type": "file",
                "path": path.relative_to(place).as_posix(),
                "size": path.stat().st_size,
                "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
            }
            for path in sorted(place.rglob("*"))
            if path.is_file()
        ]
        self._send(200, {"Content-Type": "application/json"}, json.dumps(files).encode())

    def _send(self, status, headers, data=b"", body=True, length=None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


class Hub(ThreadingHTTPServer):
    """
    Serves one repository.

    Attributes:
        name: ``org/model``.
        commits: Commit to the directory of its files.
        revisions: Branch, tag or commit to commit.
        broken, torn: Names of files answered with an error, or cut in their middle.
        gone: Whether it has stopped to answer.
        asked: (method, path) of each request.
    """

    def __init__(self, name: str, commits: dict[str, Path], branches: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.name, self.commits = name, commits
        self.revisions = branches | {commit: commit for commit in commits}
        self.broken: set[str] = set()
        self.torn: set[str] = set()
        self.gone = False
        self.asked: list[tuple[str, str]] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving(name: str, commits: dict[str, Path], branches: dict[str, str]):
    """A `Hub` at work, in a thread of its own."""
    hub = Hub(name, commits, branches)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
