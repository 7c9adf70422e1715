"""Run the server until it is told to stop; keep residency from one run to the next."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from pathlib import Path
from typing import Any

import uvicorn

from melinoe.errors import MelinoeError
from melinoe.serve.app import build_app
from melinoe.serve.batching import Batches
from melinoe.serve.metrics import Metrics
from melinoe.whole_file import parse_json, write_whole

_log = logging.getLogger("melinoe.serve")
# Seconds between two writes of the residency.
_KEEP_EVERY_S = 60.0


class Residency:
    """
    The experts that were resident when a server stopped, in a JSON file.

    Args:
        path: The file; absent until the first `write`.
        handle: Of the model that is served.
        fingerprint: Of the model: another model's residency is of no use.
    """

    def __init__(self, path: Path, handle: Any, fingerprint: str) -> None:
        self.path, self._handle, self._fingerprint = path, handle, fingerprint

    def restore(self) -> bool:
        """
        Load the experts that the file names; whether there were any.

        Raises:
            MelinoeError: the file is none of these, or another model's.
        """
        if not self.path.exists():
            _log.info("no residency to restore")
            return False
        try:
            kept = parse_json(self.path.read_bytes())
            layers, model = kept["resident"], kept["fingerprint"]
            if model != self._fingerprint:
                raise MelinoeError(
                    f"{self.path} is another model's; delete it, or give another file"
                )
            slots = self._handle.slots_by_layer
            self._handle.prefetch([ids[:n] for ids, n in zip(layers, slots, strict=True)])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MelinoeError(
                f"{self.path} holds no residency; delete it, or give another file"
            ) from error
        _log.info("restored the resident experts")
        return True

    def write(self) -> None:
        """Write which experts are resident now; a disk that is full ends no server."""
        kept = {"fingerprint": self._fingerprint, "resident": self._handle.resident()}
        try:
            write_whole(self.path, json.dumps(kept))
        except OSError as error:
            _log.warning("the residency was not written: %s", error)


class _Server(uvicorn.Server):
    """uvicorn's server; its end tells the requests that still run after a while."""

    def __init__(self, config: uvicorn.Config, batches: Batches, patience_s: float) -> None:
        super().__init__(config)
        self._batches, self._patience_s = batches, patience_s

    async def shutdown(self, sockets: Any = None) -> None:
        """Take no more requests, let those that run finish within the limit, tell the others."""
        self._batches.draining = True
        telling = asyncio.get_running_loop().call_later(
            self._patience_s, self._batches.fail_all, "the server is stopping"
        )
        try:
            await super().shutdown(sockets)
        finally:
            telling.cancel()


def serve(
    batches: Batches,
    metrics: Metrics,
    tokenizer: Any,
    name: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    residency: Residency | None = None,
    patience_s: float = 30.0,
    log_text: bool = False,
) -> None:
    """
    Serve a model until a signal ends it.

    Args:
        batches, metrics, tokenizer, name, api_key, log_text: As for `build_app`.
        host: Address to listen at.
        port: 0 takes a free one, which the log names.
        residency: Written every minute and at the end.
        patience_s: Seconds that running requests have after SIGTERM.

    Raises:
        MelinoeError: the port cannot be had, or the tokenizer is not a fast one.
    """
    if host not in ("127.0.0.1", "::1", "localhost") and api_key is None:
        _log.warning("anybody who reaches %s may use this server; set MELINOE_API_KEY", host)
    for one in (signal.SIGINT, signal.SIGTERM):
        # uvicorn stops on these, and then raises them again: go on, and return.
        signal.signal(one, lambda *_: None)
    try:
        app = build_app(batches, metrics, tokenizer, name, api_key, log_text)
        config = uvicorn.Config(
            app, host=host, port=port, log_level="warning", access_log=False, ws="none",
            timeout_graceful_shutdown=int(patience_s) + 5,
        )  # fmt: skip
        server = _Server(config, batches, patience_s)
        asyncio.run(_run(server, residency))
    except SystemExit as error:  # uvicorn's way to say that the port is taken
        raise MelinoeError(f"cannot listen at {host}:{port}; choose another --port") from error
    finally:
        batches.stop()
        if residency is not None:
            residency.write()


async def _run(server: _Server, residency: Residency | None) -> None:
    serving = asyncio.create_task(server.serve())
    while not server.started and not serving.done():
        await asyncio.sleep(0.02)
    if server.started:
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        _log.info("listening at http://%s:%s", host, port)
    while not serving.done():
        await asyncio.wait([serving], timeout=_KEEP_EVERY_S)
        if residency is not None and not serving.done():
            await asyncio.to_thread(residency.write)
    await serving
