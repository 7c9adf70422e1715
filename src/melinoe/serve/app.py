"""The application: transformers' own server over our model, behind limits, a key and a page."""

from __future__ import annotations

import asyncio
import hmac
import inspect
import logging
import uuid
from collections.abc import Callable
from importlib.resources import files
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.base import BaseHTTPMiddleware
from transformers.cli.serving.server import build_server

from melinoe.serve.batching import Batches
from melinoe.serve.body import ROUTES, ApiError
from melinoe.serve.handlers import FAILED, ChatHandler, CompletionHandler
from melinoe.serve.metrics import Metrics
from melinoe.serve.responses import Responses

_log = logging.getLogger("melinoe.serve")

# Bytes of a request's body at most, and seconds in which it has to come.
MOST_BODY_BYTES, _BODY_S = 4 << 20, 30.0
# Seconds after which a client that reads nothing of its answer is given up.
_UNREAD_S = 60.0
# Requests that are read or answered at once, beside those that have a place in the queue.
_BESIDE = 64
# Routes of transformers' application that are not served here: other models, other kinds of model.
_NOT_SERVED = {"/load_model", "/reset", "/v1/systemone", "/v1/audio/transcriptions"}
# Answered without the key: they hold nothing of the model or of anybody's requests.
_OPEN = {"/", "/health"}


def build_app(
    batches: Batches,
    metrics: Metrics,
    tokenizer: Any,
    name: str,
    api_key: str | None = None,
    log_text: bool = False,
) -> FastAPI:
    """
    Build the application.

    Args:
        batches: Computes requests over the one model.
        metrics: Counts them.
        tokenizer: Of the model.
        name: Under which clients ask for it.
        api_key: Asked of every request but `/health` and the page; None asks for none.
        log_text: Whether the log holds prompts and answers.
    """
    given = (batches, metrics, tokenizer, name, log_text)
    chat = ChatHandler(*given)
    listed = [
        {"id": one, "object": "model", "created": 0, "owned_by": "melinoe"} for one in chat.names
    ]
    parts: dict[str, Any] = {
        # In the place of transformers' manager, which loads models: ours is loaded.
        "model_manager": SimpleNamespace(get_gen_models=lambda: listed, shutdown=lambda: None),
        "chat_handler": chat,
        "completion_handler": CompletionHandler(*given),
        "response_handler": Responses(*given),
        "generation_state": SimpleNamespace(
            is_cb_alive=lambda: batches.healthy and not batches.draining
        ),
    }
    # Versions of transformers differ in the other kinds of model that they serve.
    for parameter in inspect.signature(build_server).parameters.values():
        if parameter.default is parameter.empty:
            parts.setdefault(parameter.name, None)
    app = build_server(**parts)
    app.router.routes[:] = [
        route for route in app.router.routes if getattr(route, "path", None) not in _NOT_SERVED
    ]
    # Theirs names requests, as the gate does, but sends each piece of an answer through a queue.
    app.user_middleware[:] = [
        one for one in app.user_middleware if one.cls is not BaseHTTPMiddleware
    ]
    app.title = "Melinoe"
    metrics.watch(batches)
    _add_errors(app)
    _add_pages(app, batches, metrics, name)
    _describe_bodies(app, chat.names)
    limits = batches.limits
    app.add_middleware(Gate, api_key, limits.running + limits.waiting + _BESIDE)
    return app


def _describe_bodies(app: FastAPI, names: list[str]) -> None:
    """Let `/openapi.json` describe what each route takes, which transformers leaves open."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        made = plain()
        for path, kind in ROUTES.items():
            schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
            made["components"]["schemas"].update(schema.pop("$defs", {}))
            schema["properties"]["model"] = {"enum": names}
            content = {"application/json": {"schema": schema}}
            made["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
        return made

    app.openapi = openapi  # type: ignore[method-assign]


def _add_errors(app: FastAPI) -> None:
    """Answer whatever a route raises in OpenAI's form."""

    def failed(error: Exception) -> ApiError:
        _log.error("a request failed", exc_info=error)
        return ApiError(FAILED, 500)

    def other(error: HTTPException) -> ApiError:
        return ApiError(str(error.detail), 400 if error.status_code == 422 else error.status_code)

    meanings: dict[type[Exception], Callable[[Any], ApiError]] = {
        ApiError: lambda error: error,
        RequestValidationError: lambda _: ApiError("the body must be a JSON object"),
        HTTPException: other,
        Exception: failed,
    }
    for kind, meaning in meanings.items():

        async def answer(_: Request, error: Exception, meaning: Any = meaning) -> Response:
            return _refusal(meaning(error))

        app.add_exception_handler(kind, answer)


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


class Gate:
    """
    Stand before the application: the key, the crowd, bodies and clients that take their time.

    Gives each request a name, its own if it brings one.

    Args:
        app: What comes behind.
        api_key: As for `build_app`.
        most: Requests at once.
    """

    def __init__(self, app: Any, api_key: str | None, most: int) -> None:
        self._app, self._most, self._inside = app, most, 0
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._inside += 1
        try:
            headers = dict(scope["headers"])
            body = await self._admit(headers, scope["path"], receive)
            name = headers.get(b"x-request-id") or str(uuid.uuid4()).encode()
            await self._pass_on(body, name, scope, receive, send)
        except ApiError as error:
            await _refusal(error, {"connection": "close"})(scope, receive, send)
        finally:
            self._inside -= 1

    async def _admit(self, headers: dict[bytes, bytes], path: str, receive: Any) -> bytes:
        """Give the body of a request that may come in."""
        closed = path not in _OPEN
        if closed and self._inside > self._most:
            raise ApiError("too many requests at once; try again in a second", 429,
                           code="queue_full")  # fmt: skip
        if closed and self._key is not None:
            given = headers.get(b"authorization", b"").removeprefix(b"Bearer ").strip()
            if not hmac.compare_digest(given, self._key):
                raise ApiError("the API key is wrong or missing", 401, code="invalid_api_key")
        length = headers.get(b"content-length", b"")
        body, size, more = bytearray(), int(length) if length.isdigit() else 0, True
        try:
            async with asyncio.timeout(_BODY_S):
                while more and size <= MOST_BODY_BYTES:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError("the client has left", 400)
                    body += message.get("body", b"")
                    size, more = max(size, len(body)), message.get("more_body", False)
        except TimeoutError:
            raise ApiError(
                f"the body did not come within {_BODY_S:g} s; send it again", 408
            ) from None
        if size > MOST_BODY_BYTES:
            raise ApiError(f"the body is longer than {MOST_BODY_BYTES >> 20} MiB; send less", 413)
        return bytes(body)

    async def _pass_on(self, body: bytes, name: bytes, scope: Any, receive: Any, send: Any) -> None:
        """Let the application answer, until its client has left or reads no more."""
        messages, answered = [{"type": "http.request", "body": body}], False
        scope.setdefault("state", {})["request_id"] = name.decode("latin-1")

        async def replay() -> dict[str, Any]:
            return messages.pop() if messages else await asyncio.Future()

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            if not answered:
                answering.cancel()

        async def send_in_time(message: Any) -> None:
            nonlocal answered
            answered = message["type"] == "http.response.body" and not message.get("more_body")
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (b"x-request-id", name)]
                message = {**message, "headers": headers}
            try:
                async with asyncio.timeout(_UNREAD_S):
                    await send(message)
            except TimeoutError:
                raise OSError("the client does not read its answer") from None

        answering = asyncio.ensure_future(self._app(scope, replay, send_in_time))
        watching = asyncio.create_task(watch())
        try:
            await asyncio.wait([answering])
        finally:  # also if the server's own patience has ended
            watching.cancel()
            answering.cancel()
        if not answering.cancelled():
            answering.result()


def _refusal(error: ApiError, headers: dict[str, str] | None = None) -> JSONResponse:
    again = {"retry-after": "1"} if error.status in (429, 503) else {}
    return JSONResponse(error.body(), error.status, {**again, **(headers or {})})
