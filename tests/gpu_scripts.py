"""Scripts of benchmarks/gpu as modules of this process, whose workers are forked from it."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

from forked_process import script

SCRIPTS = Path(__file__).parents[1] / "benchmarks" / "gpu"


def imported(monkeypatch, name):
    """Import a script; it and what lies beside it are forgotten after the test."""
    monkeypatch.syspath_prepend(SCRIPTS)
    for one in SCRIPTS.glob("*.py"):
        monkeypatch.setitem(sys.modules, one.stem, None)
        del sys.modules[one.stem]
    found = importlib.import_module(name)
    monkeypatch.setattr(sys.modules["supervise"], "subprocess", SimpleNamespace(Popen=script))
    return found
