"""How much memory the host can still give: what the system says, and what a container may take."""

from __future__ import annotations

from pathlib import Path


def free_host_bytes(root: Path = Path("/")) -> int | None:
    """
    Memory that can be had without swapping, the limit of a container (cgroup) included.

    Args:
        root: below which ``proc`` and ``sys`` are; for tests.

    Returns:
        Bytes, or None where the system does not say.
    """
    found = [_available(root), _left_in_group(root / "sys/fs/cgroup")]
    known = [amount for amount in found if amount is not None]
    return min(known) if known else None


def _available(root: Path) -> int | None:
    """``MemAvailable`` of the whole machine."""
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _left_in_group(group: Path) -> int | None:
    """
    What the limit leaves; None without one.

    Cached file pages count as used and are given up at need, so they are free here.
    """
    # Version 2 of the interface, then version 1. A process in a container sees its own group here.
    for files in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        limit, used, stat = (_read(group / name).strip() for name in files[:3])
        if not (limit.isdigit() and used.isdigit()):
            continue
        cached = [line.split()[1] for line in stat.splitlines() if line.startswith(files[3] + " ")]
        return max(int(limit) - int(used) + (int(cached[0]) if cached else 0), 0)
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""
