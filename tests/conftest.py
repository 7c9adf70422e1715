"""Shared by all tests: nothing is downloaded, and one thread is enough for tiny models."""

import functools
import gc
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
# Triton asks once, when it is first imported, which importing transformers does. Interpreted, its
# kernels run on the CPU; benchmarks/gpu/run.sh sets 0 to run tests/gpu compiled.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
import typer.main

# What is compiled is kept, whatever the caller's habit: all workers and processes import it again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
torch.set_num_threads(1)
# Typer makes all commands anew at each call, once a process outside of tests.
typer.main.get_command = functools.cache(typer.main.get_command)


@pytest.fixture(scope="module", autouse=True)
def little_garbage():
    """
    Set aside the libraries' objects while a test file runs.

    Fine-tuning and measuring collect garbage often. Over every loaded module that takes half a
    second each time, most of the time of a run with a tiny model.
    """
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _garbage_of_imports(little_garbage):
    """Set aside what the tests before have imported, too."""
    gc.freeze()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A tiny random OLMoE in the hub's layout, with a tokenizer of words; nobody changes it."""
    from small_olmoe import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("model") / "olmoe")


@pytest.fixture
def melinoe(monkeypatch, capsys):
    """Run a command of `melinoe` in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        from melinoe.cli import main

        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["melinoe", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.delenv("MELINOE_DEBUG", raising=False)
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def interpreted():
    """Run the device engine's kernels themselves, in Triton's interpreter."""


@pytest.fixture(autouse=True)
def _kernels(request):
    """
    Compute the kernels by numpy, which is equal and much faster, but where a test asks for
    `interpreted` or its file says ``INTERPRETED = True``.
    """
    itself = "interpreted" in request.fixturenames or getattr(request.module, "INTERPRETED", False)
    if itself or "triton" not in sys.modules:
        yield
        return
    from kernels_on_the_host import on_the_host

    with on_the_host():
        yield
