"""The search for a price with a teacher, and on two processes."""

import json
import os

import pytest
from forked import run
from small_runs import settings

from melinoe.data import load_examples
from melinoe.errors import TrainingError
from melinoe.finetune.price.search import finetune_within
from melinoe.finetune.price.steering import Price

WORDS = ("a", "the", "an", "one", "no", "some", "my", "your", "our")
TAUGHT = {"anchor": "none", "lambda_rank": 0.0, "lambda_match": 1.0}


@pytest.fixture
def place(checkpoint):
    """Nine examples, and as many others to be held to."""
    for name, words in (("data", WORDS), ("held", WORDS[::-1])):
        rows = [{"prompt": "what? ", "completion": f"{word} is it."} for word in words]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (checkpoint / f"{name}.jsonl").write_text(text)
    return checkpoint


def within(place, out, changes=None, **options):
    """A search of two runs at most; the first process writes down what it came to."""
    chosen = settings(**{"steps": 4, "batch_size": 4} | (changes or {}))
    result = finetune_within(
        place / "base",
        load_examples(place / "data.jsonl"),
        place / out,
        chosen,
        Price(0.01),
        eval_examples=load_examples(place / "held.jsonl"),
        every=2,
        runs=2,
        **options,
    )
    if os.environ.get("RANK", "0") == "0":
        (place / f"{out}.json").write_text(json.dumps(result.metadata["price"]))
    return result


def close(one, other):
    """Two records alike: numbers up to rounding, all else equal."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            close(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            close(*pair)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=2e-3, abs=1e-5)
    else:
        assert one == other


def test_two_processes_find_what_one_finds(place):
    """The same runs at the same strengths, the same price paid; one result, nothing left over."""
    within(place, "one")
    shared = {"batch_size": 2}
    assert run(lambda: within(place, "two", shared), processes=2) == [0, 0]
    one, two = (json.loads((place / f"{name}.json").read_text()) for name in ("one", "two"))
    close(two, one)
    kept = sorted(path.name for path in place.iterdir() if path.is_dir())
    assert kept == ["base", "one", "one.reference", "two", "two.reference"]


def test_the_reference_teaches_the_runs(place):
    """It has an adapter, and every run is held to it; one that has none cannot teach."""
    result = within(place, "out", TAUGHT, teacher="control")
    assert (place / "out.reference" / "adapter" / "adapter_config.json").is_file()
    assert result.metadata["teacher"]["source"].endswith("out.reference")
    within(place, "plain", {key: 0.0 for key in ("lambda_rank",)} | {"anchor": "none"})
    plain = {"teacher": "control", "reference": place / "plain.reference"}
    with pytest.raises(TrainingError, match=r"holds no adapter; .*--teacher none.* start anew"):
        within(place, "again", TAUGHT, **plain)
    assert not (place / "again").exists() and not (place / "again.runs").exists()
