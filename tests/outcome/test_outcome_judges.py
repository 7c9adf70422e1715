"""Which held-out texts may say the price of a search: those that its panel judges by."""

from small_olmoe import words_tokenizer

from melinoe.cli.texts import HeldOut, judges
from melinoe.data import Example, encode
from melinoe.finetune.price.panel import OTHER, OWN, Panel, halves

TOO_LONG = Example(" ".join(["w2"] * 9), "w3", "long")


def texts(first, count):
    """Texts of four words that all differ."""
    return [Example(f"w{first + i} w2", f"w{first + i} w3", f"{first}:{i}") for i in range(count)]


def test_they_are_the_panels_own_also_where_it_leaves_texts_out():
    """Prompts without room for a completion are in no half, and shift those that come after."""
    tokenizer = words_tokenizer()
    given = [TOO_LONG, *texts(4, 3), TOO_LONG, *texts(9, 5)]
    panel = Panel.of(encode(given, tokenizer, 8))
    _, places = halves(given, tokenizer, 8)
    assert encode([given[at] for at in places], tokenizer, 8) == panel.judging[OWN]
    assert places == [2, 5, 7, 9]  # kept: 1 2 3 5 6 7 8 9


def test_other_texts_are_split_as_one_and_keep_their_names(monkeypatch):
    """Five of one file and four of another are nine in a row, of which every second one judges."""
    monkeypatch.setattr("melinoe.checkpoint.load_tokenizer", lambda *_: words_tokenizer())
    monkeypatch.setattr("melinoe.checkpoint.files.read_config", lambda name: None)
    own, far, farther = texts(4, 7), texts(4, 5), texts(11, 4)
    held_out = HeldOut([], "own", own, {"far": far, "farther": farther})
    found = judges(held_out, "base", 8)
    assert found.examples == own[1::2] and found.chosen_by == 4
    assert found.others == {"far": [far[1], far[3]], "farther": [farther[0], farther[2]]}
    tokenizer = words_tokenizer()
    panel = Panel.of(encode(own, tokenizer, 8), encode([*far, *farther], tokenizer, 8))
    joined = [one for some in found.others.values() for one in some]
    assert encode(joined, tokenizer, 8) == panel.judging[OTHER]
