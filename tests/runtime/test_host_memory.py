"""What the host can give is the least of what the machine and the container say."""

import pytest

from melinoe.runtime.host_memory import free_host_bytes

GIB = 2**30


def put(root, path, text):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


@pytest.fixture
def machine(tmp_path):
    """100 GiB free on the machine, no container."""
    put(tmp_path, "proc/meminfo", f"MemTotal: 1 kB\nMemAvailable:   {100 * 2**20} kB\n")
    return tmp_path


def test_without_a_limit_it_is_what_the_machine_has(machine):
    """No group, a group without limit, and version 1's way to say none."""
    assert free_host_bytes(machine) == 100 * GIB
    put(machine, "sys/fs/cgroup/memory.max", "max\n")
    put(machine, "sys/fs/cgroup/memory.current", "5\n")
    assert free_host_bytes(machine) == 100 * GIB
    put(machine, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    put(machine, "sys/fs/cgroup/memory/memory.usage_in_bytes", "5\n")
    assert free_host_bytes(machine) == 100 * GIB


@pytest.mark.parametrize(
    ("limit", "used", "stat", "key"),
    [
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ],
)
def test_a_container_gives_no_more_than_its_limit(machine, limit, used, stat, key):
    """16 GiB allowed, 10 used, 4 of those a cache of files: 10 are left, of both versions."""
    group = "sys/fs/cgroup/"
    put(machine, group + limit, f"{16 * GIB}\n")
    put(machine, group + used, f"{10 * GIB}\n")
    assert free_host_bytes(machine) == 6 * GIB
    put(machine, group + stat, f"anon 1\n{key} {4 * GIB}\n")
    assert free_host_bytes(machine) == 10 * GIB
    put(machine, group + used, f"{17 * GIB}\n")
    put(machine, group + stat, "anon 1\n")
    assert free_host_bytes(machine) == 0


def test_a_system_that_says_nothing_is_not_guessed_at(tmp_path):
    """No proc, no sys: unknown, which is not zero."""
    assert free_host_bytes(tmp_path) is None
