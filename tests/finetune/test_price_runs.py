"""The search for a price with a teacher, and on two processes."""

import json
import os

import pytest
from forked import run
from small_runs import settings

from melinoe.checkpoint import read_metadata
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


def test_runs_and_reference_have_one_teacher(place):
    """Trained first, beside the run; a reference that had another teacher is refused."""
    result = within(place, "out", TAUGHT, teacher="plain")
    reference = read_metadata(place / "out.reference")
    assert result.metadata["teacher"]["source"].endswith("out.teacher")
    assert reference["teacher"]["fingerprint"] == result.metadata["teacher"]["fingerprint"]
    assert reference["is_control"] and reference["settings"]["lambda_match"] == 1.0
    known = {"reference": place / "out.reference"}
    again = within(place, "again", TAUGHT, teacher=place / "out.teacher", **known)
    assert again.metadata["price"]["paid"] == result.metadata["price"]["paid"]
    with pytest.raises(TrainingError, match="of another teacher"):
        within(place, "untaught", TAUGHT, **known)
    with pytest.raises(TrainingError, match=r"lambda_match 1\.0, this run with 2\.0"):
        within(place, "heavier", TAUGHT | {"lambda_match": 2.0}, teacher="plain", **known)
    assert not any((place / f"{one}{what}").exists() for one in ("untaught", "heavier")
                   for what in ("", ".runs", ".teacher"))  # fmt: skip
