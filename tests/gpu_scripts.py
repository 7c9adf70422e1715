"""Scripts of benchmarks/gpu as modules of this process, whose workers are processes as ever."""

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "benchmarks" / "gpu"


def imported(monkeypatch, name):
    """Import a script; it and what lies beside it are forgotten after the test."""
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}:{ROOT / 'tests'}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for one in SCRIPTS.glob("*.py"):
        monkeypatch.setitem(sys.modules, one.stem, None)
        del sys.modules[one.stem]
    return importlib.import_module(name)
