"""Answer a file of requests, many at once; a run that was killed goes on where it stopped."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
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
from melinoe.serve.handlers import ChatHandler, CompletionHandler
from melinoe.serve.metrics import Metrics
from melinoe.serve.responses import Responses
from melinoe.whole_file import parse_json, write_whole

CHAT, COMPLETION, RESPONSE = "/v1/chat/completions", "/v1/completions", "/v1/responses"
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
    rows: list[Row] = []
    seen: dict[str, int] = {}
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        try:
            row = parse_json(line)
        except ValueError as error:
            raise DataError(f"{where} is no JSON ({error}); write one object a line") from error
        if not isinstance(row, dict):
            raise DataError(f"{where} is no JSON object; write one a line")
        made = _row(row, number, where)
        if made.id in seen:
            raise DataError(
                f"{where} has the custom_id {made.id!r} of line {seen[made.id]}; give each its own"
            )
        seen[made.id] = number
        rows.append(made)
    if not rows:
        raise DataError(f"{path} holds no request; write one a line")
    return rows


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text; write it as UTF-8") from error


def _row(row: dict[str, Any], number: int, where: str) -> Row:
    name = row.get("custom_id", f"row-{number}")
    if not isinstance(name, str) or not name:
        raise DataError(f"{where} has a custom_id that is no text; write one in quotes")
    check_text(name, f"{where} in its custom_id")
    if "body" in row:
        if unknown := sorted(row.keys() - {"custom_id", "method", "url", "body"}):
            raise DataError(f"{where} has {', '.join(unknown)} beside its body; leave that out")
        url, body = row.get("url"), row["body"]
        if row.get("method", "POST") != "POST" or url not in (CHAT, COMPLETION, RESPONSE):
            raise DataError(
                f"{where} asks for {row.get('method', 'POST')} {url}; POST to {CHAT}, "
                f"{COMPLETION} or {RESPONSE}"
            )
    else:
        body = {key: value for key, value in row.items() if key != "custom_id"}
        url = CHAT if "messages" in body else COMPLETION
        if ("messages" in body) == ("prompt" in body):
            raise DataError(f"{where} must have either messages or a prompt")
    if not isinstance(body, dict):
        raise DataError(f"{where} has a body that is no JSON object")
    if body.get("stream"):
        raise DataError(f"{where} asks for a stream, and a file gets none; leave stream out")
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
        self.answers: dict[str, str] = {}  # custom_id -> line of the output
        if out.exists():
            raise OutputExistsError(f"{out} exists; choose another --out, or delete it")
        if self.path.exists():
            if not resume:
                raise OutputExistsError(
                    f"{self.path} holds the answers of an unfinished run; go on with --resume, or "
                    "delete it"
                )
            self._read(run)
        else:
            self._append(json.dumps({"run": run}))

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
            self.answers = {line["custom_id"]: json.dumps(line) for line in lines}
        except (ValueError, KeyError, TypeError) as error:
            raise OutputExistsError(
                f"{self.path} is no unfinished run of this command; choose another --out"
            ) from error
        if end < len(whole):  # only now: before, it might have been anybody's file
            os.truncate(self.path, end)

    def _append(self, line: str) -> None:
        whole = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab") as file:
                file.write(line.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if whole:
                os.truncate(self.path, whole)
                kept = "the answers so far are kept: make room, and go on with --resume"
            else:
                self.path.unlink(missing_ok=True)
                kept = "make room, or choose another --out"
            raise WriteError(f"{self.path} cannot be written ({error.strerror}); {kept}") from error

    def add(self, row: Row, status: int, body: dict[str, Any]) -> None:
        """Keep the answer to *row*."""
        name = f"batch_req_{len(self.answers) + 1}"
        response = {"status_code": status, "request_id": body.get("id", name), "body": body}
        line = {"id": name, "custom_id": row.id, "response": response, "error": None}
        self.answers[row.id] = json.dumps(line)
        self._append(self.answers[row.id])

    def finish(self, rows: Sequence[Row]) -> None:
        """Write the file of all answers."""
        text = "".join(self.answers[row.id] + "\n" for row in rows)
        try:
            write_whole(self.out, text)
        except OSError as error:
            raise WriteError(
                f"{self.out} cannot be written ({error.strerror}); the answers are in {self.path}: "
                "make room, and go on with --resume"
            ) from error
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
    progress: Callable[[int, int], None] | None = None,
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
        had = len(kept.answers)
        if left:
            batches = Batches(model, handle, limits or Limits(), tokenizer=tokenizer)
            try:
                given = (batches, Metrics(), tokenizer, name)
                handlers = {
                    CHAT: ChatHandler(*given),
                    COMPLETION: CompletionHandler(*given),
                    RESPONSE: Responses(*given),
                }
                at_once = batches.limits.running + batches.limits.waiting
                tell = progress or (lambda done, of: None)
                tell(had, len(rows))
                asyncio.run(
                    _ask(handlers, left, at_once, kept, lambda: tell(len(kept.answers), len(rows)))
                )
            except KeyboardInterrupt as stop:
                raise InterruptedRunError(
                    f"stopped; {len(kept.answers)} answers are in {kept.path}: go on with --resume"
                ) from stop
            finally:
                batches.stop()
        seconds, spent = time.perf_counter() - began, handle.counters.minus(before)
        kept.finish(rows)
    written = {row.id: json.loads(kept.answers[row.id])["response"] for row in rows}
    usages = [written[row.id]["body"].get("usage") or {} for row in left]
    uses = int(spent.uses.sum())
    return Batched(
        rows=len(rows), kept=had,
        refused=sum(one["status_code"] != 200 for one in written.values()),
        prompt_tokens=_sum(usages, "prompt_tokens", "input_tokens"),
        completion_tokens=_sum(usages, "completion_tokens", "output_tokens"),
        seconds=seconds, experts_loaded=int(spent.loads.sum()),
        hit_rate=int(spent.hits.sum()) / uses if uses else None,
    )  # fmt: skip


def _sum(usages: Sequence[dict[str, Any]], *names: str) -> int:
    return sum(int(one.get(name, 0)) for one in usages for name in names)


async def _ask(
    handlers: dict[str, Any],
    rows: Sequence[Row],
    at_once: int,
    kept: _Progress,
    tell: Callable[[], None],
) -> None:
    """Put each row to its handler; *at_once* of them are under way."""
    queue = iter(rows)
    failed: list[MelinoeError] = []

    async def work() -> None:
        for row in queue:
            if failed:
                return
            while (answer := await _answer(handlers[row.url], row))[0] == 429:
                await asyncio.sleep(_AGAIN_S)
            status, body = answer
            if status >= 500:
                failed.append(
                    MelinoeError(
                        f"{row.id} was not answered: {body['error']['message']}; "
                        f"{len(kept.answers)} answers are in {kept.path}: go on with --resume"
                    )
                )
                return
            try:
                kept.add(row, status, body)
            except WriteError as error:
                failed.append(error)
                return
            tell()

    await asyncio.gather(*(work() for _ in range(min(at_once, len(rows)))))
    if failed:
        raise failed[0]


async def _answer(handler: Any, row: Row) -> tuple[int, dict[str, Any]]:
    """Give the status and the body that the server would answer."""
    body = {key: value for key, value in row.body.items() if key != "model"}
    try:
        answer = await handler.handle_request(body, row.id)
    except ApiError as error:
        return error.status, error.body()
    return answer.status_code, json.loads(answer.body)
