"""No value and no damaged file ends in a traceback, a hang, or memory without bound."""

import zlib

import pytest

from tests.fuzz import files, options, samples
from tests.fuzz.running import run

# Seeds of each kind of file; `python -m tests.fuzz` tries more.
SEEDS = range(4)
# (kind of file, seed) that ended otherwise once, each with what it was.
FOUND = [
    ("config to plan", 106),  # architectures that are an object
    ("config.json", 106),
    ("tokenizer_config.json", 130),  # model_max_length that is a list
    ("generation_config.json", 133),  # output_hidden_states that is a list
    ("melinoe.json", 156),  # half a character, which no card can be written with
]


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    return samples.make(tmp_path_factory.mktemp("fuzz") / "whole")


def base_of(whole):
    """Arguments with which each command would run, but that it names a model that is not there."""
    absent, data = str(whole / "no-model"), str(whole / "data.jsonl")
    out = str(whole / "out")

    def base(words):
        return {
            ("demo",): {"--out": str(whole / "data.jsonl")},
            ("doctor",): {"model": absent},
            ("plan",): {"model": absent},
            ("finetune",): {"model": absent, "--data": data, "--out": out},
            ("merge",): {"adapter": absent, "--out": out},
            ("card",): {"directory": absent},
            ("trace",): {"model": absent, "--data": data, "--out": out},
            ("generate",): {"model": absent, "prompt": "w3"},
            ("chat",): {"model": absent},
            ("serve",): {"model": absent},
            ("pack",): {"model": absent, "--out": out},
            ("import-trace",): {"file": absent, "--out": out},
            ("simulate",): {"trace": str(whole / "trace.safetensors"), "--slots": "2"},
            ("bench",): {"model": absent, "--data": data},
            ("evaluate",): {"model": absent, "--data": data},
            ("report",): {"runs": absent, "--out": out},
            ("predictor", "fit"): {"trace": absent, "--out": out},
        }.get(words, {})

    return base


def chosen(number, share):
    """Whether a case belongs to the part of all cases that the suite runs."""
    return zlib.crc32(str(number).encode()) % share == 0


def test_no_value_of_any_option_ends_in_a_traceback(whole, tmp_path, monkeypatch):
    """A part of all options x values, alike in every run: exit 0, 1 with a sentence, or 2."""
    monkeypatch.chdir(tmp_path)  # some values are names of places to write to
    wrong = []
    places = options.places(tmp_path / "places")
    for number, case in enumerate(options.cases(places, base_of(whole))):
        if chosen(number, 16) and (why := run(case).wrong):
            wrong.append(f"melinoe {' '.join(map(repr, case))[:300]}: {why}")
    assert not wrong, f"{len(wrong)} cases\n" + "\n\n".join(wrong[:20])


def test_no_damaged_file_ends_in_a_traceback(whole, tmp_path):
    """Every kind of file that a command reads, damaged by a few seeds, and those found before."""
    wrong = []
    readers = samples.readers(whole)
    for name, (source, command) in readers.items():
        content = source.read_bytes()
        for seed in [*SEEDS, *(seed for kind, seed in FOUND if kind == name)]:
            path = samples.damaged(source, files.damage(content, seed), tmp_path / "damaged")
            if why := run(command(path)).wrong:
                wrong.append(f"{name}, seed {seed}: {why}")
    assert not wrong, f"{len(wrong)} cases\n" + "\n\n".join(wrong[:20])
