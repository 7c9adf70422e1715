"""Which held-out texts may say the price of a search: those that it did not choose by."""

from small_olmoe import words_tokenizer

from melinoe.cli.texts import HeldOut, judges
from melinoe.data import Example
from melinoe.finetune.price import halves

TOO_LONG = Example(" ".join(["w2"] * 9), "w3", "long")


def texts(first, count):
    """Texts of four words that all differ."""
    return [Example(f"w{first + i} w2", f"w{first + i} w3", f"{first}:{i}") for i in range(count)]


def test_texts_without_room_for_a_completion_are_in_no_half():
    """They shift those that come after: kept are 1 2 3 5 6 7 8 9, of which every second judges."""
    given = [TOO_LONG, *texts(4, 3), TOO_LONG, *texts(9, 5)]
    choosing, judging = halves(given, words_tokenizer(), 8)
    assert judging == [given[at] for at in (2, 5, 7, 9)]
    assert choosing == [given[at] for at in (1, 3, 6, 8)]


def test_other_texts_are_split_as_one_and_keep_their_names(monkeypatch):
    """Five of one file and four of another are nine in a row, of which every second one judges."""
    monkeypatch.setattr("melinoe.checkpoint.load_tokenizer", lambda *_: words_tokenizer())
    monkeypatch.setattr("melinoe.checkpoint.files.read_config", lambda name: None)
    own, far, farther = texts(4, 7), texts(4, 5), texts(11, 4)
    held_out = HeldOut([], "own", own, {"far": far, "farther": farther})
    found = judges(held_out, "base", 8, True)
    assert found.examples == own[1::2] and found.chosen_by == 4
    assert found.others == {"far": [far[1], far[3]], "farther": [farther[0], farther[2]]}
    unbounded = judges(held_out, "base", 8, False)
    assert unbounded.others == held_out.others and unbounded.examples == own[1::2]
    assert halves([*far, *farther], words_tokenizer(), 8)[1] == [far[1], far[3], *farther[::2]]
