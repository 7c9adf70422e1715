"""What this machine can do: processor, memory, GPUs."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Gpu:
    """One CUDA device."""

    name: str
    memory_bytes: int
    capability: str


@dataclass(frozen=True)
class Machine:
    """Processor, cores open to this process, main memory, CUDA devices, torch's version."""

    cpu: str
    cores: int
    threads: int
    memory_bytes: int
    gpus: tuple[Gpu, ...]
    torch: str
    system: str

    @property
    def can_pin(self) -> bool:
        """Whether host memory can be pinned for a GPU."""
        return bool(self.gpus)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def describe_machine() -> Machine:
    """Look at the machine this process runs on; starts no CUDA context where there is no GPU."""
    gpus = []
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(number)
            gpus.append(Gpu(found.name, found.total_memory, f"{found.major}.{found.minor}"))
    return Machine(
        cpu=_cpu_name(),
        cores=_cores(),
        threads=torch.get_num_threads(),
        memory_bytes=_memory_bytes(),
        gpus=tuple(gpus),
        torch=torch.__version__,
        system=f"{platform.system()} {platform.machine()}",
    )


def default_device() -> torch.device:
    """The first CUDA device if there is one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    """Main memory, or what the control group allows if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total
