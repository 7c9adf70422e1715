"""Whatever the server's own description of its routes allows is answered, never by a 500."""

import json
import re
import subprocess
import sys


def test_no_request_that_the_schema_allows_fails_the_server(server, tmp_path):
    """Four random requests to each route; some of them write text."""
    before = server.log.read_text().count('"status": "ok"')
    made = subprocess.run(
        [
            sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()",
            "run", f"{server.url}/openapi.json", "--checks", "not_a_server_error", "--phases",
            "fuzzing", "--max-examples", "4", "--seed", "1", "--request-timeout", "60",
        ],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout[-4000:] + made.stderr[-2000:]
    assert int(re.search(r"Tested: (\d+)", made.stdout)[1]) >= 5
    assert server.log.read_text().count('"status": "ok"') > before
    lines = [line for line in server.log.read_text().splitlines() if line.startswith("{")]
    assert not [line for line in lines if json.loads(line)["status"].startswith("5")]
