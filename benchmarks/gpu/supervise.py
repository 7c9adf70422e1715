"""
Run the sections of a benchmark in a process of their own, so that none of them can cost the others.

The worker writes one JSON line for each thing that happens: ``begin`` and ``end`` of a section,
``row``, ``failed``. It works off sections until it is done; if one does not end in time, or takes
the process with it (an illegal access ends every later call of CUDA in that process), the next
sections run in a new one. What is known is handed on whenever something was added to it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


class Supervisor:
    """
    Sections, their time limits, and what became of them.

    Args:
        limits: Section -> seconds it may take, in the order in which they run.
        command: Starts a worker; it is given the sections left and the file for its lines.
        changed: Called after each section with all events so far.
        end: `time.monotonic` at which everything is to be over.
        folder: For the workers' files.

    Attributes:
        events: What happened, in order.
    """

    def __init__(
        self,
        limits: dict[str, float],
        command: Callable[[Sequence[str], Path], list[str]],
        changed: Callable[[list[dict[str, Any]]], None],
        end: float,
        folder: Path,
    ) -> None:
        self.limits, self.command, self.changed = limits, command, changed
        self.end, self.folder = end, folder
        self.events: list[dict[str, Any]] = []

    def run(self) -> list[dict[str, Any]]:
        """Run all sections, in as many workers as that takes; returns the events."""
        started = 0
        while left := self._left():
            if time.monotonic() >= self.end:
                for name in left:
                    self._add({"event": "failed", "section": name, "reason": "no time left"})
                break
            self._work(left, self.folder / f"worker-{started}.jsonl")
            started += 1
        return self.events

    def _left(self) -> list[str]:
        over = {e["section"] for e in self.events if e["event"] in ("end", "failed")}
        return [name for name in self.limits if name not in over]

    def _work(self, left: Sequence[str], lines: Path) -> None:
        """One worker, until it is done, dead, or too slow."""
        lines.touch()
        worker = subprocess.Popen(self.command(left, lines), start_new_session=True)
        open_since: tuple[str, float] | None = None
        read, why = 0, None
        try:
            while True:
                ended = worker.poll() is not None
                text = lines.read_text(encoding="utf-8")
                whole = text.rfind("\n") + 1
                for line in text[read:whole].splitlines():
                    event = json.loads(line)
                    if event["event"] == "begin":
                        open_since = event["section"], time.monotonic()
                    elif event["event"] in ("end", "failed"):
                        open_since = None
                    self._add(event)
                read = whole
                if ended:
                    break
                if open_since and time.monotonic() - open_since[1] > self.limits[open_since[0]]:
                    why = f"did not end within {self.limits[open_since[0]]:.0f} s"
                elif time.monotonic() > self.end + 20:
                    why = "the time was over"
                if why:
                    break
                time.sleep(0.1)
        finally:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
            code = worker.wait()
        if open_since is not None:
            reason = why or f"its process ended with code {code}"
            self._add({"event": "failed", "section": open_since[0], "reason": reason})
        elif self._left() == list(left):  # it does not even begin: there is no use in another
            for name in left:
                reason = why or f"no worker starts, code {code}"
                self._add({"event": "failed", "section": name, "reason": reason})

    def _add(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        if event["event"] != "begin":
            self.changed(self.events)
