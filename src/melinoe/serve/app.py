"""The application: transformers' own server over our model, behind limits, a key and a page."""

from __future__ import annotations

import asyncio
import contextvars
import hmac
import inspect
import json
import logging
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from transformers.cli.serving.server import build_server

from melinoe.serve.batching import Batches
from melinoe.serve.body import ApiError
from melinoe.serve.handlers import ChatHandler, CompletionHandler
from melinoe.serve.metrics import Metrics
from melinoe.serve.responses import Responses
from melinoe.serve.schema import bodies, describe

_log = logging.getLogger("melinoe.serve")

# Bytes of a request's body at most.
MOST_BODY_BYTES = 4 << 20
# Seconds in which it has to come.
_BODY_S = 30.0
# Routes of transformers' application that are not served here: other models, other kinds of model.
_NOT_SERVED = {"/load_model", "/reset", "/v1/systemone", "/v1/audio/transcriptions"}
# Answered without the key: they hold nothing of the model or of anybody's requests.
_OPEN = {"/", "/health"}

_gone: contextvars.ContextVar[asyncio.Event | None] = contextvars.ContextVar("gone", default=None)


def client_gone() -> bool:
    """Whether the client of the request at hand has closed its connection."""
    event = _gone.get()
    return event is not None and event.is_set()


class _Models:
    """List the model and its adapters, in the place of transformers' model manager."""

    force_model = None

    def __init__(self, names: list[str]) -> None:
        self._names = names

    def get_gen_models(self) -> list[dict[str, Any]]:
        return [
            {"id": name, "object": "model", "created": 0, "owned_by": "melinoe"}
            for name in self._names
        ]

    def shutdown(self) -> None:
        """The model belongs to whoever loaded it."""


class _State:
    """Tell transformers' application whether the worker is well."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def is_cb_alive(self) -> bool:
        return self._batches.healthy and not self._batches.draining


def build_app(
    batches: Batches, metrics: Metrics, tokenizer: Any, name: str, api_key: str | None = None
) -> FastAPI:
    """
    Build the application.

    Args:
        batches: Computes requests over the one model.
        metrics: Counts them.
        tokenizer: Of the model.
        name: Under which clients ask for it.
        api_key: Asked of every request but `/health` and the page; None asks for none.
    """
    chat = ChatHandler(batches, metrics, tokenizer, name, client_gone)
    completion = CompletionHandler(batches, metrics, tokenizer, name, client_gone)
    given: dict[str, Any] = {
        "model_manager": _Models(chat.names),
        "chat_handler": chat,
        "completion_handler": completion,
        "response_handler": Responses(chat),
        "generation_state": _State(batches),
    }
    # Versions of transformers differ in the other kinds of model that they serve.
    for parameter in inspect.signature(build_server).parameters.values():
        if parameter.default is parameter.empty:
            given.setdefault(parameter.name, None)
    app = build_server(**given)
    app.router.routes[:] = [
        route for route in app.router.routes if getattr(route, "path", None) not in _NOT_SERVED
    ]
    app.title = "Melinoe"
    metrics.watch(batches)
    _add_errors(app)
    _add_pages(app, batches, metrics, name)
    vocabulary = batches.model.config.get_text_config().vocab_size
    describe(app, bodies(chat.names, vocabulary, batches.limits))
    app.add_middleware(Gate, api_key=api_key)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status in (429, 503) else None
        status = error.status if error.status != 499 else 400
        return JSONResponse(error.body(), status, headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(ApiError("the body must be a JSON object").body(), 400)

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> JSONResponse:
        status = 400 if error.status_code == 422 else error.status_code
        return JSONResponse(ApiError(str(error.detail), status).body(), status)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        _log.error("a request failed", exc_info=error)
        return JSONResponse(ApiError("the server failed; its log says why", 500).body(), 500)


def _add_pages(app: FastAPI, batches: Batches, metrics: Metrics, name: str) -> None:
    page = (files("melinoe.serve") / "page.html").read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    def chat_page() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/metrics", include_in_schema=False)
    def scrape() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/status")
    def status() -> dict[str, Any]:
        """Give what the page shows: residency by layer, speed, the last requests."""
        handle, (running, waiting) = batches.handle, batches.counts()
        counters = handle.counters
        uses = int(counters.uses.sum())
        return {
            "model": name,
            "experts": [layer.num_experts for layer in handle.layers],
            "slots": list(handle.slots_by_layer),
            "resident": handle.resident(),
            "hit_rate": int(counters.hits.sum()) / uses if uses else None,
            "tokens_per_s": metrics.tokens_per_s(),
            "running": running,
            "waiting": waiting,
            "restarts": len(batches.restarts),
            "recent": list(metrics.recent),
        }


Send = Callable[[dict[str, Any]], Awaitable[None]]


class Gate:
    """
    Stand before the application: the key, the body's size, and whether the client is there.

    Args:
        app: What comes behind.
        api_key: As for `build_app`.
    """

    def __init__(self, app: Any, api_key: str | None) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self._key is not None and scope["path"] not in _OPEN:
            given = headers.get(b"authorization", b"").removeprefix(b"Bearer ").strip()
            if not hmac.compare_digest(given, self._key):
                await _answer(send, ApiError("the API key is wrong or missing", 401,
                                             code="invalid_api_key"))  # fmt: skip
                return
        try:
            body, error = await asyncio.wait_for(_body(receive, headers), _BODY_S)
        except TimeoutError:
            body, error = (
                b"",
                ApiError(f"the body did not come within {_BODY_S:g} s; send it again", 408),
            )
        if error is not None:
            await _answer(send, error)
            return
        gone = asyncio.Event()
        token = _gone.set(gone)
        given_once = False

        async def replay() -> dict[str, Any]:
            nonlocal given_once
            if not given_once:
                given_once = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        watcher = asyncio.create_task(_watch(receive, gone))
        try:
            await self._app(scope, replay, send)
        finally:
            watcher.cancel()
            _gone.reset(token)


async def _body(receive: Any, headers: dict[bytes, bytes]) -> tuple[bytes, ApiError | None]:
    too_long = ApiError(f"the body is longer than {MOST_BODY_BYTES >> 20} MiB; send less", 413)
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > MOST_BODY_BYTES:
        return b"", too_long
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b"", ApiError("the client has left", 400)
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MOST_BODY_BYTES:
            return b"", too_long
        if not message.get("more_body"):
            return b"".join(parts), None


async def _watch(receive: Any, gone: asyncio.Event) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    gone.set()


async def _answer(send: Send, error: ApiError) -> None:
    body = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
