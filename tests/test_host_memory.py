"""What the host can give is the least of what the machine, each control group and ulimit leave."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from damaged import write_olmoe
from small_olmoe import words_tokenizer
from typer.testing import CliRunner

from melinoe.cli.app import app
from melinoe.config import FinetuneSettings
from melinoe.data import Example
from melinoe.errors import BudgetError
from melinoe.finetune import finetune
from melinoe.finetune.saving import merge_adapter
from melinoe.host_memory import HostMemory, check_host_room, free_host_bytes, host_memory

GIB = 2**30
V2 = "30 20 0:26 {} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 20 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
    "35 20 0:31 {} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)


def put(root, path, text):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def put_group(root, path, limit, used, cached=0, high="max"):
    """A group of version 2."""
    group = f"sys/fs/cgroup/{path}"
    put(root, f"{group}/memory.max", f"{limit}\n")
    put(root, f"{group}/memory.high", f"{high}\n")
    put(root, f"{group}/memory.current", f"{used}\n")
    put(root, f"{group}/memory.stat", f"anon 1\ninactive_file {cached}\nactive_file 7\n")


def put_old_group(root, path, limit, used, cached=0):
    """A group of version 1."""
    group = f"sys/fs/cgroup/memory/{path}"
    put(root, f"{group}/memory.limit_in_bytes", f"{limit}\n")
    put(root, f"{group}/memory.usage_in_bytes", f"{used}\n")
    put(root, f"{group}/memory.stat", f"inactive_file 1\ntotal_inactive_file {cached}\n")


@pytest.fixture
def machine(tmp_path):
    """100 GiB free on the machine, no limit."""
    put(tmp_path, "proc/meminfo", f"MemTotal: 1 kB\nMemAvailable:   {100 * 2**20} kB\n")
    return tmp_path


@pytest.fixture
def grouped(machine):
    """The same; the process is in a group of version 2, two below the topmost, none limited."""
    put(machine, "proc/self/mountinfo", V2.format("/"))
    put(machine, "proc/self/cgroup", "0::/user.slice/job\n")
    put_group(machine, "user.slice", "max", 20 * GIB)
    put_group(machine, "user.slice/job", "max", 10 * GIB)
    return machine


def test_a_system_that_says_nothing_is_not_guessed_at(tmp_path):
    """No proc, no sys: unknown, which is not zero."""
    assert host_memory(tmp_path) is None
    assert free_host_bytes(tmp_path) is None


def test_without_a_limit_it_is_what_the_machine_has(grouped):
    """No group is limited, of either version; the topmost has no limit at all."""
    assert free_host_bytes(grouped) == 100 * GIB
    put(grouped, "proc/self/mountinfo", V1.format("/"))
    put(grouped, "proc/self/cgroup", "4:memory:/job\n0::/\n")
    put_old_group(grouped, "job", 9223372036854771712, 5)
    assert host_memory(grouped) == (100 * GIB, "all that the machine has")


def test_the_processes_own_group_limits_it(grouped):
    """16 GiB allowed, 10 used, 4 of those a cache of files that nobody reads: 10 are left."""
    put_group(grouped, "user.slice/job", 16 * GIB, 10 * GIB, 4 * GIB)
    left = host_memory(grouped)
    assert left.free_bytes == 10 * GIB
    assert left.limited_by.endswith("/sys/fs/cgroup/user.slice/job/memory.max")


def test_the_smallest_limit_on_the_path_counts(grouped):
    """A slice above the job leaves 5 GiB, the job itself 6; then one between them 1."""
    put_group(grouped, "user.slice/job", 16 * GIB, 10 * GIB)
    put_group(grouped, "user.slice", 25 * GIB, 20 * GIB)
    assert free_host_bytes(grouped) == 5 * GIB
    put(grouped, "proc/self/cgroup", "0::/user.slice/job/step/task\n")
    put_group(grouped, "user.slice/job/step", 10 * GIB, 9 * GIB)
    assert free_host_bytes(grouped) == 1 * GIB


def test_another_jobs_limit_does_not_count(grouped):
    """A neighbour is full, which is its own affair."""
    put_group(grouped, "user.slice/neighbour", 1 * GIB, 1 * GIB)
    assert free_host_bytes(grouped) == 100 * GIB


def test_where_the_kernel_throttles_is_a_limit_too(grouped):
    """Above memory.high the process is slowed until it hardly runs."""
    put_group(grouped, "user.slice/job", "max", 10 * GIB, high=12 * GIB)
    left = host_memory(grouped)
    assert left.free_bytes == 2 * GIB
    assert left.limited_by.endswith("memory.high")


def test_more_used_than_allowed_leaves_nothing(grouped):
    """A limit may be lowered below what is in use."""
    put_group(grouped, "user.slice/job", 8 * GIB, 10 * GIB)
    assert free_host_bytes(grouped) == 0


def test_version_1_counts_the_same(machine):
    """Slurm's nested groups: 16 GiB for the job, of which a step may have 12, and has 10."""
    put(machine, "proc/self/mountinfo", V1.format("/"))
    put(machine, "proc/self/cgroup", "5:cpu:/else\n4:memory:/slurm/job_7/step_0\n0::/\n")
    put_old_group(machine, "slurm/job_7", 16 * GIB, 11 * GIB, 1 * GIB)
    put_old_group(machine, "slurm/job_7/step_0", 12 * GIB, 10 * GIB, 1 * GIB)
    assert free_host_bytes(machine) == 3 * GIB


def test_both_versions_side_by_side(machine):
    """Version 1 for memory, an empty version 2 beside it, as many systems had."""
    unified = "36 20 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    put(machine, "proc/self/mountinfo", V1.format("/") + unified)
    put(machine, "proc/self/cgroup", "4:memory:/job\n0::/\n")
    put_old_group(machine, "job", 4 * GIB, 1 * GIB)
    assert free_host_bytes(machine) == 3 * GIB


@pytest.mark.parametrize(
    ("own", "mounted"),
    [
        ("/", "/"),  # a namespace of its own
        ("/docker/8f3a", "/docker/8f3a"),  # the host's path, of which this one group is mounted
        ("/../other", "/"),  # moved out of the namespace's own group
        ("/", "/../.."),  # the host's groups, mounted into a namespace
        ("/kubepods/pod 1/c", "/kubepods/pod\\0401/c"),  # a blank, as mountinfo writes it
    ],
)
def test_a_container_sees_its_own_group_as_the_topmost(machine, own, mounted):
    """The limit stands in the directory that is mounted, whatever the process calls itself."""
    put(machine, "proc/self/mountinfo", V2.format(mounted))
    put(machine, "proc/self/cgroup", f"0::{own}\n")
    put_group(machine, "", 8 * GIB, 1 * GIB)
    assert free_host_bytes(machine) == 7 * GIB


@pytest.mark.parametrize(
    ("limit", "used", "option"),
    [("Max address space", "VmSize", "-v"), ("Max data size", "VmData", "-d")],
)
def test_the_limits_of_the_process_count(machine, limit, used, option):
    """ulimit gives 6 GiB of a kind, of which 2 are in use."""
    limits = "Max cpu time  unlimited  unlimited  seconds\n{}  {}  unlimited  bytes\n"
    put(machine, "proc/self/limits", limits.format(limit, 6 * GIB))
    put(machine, "proc/self/status", f"Name:\tpython\n{used}:\t {2 * 2**20} kB\n")
    assert host_memory(machine) == (4 * GIB, f"the limit of ulimit {option}")
    put(machine, "proc/self/limits", limits.format(limit, "unlimited"))
    assert free_host_bytes(machine) == 100 * GIB


@pytest.mark.parametrize("text", ["", "\n", "0::", "::::", "no colons\n", "\xff\n", "0::/a\n" * 3])
def test_files_of_another_form_are_passed_over(machine, text):
    """A kernel may write what this release has not seen: the machine's own figure remains."""
    for name in ("cgroup", "mountinfo", "limits", "status"):
        put(machine, f"proc/self/{name}", text)
    assert free_host_bytes(machine) == 100 * GIB


def test_the_sentence_names_the_limit_and_the_way_out(monkeypatch):
    """What needs as much as is left is let through, one byte more is not."""
    left = HostMemory(4096, "the limit of ulimit -v")
    monkeypatch.setattr("melinoe.host_memory.host_memory", lambda: left)
    check_host_room(4096, "4KiB of experts", "give fewer slots")
    with pytest.raises(BudgetError) as refused:
        check_host_room(4097, "5KiB of experts", "give fewer slots")
    assert str(refused.value) == (
        "5KiB of experts do not fit into the 4KiB of host memory that are left (the limit of "
        "ulimit -v); give fewer slots"
    )


def in_a_process(code):
    """What *code* prints in a new process."""
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300
    )
    return done.stdout.split("|")


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="no /proc to read limits from")
def test_a_real_limit_of_the_shell_is_seen():
    """ulimit -v 3 GiB: less than that is left, by a real system's files."""
    free, by = in_a_process(
        f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({3 * GIB}, {3 * GIB}));"
        "from melinoe.host_memory import host_memory; print(*host_memory(), sep='|', end='')"
    )
    assert 0 < int(free) < 3 * GIB
    assert by == "the limit of ulimit -v"


@pytest.fixture
def group():
    """A group below this process's own, limited to 1 GiB by the real system."""
    memory = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    old = [path for _, names, path in memory if "memory" in names.split(",")]
    top, path, limit = (
        ("/sys/fs/cgroup/memory", old[0], "memory.limit_in_bytes")
        if old
        else ("/sys/fs/cgroup", memory[-1][2], "memory.max")
    )
    made = Path(top + path) / f"melinoe-test-{os.getpid()}"
    try:
        made.mkdir()
        (made / limit).write_text(str(GIB))
    except OSError as error:
        if made.is_dir():
            made.rmdir()
        pytest.skip(f"this system lets nobody make a group ({error})")
    yield made, limit
    made.rmdir()


@pytest.mark.skipif(not Path("/proc/self/cgroup").exists(), reason="a system without groups")
def test_a_real_group_of_the_processes_own_is_seen(group):
    """A process moves into it, and has at most its 1 GiB."""
    directory, limit = group
    free, by = in_a_process(
        f"import os; open({str(directory / 'cgroup.procs')!r}, 'w').write(str(os.getpid()));"
        "from melinoe.host_memory import host_memory; print(*host_memory(), sep='|', end='')"
    )
    assert 0 < int(free) <= GIB
    assert by == f"the limit in {directory / limit}"


def test_weights_that_do_not_fit_are_refused_before_training_and_merging(tmp_path, monkeypatch):
    """Nothing was read and nothing is left behind."""
    base = tmp_path / "base"
    write_olmoe(base)
    data = [Example("what? ", "that.", "here")] * 2
    settings = FinetuneSettings(
        capacity=0.5, steps=1, batch_size=2, save="adapter", lambda_replay=0.0
    )
    words_tokenizer().save_pretrained(base)
    finetune(base, data, tmp_path / "adapter", settings)
    left = HostMemory(10_000, "the limit of a test")
    monkeypatch.setattr("melinoe.host_memory.host_memory", lambda: left)
    with pytest.raises(BudgetError, match=r"of weights do not fit .* train on a host with more"):
        finetune(base, data, tmp_path / "out", settings)
    with pytest.raises(BudgetError, match=r"of weights do not fit .* merge on a host with more"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("command", [["doctor"], ["plan", "--gpu-memory", "1GiB"]])
def test_doctor_and_plan_show_what_is_left_and_why(monkeypatch, command):
    """In words, and as JSON."""
    left = HostMemory(3 * GIB, "the limit of a test")
    monkeypatch.setattr("melinoe.host_memory.host_memory", lambda: left)
    said = CliRunner().invoke(app, [command[0], "tiny", *command[1:]])
    assert "3GiB" in said.output
    assert "limit of a test" in said.output.replace("\n", " ")
    told = json.loads(CliRunner().invoke(app, [command[0], "tiny", *command[1:], "--json"]).stdout)
    assert {"free_bytes": 3 * GIB, "limited_by": "the limit of a test"} in list(told.values())
