"""Asked to stop (Ctrl-C, or a scheduler's SIGTERM), a run ends its step and keeps its state."""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ECHO_S = 1.0  # a launcher passes on the Ctrl-C that the terminal has sent to every process itself


class StopRequest:
    """
    Whether the run has been asked to stop.

    Attributes:
        asked: Set by the first signal. A second Ctrl-C ends the process at once; a scheduler's
            SIGTERM may come as often as it likes, and is followed by a SIGKILL in the end.
    """

    def __init__(self) -> None:
        self.asked = False
        self._first_s = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it, signals are noted; outside the main thread nothing is changed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[signal.Signals, Any] = {one: signal.getsignal(one) for one in _SIGNALS}
        for one in _SIGNALS:
            signal.signal(one, self._note)
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self._first_s = True, now
            if os.environ.get("RANK", "0") == "0":
                log.warning("stopping after this step; Ctrl-C once more stops at once, unsaved")
        elif number == signal.SIGINT and now - self._first_s > _ECHO_S:
            raise KeyboardInterrupt
