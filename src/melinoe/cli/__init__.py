"""The command line: each command parses, calls one stage, and prints. Stages load when they run."""

from melinoe.cli.app import main

__all__ = ["main"]
