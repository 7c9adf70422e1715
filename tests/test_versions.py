"""Code that runs from a checkout, installed nowhere, says so and works."""

import importlib.metadata
import io
import multiprocessing
import sys
from contextlib import redirect_stdout

import melinoe.engine.record  # noqa: F401  torch and transformers are the child's too

REAL = importlib.metadata.version


def _version(name):
    if name == "melinoe":
        raise importlib.metadata.PackageNotFoundError(name)
    return REAL(name)


def _import_anew_and_say():
    """Import melinoe again, where its own metadata is missing, as it is in a checkout."""
    importlib.metadata.version = _version
    for name in [one for one in sys.modules if one.split(".")[0] == "melinoe"]:
        del sys.modules[name]
    from melinoe.engine.record import _versions

    found = _versions()
    assert found["melinoe"] == "not installed" and found["torch"], found
    from melinoe.cli import main

    sys.argv, said = ["melinoe", "--version"], io.StringIO()
    with redirect_stdout(said):
        try:
            main()
        except SystemExit as stop:
            assert not stop.code
    assert "melinoe not installed" in said.getvalue(), said.getvalue()


def test_a_checkout_that_is_not_installed_records_traces_and_says_its_version():
    """In a process of its own, which is forked so that it need not load torch again."""
    child = multiprocessing.get_context("fork").Process(target=_import_anew_and_say)
    child.start()
    child.join()
    assert child.exitcode == 0
