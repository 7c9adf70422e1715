"""Asked to stop (Ctrl-C, or a scheduler's SIGTERM), a run ends its step and keeps its state."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """
    Whether the run has been asked to stop.

    Attributes:
        asked: Set by the first signal; the second ends the process at once, as without this.
    """

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it, the first signal is noted; outside the main thread nothing is changed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[signal.Signals, Any] = {one: signal.getsignal(one) for one in _SIGNALS}

        def note(number: int, frame: FrameType | None) -> None:
            self.asked = True
            restore()

        def restore() -> None:
            for one, handler in before.items():
                signal.signal(one, handler)

        for one in _SIGNALS:
            signal.signal(one, note)
        try:
            yield
        finally:
            restore()
