"""Run one command in this process, and judge how it ended."""

import contextlib
import io
import resource
import signal
import sys
import traceback
from dataclasses import dataclass

from melinoe.cli import app as cli

# Of one command: seconds of the processor, seconds on the clock, and bytes more than before.
PROCESSOR_S, CLOCK_S, MORE_BYTES = 60, 600, 3 << 30


class TooLongError(BaseException):
    """A command hangs; no handler of ordinary errors may swallow it."""


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what is wrong with that; nothing if it is as promised."""

    code: int | None
    out: str
    err: str
    raised: str

    @property
    def wrong(self) -> str | None:
        """Why this is not how a command may end."""
        if self.raised:
            return f"raised\n{self.raised}"
        if self.code not in (0, 1, 2):
            return f"exit code {self.code}\n{self.err}"
        if "Traceback" in self.err:
            return f"a traceback\n{self.err}"
        if self.code == 1:
            last = self.err.splitlines()[-1] if self.err.strip() else ""
            if not last.startswith("melinoe: "):
                return f"exit 1 without one sentence at the end\n{self.err}"
            if len(last) > 2000:
                return f"a sentence of {len(last)} characters\n{last[:300]}"
        if self.code == 2 and not self.err.strip():
            return "exit 2 without a word"
        return None


@contextlib.contextmanager
def limits():
    """Bound time and memory of the body; the process has its own limits back afterwards."""

    def strike(number, _):
        raise TooLongError(f"signal {number}")

    before = {one: signal.signal(one, strike) for one in (signal.SIGPROF, signal.SIGALRM)}
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MORE_BYTES, hard))
    signal.setitimer(signal.ITIMER_PROF, PROCESSOR_S)
    signal.alarm(CLOCK_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        for one, handler in before.items():
            signal.signal(one, handler)


def run(arguments, stdin=b""):
    """Run ``melinoe ARGUMENTS``; never raises but for a request to stop."""
    out, err = io.StringIO(), io.StringIO()
    argv, given = sys.argv, sys.stdin
    sys.argv = ["melinoe", *map(str, arguments)]
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
    code, raised = 0, ""
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), limits():
            cli.main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else (0 if stop.code is None else 1)
    except KeyboardInterrupt:
        raise
    except BaseException:
        raised = traceback.format_exc(limit=-8)
    finally:
        sys.argv, sys.stdin = argv, given
    return Ended(code, out.getvalue(), err.getvalue(), raised)
