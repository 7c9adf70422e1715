"""Code that runs from a checkout, installed nowhere, says so and works."""

import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"


def test_a_checkout_that_is_not_installed_records_traces_and_says_its_version():
    """Its own metadata is missing there, as on a machine that nothing may be installed on."""
    program = (
        "import importlib.metadata as m\n"
        "real = m.version\n"
        "def version(name):\n"
        "    if name == 'melinoe':\n"
        "        raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
        "from melinoe.runtime.record import _versions\n"
        "found = _versions()\n"
        "assert found['melinoe'] == 'not installed' and found['torch'], found\n"
        "from melinoe.cli import main\n"
        "import sys; sys.argv = ['melinoe', '--version']; main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=SOURCE, check=False
    )
    assert "melinoe not installed" in done.stdout, done.stderr[-2000:]
