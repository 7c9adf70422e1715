"""
Processes forked from the one that tests: they have imported everything, which else takes seconds.

That commands are found from a shell too, `python -m melinoe`, tests/cli/test_cli.py shows.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import warnings


class ForkedProcess:
    """
    Call *function* in a process of its own, with the methods of `subprocess.Popen`.

    Args:
        function: Its end is the process's; `SystemExit` gives the exit code.
        log: A file for what it prints; None: where this process prints.
    """

    def __init__(self, function, *arguments, log=None):
        def work():
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            warnings.resetwarnings()  # pytest's make errors of them
            if log is not None:
                output = log.open("w", buffering=1)
                for standard in (1, 2):
                    os.dup2(output.fileno(), standard)
                sys.stdout = sys.stderr = output
            function(*arguments)

        if log is not None:
            log.write_text("")
        self._process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
        with warnings.catch_warnings():  # newer Pythons speak of this process's threads
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process.start()
        self.pid, self.kill = self._process.pid, self._process.kill

    def poll(self):
        """Its exit code, -signal where one ended it, None while it runs."""
        return self._process.exitcode

    def wait(self, timeout=None):
        self._process.join(timeout)
        assert self.poll() is not None, f"still runs after {timeout} s"
        return self.poll()

    def send_signal(self, number):
        os.kill(self.pid, number)


def command(*words, log=None):
    """Begin ``melinoe WORDS``."""

    def run():
        from melinoe.cli import main

        sys.argv = ["melinoe", *map(str, words)]
        main()

    return ForkedProcess(run, log=log)


def script(words, **_):
    """Begin ``python FILE WORDS``, in place of `subprocess.Popen`."""
    python, file, *more = words
    assert python == sys.executable

    def run():
        sys.argv = [file, *more]
        runpy.run_path(file, run_name="__main__")

    return ForkedProcess(run)
