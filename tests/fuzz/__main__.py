"""
Fuzz for longer than the suite does: every option and value, then damaged files until time is up.

    python -m tests.fuzz --seconds 600 [--first-seed 100]
"""

import argparse
import os
import tempfile
import time
import warnings
from pathlib import Path

from tests.fuzz import files, options, samples
from tests.fuzz.running import run
from tests.fuzz.test_fuzz import base_of


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--first-seed", type=int, default=100)
    parser.add_argument("--part", choices=["options", "files", "both"], default="both")
    parser.add_argument("--only", default="", help="words of a command, or a kind of file")
    arguments = parser.parse_args()
    warnings.simplefilter("error")
    end, tried, wrong = time.monotonic() + arguments.seconds, 0, 0

    def judge(what, ended):
        nonlocal tried, wrong
        tried += 1
        if why := ended.wrong:
            wrong += 1
            print(f"--- {what}: {why}\n", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # some values are names of places to write to
        whole = samples.make(Path(folder) / "whole")
        places = options.places(Path(folder) / "places")
        for case in options.cases(places, base_of(whole)):
            if arguments.part == "files" or time.monotonic() > end:
                break
            if arguments.only in " ".join(map(str, case)):
                judge(" ".join(map(repr, case))[:300], run(case))
        seed = arguments.first_seed
        while time.monotonic() < end and arguments.part != "options":
            for name, (source, command) in samples.readers(whole).items():
                if arguments.only in name and time.monotonic() < end:
                    content = files.damage(source.read_bytes(), seed)
                    path = samples.damaged(source, content, Path(folder) / "damaged")
                    judge(f"{name}, seed {seed}", run(command(path)))
            seed += 1
    print(f"{tried} cases, {wrong} wrong; seeds up to {seed - 1}")


if __name__ == "__main__":
    main()
