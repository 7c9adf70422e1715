"""Find how much memory the host can still give, under every limit on the process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from melinoe.errors import BudgetError


class HostMemory(NamedTuple):
    """Bytes that can be had without swapping, and which limit says so."""

    free_bytes: int
    limited_by: str


def host_memory(root: Path = Path("/")) -> HostMemory | None:
    """
    Find the smallest amount left under any limit on this process; None outside Linux.

    Looks at the whole machine (``MemAvailable``), at every control group on the path to this
    process's own (versions 1 and 2; Slurm, systemd and containers set these), and at the limits of
    the process itself (``ulimit -v`` and ``-d``), below *root*.
    """
    return min([*_machine(root), *_groups(root), *_own_limits(root)], default=None)


def free_host_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that can be had without swapping; see `host_memory`."""
    found = host_memory(root)
    return None if found is None else found.free_bytes


def check_host_room(needed_bytes: int, what: str, way_out: str) -> None:
    """
    Refuse, with a BudgetError, what the system would end the process for.

    *what*, in the plural (``1GiB of experts``), takes *needed_bytes* of host memory; *way_out* is a
    clause that says what to do instead.
    """
    found = host_memory()
    if found is not None and needed_bytes > found.free_bytes:
        raise BudgetError(
            f"{what} do not fit into the {format_bytes(found.free_bytes)} of host memory that are "
            f"left ({found.limited_by}); {way_out}"
        )


def format_bytes(amount: int) -> str:
    """*amount* in GiB, MiB, KiB or bytes, with at most three decimals, rounded up."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if amount >= size:
            thousandths = -(-amount * 1000 // size)  # up, so that the printed amount suffices
            return f"{thousandths / 1000:.3f}".rstrip("0").rstrip(".") + unit
    return f"{amount}B"


_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)}
_UNITS |= {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)}
# Python reads no whole number of more than 4,300 digits.
_BYTES = re.compile(r"\s*(\d{0,300})(?:\.(\d{1,300}))?\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """Read an amount of memory: ``"8GiB"``, ``"500 MB"``, ``"1.5gib"``, ``"1024"`` or an int."""
    if isinstance(text, int) and not isinstance(text, bool):
        amount = text
    else:
        match = _BYTES.fullmatch(str(text))
        if match is None or not (match[1] or match[2]) or match[3].lower() not in _UNITS:
            raise BudgetError(
                f"{text!r} is not an amount of memory; write it like 8GiB, 500MB or 1073741824"
            )
        # In whole numbers: a float would lose the last bytes of a large budget.
        unit, part = _UNITS[match[3].lower()], match[2] or "0"
        amount = int(match[1] or 0) * unit + int(part) * unit // 10 ** len(part)
    if amount <= 0:
        raise BudgetError(f"{text!r} leaves no memory; write an amount like 8GiB or 500MB")
    return amount


def _machine(root: Path) -> Iterator[HostMemory]:
    available = _kilobytes(root / "proc/meminfo", "MemAvailable")
    if available is not None:
        yield HostMemory(available, "all that the machine has")


def _own_limits(root: Path) -> Iterator[HostMemory]:
    """List the process's limits, each less what the process has of it already."""
    limits = _read(root / "proc/self/limits")
    for name, used_as, option in (
        ("Max address space", "VmSize", "-v"),
        ("Max data size", "VmData", "-d"),
    ):
        soft = re.search(rf"^{name}\s+(\d+)\s", limits, re.MULTILINE)
        used = _kilobytes(root / "proc/self/status", used_as)
        if soft and used is not None:
            yield HostMemory(max(int(soft[1]) - used, 0), f"the limit of ulimit {option}")


def _groups(root: Path) -> Iterator[HostMemory]:
    """Yield what each control group leaves, from this process's own to the topmost in sight."""
    groups = [line.split(":", 2) for line in _read(root / "proc/self/cgroup").splitlines()]
    groups = [group for group in groups if len(group) == 3]
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, behind = line.partition(" - ")
        fields, kind = before.split(), behind.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        files: tuple[tuple[str, ...], str, str]  # limits, use, used bytes that are pages of files
        if kind[0] == "cgroup2":
            own = [path for _, controllers, path in groups if not controllers]
            files = (("memory.max", "memory.high"), "memory.current", "inactive_file")
        elif kind[0] == "cgroup" and "memory" in kind[2].split(","):
            own = [path for _, controllers, path in groups if "memory" in controllers.split(",")]
            files = (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        top = root / _unescaped(fields[4]).lstrip("/")
        below = _below(own[0], _unescaped(fields[3])) if own else PurePosixPath()
        for group in (below, *below.parents):
            yield from _left_in(top / group, *files)


def _below(own: str, mounted: str) -> PurePosixPath:
    """
    Give the process's group relative to the one that is mounted.

    A container may see its own group as the topmost: then it is the only one that is known.
    """
    try:
        below = PurePosixPath(own).relative_to(mounted)
    except ValueError:
        return PurePosixPath()
    return PurePosixPath() if ".." in below.parts else below


def _left_in(
    group: Path, limits: tuple[str, ...], used_in: str, cached_as: str
) -> Iterator[HostMemory]:
    used = _read(group / used_in).strip()
    if not used.isdigit():
        return
    # Pages of files that nobody has used lately count as used, and are given up at need.
    cached = re.search(rf"^{cached_as} (\d+)$", _read(group / "memory.stat"), re.MULTILINE)
    taken = int(used) - (int(cached[1]) if cached else 0)
    for name in limits:
        limit = _read(group / name).strip()
        if limit.isdigit():  # version 2 says "max" where there is none; version 1 a huge number
            yield HostMemory(max(int(limit) - taken, 0), f"the limit in {group / name}")


def _kilobytes(path: Path, name: str) -> int | None:
    """Read the bytes of a line like ``VmSize:  1234 kB``."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", _read(path), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _unescaped(text: str) -> str:
    """Read a path of mountinfo, which writes blanks and the like as ``\\040``."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
