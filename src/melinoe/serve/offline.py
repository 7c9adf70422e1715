"""Answer a file of requests, many at once; a run that was killed goes on where it stopped."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from melinoe.data import check_text
from melinoe.errors import (
    DataError,
    InterruptedRunError,
    MelinoeError,
    OutputExistsError,
    WriteError,
)
from melinoe.lock import held
from melinoe.serve.batching import Batches, Limits
from melinoe.serve.body import ApiError
from melinoe.serve.handlers import ChatHandler, CompletionHandler, Handler
from melinoe.serve.metrics import Metrics
from melinoe.serve.responses import Responses
from melinoe.whole_file import parse_json, write_whole

CHAT, COMPLETION, RESPONSE = "/v1/chat/completions", "/v1/completions", "/v1/responses"
_HANDLERS: dict[str, type[Handler]] = {
    CHAT: ChatHandler,
    COMPLETION: CompletionHandler,
    RESPONSE: Responses,
}
# Seconds before a row that found the queue full is asked again.
_AGAIN_S = 0.2


class Row(NamedTuple):
    """One request of a file: its name, its route and its body."""

    id: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Batched:
    """
    Sum up what a run answered and what that took.

    Attributes:
        rows: Of the file.
        kept: Of them, answered by an earlier run.
        refused: Of them, answered with an error: what they ask for is wrong or not served.
        prompt_tokens, completion_tokens: Read and written in this run.
        seconds: From the first request to the last answer of this run.
        experts_loaded: In this run.
        hit_rate: Share of the expert uses that found their expert resident.
    """

    rows: int
    kept: int
    refused: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    experts_loaded: int
    hit_rate: float | None

    @property
    def tokens_per_s(self) -> float:
        """Tokens written a second."""
        return self.completion_tokens / self.seconds if self.seconds else 0.0


def read_rows(path: Path) -> list[Row]:
    """
    Read requests from a JSONL file.

    A line is a request of OpenAI's batch files (``custom_id``, ``url``, ``body``), or a body by
    itself, with ``messages`` or with ``prompt``, and with ``custom_id`` if it is to have a name
    other than ``row-`` and the line's number.

    Raises:
        DataError: the file cannot be read, or a line is no such thing; the message names it.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text; write it as UTF-8") from error
    rows: list[Row] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(_row(line, f"row-{number}"))
            check_text(rows[-1].id, f"{path}, line {number} in its custom_id")
            first = seen.setdefault(rows[-1].id, number)
            if first < number:
                raise ValueError(f"has the custom_id {rows[-1].id!r} of line {first}; change one")
        except ValueError as error:
            raise DataError(f"{path}, line {number} {error}") from error
    if not rows:
        raise DataError(f"{path} holds no request; write one a line")
    return rows


def _row(line: str, name: str) -> Row:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ValueError(f"is no JSON ({error}); write one object a line") from error
    if not isinstance(row, dict):
        raise ValueError("is no JSON object; write one a line")
    name = row.pop("custom_id", name)
    if not isinstance(name, str) or not name:
        raise ValueError("has a custom_id that is no text; write one in quotes")
    if "body" not in row:
        if ("messages" in row) == ("prompt" in row):
            raise ValueError("must have either messages or a prompt")
        row = {"url": CHAT if "messages" in row else COMPLETION, "body": row}
    method, url, body = row.pop("method", "POST"), row.pop("url", None), row.pop("body")
    if row:
        raise ValueError(f"has {', '.join(sorted(row))} beside its body; leave that out")
    if method != "POST" or url not in _HANDLERS:
        raise ValueError(f"asks for {method} {url}; POST to {', '.join(_HANDLERS)}")
    if not isinstance(body, dict):
        raise ValueError("has a body that is no JSON object")
    if body.get("stream"):
        raise ValueError("asks for a stream, and a file gets none; leave stream out")
    return Row(name, url, body)


def named_model(rows: Sequence[Row]) -> str:
    """
    Give the one model that *rows* name.

    Raises:
        DataError: they name none, or several.
    """
    names = sorted({str(row.body["model"]) for row in rows if row.body.get("model") is not None})
    if len(names) != 1:
        found = f"the models {', '.join(names)}" if names else "no model"
        raise DataError(f"the requests name {found}; give the one to load with --model")
    return names[0]


class _Progress:
    """
    Keep finished answers beside *out* until all are there; then write *out*, in the file's order.

    Args:
        out: The file to write.
        run: Identifies the run; an unfinished one of another identity is not continued.
        resume: Whether an unfinished run may be continued.

    Raises:
        OutputExistsError: *out* exists, or an unfinished run that is not to be, or cannot be,
            continued.
    """

    def __init__(self, out: Path, run: dict[str, str], resume: bool) -> None:
        self.out, self.path = out, out.with_name(f"{out.name}.unfinished")
        self.answers: dict[str, Any] = {}  # custom_id -> line of the output
        if out.exists():
            raise OutputExistsError(f"{out} exists; choose another --out, or delete it")
        if not self.path.exists():
            self._append({"run": run})
        elif resume:
            self._read(run)
        else:
            raise OutputExistsError(
                f"{self.path} holds the answers of an unfinished run; go on with --resume, or "
                "delete it"
            )

    def _read(self, run: dict[str, str]) -> None:
        whole = self.path.read_bytes()
        end = whole.rfind(b"\n") + 1  # a line without an end was being written when the run ended
        try:
            head, *lines = map(parse_json, whole[:end].splitlines())
            if head["run"] != run:
                raise OutputExistsError(
                    f"{self.path} belongs to a run of another model or file; delete it, or choose "
                    "another --out"
                )
            self.answers = {line["custom_id"]: line for line in lines}
        except (ValueError, KeyError, TypeError) as error:
            raise OutputExistsError(
                f"{self.path} is no unfinished run of this command; choose another --out"
            ) from error
        if end < len(whole):  # only now: before, it might have been anybody's file
            os.truncate(self.path, end)

    def _append(self, line: dict[str, Any]) -> None:
        begun = self.path.exists()
        try:
            with self.path.open("ab") as file:
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if not begun:
                self.path.unlink(missing_ok=True)
            raise self._unwritten(self.path, error) from error

    def _unwritten(self, path: Path, error: OSError) -> WriteError:
        way = "choose another --out"
        if self.answers:
            way = f"go on with --resume: {len(self.answers)} answers are in {self.path}"
        return WriteError(f"{path} cannot be written ({error.strerror}); make room, and {way}")

    def add(self, row: Row, status: int, body: dict[str, Any]) -> None:
        """Keep the answer to *row*."""
        name = f"batch_req_{len(self.answers) + 1}"
        response = {"status_code": status, "request_id": body.get("id", name), "body": body}
        line = {"id": name, "custom_id": row.id, "response": response, "error": None}
        self._append(line)
        self.answers[row.id] = line

    def finish(self, rows: Sequence[Row]) -> None:
        """Write the file of all answers."""
        try:
            write_whole(self.out, "".join(f"{json.dumps(self.answers[r.id])}\n" for r in rows))
        except OSError as error:
            raise self._unwritten(self.out, error) from error
        self.path.unlink()


def answer_file(
    model: Any,
    handle: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    out: Path,
    *,
    name: str = "model",
    fingerprint: str = "",
    limits: Limits | None = None,
    resume: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Batched:
    """
    Answer *rows* as the server would, as many at once as *limits* let run.

    All requests of a step share what it loads, so an expert is moved once for all of them. Greedy
    text is that of each request alone. A line of *out* is one of OpenAI's batch output.

    Args:
        model: Attached to *handle*.
        handle: Of `melinoe.load`.
        tokenizer: Of the model.
        rows: Of `read_rows`; the models that they name are ignored.
        out: JSONL file to write, in the order of *rows*, when all are answered. Until then answers
            are in ``<out>.unfinished``, a line each as they come.
        name: Of the model, in the answers.
        fingerprint: Of the model; a run of another one is not continued.
        limits: What may be spent; by default as much as the server spends.
        resume: Go on with an unfinished run.
        progress: Called with the rows that have an answer, and all.

    Raises:
        OutputExistsError: *out* exists, another process writes it, or there is an unfinished run.
        WriteError: the disk is full; what was written before is kept.
        InterruptedRunError: Ctrl-C came; what was answered before is kept.
        MelinoeError: the model failed; what was answered before is kept.
    """
    digest = hashlib.sha256(json.dumps([list(row) for row in rows]).encode()).hexdigest()
    with held(out):
        kept = _Progress(out, {"model": fingerprint, "requests": digest}, resume)
        left = [row for row in rows if row.id not in kept.answers]
        before, began = handle.counters, time.perf_counter()
        if left:
            progress(len(rows) - len(left), len(rows))
            batches = Batches(model, handle, limits or Limits(), tokenizer=tokenizer)
            try:
                asyncio.run(
                    _ask(batches, tokenizer, name, left, kept,
                         lambda: progress(len(kept.answers), len(rows)))
                )  # fmt: skip
            except KeyboardInterrupt as stop:
                raise InterruptedRunError(
                    f"stopped; {len(kept.answers)} answers are in {kept.path}: go on with --resume"
                ) from stop
            finally:
                batches.stop()
        seconds, spent = time.perf_counter() - began, handle.counters.minus(before)
        kept.finish(rows)
    written = {id: line["response"] for id, line in kept.answers.items()}
    usages = [written[row.id]["body"].get("usage") or {} for row in left]
    uses = int(spent.uses.sum())
    return Batched(
        rows=len(rows), kept=len(rows) - len(left),
        refused=sum(one["status_code"] != 200 for one in written.values()),
        prompt_tokens=_sum(usages, "prompt_tokens", "input_tokens"),
        completion_tokens=_sum(usages, "completion_tokens", "output_tokens"),
        seconds=seconds, experts_loaded=int(spent.loads.sum()),
        hit_rate=int(spent.hits.sum()) / uses if uses else None,
    )  # fmt: skip


def _sum(usages: Sequence[dict[str, Any]], *names: str) -> int:
    return sum(int(one.get(name, 0)) for one in usages for name in names)


async def _ask(
    batches: Batches,
    tokenizer: Any,
    name: str,
    rows: Sequence[Row],
    kept: _Progress,
    tell: Callable[[], None],
) -> None:
    """Put each row to its handler, as many at once as have room."""
    metrics, queue = Metrics(), iter(rows)
    handlers = {url: kind(batches, metrics, tokenizer, name) for url, kind in _HANDLERS.items()}

    async def answer(row: Row) -> tuple[int, dict[str, Any]]:
        try:
            given = await handlers[row.url].handle_request({**row.body, "model": None}, row.id)
        except ApiError as error:
            return error.status, error.body()
        return given.status_code, json.loads(bytes(given.body))

    async def work() -> None:
        for row in queue:
            while (got := await answer(row))[0] == 429:
                await asyncio.sleep(_AGAIN_S)
            status, body = got
            if status >= 500:
                raise MelinoeError(
                    f"{row.id} was not answered: {body['error']['message']}; "
                    f"{len(kept.answers)} answers are in {kept.path}: go on with --resume"
                )
            kept.add(row, status, body)
            tell()

    places = batches.limits.running + batches.limits.waiting
    await asyncio.gather(*(work() for _ in range(min(places, len(rows)))))
