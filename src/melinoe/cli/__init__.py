"""Parse commands, call one stage each, and print; a stage is imported when it runs."""

from melinoe.cli.app import main

__all__ = ["main"]
