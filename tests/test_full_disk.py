"""
A disk that is full: every command that writes says so in one sentence, and loses nothing.

The limit on a process's file sizes stands for the disk: beyond it every write fails, or takes a
part, whoever makes it (Python, safetensors, a copy by the kernel).
"""

import os
import resource
import signal
import sys
import traceback

import pytest
from data_rows import write
from small_olmoe import write_checkpoint

TRAINED = (
    "--steps 1 --batch-size 2 --lora-rank 2 --learning-rate 0.01 --lambda-replay 0 --hold-out 0"
)
# Each writes into OUT, but for those that add to or replace a file that is there: IN.
COMMANDS = {
    "trace": "trace BASE --data DATA --out OUT/t.safetensors --max-new-tokens 4 --slots 8",
    "predictor fit": "predictor fit IN/t.safetensors --out OUT/p --model BASE",
    "batch": "batch IN/asked.jsonl --out OUT/answers.jsonl --model BASE --slots 8",
    "pack": "pack BASE --format int8 --out OUT/packed",
    "prune": "prune BASE --data DATA --keep 4 --out OUT/pruned",
    "merge": "merge IN/adapter --out OUT/merged",
    "finetune": f"finetune BASE --data DATA --out OUT/tuned --no-measure {TRAINED}",
    "finetune adapter": f"finetune BASE --data DATA --out OUT/a --save adapter {TRAINED}",
    "outcome": f"finetune BASE --data DATA --out IN/adapter --save adapter --resume {TRAINED}",
    "import-trace": "import-trace IN/choices.csv --out OUT/i.safetensors --num-experts 8",
    "evaluate": "evaluate BASE --data DATA --out IN/records.jsonl",
    "bench": "bench BASE --data DATA --slots 8 --limit 1 --max-new-tokens 2 --out IN/records.jsonl",
    "report": "report IN/records.jsonl --out OUT/page.html",
    "report of a trace": "report IN/t.safetensors --out OUT/page.html",
    "card": "card IN/adapter",
    "reference": "doctor BASE --export --reference OUT/reference.json",
}


def call(words, limit):
    """Run a command in a process of its own whose files end at *limit* bytes: exit code, stderr."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(writer, 2)
            sys.stdout, sys.stderr = (os.fdopen(one, "w", buffering=1) for one in (1, 2))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            sys.argv = ["melinoe", *words]
            from melinoe.cli.app import main

            if limit is not None:
                sys.dont_write_bytecode = True  # a module that is cut off there would be read later
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        except BaseException:
            traceback.print_exc()
            code = 99
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as said:
        text = said.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """What the commands read, made by the commands themselves, and a record to add to."""
    place = tmp_path_factory.mktemp("disk")
    write_checkpoint(place / "base")
    rows = [{"prompt": f"w{i} w4", "completion": f" w{i + 3} w5 w6"} for i in range(2, 22)]
    write(place / "data.jsonl", *rows)
    (place / "in").mkdir()
    (place / "in" / "choices.csv").write_text(
        "token,layer,expert\n" + "".join(f"{t},0,{t % 8}\n{t},0,{(t + 1) % 8}\n" for t in range(9))
    )
    asked = [{"prompt": f"w{i} w4", "max_tokens": 3} for i in range(2, 8)]
    write(place / "in" / "asked.jsonl", *asked)
    for name in ("trace", "finetune adapter", "evaluate"):
        code, said = call(words_of(name, place, place / "in"), None)
        assert code == 0, said
    (place / "in" / "a").rename(place / "in" / "adapter")
    return place


def words_of(name, place, out):
    known = {"BASE": place / "base", "DATA": place / "data.jsonl", "IN": place / "in", "OUT": out}
    words = COMMANDS[name].split()
    for key, path in known.items():
        words = [w.replace(key, str(path)) if w.split("/")[0] == key else w for w in words]
    return words


def contents(directory):
    """Path to bytes, of all that lies in a directory; a lock that is held by nobody is nothing."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


@pytest.mark.parametrize("limit", [0, 100])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_one_sentence_and_nothing_is_lost(name, limit, place, tmp_path):
    """What was there is as it was; what was not is not: no half a file, no temporary one."""
    before = contents(place)
    code, said = call(words_of(name, place, tmp_path), limit)
    lines = [line for line in said.splitlines() if line.startswith("melinoe: ")]
    assert code == 1 and "Traceback" not in said, said
    assert len(lines) == 1 and said.splitlines()[-1] == lines[0], said
    assert "File too large" in lines[0] or "cannot be written" in lines[0], said
    assert contents(place) == before
    assert not any(path.is_file() for path in tmp_path.rglob("*")), contents(tmp_path).keys()
