"""Without the calls that only Linux, or only POSIX, has: imports work and checkpoints are read."""

import ast
import importlib
import os
import sys
from pathlib import Path

import damaged
import torch

import melinoe.whole_file as unfinished_module
from melinoe.checkpoint import load_model, open_checkpoint, write_model

SOURCE = Path(unfinished_module.__file__).parents[1]
POSIX_MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "posix"}
# Missing on Windows, macOS or both.
POSIX_CALLS = {
    "pread", "preadv", "pwrite", "posix_fadvise", "sched_getaffinity", "sysconf", "fchmod",
    "getuid", "fork", "getpgid", "killpg", "mkfifo",
}  # fmt: skip


def test_a_checkpoint_is_read_and_written_where_there_is_no_pread(tmp_path, monkeypatch):
    """As on Windows: read by seeking, under a lock; no directory is locked."""
    base = damaged.write_olmoe(tmp_path / "base")
    with open_checkpoint(str(base)) as checkpoint:
        expected = load_model(checkpoint).state_dict()
    for name in POSIX_CALLS - {"sysconf"}:
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr("melinoe.checkpoint.safetensors_file._ONCE_BYTES", 100)  # in many pieces
    monkeypatch.setitem(sys.modules, "fcntl", None)
    try:
        importlib.reload(unfinished_module)
        assert unfinished_module.fcntl is None
        monkeypatch.setattr("melinoe.checkpoint.writing.unfinished", unfinished_module.unfinished)
        with open_checkpoint(str(base)) as checkpoint:
            model = load_model(checkpoint)
            damaged.check_experts(checkpoint, expected)
        (tmp_path / "out").mkdir()
        write_model(model, str(base), tmp_path / "out", {}, [])
    finally:
        monkeypatch.undo()
        importlib.reload(unfinished_module)
    assert unfinished_module.fcntl is not None
    with open_checkpoint(str(tmp_path / "out")) as checkpoint:
        for name, tensor in load_model(checkpoint).state_dict().items():
            assert torch.equal(tensor, expected[name]), name


def test_what_other_systems_lack_is_asked_for_first():
    """No import of a POSIX module outside a try, no such call in a file that has no hasattr."""
    for path in SOURCE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        tried = {
            id(one) for node in ast.walk(tree) if isinstance(node, ast.Try) for one in node.body
        }
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            assert not POSIX_MODULES.intersection(names) or id(node) in tried, path
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and (node.value.id, node.attr in POSIX_CALLS) == ("os", True)
            ):
                asked = f'hasattr(os, "{node.attr}")' in text or "except (AttributeError" in text
                assert asked, f"{path} calls os.{node.attr}, which other systems lack"
