"""Every command that reads rows reads them alike, says what is lost, and keeps the numbers."""

import pytest
from data_rows import byte_tokenizer, write

from melinoe.checkpoint import read_metadata
from melinoe.data import Encoded, count_losses, encode, load_examples
from melinoe.errors import DataError

# Prompts of 3 to 6 words: at 5 tokens the completion of four (and its end) does not fit.
ROWS = [{"q": " ".join(["w2"] * n), "a": "w5 w6 w7 w8", "id": n} for n in (3, 4, 5, 6)]


def test_finetune_says_what_is_lost_and_keeps_the_numbers(checkpoint, tmp_path, melinoe, caplog):
    """Of prompts of 3, 4, 5 and 6 tokens at 5: two are cut by 3 and 4 tokens, two left out."""
    data = write(tmp_path / "rows.jsonl", *ROWS)
    code, _, err = melinoe(
        *("finetune", checkpoint, "--data", data, "--columns", "prompt=q,completion=a"),
        *("--out", tmp_path / "out", "--steps", 1, "--max-length", 5, "--batch-size", 1),
        *("--no-measure", "--hold-out", 0),
    )
    assert code == 0, err
    assert "4 rows; ignored columns: id (in 4)" in caplog.text
    assert "2 were cut at 5 tokens (7 tokens fell away); 2 left out" in caplog.text
    about = read_metadata(tmp_path / "out")["data"]
    assert about["columns"] == "prompt=q,completion=a"
    assert {key: about[key] for key in ("examples", "left_out", "shortened", "tokens_cut")} == {
        "examples": 4,
        "left_out": 2,
        "shortened": 2,
        "tokens_cut": 7,
    }


def test_evaluate_says_what_is_lost(checkpoint, tmp_path, melinoe, caplog):
    """The same line as in training."""
    data = write(tmp_path / "rows.jsonl", *ROWS)
    given = ("--data", data, "--columns", "prompt=q,completion=a", "--max-length", 5)
    code, _, err = melinoe("evaluate", checkpoint, *given)
    assert code == 0, err
    assert "2 were cut at 5 tokens (7 tokens fell away); 2 left out" in caplog.text


def test_prompts_alone_are_traced_and_fitted(checkpoint, tmp_path, melinoe):
    """`trace` reads rows without a completion to learn, and `predictor fit` what it kept."""
    rows = [{"q": f"w{n} w{n + 1} w{n + 2}"} for n in range(2, 22)]
    data = write(tmp_path / "rows.jsonl", *rows)
    trace = tmp_path / "t.safetensors"
    given = ("--data", data, "--columns", "prompt=q")
    code, _, err = melinoe("trace", checkpoint, *given, "--out", trace, "--max-new-tokens", 3)
    assert code == 0, err
    fit = ("predictor", "fit", trace, "--model", checkpoint, "--out", tmp_path / "p")
    code, _, err = melinoe(*fit)
    assert code == 0, err


@pytest.mark.parametrize("command", ["finetune", "evaluate", "trace", "bench"])
@pytest.mark.parametrize(
    ("row", "more", "words"),
    [
        (
            ROWS[0],
            ["--columns", "prompt=x,completion=x"],
            "rows.jsonl:2 has no column 'x'",
        ),
        (ROWS[0], [], "rows.jsonl:2 has the keys ['a', 'id', 'q']"),
        ({"text": "w2", "weight": 0}, [], 'rows.jsonl:2 has a "weight"'),
        ("\ud83d", [], "rows.jsonl:2 in its"),
    ],
    ids=["column", "form", "weight", "half"],
)
def test_a_row_that_cannot_be_used_is_one_sentence(
    checkpoint, tmp_path, melinoe, command, row, more, words
):
    """Before any model is read, in the same words from each command."""
    row = {"prompt": row, "completion": "w2"} if isinstance(row, str) else row
    good = {"prompt": "w2", "completion": "w3", "x": "w2"}
    data = write(tmp_path / "rows.jsonl", good, row)
    out = ["--out", tmp_path / "out"] if command in ("finetune", "trace") else []
    code, _, err = melinoe(command, checkpoint, "--data", data, *out, *more)
    assert (code, err.count("\n")) == (1, 1), err
    assert words in err and not (tmp_path / "out").exists()


def test_losses_are_counted_by_hand():
    """One left out of three, one cut by two tokens, one turn that is context."""
    kept = [Encoded([1, 2], [False, True], 2), Encoded([1, 2], [False, True], 0, 1)]
    assert count_losses([None] * 3, kept) == {
        "left_out": 1,
        "shortened": 1,
        "tokens_cut": 2,
        "turns_unlearned": 1,
    }


def test_a_prompt_alone_has_nothing_to_learn(tmp_path):
    """It will do to answer; encoding it for training will not."""
    (prompt,) = load_examples(write(tmp_path / "r.jsonl", {"prompt": "p"}), prompts=True)
    with pytest.raises(DataError, match="nothing to learn"):
        encode([prompt], byte_tokenizer(), 9)


def test_rows_without_a_prompt_to_answer_are_refused_by_trace(checkpoint, tmp_path, melinoe):
    """Answered from start-of-text, every one of them would be the same."""
    data = write(tmp_path / "rows.jsonl", {"text": "w2 w3"})
    code, _, err = melinoe("trace", checkpoint, "--data", data, "--out", tmp_path / "t.safetensors")
    assert code == 1 and "--columns prompt=text" in err
