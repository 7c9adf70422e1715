"""Describe the machine and software that a measurement ran on."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """
    Return facts about this machine, its software and this moment; nothing that names its owner.

    ``commit`` is ``None`` outside a checkout of the project, and ends in ``-dirty`` if files
    changed.
    """
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    names = ("melinoe", "torch", "transformers", "numpy", "safetensors")
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count() if cores is None else len(cores),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
        "commit": _commit(Path(__file__).resolve()),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _memory_gib() -> float | None:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    return round(total / 2**30, 1)


def _commit(file: Path) -> str | None:
    """Name the commit of the checkout that this code runs from; an installed package has none."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(file.parent), *words], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # Installed into an environment that lies inside another project, git would answer for that one.
    if git("ls-files", "--error-unmatch", file.name) is None:
        return None
    commit = git("rev-parse", "--short=12", "HEAD")
    dirty = commit and git("status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if dirty else commit
